"""LAME: corrects the predictions of a batch so that neighbours agree; the net is left alone."""

from __future__ import annotations

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


def affinity_matrix(features: Tensor, kind: Affinity, neighbours: int) -> Tensor:
    """How much each sample listens to each other one: W (B, B) of features (B, D), which are normalised first.

    ``knn``: 1 for the ``neighbours`` nearest others, else 0 (not symmetric); ``rbf``: exp(-d^2 / 2 s^2) with s the mean
    distance to the ``neighbours``-th nearest, the sample itself counting as the first; ``linear``: cosine similarity.
    A batch smaller than that uses what it has.
    """
    z = normalize(features, dim=1)
    if kind == "linear":
        return z @ z.T
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    if kind == "rbf":
        width = distance.topk(min(neighbours, len(z)), largest=False).values[:, -1].mean()
        return torch.exp(-0.5 * (distance / width.clamp_min(torch.finfo(z.dtype).eps)) ** 2)
    others = distance.fill_diagonal_(torch.inf)
    nearest = others.topk(min(neighbours, len(z) - 1), largest=False).indices
    return torch.zeros_like(distance).scatter_(1, nearest, 1.0)


def refine(log_p: Tensor, affinity: Tensor, max_iterations: int = MAX_ITERATIONS) -> tuple[Tensor, list[float]]:
    """Repeats Y <- softmax(log p + W Y) until the objective's bound changes by less than a share of 1e-8.

    Args:
        log_p: Log-probabilities (B, K).
        affinity: W (B, B).
        max_iterations: Iterations at most.

    Returns:
        log Y (B, K), and of each iteration the bound -sum_b log sum_k exp(log p + W Y)_bk, which is the minimum that
        the iteration finds of sum_b KL(y_b || p_b) - sum_bc w_bc <y_b, y_c> with the second y held fixed.
    """
    log_y, bounds = log_p, list[float]()
    for _ in range(max_iterations):
        log_y = log_p + affinity @ log_y.exp()
        normalizer = log_y.logsumexp(1, keepdim=True)
        log_y = log_y - normalizer
        bounds.append(-normalizer.sum().item())
        if len(bounds) > 2 and abs(bounds[-1] - bounds[-2]) <= TOLERANCE * abs(bounds[-2]):
            break
    return log_y, bounds


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
    backward pass; each iteration asks the device for the bound. Returns log Y as the logits. ``stats`` has the number
    of iterations and the bound of the objective.

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
        refined = torch.log_softmax(at_least_float32(logits), dim=1)
        whole = torch.isfinite(features).all(1) & torch.isfinite(logits).all(1)  # half precision may overflow
        if bool(whole.any()):
            with torch.autocast(x.device.type, enabled=False):
                affinity = affinity_matrix(features[whole].double(), self.affinity, self.neighbours)
                log_y, bounds = refine(torch.log_softmax(logits[whole].double(), dim=1), affinity)
            refined[whole] = log_y.to(refined.dtype)
            self.note(iterations=torch.tensor(len(bounds)), objective=torch.tensor(bounds[-1], dtype=torch.float64))
        return refined
