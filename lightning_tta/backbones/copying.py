"""A copy of any net, also of one that keeps computed tensors; and nets that have no values yet."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_tta.errors import UnsupportedModelError

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers that hold the net as their ``module``."""


def copy_net(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy of a net.

    Tensors that the net, or an object it holds (a hook, a list), has computed and kept are copied without their graph:
    torch refuses to copy those. The old ``weight_norm`` and ``spectral_norm``, pruning and nets that note their last
    features keep such tensors; each pass computes them anew. Of a net in DataParallel or DistributedDataParallel, whose
    copy would talk to other processes, the net inside is copied.

    Args:
        model: Any net.
        shared: Tensors that the copy shares with the net.

    Raises:
        UnsupportedModelError: If the net is not initialised, or something in it cannot be copied; it is named.
    """
    while isinstance(model, PARALLEL):
        model = model.module
    check_initialized(model)
    known: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo = {id(t): t.detach().clone() for t in _computed_tensors(model)} | known
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {_culprit(model)} ({_first_line(error)}). Remove it from the "
            "net, or adapt the net itself: adapt(net, ..., in_place=True)."
        ) from error


def check_initialized(model: nn.Module) -> None:
    """Refuse a net with parameters that have no values yet: of lazy layers, or on the device ``meta``.

    Raises:
        UnsupportedModelError: With what to do.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UnsupportedModelError(
                f"'{name}' of {type(model).__name__} belongs to a lazy layer that has not seen an input. Run one batch "
                "through the net first, net(images), and load its weights; adapt it after that."
            )
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"Parameter '{name}' of {type(model).__name__} has no values (device 'meta'). Create the model on a "
                "real device, or load its weights first (to_empty, then load_state_dict), and adapt it after that."
            )


def _computed_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors with a graph that can be reached from a net the way ``copy.deepcopy`` goes."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                found.append(value)
        elif isinstance(value, Mapping):
            todo += [*value.values(), *vars(value).values()] if hasattr(value, "__dict__") else value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += value
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            todo.append(value.__self__)
        elif hasattr(value, "__dict__") and not inspect.isroutine(value) and not isinstance(value, type):
            if not inspect.ismodule(value):
                todo += vars(value).values()
    return found


def _culprit(model: nn.Module) -> str:
    """Which attribute of which module cannot be copied, in words."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            memo = {id(t): t for t in (*model.modules(), *model.parameters(), *model.buffers())}
            memo |= {id(t): t for t in _computed_tensors(model)}
            try:
                copy.deepcopy(value, memo)
            except Exception:
                kinds = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward hook"}
                what = kinds.get(attribute, f"its attribute '{attribute}'")
                return f"{what} of {f'module {name!r}' if name else 'the net'}, a {type(value).__name__}, is the reason"
    return "deepcopy fails"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
