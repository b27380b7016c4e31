"""What is quantised in a net: tensors, layers, and operations of an exported graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

FORWARD_ONLY = "'neo', 'output_shift', 't3a', 'lame' or, where BatchNorm layers are left, 'norm'"
"""Methods that need no gradient, and so run on a quantised net; for messages."""


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor holds quantised values: torch's own kinds, or a subclass that says how it is dequantised."""
    return tensor.is_quantized or getattr(type(tensor), "dequantize", None) is not Tensor.dequantize


def dequantized(tensor: Tensor) -> Tensor:
    """The floating-point values of a tensor, detached if it is quantised; the tensor itself if it is not."""
    return tensor.detach().dequantize() if is_quantized(tensor) else tensor


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer of ``torch.ao``, whose weight is packed: a function returns it."""
    return hasattr(module, "in_features") and _returns_weight(module)


def _returns_weight(module: nn.Module) -> bool:
    """Whether ``weight`` is a function; no module either, as what torch keeps a parametrisation in has."""
    weight = getattr(module, "weight", None)
    return callable(weight) and not isinstance(weight, nn.Module)


def has_quantized(model: nn.Module) -> bool:
    """Whether a net has quantised weights, layers with packed weights, or a graph with quantised operations."""
    for module in model.modules():
        if any(is_quantized(parameter) for parameter in module.parameters(recurse=False)):
            return True
        if _returns_weight(module) or _graph_is_quantized(module):
            return True
    return False


def _graph_is_quantized(module: nn.Module) -> bool:
    return isinstance(module, GraphModule) and any("quantize" in str(node.target) for node in _calls(module))


def _calls(module: GraphModule) -> Iterator[Node]:
    return (node for node in module.graph.nodes if node.op in ("call_function", "call_method"))


def contents(value: Any) -> Iterator[tuple[str, Tensor | str]]:
    """What an entry of a state dict consists of: plain tensors, with a name of each, and a text for anything else.

    Args:
        value: A tensor of whatever kind; a tuple or list, as the packed weights of ``torch.ao``; or an object.
    """
    if isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from ((f".{number}{name}", part) for name, part in contents(item))
    elif not isinstance(value, Tensor):
        yield "", repr(value)
    elif value.is_quantized:
        yield ".int_repr", value.int_repr()
        if str(value.qscheme()).startswith("torch.per_channel"):
            yield ".scales", value.q_per_channel_scales()
            yield ".zero_points", value.q_per_channel_zero_points()
            yield ".axis", repr(value.q_per_channel_axis())
        else:
            yield ".scale", repr((value.q_scale(), value.q_zero_point()))
    elif is_quantized(value) and hasattr(value, "__tensor_flatten__"):
        names, settings = value.__tensor_flatten__()
        for name in names:
            yield from ((f".{name}{rest}", part) for rest, part in contents(getattr(value, name)))
        yield ".settings", repr(settings)
    else:
        yield "", value


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory that a tensor lies in: several pieces of a subclass that consists of other tensors."""
    if is_quantized(tensor) and not tensor.is_quantized:
        return [part.untyped_storage() for _, part in contents(tensor) if isinstance(part, Tensor)]
    return [tensor.untyped_storage()]
