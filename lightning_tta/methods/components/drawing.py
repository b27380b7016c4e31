"""Random draws of methods: by a seed and the number of steps taken, the same on every device and after every reset."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.views.jitter import jitter


class DrawingMethod(GradientMethod):
    """Base of methods that draw at random. A method calls :meth:`count_step` after each step.

    Args:
        model: A classifier.
        seed: Of all draws.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.

    Attributes:
        draws: Draws that a step may make, each with a key of its own.
    """

    draws: ClassVar[int] = 1_000_003

    def __init__(self, model: nn.Module, *, seed: int = 0, **options: Any) -> None:
        super().__init__(model, **options)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.seed = seed
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.state("steps_taken", torch.zeros((), dtype=torch.int64, device=device), source=0)

    def count_step(self, taken: Tensor | None) -> None:
        """Draw otherwise from here on, if a step was taken, 0-dimensional and bool, or ``None``."""
        self.write("steps_taken", self.value("steps_taken") + 1, taken)

    def draw_key(self, number: int = 0) -> Tensor:
        """The key of draw ``number``, below :attr:`draws`, of the coming step, (2,), on the device of the state."""
        counter = self.value("steps_taken") * self.draws + number
        return torch.stack([torch.full_like(counter, self.seed), counter])

    def host_key(self, steps_taken: int, number: int) -> Tensor:
        """The key of draw ``number``, below :attr:`draws`, of the step after so many; on the host."""
        return torch.tensor([self.seed, steps_taken * self.draws + number])

    def view(self, x: Tensor, number: int = 0, **options: Any) -> Tensor:
        """A random view of the images, draw ``number`` of the coming step; asks the device. Options of ``jitter``."""
        return jitter(x, self.host_key(int(self.value("steps_taken")), number), **options)
