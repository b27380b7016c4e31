"""A method's state at one moment, kept in memory: only what it may change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_tta.methods.base.method import TTAMethod

Moment = dict[str, Any]
"""``tensors``, the declared ones by name, and ``extra``: optimizers, memory and counters. Plain data, can be saved."""


def take(method: TTAMethod) -> Moment:
    """The state as it is now, copied."""
    tensors = {name: tensor.detach().clone() for name, tensor in method.adaptable.items()}
    extra = {name: value for name, value in method.get_extra_state().items() if name != "snapshot"}
    return {"tensors": tensors, "extra": copy.deepcopy(extra)}


def put_back(method: TTAMethod, moment: Moment) -> None:
    """Bring ``method`` to where it was, exactly."""
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in method.adaptable.items():
            tensor.copy_(moment["tensors"][name])
    method.set_extra_state({**moment["extra"], "snapshot": dict(method._snapshot)})


def size(value: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(size(part) for part in parts)
