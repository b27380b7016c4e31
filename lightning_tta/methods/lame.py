"""LAME: corrects the predictions of a batch so that neighbours agree; the net is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import TTAMethod

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
    if kind == "rbf":
        nearest, number = distance.topk(torch.sym_min(neighbours, z.shape[0]), largest=False).values, whole.sum()
        place = (number.clamp(1, nearest.shape[1]) - 1).expand(z.shape[0], 1)
        width = torch.where(whole, nearest.gather(1, place).squeeze(1), 0).sum() / number
        return torch.exp(-0.5 * (distance / width.clamp_min(torch.finfo(z.dtype).eps)) ** 2)
    number = torch.arange(z.shape[0], device=z.device)
    others = distance.masked_fill_(number[:, None] == number, torch.inf)
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


class LAME(TTAMethod):
    """Minimises, over the assignments Y of the batch alone, their distance from the predictions and from neighbours.

    ``L(Y) = sum_b KL(y_b || p_b) - 1/2 sum_bc w_bc <y_b, y_c>`` by the fixed point ``Y <- softmax(log p + W Y)``, which
    descends for a symmetric positive semi-definite W (``rbf``, ``linear``), from Y = p; at most 100 iterations, ended
    when the objective's bound changes by less than 1e-8 of itself. W is the affinity of the normalised features.

    Which affinity: LAME bets that neighbours in the batch share a class. That holds on correlated streams (video,
    class-sorted), where ``rbf``, the authors' default, is the strongest: every sample listens to the whole batch. On
    iid streams of many classes it does not hold, and ``rbf`` pulls a batch into one class: on CIFAR-10-C (ResNet-20,
    severity 1) we have seen 88 % error where the source has 54 %. ``knn``, our default, listens to a few neighbours and
    is the safer choice where the stream is unknown. ``linear`` weighs opposite features negatively; features after a
    ReLU are all similar, and it then acts like a wide ``rbf``.

    Parameters touched: none; BatchNorm keeps its source statistics. State: none. Per batch: one forward pass, no
    backward pass; where the host cannot see the end at no cost, all 100 iterations run, the later ones masked. Returns
    log Y as the logits. ``stats`` has the number of iterations and the bound of the objective.

    Args:
        model: A classifier that ends in one linear layer.
        affinity: ``knn``, ``rbf`` or ``linear``.
        neighbours: Neighbours of ``knn``, or the one that sets the width of ``rbf``; >= 1. Authors: 5. A batch with
            fewer samples uses those there are; a batch of one returns the prediction itself (``knn``).
        head: Name of the last linear layer where the search finds another.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: Boudiaf et al., CVPR 2022, arXiv 2201.05718. Differs from the authors' code: starts from log-softmax and
    not from log(p + 1e-10), so that logits stay finite and exact; a sample is never its own neighbour in ``knn``, also
    where images repeat; one sample has a finite width in ``rbf``; computed in float64, else 1e-8 has no meaning.
    """

    def __init__(
        self, model: nn.Module, *, affinity: Affinity = "knn", neighbours: int = 5, head: str | None = None
    ) -> None:
        super().__init__(model)
        check_choice("affinity", affinity, ("knn", "rbf", "linear"))
        check_range("neighbours", neighbours, 1, integer=True)
        self.affinity, self.neighbours = affinity, neighbours
        self.split = HeadSplit(self.model, head)

    no_plain_net = (
        "it corrects the predictions of a batch together and leaves the net as it was. Deploy the method itself, or "
        "adapt with 't3a', 'tent' or 'norm'"
    )

    def step(self, x: Tensor) -> Tensor:
        """Refine the batch's predictions."""
        return self.infer(x)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """The same: nothing is kept between batches."""
        features, logits = self.features(x)
        plain = torch.log_softmax(at_least_float32(logits), dim=1)
        whole = torch.isfinite(features).all(1) & torch.isfinite(logits).all(1)  # half precision may overflow
        with torch.autocast(x.device.type, enabled=False):
            affinity = affinity_matrix(features.double(), self.affinity, self.neighbours, whole)
            log_p = torch.log_softmax(torch.where(whole[:, None], logits.double(), 0), dim=1)
            log_y, iterations, bound = refine(log_p, affinity, whole=whole, known=self.known)
        there_is_one = whole.any()
        self.note(
            iterations=torch.where(there_is_one, iterations, torch.nan),
            objective=torch.where(there_is_one, bound, torch.nan),
        )
        return torch.where(whole[:, None], log_y.to(plain.dtype), plain)
