"""No adaptation: the baseline of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod


class Source(TTAMethod):
    """Minimises nothing: the source model as it is, BatchNorm with its source statistics.

    Parameters touched: none. State: none. Per batch: one forward pass.

    Args:
        model: Any classifier.
    """

    about = About(
        does="nothing: the baseline",
        learns="none",
        passes="1 / 0",
        needs="-",
        holds="-",
        suits="any, to compare with",
        formula="-",
        paper="a baseline",
    )

    synchronized = True
    tasks = frozenset({"images", "tokens", "pixels", "regression"})

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """A plain forward pass."""
        return self.infer(x)
