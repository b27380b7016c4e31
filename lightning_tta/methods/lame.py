"""LAME: corrects the predictions of a batch so that neighbours agree; the net is left alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import HeadSplit
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.refinements import Affinity, agree, check_affinity


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

    about = About(
        does="corrects predictions so that neighbors in a batch agree",
        learns="none",
        passes="1 / 0",
        needs="linear head; batches",
        holds="-",
        suits="sorted by class, correlated",
        formula="code and paper",
        paper="CVPR 2022, arXiv 2201.05718",
    )

    def __init__(
        self, model: nn.Module, *, affinity: Affinity = "knn", neighbours: int = 5, head: str | None = None
    ) -> None:
        super().__init__(model)
        check_affinity(affinity, neighbours)
        self.affinity, self.neighbours = affinity, neighbours
        self.split = HeadSplit(self.model, head)

    joins_images = True
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
        log_y, iterations, bound = agree(features, logits, self.affinity, self.neighbours, self.known)
        self.note(iterations=iterations, objective=bound)
        return log_y
