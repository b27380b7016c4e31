"""A copy of any net, also of one that keeps computed tensors; and nets that have no values yet."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FunctionType
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
    features keep such tensors; each pass computes them anew. A function that the net holds (a hook, a ``forward`` put
    in place of a layer's) and that has a part of the net in its closure or defaults has the copy's part there; torch
    leaves functions alone. Of a net in DataParallel or DistributedDataParallel, whose copy would talk to other
    processes, the net inside is copied.

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
    try:
        with copied_whole(model, known):
            return copy.deepcopy(model, known)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {_culprit(model)} ({_first_line(error)}). Remove it from the "
            "net, or adapt the net itself: adapt(net, ..., in_place=True)."
        ) from error


@contextmanager
def copied_whole(model: nn.Module, memo: dict[int, Any]) -> Iterator[None]:
    """While active, ``copy.deepcopy(value, memo)``, where ``value`` holds the net, copies it as :func:`copy_net`."""
    functions = _Functions(model)
    for number, twin in (*((id(t), t.detach().clone()) for t in _computed_tensors(model)), *functions.twins()):
        memo.setdefault(number, twin)
    yield
    functions.bind(memo)
    for module in memo[id(model)].modules():  # weak references to modules of the net: of the copy now
        for name, value in list(vars(module).items()):
            if isinstance(value, weakref.ref) and isinstance(value(), nn.Module) and id(value()) in memo:
                vars(module)[name] = weakref.ref(memo[id(value())])


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
    return [value for value in _reachable([model]) if isinstance(value, Tensor) and not value.is_leaf]


def holds_parameters_elsewhere(model: nn.Module) -> bool:
    """Whether a list, a function or another object in a net holds a parameter of it, which it may take from there.

    A pass with other values in the parameters' own places would then miss them.
    """
    modules, parameters = list(model.modules()), set(model.parameters())
    usual = {"_parameters", "_buffers", "_modules"}
    values = [value for module in modules for name, value in vars(module).items() if name not in usual]
    for value in _reachable(values, modules):
        inside = [value]
        if isinstance(value, FunctionType):
            inside = [*map(_content, value.__closure__ or ()), *(value.__defaults__ or ())]
        if any(isinstance(item, nn.Parameter) and item in parameters for item in inside):
            return True
    return False


def _reachable(start: list[Any], without: Iterable[Any] = ()) -> Iterator[Any]:
    """What objects hold, the way ``copy.deepcopy`` goes; functions too, but not what is in them."""
    seen = {id(value) for value in without}
    todo = list(start)
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Tensor):
            continue
        if isinstance(value, Mapping):
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


class _Functions:
    """The functions that a net holds and that use a part of it, and their copies, which use the copy's."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
        self.twin_of: dict[FunctionType, FunctionType] = {}
        self._cells: dict[int, CellType] = {}  # of the copies, by those of the functions: several may share one
        self._seen: set[int] = set()
        for value in _reachable([model]):
            if isinstance(value, FunctionType):
                self._uses(value)
                self._warn_of_globals(model, value)

    def twins(self) -> list[tuple[int, FunctionType]]:
        """The copies with the functions' ids, for the memo of ``copy.deepcopy``."""
        return [(id(function), twin) for function, twin in self.twin_of.items()]

    def bind(self, memo: dict[int, Any]) -> None:
        """Let the copies use what ``memo`` has for what the functions use."""
        for function, twin in self.twin_of.items():
            for cell in function.__closure__ or ():
                if id(cell) in self._cells:
                    self._cells[id(cell)].cell_contents = copy.deepcopy(cell.cell_contents, memo)
            for holder in (twin.__dict__, twin.__kwdefaults__ or {}):
                holder.update({name: self._copied(value, memo) for name, value in holder.items()})
            if twin.__defaults__:
                twin.__defaults__ = tuple(self._copied(value, memo) for value in twin.__defaults__)

    def _copied(self, value: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(value, memo) if self._uses(value) else value

    def _uses(self, value: Any) -> bool:
        """Whether a value is a part of the net, or has one at hand; a function that does gets a copy."""
        if isinstance(value, (nn.Module, Tensor)):
            return id(value) in self.parts
        if inspect.ismethod(value):
            return self._uses(value.__self__)
        if isinstance(value, functools.partial):
            return any([self._uses(v) for v in (value.func, *value.args, *value.keywords.values())])
        if isinstance(value, (list, tuple, dict)):
            return any(isinstance(v, (nn.Module, Tensor)) and self._uses(v) for v in _values(value))
        return isinstance(value, FunctionType) and self._function_uses(value)

    def _function_uses(self, function: FunctionType) -> bool:
        if id(function) in self._seen:
            return function in self.twin_of
        self._seen.add(id(function))
        cells = [cell for cell in function.__closure__ or () if self._uses(_content(cell))]
        others = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
        if not any([bool(cells), *map(self._uses, others)]):
            return False
        self._cells |= {id(cell): CellType() for cell in cells if id(cell) not in self._cells}
        closure = tuple(self._cells.get(id(cell), cell) for cell in function.__closure__ or ())
        twin = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure or None
        )
        functools.update_wrapper(twin, function)
        twin.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
        vars(twin).clear()
        vars(twin).update(vars(function))
        self.twin_of[function] = twin
        return True

    def _warn_of_globals(self, model: nn.Module, function: FunctionType) -> None:
        names = [n for n in function.__code__.co_names if self._uses(function.__globals__.get(n))]
        if names:
            warnings.warn(
                f"The function '{function.__name__}', which {type(model).__name__} holds, uses a part of the net "
                f"through the global name {names[0]!r}. In a copy of the net it still uses the original's, which does "
                f"not adapt. Hand it over as a default (def {function.__name__}(..., {names[0]}={names[0]})), or adapt "
                "the net itself: adapt(net, ..., in_place=True).",
                stacklevel=5,
            )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


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
