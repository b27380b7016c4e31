"""The stages of a net, and what each takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_tta.backbones.split import parts_by_depth, try_pass


@dataclass(frozen=True)
class Stages:
    """What a trial pass of two images shows.

    Attributes:
        calls: Inputs and output of each call, by the module's name, in the order in which they first end.
        layers: Names of the modules that run and have weights of their own, in this order.
        names: Names of the stages or blocks, see :func:`~lightning_tta.backbones.split.parts_by_depth`, in this order;
            the layers where there are none.
    """

    calls: dict[str, list[tuple[Any, Any]]]
    layers: list[str]
    names: list[str]

    def once(self, name: str) -> tuple[Any, Any] | None:
        """The first input and the output of a module that runs once, with one input; else ``None``."""
        calls = self.calls.get(name, [])
        return (calls[0][0][0], calls[0][1]) if len(calls) == 1 and len(calls[0][0]) == 1 else None


def find_stages(net: nn.Module, instead: str) -> Stages:
    """The stages of a net.

    Args:
        net: Any net that takes images alone.
        instead: What else to do where it takes none of those that are tried.

    Raises:
        UnsupportedModelError: If no pass could be tried.
    """
    calls: dict[str, list[tuple[Any, Any]]] = {}
    for name, inputs, output in try_pass(net, 2, instead).calls:
        if ".parametrizations." not in f".{name}.":  # which compute weights
            calls.setdefault(name, []).append((inputs, output))
    weighted = {name for name, module in net.named_modules() if name and _has_weights(module)}
    layers = [name for name in calls if name in weighted]
    stages = set(parts_by_depth(net, layers) or layers)
    return Stages(calls, layers, [name for name in calls if name in stages])


def _has_weights(module: nn.Module) -> bool:
    """Whether a module has weights of its own; the mean and std that normalise pixels are none."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return bool(names - {"mean", "std"}) or parametrize.is_parametrized(module)
