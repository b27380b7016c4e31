"""A quadratic penalty that holds each weight near a value, with a strength of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.gradient import GradientMethod


class PullMethod(GradientMethod):
    """Base of methods with ``factor * sum_i s_i (theta_i - c_i)^2`` in their loss, over all that is learned.

    A weight that the rest of the loss does not depend on stays where it is.
    """

    _pull: tuple[Sequence[Tensor], float] | None = None  # s (theta - c) and 2 factor, from the loss to its gradient

    @torch.no_grad()
    def pull(self, centers: Sequence[Tensor], strengths: Sequence[Tensor], factor: float) -> Tensor:
        """The penalty, 0-dimensional, without graph: :meth:`differentiate`, or :meth:`pulled`, adds its gradient next.

        So the gradients of all parameters together take a few kernels, not some for each.

        Args:
            centers: c, one for each tensor of :attr:`learned`.
            strengths: s, likewise.
            factor: Of the sum.
        """
        now, centers, strengths = (
            [at_least_float32(tensor.detach()) for tensor in tensors] for tensors in (self.learned, centers, strengths)
        )
        moved = torch._foreach_sub(now, centers)
        weighted = torch._foreach_mul(strengths, moved)
        self._pull = weighted, 2 * factor
        return factor * torch.cat([each.flatten() for each in torch._foreach_mul(weighted, moved)]).sum()

    def let_go(self) -> None:
        """Forget a penalty whose gradient was not taken."""
        self._pull = None

    def differentiate(self, loss: Tensor, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor | None, ...]:
        """With the gradient of the penalty."""
        return self.pulled(super().differentiate(loss, tensors))

    def pulled(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients by :attr:`learned`, and that of the penalty with them, 2 ``factor`` s (theta - c); only once."""
        pull, self._pull = self._pull, None
        if pull is None:
            return tuple(values)
        reached = [number for number, value in enumerate(values) if value is not None]
        gradients = [value for value in values if value is not None]
        wide = torch._foreach_mul([pull[0][number] for number in reached], pull[1])
        pulls = [each.to(gradient.dtype) for each, gradient in zip(wide, gradients, strict=True)]
        sums = iter(torch._foreach_add(gradients, pulls))
        return tuple(None if value is None else next(sums) for value in values)
