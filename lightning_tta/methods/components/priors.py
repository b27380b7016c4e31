"""Corrections of a method's predictions for the distribution of the labels in the stream, without training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_tta import collective
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.correction import Correction
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET, State
from lightning_tta.methods.components.filters import empty_by_class
from lightning_tta.methods.components.wanted import Wanted, read

WINDOW, IMAGES, SOURCE = "prior.window", "prior.images", "prior.source"
FACTORS, AVERAGE = "prior.factors", "prior.average"
BELIEFS, SWITCH, WEIGHTS = "prior.beliefs", "prior.switch", "prior.weights"

LEAST = -10.0  # log of the least share of a weight in the largest


class Prior(Correction):
    """Base of the priors: a factor for each class, learned from the stream, that predictions are multiplied by.

    Args:
        method: Whose predictions they are.
        source_prior: Distribution of the training set's labels: ``uniform``, or K numbers above 0 of sum 1.
        on_logits: Whether the factors multiply logits, and not probabilities.
    """

    def __init__(
        self,
        method: TTAMethod,
        source_prior: Literal["uniform"] | Sequence[float] = "uniform",
        *,
        on_logits: bool = False,
    ) -> None:
        self.on_logits = on_logits
        like = method.state(FACTORS, empty_by_class(method.model), source=NOT_YET)
        method.keep_wide(FACTORS)
        self.source_prior = None if source_prior == "uniform" else _checked(source_prior)
        if self.source_prior is not None:
            method.state(SOURCE, like.new_tensor(self.source_prior), fixed_dtype=True)

    def source(self, method: State, logits: Tensor) -> Tensor:
        """The source's distribution (K,)."""
        classes = logits.shape[1]
        if self.source_prior is None:
            return logits.new_full((classes,), 1 / classes)
        if len(self.source_prior) != classes:
            raise ConfigError(
                f"source_prior must have a number for each class; it has {len(self.source_prior)}, and the net has "
                f"{classes} logits."
            )
        return method.value(SOURCE).to(logits)

    @abstractmethod
    def learn(self, method: State, logits: Tensor) -> Tensor:
        """The factors (K,), above 0, with a batch of logits (B, K) in them; may be not finite."""

    def correct(self, method: State, logits: Tensor, features: Tensor | None, *, learn: bool) -> Tensor:
        """Logits with the factors in them; the batch's own as long as there is none."""
        if learn:
            factors = self.learn(method, logits)
            method.sized(FACTORS, factors)
            method.write(FACTORS, factors, torch.isfinite(factors).all())
        factors = torch.nan_to_num(method.value(FACTORS), nan=1.0).to(logits)
        return logits * factors if self.on_logits else logits + factors.log()

    def fold(self, method: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The factors in the bias; of those on logits, in the weight too."""
        factors = torch.nan_to_num(method.value(FACTORS), nan=1.0).to(bias)
        return (weight * factors[:, None], bias * factors) if self.on_logits else (weight, bias + factors.log())


class EM(Prior):
    """Estimates the distribution of the labels of the last images, by expectation maximisation.

    With ``p = softmax(u / T)`` of the last N images, the batch among them, s the source's distribution and c
    pseudo-counts, from ``pi = s``, a fixed number of times::

        r_nk = p_nk pi_k / s_k / sum_j p_nj pi_j / s_j        pi_k = (sum_n r_nk + c s_k) / (N + c)

    and the logits of class k get ``+ T log(pi_k / s_k)``. Where only the labels have shifted and p is calibrated, that
    is, up to T, the prediction of a source with the labels of the last images. Nets are too sure on shifted images, and
    a prior in which they have a say of their true weight changes little: T above 1 makes up for that.

    On shifted images p is not calibrated: the net prefers some classes. ``pi`` takes its preference for labels, and
    makes what it predicts too often more frequent. So by default s is the mean of the net's own predictions over the
    stream so far, in place of the training set's distribution: what is corrected is how the last images differ from
    the stream as a whole. That gains on correlated streams and leaves shuffled ones alone; it does nothing where the
    labels of the whole stream are skewed in the same way. For that, and a net that is calibrated there, give
    ``uniform``, or the training set's shares.

    State: probabilities (N, K), 0.6 MB for 150 images of 1,000 classes, the factors (K,), and with ``stream`` the mean
    (K,), from c images of the uniform distribution; images before the last 10 N fade. ``predict`` and ``export`` use
    the estimate as it is after the stream so far. A sample whose logits are not finite does not count.

    Args:
        method: Whose predictions they are.
        window: N, images, >= 1. A longer one is surer, and slower to follow labels that change.
        temperature: T, above 0; authors 1. A larger one gains more on correlated streams, and costs more on others.
        pseudo_counts: c, images, >= 0; ``None``: one for each class. 0 is the authors' estimate.
        iterations: >= 1.
        source_prior: s: ``stream``, ``uniform``, or K numbers above 0 of sum 1.

    Source: Saerens, Latinne and Decaestecker, Neural Computation 14(1), 2002, whose s is the training set's
    distribution, without window and pseudo-counts.
    """

    def __init__(
        self,
        method: TTAMethod,
        *,
        window: int = 150,
        temperature: float = 1.25,
        pseudo_counts: float | None = None,
        iterations: int = 10,
        source_prior: Literal["stream", "uniform"] | Sequence[float] = "stream",
    ) -> None:
        check_range("window", window, 1, integer=True)
        if pseudo_counts is not None:
            check_range("pseudo_counts", pseudo_counts, 0)
        check_range("temperature", temperature, 0, low_open=True)
        check_range("iterations", iterations, 1, integer=True)
        self.of_stream = source_prior == "stream"
        super().__init__(method, "uniform" if source_prior == "stream" else source_prior)
        self.window, self.pseudo_counts, self.iterations = window, pseudo_counts, iterations
        self.temperature = temperature
        like = method.value(FACTORS)
        method.state(WINDOW, like.new_full((window, 1), NOT_YET), source=NOT_YET, fixed_dtype=True)
        method.state(IMAGES, torch.zeros((), dtype=torch.int64, device=like.device), source=0)
        if self.of_stream:
            method.state(AVERAGE, like.new_full((1,), NOT_YET), source=NOT_YET, fixed_dtype=True)

    def learn(self, method: State, logits: Tensor) -> Tensor:
        """Take the batch into the window, and estimate."""
        logits = collective.gather(logits) / self.temperature
        counts = logits.shape[1] if self.pseudo_counts is None else self.pseudo_counts
        source = self._average(method, logits, counts) if self.of_stream else self.source(method, logits)
        window, number = self._take(method, logits)
        filled = torch.arange(len(window), device=window.device) < number
        p = torch.where(filled[:, None], window, 0)
        source = source.to(p).clamp_min(_tiny(p))
        prior, total = source, filled.sum() + counts
        for _ in range(self.iterations):
            ratio = prior / source
            inverse = torch.where(filled, p.mv(ratio).clamp_min(_tiny(p)).reciprocal(), 0)
            prior = (ratio * p.T.mv(inverse) + counts * source) / total
        return (prior.clamp_min(_tiny(p)) / source) ** self.temperature

    def _average(self, method: State, logits: Tensor, counts: float) -> Tensor:
        """The mean prediction of the stream, with the batch in it."""
        finite = torch.isfinite(logits).all(1)
        p = torch.where(finite[:, None], torch.softmax(logits, 1), 0)
        average = method.sized(AVERAGE, logits[0])
        old = torch.where(average.isnan(), 1 / logits.shape[1], average)
        new, before = finite.sum(), method.value(IMAGES).clamp(max=10 * self.window)
        total = before + new + counts
        method.write(AVERAGE, old + (p.sum(0) - new * old) / total, new > 0)
        return method.value(AVERAGE)

    def _take(self, method: State, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The window with the last finite samples in it, and how many images it has had."""
        finite = torch.isfinite(logits).all(1)
        method.write(IMAGES, method.value(IMAGES) + finite.sum())
        number = method.value(IMAGES)
        order = finite.long().argsort(stable=True)[-self.window :]  # the finite ones last, as they came
        places = (number - len(order) + torch.arange(len(order), device=order.device)) % self.window
        window = method.sized(WINDOW, logits.new_empty(self.window, logits.shape[1]))
        new = torch.softmax(logits[order], 1).to(window)
        window.index_copy_(0, places, torch.where(finite[order][:, None], new, window[places]))
        return window, number


class Moving(Prior):
    """Multiplies the probabilities by a smoothed average of the stream's predictions.

    With the mean prediction q of a batch of B, s = max(1/B, 1/K) / max(q): ``(q + s) / (1 + s K)`` are the factors.
    ``momentum`` m below 1 makes q an average over the stream, ``q <- (1 - m) q + m mean_b p_b``, from the source's
    distribution, with B / m images in it.

    State: the average (K,) and the factors (K,). ``predict`` and ``export`` use the factors of the last batch. A sample
    whose logits are not finite does not count.

    Args:
        method: Whose predictions they are.
        momentum: m, in (0, 1]; authors 1, each batch for itself.
        form: ``probabilities``, or ``logits``: the authors' code multiplies the logits, which takes from a class whose
            logit is above 0 and is rare, and from a class whose logit is below 0 and is frequent.
        source_prior: ``uniform``, or K numbers above 0 of sum 1. The factors are divided by it.

    Source: Marsden et al., ROID, WACV 2024, arXiv 2306.00650.
    """

    def __init__(
        self,
        method: TTAMethod,
        *,
        momentum: float = 1.0,
        form: Literal["probabilities", "logits"] = "probabilities",
        source_prior: Literal["uniform"] | Sequence[float] = "uniform",
    ) -> None:
        check_range("momentum", momentum, 0, 1, low_open=True)
        check_choice("form", form, ("probabilities", "logits"))
        super().__init__(method, source_prior, on_logits=form == "logits")
        self.momentum = momentum
        method.state(AVERAGE, empty_by_class(method.model), source=NOT_YET)
        method.keep_wide(AVERAGE)

    def learn(self, method: State, logits: Tensor) -> Tensor:
        """Take the batch into the average."""
        finite, source = torch.isfinite(logits).all(1), self.source(method, logits)
        mean, number = collective.weighted_sums(torch.softmax(logits, 1), finite)
        average = method.sized(AVERAGE, mean)
        old = torch.where(average.isnan(), source.to(average), average)
        new = torch.lerp(old, mean.to(old), self.momentum)
        method.write(AVERAGE, new, number > 0)
        smoothing = (self.momentum / number).clamp_min(1 / len(source)) / new.max()
        return (new + smoothing) / (1 + smoothing * len(source)) / source / len(source)


class Markov(Correction):
    """Takes the labels of the stream for a Markov chain that mostly stays, and predicts by forward and backward passes.

    From one image to the next the label stays with probability 1 - s, and is else drawn from a distribution pi, which
    may draw the same label again. With the net's probabilities P_t (K,), the emission of image t is E_t = P_t / pi, and
    the prediction is the posterior given the images of the batch and, by the first pass, all those before::

        forward    a_t ~ E_t ((1 - s) a_(t-1) + s pi), of sum 1; starts at the last image of the batch before
        backward   r_t ~ E_t ((1 - s) r_(t+1) + s pi), of sum 1; starts at pi, behind the last image of the batch
        posterior  P_t ((1 - s) a_(t-1) + s pi) ((1 - s) r_(t+1) + s pi) / pi^2, up to its sum

    ``s = 1`` gives P back. What is predicted is the mean of the posteriors of several s, weighed by the likelihood of
    the stream so far, which is the product of the sums of ``a_t`` before they are normalised. That is what leaves a
    shuffled stream alone. No weight falls below e^-10 of the largest, so that a stream which changes is followed: about
    as many images are needed as tell so far apart.

    ``base: stream``: pi is the mean prediction of the stream, with c pseudo-images of the uniform distribution in it.
    So a net's preference for some classes, usual on shifted images, is not taken for labels that stay. ``uniform``
    gains more on correlated streams, and may cost on shuffled ones.

    What it predicts depends on the order of the images, in a batch too, by design. ``predict`` treats images apart: of
    one image at an unknown place of the chain the posterior is P, so ``predict`` and ``export`` leave the logits alone.

    State: for each of the G values of s the logarithm of its weight and ``a_t`` of the last image (K,); with ``stream``
    the mean prediction (K,) and the number of images. A sample whose logits are not finite stays as it is, and is no
    step of the chain. A batch of B takes 3 B small operations, one after the other, each on (2, G, K) numbers, and a
    recorded step holds them all.

    Args:
        method: Whose predictions they are.
        base: ``stream`` or ``uniform``.
        pseudo_counts: c, images, above 0.
        switch: The values of s, in (0, 1]; one alone is a fixed s.

    Source: none that we know; the forward-backward algorithm (Baum et al., Ann. Math. Statist. 41(1), 1970), with a net
    as emission as in hybrid speech recognition (Bourlard and Morgan, 1994). Values of s are weighed, and not one s
    learned by expectation maximisation, since that hardly leaves a start at s near 1 where the net is unsure.
    """

    synchronized = False  # the order of samples over processes is not known
    acts_apart = False

    def __init__(
        self,
        method: TTAMethod,
        *,
        base: Literal["stream", "uniform"] = "stream",
        pseudo_counts: float = 50.0,
        switch: Sequence[float] = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125),
    ) -> None:
        check_choice("base", base, ("stream", "uniform"))
        check_range("pseudo_counts", pseudo_counts, 0, low_open=True)
        if isinstance(switch, str) or not isinstance(switch, Sequence) or not switch:
            raise ConfigError(f"switch must be a list of probabilities in (0, 1]; got {switch!r}.")
        for number in switch:
            check_range("each number of switch", number, 0, 1, low_open=True)
        self.of_stream, self.pseudo_counts, self.switch = base == "stream", pseudo_counts, tuple(switch)
        like = at_least_float32(next(method.model.parameters(), torch.zeros(())).detach())
        method.state(BELIEFS, like.new_full((1,), NOT_YET), source=NOT_YET, fixed_dtype=True)
        method.state(SWITCH, like.new_tensor(self.switch)[:, None], fixed_dtype=True)
        method.state(WEIGHTS, like.new_zeros(len(switch)), source=0, fixed_dtype=True)
        if self.of_stream:
            method.state(AVERAGE, like.new_full((1,), NOT_YET), source=NOT_YET, fixed_dtype=True)
            method.state(IMAGES, torch.zeros((), dtype=torch.int64, device=like.device), source=0)

    def correct(self, method: State, logits: Tensor, features: Tensor | None, *, learn: bool) -> Tensor:
        """Log of the posterior (B, K); of ``learn=False``, the logits as they are."""
        if not learn:
            return logits
        finite = torch.isfinite(logits).all(1)
        order = finite.long().argsort(stable=True, descending=True)  # the finite ones first, as they came
        counts, number = finite[order], finite.sum()
        log_p = torch.log_softmax(torch.where(counts[:, None], logits[order], 0), 1)
        p = log_p.exp()
        base, switch = self._base(method, torch.where(counts[:, None], p, 0), number), method.value(SWITCH).to(p)
        afresh = base.expand(len(switch), -1)
        old = method.sized(BELIEFS, afresh)
        start = torch.stack([torch.where(old.isnan(), afresh, old), afresh])  # forward, backward
        emission = torch.where(counts[:, None], p / base, 1)
        beliefs, sums = _filter(torch.stack([emission, emission.flip(0)], 1), start, base, switch)

        weights = method.value(WEIGHTS).to(p) + torch.where(counts[:, None], sums.log(), 0).sum(0)
        weights = (weights - weights.max()).clamp_min(LEAST)
        method.write(WEIGHTS, weights)
        method.write(BELIEFS, beliefs.index_select(0, number[None])[0, 0], number > 0)
        forward, backward = beliefs[:-1].lerp_(base, switch).div_(base).unbind(1)  # before the image itself is seen
        factors = backward.flip(0).mul_(forward)  # (B, G, K), that P is multiplied by
        shares = torch.softmax(weights, 0) / (factors @ p[:, :, None])[:, :, 0]
        posterior = log_p + (shares[:, None] @ factors)[:, 0].log()
        return torch.where(finite[:, None], torch.empty_like(logits).index_copy_(0, order, posterior), logits)

    def _base(self, method: State, p: Tensor, number: Tensor) -> Tensor:
        """The distribution pi (K,), with probabilities (B, K) of a number of images in it; those of others are 0."""
        uniform = p.new_full(p.shape[1:], 1 / p.shape[1])
        if not self.of_stream:
            return uniform
        average, images = method.sized(AVERAGE, uniform), method.value(IMAGES) + number
        old = torch.where(average.isnan(), uniform, average)
        new = old + (p.sum(0) - number * old) / (images + self.pseudo_counts)
        method.write(AVERAGE, new, number > 0)
        method.write(IMAGES, images)
        return new


