"""Mean and variance of vectors that come in parts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_tta.losses import at_least_float32


@dataclass
class RunningMoments:
    """Mean and sum of squared deviations of what has come, in float32 at least, whatever the parts (Chan et al. 1979).

    Attributes:
        count: How many have come.
        mean: Of the shape of one.
        squares: Likewise.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, values: Tensor) -> None:
        """Take (N, ...), N at least 1."""
        here = at_least_float32(values)
        mean, total = here.mean(0), self.count + len(here)
        apart = mean - self.mean.to(mean)
        self.squares = (
            self.squares.to(mean) + (here - mean).square().sum(0) + apart.square() * (self.count * len(here) / total)
        )
        self.mean = self.mean.to(mean) + apart * (len(here) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased."""
        return self.squares / (self.count - 1)

    @property
    def problem(self) -> str:
        """Why there is no variance; empty where there is."""
        if not bool((self.mean.isfinite() & self.squares.isfinite()).all()):
            return "values that are not finite"
        return "" if self.count > 1 else f"{self.count} images"
