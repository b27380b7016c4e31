"""Output shift: features are moved by the difference between the source's mean and that of the stream so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.errors import check_range
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.shift import ShiftMethod


class OutputShift(ShiftMethod):
    """Minimises nothing: moves the features from the mean of the stream to the mean of the source.

    With features z, last linear layer g and the mean mu of the source's features, from :meth:`prepare`::

        returned:  g(z + gamma (mu - ema))    ema of the batches before; the first batch is predicted by the source
        ema <- (1 - momentum) ema + momentum mean_b z_b    the first batch: ema <- mean_b z_b

    :class:`~lightning_tta.methods.neo.NEO` with ``center="source"`` takes the batch in before it predicts it.

    Parameters touched: none; BatchNorm keeps its source statistics. State: ema - mu, and the number of images. Per
    batch: one forward pass, no backward pass. An image whose features are not finite does not enter.

    Args:
        model: A classifier that ends in one linear layer.
        gamma: How much of the difference is taken out, >= 0. Authors: 1.
        momentum: Weight of a new batch in the average, in (0, 1]. Authors: 0.1.
        head: Name of the last linear layer where the search finds another.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: Niu et al., FOA, ICML 2024, arXiv 2404.01650: its activation shifting, without the prompts and their search.
    Differs from the authors' code: any net that ends in a linear layer, not ViTs alone.
    """

    about = About(
        does="moves features to the source's mean",
        learns="none",
        passes="1 / 0",
        needs="linear head; source images",
        holds="a mean, D",
        suits="shuffled, any batch size",
        formula="code",
        paper="ICML 2024, arXiv 2404.01650",
    )

    synchronized = True
    tasks = frozenset({"images", "regression"})

    def __init__(self, model: nn.Module, *, gamma: float = 1.0, momentum: float = 0.1, head: str | None = None) -> None:
        check_range("gamma", gamma, 0)
        check_range("momentum", momentum, 0, 1, low_open=True)
        super().__init__(model, head)
        self.gamma, self.momentum = gamma, momentum
        self.expect_source(1)

    @property
    def offset(self) -> Tensor:
        """The shift, as much of it as is taken out."""
        return self.gamma * self.value("shift")

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Predict the batch, then take it into the average."""
        features, _, finite = self.seen(x)
        scores = self.scores(features, self.offset)
        shift, before = self.value("shift"), self.value("images")
        mean, number = collective.weighted_sums(features - self.source_mean[0], finite)
        there_are = number > 0
        self.count("skipped_steps", ~there_are)
        self.write("shift", torch.where(before > 0, shift + self.momentum * (mean - shift), mean), there_are)
        self.write("images", before + number.to(before.dtype))
        return scores