def _filter(emission: Tensor, start: Tensor, base: Tensor, switch: Tensor) -> tuple[Tensor, Tensor]:
    """Passes over N sequences at once, for each of G probabilities of a draw.

    Args:
        emission: E (B, N, K).
        start: Beliefs (N, G, K) before the first image.
        base: pi (K,).
        switch: s (G, 1).

    Returns:
        The beliefs (B + 1, N, G, K), with those before the first image; and of the first sequence the likelihood (B, G)
        of each image given those before.
    """
    drawn, stayed = emission[:, :, None] * (switch * base), emission[:, :, None] * (1 - switch)
    beliefs = emission.new_empty(len(emission) + 1, *start.shape)
    sums = emission.new_empty(len(emission), *start.shape[:2], 1)
    beliefs[0].copy_(start)
    each = zip(beliefs[:-1].unbind(), beliefs[1:].unbind(), sums.unbind(), drawn.unbind(), stayed.unbind(), strict=True)
    for old, new, total, of_draw, of_stay in each:
        torch.addcmul(of_draw, of_stay, old, out=new)
        torch.sum(new, 2, keepdim=True, out=total)
        new.div_(total)
    return beliefs, sums[:, 0, :, 0]


def _checked(prior: object) -> list[float]:
    numbers = [] if isinstance(prior, str) or not isinstance(prior, Sequence) else list(prior)
    real = all(isinstance(number, (int, float)) and 0 < number < 1 for number in numbers)
    if not numbers or not real or abs(sum(numbers) - 1) > 1e-3:
        raise ConfigError(
            "source_prior must be 'uniform' (of prior='em' also 'stream'), or a list of numbers above 0, one a class, "
            f"whose sum is 1: the shares of the classes in the training set; got {prior!r}. Give a class that is never "
            "there a small share."
        )
    return [number / sum(numbers) for number in numbers]


def _tiny(p: Tensor) -> float:
    return torch.finfo(p.dtype).tiny


KINDS: dict[str, Callable[..., Correction]] = {"em": EM, "moving": Moving, "markov": Markov}
"""The kinds, by the word that ``prior=`` takes."""


def choose(method: TTAMethod, wanted: Wanted) -> None:
    """Correct a method's predictions for the labels of the stream.

    Args:
        method: Before its first batch.
        wanted: One of :data:`KINDS`, or a dict of ``kind`` and the options of its class.

    Raises:
        ConfigError: If the kind or an option is unknown or out of range.
    """
    kind, options = read(wanted, "prior", KINDS)
    if method.own_prior:
        raise ConfigError(f"prior={kind!r} and method '{method.name}' exclude each other: {method.own_prior}.")
    method.put_on(KINDS[kind](method, **options))
