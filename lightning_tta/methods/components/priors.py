"""Corrections of a method's predictions for the distribution of the labels in the stream, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tta import collective
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.correction import Correction
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET, State
from lightning_tta.methods.components.statistics import read

WINDOW, IMAGES, SOURCE = "prior.window", "prior.images", "prior.source"
FACTORS, AVERAGE = "prior.factors", "prior.average"


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
        like = at_least_float32(next(method.model.parameters(), torch.zeros(())).detach())
        method.state(FACTORS, like.new_full((1,), NOT_YET), source=NOT_YET, fixed_dtype=True)
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

    def learn(self, method: State, logits: Tensor) -> Tensor:
        """The factors (K,), above 0, with a batch of logits (B, K) in them; may be not finite."""
        raise NotImplementedError

    def correct(
        self,
        method: State,
        logits: Tensor,
        features: Tensor | None,
        *,
        learn: bool,
        known: Callable[[Tensor], bool] = lambda condition: False,
    ) -> Tensor:
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
        like = method.value(FACTORS)
        method.state(AVERAGE, like.new_full((1,), NOT_YET), source=NOT_YET, fixed_dtype=True)

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


KINDS: dict[str, Callable[..., Correction]] = {"em": EM, "moving": Moving}
"""The kinds, by the word that ``prior=`` takes."""


def choose(method: TTAMethod, wanted: str | Mapping[str, Any]) -> None:
    """Correct a method's predictions for the labels of the stream.

    Args:
        method: Before its first batch.
        wanted: One of :data:`KINDS`, or a dict of ``kind`` and the options of its class.

    Raises:
        ConfigError: If the kind or an option is unknown or out of range.
    """
    kind, options = read(wanted, "prior", KINDS)
    method.put_on(KINDS[kind](method, **options))
