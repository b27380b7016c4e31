"""Refinements of a batch's predictions, put on any method: LAME's, and that of a temporal stream, COFA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.correction import Correction
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET, State
from lightning_tta.methods.components.wanted import Wanted, read

Affinity = Literal["knn", "rbf", "linear"]

MAX_ITERATIONS, TOLERANCE = 100, 1e-8


def affinity_matrix(features: Tensor, kind: Affinity, neighbours: int, whole: Tensor | None = None) -> Tensor:
    """How much each sample listens to each other one: W (B, B) of features (B, D), which are normalised first.

    ``knn``: 1 for the ``neighbours`` nearest others, else 0 (not symmetric); ``rbf``: exp(-d^2 / 2 s^2) with s the mean
    distance to the ``neighbours``-th nearest, the sample itself counting as the first; ``linear``: cosine similarity.
    A batch smaller than that uses what it has. Samples that are not ``whole``, (B,) bool, have rows and columns of 0,
    and the others have what they have without them.
    """
    if whole is None:
        whole = torch.ones(len(features), dtype=torch.bool, device=features.device)
    z = normalize(torch.where(whole[:, None], features, 0), dim=1)
    if kind == "linear":
        return z @ z.T
    pairs = whole[:, None] & whole
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").masked_fill_(~pairs, torch.inf)
    number = torch.arange(z.shape[0], device=z.device)
    itself = number[:, None] == number
    if kind == "rbf":
        distance = distance.masked_fill_(itself & pairs, 0)  # by rounding an exported program may have a little more
        nearest, count = distance.topk(torch.sym_min(neighbours, z.shape[0]), largest=False).values, whole.sum()
        place = (count.clamp(1, nearest.shape[1]) - 1).expand(z.shape[0], 1)
        width = torch.where(whole, nearest.gather(1, place).squeeze(1), 0).sum() / count
        return torch.exp(-0.5 * (distance / width.clamp_min(torch.finfo(z.dtype).eps)) ** 2)
    others = distance.masked_fill_(itself, torch.inf)
    nearest, places = others.topk(torch.sym_min(neighbours, z.shape[0] - 1), largest=False)
    return torch.zeros_like(distance).scatter_(1, places, nearest.isfinite().to(distance.dtype))


def refine(
    log_p: Tensor,
    affinity: Tensor,
    max_iterations: int = MAX_ITERATIONS,
    *,
    whole: Tensor | None = None,
    known: Callable[[Tensor], bool] = lambda condition: False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeats Y <- softmax(log p + W Y) until the objective's bound changes by less than a share of 1e-8.

    Args:
        log_p: Log-probabilities (B, K), finite.
        affinity: W (B, B).
        max_iterations: Iterations at most.
        whole: (B,), bool: samples that the bound is of; ``None``: all.
        known: Whether a condition, 0-dimensional, is true and the host knows that at no cost. Iterations after the last
            one are then left out; they change nothing otherwise.

    Returns:
        log Y (B, K); the number of iterations, float64; and the bound after the last one,
        -sum_b log sum_k exp(log p + W Y)_bk, which is the minimum that the iteration finds of
        sum_b KL(y_b || p_b) - sum_bc w_bc <y_b, y_c> with the second y held fixed. The last two are 0-dimensional.
    """
    if torch.compiler.is_exporting():
        return _refine_in_a_loop(log_p, affinity, max_iterations, whole)
    log_y, bound = log_p, log_p.new_zeros(())
    iterations = log_p.new_zeros((), dtype=torch.float64)
    ended: Tensor | None = None  # as long as it is known not to be
    for number in range(1, max_iterations + 1):
        pulled = log_p + affinity @ log_y.exp()
        normalizer = pulled.logsumexp(1, keepdim=True)
        counted = normalizer if whole is None else torch.where(whole[:, None], normalizer, 0)
        before, new_bound, new = bound, -counted.sum(), pulled - normalizer
        if ended is None:
            log_y, bound, iterations = new, new_bound, iterations + 1
        else:
            log_y, bound = torch.where(ended, log_y, new), torch.where(ended, bound, new_bound)
            iterations = iterations + ~ended
        if number > 2:
            converged = (bound - before).abs() <= TOLERANCE * before.abs()
            if known(converged):
                break
            if ended is not None or not known(~converged):
                ended = converged if ended is None else ended | converged
    return log_y, iterations, bound


