"""Training on source images, before the stream, of what a method adds to the net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32


@contextmanager
def all_or_nothing(module: nn.Module) -> Iterator[None]:
    """While active, an error brings every tensor of a module back to what it was."""
    tensors = [*module.parameters(), *module.buffers()]  # state_dict() of a quantised net has other things, too
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:  # images that the net refuses, or an interrupt
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        raise


@contextmanager
def training(module: nn.Module, lr: float, owner: str) -> Iterator[Callable[[Tensor], None]]:
    """While active, a module's parameters require gradients; all or nothing.

    Args:
        module: Of any precision: the steps are taken in at least float32.
        lr: Rate of AdamW.
        owner: Whose it is, for messages.

    Yields:
        A function that takes one step down a loss, 0-dimensional, with a graph.

    Raises:
        DataError: If the parameters end in values that are not finite.
    """
    parameters = list(module.parameters())
    required = [parameter.requires_grad for parameter in parameters]
    wide = [at_least_float32(parameter.requires_grad_(True).detach()).clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(wide, lr=lr)

    def descend(loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for tensor, gradient in zip(wide, gradients, strict=True):
            tensor.grad = None if gradient is None else gradient.to(tensor)
        optimizer.step()
        torch._foreach_copy_([parameter.detach() for parameter in parameters], wide)

    try:
        with all_or_nothing(module):
            yield descend
            if not all(bool(parameter.isfinite().all()) for parameter in parameters):
                raise DataError(
                    f"What '{owner}' trains on source images ended in values that are not finite, at a rate of {lr}. "
                    "Give a lower rate, or source images on which the net's features are finite."
                )
    finally:
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.requires_grad_(flag)
