"""Residual blocks of any net, found by what they do, and passes in which some are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_tta.backbones.norms import is_norm_layer, replaced_forwards
from lightning_tta.backbones.split import is_inside, try_pass
from lightning_tta.errors import UnsupportedModelError


@torch.no_grad()
def residual_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that add to their input what they compute of it, in the order of execution.

    Such a module holds a norm layer, runs once in a pass, returns one tensor of its input's shape, and with zeros for
    all its parameters returns its input. Of modules inside each other the innermost counts. Empty where there is none,
    or no pass can be tried.
    """
    try:
        twin, _, calls = try_pass(model, 2)
    except UnsupportedModelError:
        return []
    names = [name for name, _, _ in calls]
    found = [
        name
        for name, inputs, output in calls
        if name and names.count(name) == 1 and _adds(twin.get_submodule(name), inputs, output)
    ]
    return [name for name in found if not any(other != name and is_inside(other, name) for other in found)]


def _adds(module: nn.Module, inputs: Any, output: Any) -> bool:
    """Whether a module returns its input where all its parameters are 0."""
    x = inputs[0] if inputs else None
    if not any(map(is_norm_layer, module.modules())):
        return False
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)) or x.shape != output.shape or not bool(x.any()):
        return False
    zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    try:
        result = functional_call(module, zeros, inputs)
    except Exception:  # it wants more than its inputs by position
        return False
    return isinstance(result, Tensor) and torch.equal(result, x)


def without_blocks(model: nn.Module, names: Sequence[str], keep: Tensor) -> AbstractContextManager[None]:
    """While active, some residual blocks return their input.

    All of them are computed: which ones are left out is not known to the host.

    Args:
        model: The net.
        names: Of its residual blocks, N.
        keep: (N,), bool: which stay.
    """
    blocks = [model.get_submodule(name) for name in names]
    return replaced_forwards({block: _or_input(block.forward, keep[n]) for n, block in enumerate(blocks)})


def _or_input(forward: Callable[..., Tensor], keep: Tensor) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.where(keep, forward(x, *args, **options), x)

    return run