def _refine_in_a_loop(
    log_p: Tensor, affinity: Tensor, max_iterations: int, whole: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one loop of a program, which ends by itself."""
    from torch._higher_order_ops.while_loop import while_loop  # only programs need it

    counts = torch.ones_like(log_p[:, 0], dtype=torch.bool) if whole is None else whole

    def go_on(number: Tensor, log_y: Tensor, before: Tensor, bound: Tensor) -> Tensor:
        moves = (bound - before).abs() > TOLERANCE * before.abs()
        return (number < max_iterations) & ((number <= 2) | moves)

    def iterate(number: Tensor, log_y: Tensor, before: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
        pulled = log_p + affinity @ log_y.exp()
        normalizer = pulled.logsumexp(1, keepdim=True)
        return number + 1, pulled - normalizer, bound.clone(), -torch.where(counts[:, None], normalizer, 0.0).sum()

    zero = log_p.new_zeros(())
    start = (log_p.new_zeros((), dtype=torch.int64), log_p.clone(), zero, zero.clone())
    number, log_y, _, bound = while_loop(go_on, iterate, start)  # type: ignore[no-untyped-call]
    return log_y, number.double(), bound


def check_affinity(affinity: str, neighbours: int) -> None:
    """Refuse options of :func:`agree` that are none.

    Raises:
        ConfigError: With what is allowed.
    """
    check_choice("affinity", affinity, ("knn", "rbf", "linear"))
    check_range("neighbours", neighbours, 1, integer=True)


def agree(
    features: Tensor, logits: Tensor, affinity: Affinity, neighbours: int, known: Callable[[Tensor], bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """LAME's refinement of a batch, in float64; samples whose features or logits are not finite stay out of it.

    Args:
        features: (B, D).
        logits: (B, K).
        affinity: See :func:`affinity_matrix`.
        neighbours: The same.
        known: See :func:`refine`.

    Returns:
        log Y (B, K), at least float32; the number of iterations and the bound, 0-dimensional, NaN if no sample counts.
    """
    plain = torch.log_softmax(at_least_float32(logits), dim=1)
    whole = torch.isfinite(features).all(1) & torch.isfinite(logits).all(1)  # half precision may overflow
    with torch.autocast(logits.device.type, enabled=False):
        weights = affinity_matrix(features.double(), affinity, neighbours, whole)
        log_p = torch.log_softmax(torch.where(whole[:, None], logits.double(), 0), dim=1)
        log_y, iterations, bound = refine(log_p, weights, whole=whole, known=known)
    there_is_one = whole.any()
    return (
        torch.where(whole[:, None], log_y.to(plain.dtype), plain),
        torch.where(there_is_one, iterations, torch.nan),
        torch.where(there_is_one, bound, torch.nan),
    )


class LAME(Correction):
    """Lets neighbours in the batch agree, as the method ``lame`` does, whatever method predicts.

    ``Y <- softmax(log p + W Y)``, from the method's predictions p and the affinity W of the features of its pass over
    the batch, see :class:`lightning_tta.methods.lame.LAME`. It keeps nothing between batches. One pass of the net more
    where the method has none over the batch as it came.

    Args:
        method: Whose predictions they are.
        affinity: ``knn``, ``rbf`` or ``linear``. ``rbf`` gains most where a batch has few classes, and costs much
            where it has many.
        neighbours: Of ``knn``, or the one that sets the width of ``rbf``; >= 1.

    Source: Boudiaf et al., CVPR 2022, arXiv 2201.05718; differs from the authors' code as the method does.
    """

    wants_features = True
    synchronized = False  # a process has its own part of the batch, and so other neighbours
    no_plain_net = (
        "refine='lame' corrects the predictions of a batch together. Deploy the method itself, or leave refine= out"
    )

    def __init__(self, method: TTAMethod, *, affinity: Affinity = "knn", neighbours: int = 5) -> None:
        check_affinity(affinity, neighbours)
        self.affinity, self.neighbours = affinity, neighbours

    def correct(self, method: State, logits: Tensor, features: Tensor | None, *, learn: bool) -> Tensor:
        """Log Y (B, K)."""
        assert features is not None
        assert isinstance(method, TTAMethod)
        return agree(features, logits, self.affinity, self.neighbours, method.known)[0]


LAST = "refine.last"


class COFA(Correction):
    """Takes the mean of each sample's feature with that of the sample before, if its prediction is surer.

    ``u_b`` becomes ``g((z_b + z_(b-1)) / 2)`` where that has the lower entropy. The head g is linear, so this is the
    mean of the two logits, ``(u_b + u_(b-1)) / 2``, and needs no features: it works on any net. The sample before the
    first of a batch is the last one of the batch before, as predicted then.

    It bets that images next to each other in time show the same thing, as the frames of a video do; so what it
    predicts depends on the order of the images, in a batch too, and a shuffled batch gets other predictions. On a
    shuffled stream the lower entropy is a weak guard, since a sure neighbour of another class passes it: on CIFAR-10
    (ResNet-20) we have seen it cost 5 points there.

    State: the last logits (K,). A sample whose logits are not finite stays as it is, and is nobody's neighbour.
    ``predict`` takes the last sample of the stream as the one before its first, and keeps nothing.

    Args:
        method: Whose predictions they are.

    Source: UniTTA, arXiv 2407.20080. Differs from the authors' code: after a step that changes the head, the last
    logits of the batch before are those of the head of then.
    """

    synchronized = False  # the order of samples over processes is not known
    no_plain_net = (
        "refine='cofa' mixes the predictions of images that follow each other. Deploy the method itself, or leave "
        "refine= out"
    )

    def __init__(self, method: TTAMethod) -> None:
        like = next(method.model.parameters(), torch.zeros(()))
        method.state(LAST, at_least_float32(like.new_full((1,), NOT_YET)), source=NOT_YET, fixed_dtype=True)

    def correct(self, method: State, logits: Tensor, features: Tensor | None, *, learn: bool) -> Tensor:
        """The surer of the sample's own logits and the mean with those before."""
        last = method.sized(LAST, logits[0]) if learn else method.value(LAST).expand(logits.shape[1])
        rows = torch.cat([last.to(logits)[None], logits])
        finite = torch.isfinite(rows).all(1)
        place = torch.where(finite, torch.arange(len(rows), device=rows.device), 0).cummax(0).values
        means = (logits + rows[place[:-1]]) / 2  # row 0 is not finite as long as there is none before
        surer = entropy(means) < entropy(logits)
        if learn:
            method.write(LAST, rows.index_select(0, place[-1:])[0])
        return torch.where(surer[:, None], means, logits)


KINDS: dict[str, Callable[..., Correction]] = {"lame": LAME, "cofa": COFA}
"""The kinds, by the word that ``refine=`` takes."""


def choose(method: TTAMethod, wanted: Wanted) -> None:
    """Refine a method's predictions.

    Args:
        method: Before its first batch.
        wanted: One of :data:`KINDS`, or a dict of ``kind`` and the options of its class.

    Raises:
        ConfigError: If the kind or an option is unknown or out of range, or the method refines so itself.
        UnsupportedModelError: If the kind needs features, and the net has no linear layer.
    """
    kind, options = read(wanted, "refine", KINDS)
    if kind == method.name:
        raise ConfigError(f"Method '{kind}' refines its predictions so already. Leave refine={kind!r} out.")
    method.put_on(KINDS[kind](method, **options))
