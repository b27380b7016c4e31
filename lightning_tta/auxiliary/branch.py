"""A second head on a part of a net: the stages after a certain one once more, with weights of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lightning_tta.auxiliary.base import other_forwards
from lightning_tta.backbones.copying import copy_net
from lightning_tta.backbones.split import execution_order, find_head, is_inside, module_at, plain_head
from lightning_tta.errors import UnsupportedModelError


class Branch(nn.Module):
    """Shares a net up to a stage; has copies of what runs after it, and a last linear layer of its own.

    The branch runs as a pass of the net in which the copies take the place of the modules that they are copies of, so
    that any net will do: how its parts are joined is known to the net alone.

    Args:
        net: A classifier that ends in a linear layer.
        at: Share of the net's depth that is shared, in (0, 1]: up to the end of this stage or block, see
            :func:`~lightning_tta.backbones.split.module_at`.
        outputs: Number of outputs.

    Attributes:
        names: The modules of the net that are not shared, by name.

    Raises:
        UnsupportedModelError: If the net has no linear head, or none after the stage.
    """

    def __init__(self, net: nn.Module, at: float, outputs: int) -> None:
        super().__init__()
        head, layer = find_head(net)
        order = execution_order(net)
        if order is not None and head not in order:
            raise UnsupportedModelError(
                f"{type(net).__name__} must return logits, of its last linear layer '{head}', which does not run. Wrap "
                "the net in a module that ends in a linear layer."
            )
        stage = module_at(net, at)
        self.names = list(_after(net, stage, order))
        if not any(is_inside(head, name) for name in self.names):
            raise UnsupportedModelError(
                f"The last linear layer '{head}' of {type(net).__name__} does not run after '{stage}', which is at "
                f"{at} of its depth. Use a lower at."
            )
        self.tail = nn.ModuleDict()
        for name in self.names:
            twin = _linear(layer, outputs) if name == head else copy_net(net.get_submodule(name))
            if name != head and is_inside(head, name):
                owner, _, leaf = head.removeprefix(f"{name}.").rpartition(".")
                setattr(twin.get_submodule(owner), leaf, _linear(layer, outputs))
            self.tail[name.replace(".", "/")] = twin  # a module's name in a dict has no dots
        self.requires_grad_(True)

    def running(self, net: nn.Module) -> AbstractContextManager[None]:
        """While active, a pass of the net is one of the branch, and gives (B, outputs)."""
        twins = (self.tail[name.replace(".", "/")] for name in self.names)
        return other_forwards({net.get_submodule(n): _calling(t) for n, t in zip(self.names, twins, strict=True)})

    def is_shared(self, name: str) -> bool:
        """Whether a parameter of the net, by its name, is one of the branch too."""
        return not any(is_inside(name, module) for module in self.names)


def _calling(module: nn.Module) -> Callable[..., Any]:
    return lambda *inputs, **options: module(*inputs, **options)


def _after(net: nn.Module, stage: str, order: list[str] | None) -> Iterator[str]:
    """The largest modules that run, but nothing of which has run when a stage ends."""
    names = [name for name, _ in net.named_modules()] if order is None else order
    before = {name for name in names[: names.index(stage) + 1] if name and not stage.startswith(f"{name}.")}

    def walk(prefix: str) -> Iterator[str]:
        for child, _ in net.get_submodule(prefix).named_children():
            name = f"{prefix}.{child}".lstrip(".")
            if name in before or not any(is_inside(other, name) for other in names):
                continue
            if any(is_inside(other, name) for other in before) or is_inside(stage, name):
                yield from walk(name)
            else:
                yield name

    return walk("")


def _linear(head: nn.Linear, outputs: int) -> nn.Linear:
    """A fresh layer, of the usual initial values, that leave torch's random numbers alone."""
    like = plain_head(head)  # of a quantised one
    layer = nn.Linear(like.in_features, outputs, device="meta").to_empty(device="cpu")
    generator, bound = torch.Generator().manual_seed(0), 1 / math.sqrt(like.in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer.to(like.weight)
