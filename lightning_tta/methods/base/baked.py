"""What a recorded step holds fixed beside the tensors that it reads: whether that is still so, and what must not be."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tta.methods.base.custody import has_address
from lightning_tta.methods.base.recorder import hooks_of, who_looks
from lightning_tta.methods.base.state import State

Key = tuple[Any, ...]
_PLAIN = (bool, int, float, str, type(None))


class _Is:
    """An object as itself: equal to nothing else, and kept, so that no other one gets its address."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def settings(method: State, optimizers: Iterable[Optimizer]) -> Key:
    """What a step may have been made of beside its state: options, learning rates, objectives and filters.

    Plain values count, of the method and of the objects that it holds; of those objects it also counts which they are.
    """
    values: list[Any] = []
    parts = (module for name, module in method.named_children() if name != "model")
    held: list[object] = [*getattr(method, "filters", ()), *parts]
    _add_plain(method, values, held)
    for each in held:
        values.append(_Is(each))
        _add_plain(each, values, None)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            values += [value for name, value in group.items() if name not in ("params", "lr")]  # set from initial_lr
    return tuple(values)


def _add_plain(holder: object, values: list[Any], held: list[object] | None) -> None:
    """Add public attributes: values to ``values``, objects to ``held``; if that is ``None``, callables themselves."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if name[0] == "_" or name in ("training", "execution"):
            continue
        if isinstance(value, _PLAIN):
            values.append(value)
        elif isinstance(value, (list, tuple)):
            if all(isinstance(item, _PLAIN) for item in value):
                values.append(tuple(value))
        elif isinstance(value, (dict, set, Tensor)):
            continue
        elif held is not None:
            held.append(value)
        elif callable(value):
            values.append(_Is(value))


class Modules:
    """What of a method's modules is looked at before each replay: who looks inside, and what a recording holds fixed.

    That are addresses of tensors, whether they learn, forwards that were put in place of a module's own, and the plain
    attributes of modules other than torch's.
    """

    def __init__(self, method: nn.Module) -> None:
        modules = [module for module in method.modules() if module is not method]
        self._hooks = hooks_of(modules)
        self._slots = [vars(module) for module in modules]
        own = [vars(m) for m in modules if not type(m).__module__.startswith("torch.nn.")]
        names_of = ((slots, [name for name, value in slots.items() if _is_setting(name, value)]) for slots in own)
        self._plain = [(slots, name) for slots, names in names_of for name in names]
        self._tensors = [tensor for tensor in (*method.parameters(), *method.buffers()) if has_address(tensor)]

    def who_looks(self) -> str:
        """As :func:`~lightning_tta.methods.base.recorder.who_looks`, hooks of parameters too."""
        return who_looks([*self._hooks, *(tensor._backward_hooks for tensor in self._tensors)])

    def held(self) -> Key:
        """All of it as it is now."""
        forwards = [_Is(slots["forward"]) for slots in self._slots if "forward" in slots]
        flags = [tensor.requires_grad for tensor in self._tensors]
        return (
            [slots.get(name) for slots, name in self._plain],
            list(map(Tensor.data_ptr, self._tensors)),
            flags,
            forwards,
        )


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, _PLAIN) and name != "training" and not name.startswith("_is_")


_BY_THE_WAY = frozenset({"scalars", "_unrecorded", "_features_seen"})
"""Attributes of a method that a step may replace, and that are accounted for."""


def undeclared(method: State) -> dict[str, Any]:
    """What a step could change that is no declared state, as it is now: attributes and tensors of all modules."""
    declared = set(map(id, (*method.adaptable.values(), *method.rest.values())))
    holders = dict(method.named_modules())
    objects = {f"filters.{number}": each for number, each in enumerate(getattr(method, "filters", ()))}
    now: dict[str, Any] = {}
    for place, holder in {**holders, **objects}.items():
        values = {
            name: value for name, value in vars(holder).items() if name not in _BY_THE_WAY or holder is not method
        }
        values |= {**values.get("_parameters", {}), **values.get("_buffers", {})}
        for name, value in values.items():
            if id(value) not in declared:
                now[f"{place}.{name}".lstrip(".")] = _as_it_is(value)
    return now


def _as_it_is(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Is(value), None if value.is_inference() else value._version
    if isinstance(value, _PLAIN):
        return value
    return len(value) if isinstance(value, (list, dict, set, deque)) else None


def change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Why a step that has changed more than its state cannot be recorded; empty if it has not."""
    missing = object()
    for name in {**before, **after}:
        old, new = before.get(name, missing), after.get(name, missing)
        if old != new and not (old != old and new != new):  # NaN has not changed
            return f"it changes '{name}', which is no declared state, so that a replay would not"
    return ""


def host_randomness() -> Key:
    """Where the host's generators stand: what they give would be the same in each replay."""
    numpy = sys.modules.get("numpy")
    legacy = () if numpy is None else numpy.random.get_state()  # a tuple with an array
    others = [item.tobytes() if hasattr(item, "tobytes") else item for item in legacy]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), tuple(others)
