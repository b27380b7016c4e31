"""State of one kind: every tensor that a method may change, declared once, of a fixed shape, written in place.

From the one declaration follow reset, saving, loading, conversion, copies and the rollback of the guard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import ConfigError

NOT_YET = float("nan")
"""What a floating-point state holds that nothing has been written to yet."""

INPUTS, OTHERS = "window.", "memory."
"""How names of states begin that hold what a method was given, and nothing that it made of it; and states of a method
that are not those that it has now."""
GATES = "gate."
"""How names of states begin that hold what is known of the stream, whatever the method has made of it."""

Lent = list[tuple[list[Tensor], list[Tensor]]]
Moment = dict[str, dict[str, Tensor]]
"""The state at one moment: ``tensors``, those of :attr:`State.adaptable`, and ``rest``. Plain data, can be saved."""


class State(nn.Module):
    """Base of the methods' base: holds what :meth:`state` declares.

    A tensor that is a parameter or buffer of a module inside stands in the state dict under its own name and in
    :attr:`adaptable`. Any other one (a moving average, a counter, an optimizer's moments) belongs to this object alone,
    and is saved beside them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._adaptable: dict[str, Tensor] = {}  # parameters and buffers, by their name in the state dict
        self._rest: dict[str, Tensor] = {}  # all other tensors
        self._sources: dict[str, Tensor] = {}  # by name, of both; broadcast to the tensor's shape
        self._fixed_dtype: set[str] = set()
        self._wide: set[str] = set()
        self.layout = 0  # of which tensors hold the state; another number, other tensors
        self._lent: Lent = []  # tensors with the values that they get back
        self._collected: set[str] = set()  # buffers whose shape is known once they hold something
        self._nested: dict[str, State] = {}  # methods inside this one

    # What a method uses ----------------------------------------------------------------------------------------------

    def state(
        self, name: str, tensor: Tensor, *, source: Tensor | float | None = None, fixed_dtype: bool = False
    ) -> Tensor:
        """Declare a tensor that the method may change; write to it in place, with :meth:`write` or by hand.

        Args:
            name: Of a parameter or buffer, its name in the state dict, such as ``model.norm1.weight``; else any.
            tensor: The tensor, as it is at the source.
            source: What :meth:`reset` writes: a number, or a tensor that broadcasts to ``tensor``, to save memory where
                it is the same all over or shared. Default: a copy of ``tensor``.
            fixed_dtype: Whether ``method.half()`` and the like leave its dtype alone.

        Returns:
            ``tensor``.
        """
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
        owned = tensor is self._lookup(name)
        (self._adaptable if owned else self._rest)[name] = tensor
        if fixed_dtype:
            self._fixed_dtype.add(name)
        if source is None:
            source = tensor.detach().clone()
        elif not isinstance(source, Tensor):
            source = torch.tensor(source, dtype=tensor.dtype, device=tensor.device)
        self._sources[name] = source
        return tensor

    def nest(self, name: str, method: State) -> None:
        """Hold another method, which has a net of its own: its state is a part of this one's, under ``name``."""
        self.add_module(name, method)
        self._nested[name] = method

    def keep_wide(self, *names: str) -> None:
        """Let states stay in float32 at least, with their values, where the method goes to half precision."""
        self._wide.update(names)

    def withdraw(self, *names: str) -> None:
        """Take back declarations of states that are no parameters or buffers; before the first batch."""
        for name in names:
            del self._rest[name], self._sources[name]
            self._fixed_dtype.discard(name)
            self._wide.discard(name)
        self.layout += 1

    def collect(self, name: str, tensor: Tensor) -> None:
        """Keep what is collected before a stream, and does not change in it, as a buffer: in place of what it held.

        Its shape may be any; of a method that has collected nothing, it is empty. A loaded state brings its own.

        Args:
            name: Of the buffer.
            tensor: Its values.
        """
        self._collected.add(name)
        with outside_inference_mode():
            self.register_buffer(name, tensor.detach().clone())
        self.layout += 1

    def sized(self, name: str, like: Tensor) -> Tensor:
        """A state whose shape depends on the net's output, as it is now; allocated, not written, at its first use.

        Args:
            name: Declared with ``source=NOT_YET`` and a shape that may be wrong.
            like: Has the shape, dtype and device to have.
        """
        if self._rest[name].shape != like.shape:
            with outside_inference_mode():
                self._rest[name] = torch.full_like(like, NOT_YET)
            self.layout += 1
        return self._rest[name]

    @torch.no_grad()
    def write(self, name: str, value: Tensor, where: Tensor | None = None) -> None:
        """Write to a state in place.

        Args:
            name: As declared.
            value: Broadcasts to the state's shape.
            where: 0-dimensional, bool: whether to write, or leave the old value. ``None``: write.
        """
        tensor = self.value(name)
        value = value.detach().to(tensor)
        tensor.copy_(value if where is None else torch.where(where, value, tensor))

    def value(self, name: str) -> Tensor:
        """A state as it is now."""
        place, _, inner = name.partition(".")
        if place in self._nested:
            return self._nested[place].value(inner)
        return self._rest[name] if name in self._rest else self._adaptable[name]

    def source_value(self, name: str) -> Tensor:
        """What a state is at the source; may be of fewer dimensions, and broadcasts. Not to be written to."""
        place, _, inner = name.partition(".")
        return self._nested[place].source_value(inner) if place in self._nested else self._sources[name]

    def renew_source(self, name: str) -> None:
        """What the state is now is its source from here on; for what is prepared before a stream."""
        self._sources[name].copy_(self.value(name).detach())

    @property
    def adaptable(self) -> dict[str, Tensor]:
        """The parameters and buffers that the method may change, by their name in ``state_dict()``."""
        return self._with_nested(self._adaptable, "adaptable")

    @property
    def rest(self) -> dict[str, Tensor]:
        """All other states, by name."""
        return self._with_nested(self._rest, "rest")

    def _with_nested(self, tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
        nested = ((f"{place}.{name}", t) for place, m in self._nested.items() for name, t in getattr(m, group).items())
        return {**tensors, **dict(nested)}

    @property
    def memory(self) -> dict[str, Tensor | None]:
        """The method's own state beside parameters, buffers and optimizers; ``None`` for what has no value yet."""
        states = {name: tensor for name, tensor in self._rest.items() if not name.startswith("optimizers.")}
        return {name: None if is_empty(tensor) else tensor for name, tensor in states.items()}

    @contextmanager
    def lend(self, tensors: list[Tensor]) -> Iterator[None]:
        """While active, they may be written to; afterwards they are exactly as before, also after an interrupt."""
        tensors = [tensor.detach() for tensor in tensors]
        with outside_inference_mode():
            entry = (tensors, [torch.empty_like(tensor) for tensor in tensors])
        self._copy(entry[1], tensors)
        self._lent.append(entry)
        try:
            yield
        finally:
            if any(entry is other for other in self._lent):  # else they are back already, and this comes late
                self._copy(*entry)
                self._lent.pop()

    @contextmanager
    def at_source(self) -> Iterator[None]:
        """While active, :attr:`adaptable` has its source values. Not while a graph still needs the others."""
        tensors = [tensor.detach() for tensor in self._adaptable.values()]
        with self.hold(), self.lend(tensors), ExitStack() as nested:
            self._copy(tensors, [self._sources[name].expand_as(tensor) for name, tensor in self._adaptable.items()])
            for method in self._nested.values():
                nested.enter_context(method.at_source())
            yield

    @contextmanager
    def standing_in(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """While active, other tensors hold states, by name, and get what is written; these may be without values.

        For buffers and states of this object alone, not for parameters.
        """
        states, rest = dict(self._adaptable), dict(self._rest)
        owned = [name for name in values if name in states]
        try:
            for name in owned:
                self._adaptable[name] = self._put(name, values[name])
            self._rest.update({name: value for name, value in values.items() if name in rest})
            yield
        finally:
            for name in owned:
                self._put(name, states[name])
            self._adaptable, self._rest = states, rest

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        path, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(path), leaf, tensor)
        return tensor

    def hold(self) -> AbstractContextManager[None]:
        """While active, writes to the state are meant."""
        return nullcontext()

    def reset(self) -> None:
        """Every state back to its source value, exactly."""
        self.reset_where(None)

    def reset_where(self, condition: Tensor | None) -> None:
        """Every state back to its source value if ``condition``, 0-dimensional and bool, is true, or ``None``."""
        states = {**self._adaptable, **self._rest}
        if condition is not None:  # of its own accord, in the middle of a stream, whose images stay what they are
            states = {name: tensor for name, tensor in states.items() if not name.startswith((INPUTS, OTHERS, GATES))}
            for method in self._nested.values():
                method.reset_where(condition)
        with outside_inference_mode(), torch.no_grad():
            if condition is None:
                for name, tensor in states.items():
                    tensor.copy_(self._sources[name])
                for method in self._nested.values():
                    method.reset()
                return
            for dtype in {tensor.dtype for tensor in states.values()}:  # all of a kind at once: a few kernels
                names = [name for name, tensor in states.items() if tensor.dtype == dtype]
                tensors = [states[name].detach() for name in names]
                sources = [self._sources[name].expand_as(tensor) for name, tensor in zip(names, tensors, strict=True)]
                source, now = (torch.cat([tensor.flatten() for tensor in group]) for group in (sources, tensors))
                values = torch.split(torch.where(condition, source, now), [tensor.numel() for tensor in tensors])
                torch._foreach_copy_(tensors, [v.view_as(t) for v, t in zip(values, tensors, strict=True)])

    @staticmethod
    def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
        if tensors:
            with outside_inference_mode(), torch.no_grad():
                torch._foreach_copy_(tensors, values)

    # Saving, loading, moving -----------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """What is neither parameter nor buffer. Safe for ``weights_only`` loading."""
        return {"source": dict(self._sources), "memory": {name: t.clone() for name, t in self._rest.items()}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`get_extra_state`."""
        with outside_inference_mode(), torch.no_grad():  # else the optimizers could not step afterwards
            for name, value in state["memory"].items():
                if not self._resizes(name, value):
                    self._rest[name].copy_(value)
                elif is_empty(value):  # as it was before its first use; it keeps its place
                    self._rest[name].fill_(NOT_YET)
                else:
                    self.sized(name, value).copy_(value)
            for name, value in state["source"].items():
                self._sources[name].copy_(value)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, local: Any, *rest: Any) -> None:
        given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if given:
            if local.get("assign_to_params_buffers"):
                raise ConfigError(
                    "A method cannot be loaded with assign=True: its optimizers and sources hold the tensors that are "
                    "there. Leave it out; load_state_dict copies into them."
                )
            self._check_fits(given)
            for name in self._collected & given.keys():
                if given[name].shape != self.get_buffer(name).shape:
                    self.collect(name, given[name].to(self.get_buffer(name)))
        super()._load_from_state_dict(state_dict, prefix, local, *rest)

    def _check_fits(self, given: Mapping[str, Any]) -> None:
        """Refuse a state of another method, net or options, or a part of one, before anything of it is written."""
        for place, method in self._nested.items():
            method._check_fits(_part(given, place))
        given, here = _without(given, self._nested), _without(nn.Module.state_dict(self), self._nested)
        state = given.get("_extra_state")
        if not isinstance(state, Mapping) or not {"memory", "source"} <= state.keys():
            raise ConfigError(
                f"This state does not fit {type(self).__name__}: it is none of a method, but perhaps of a plain net. "
                "Load weights into the net, before adapt(); a method loads what its own state_dict() gave."
            )
        saved = state["memory"]
        memory = {name: value for name, value in saved.items() if not self._resizes(name, value)}
        mine = {name: value for name, value in self._rest.items() if name in memory or name not in saved}
        collected = {name: None for name in self._collected if isinstance(given.get(name), Tensor)}  # of any shape
        tensors = [{**values, **collected} for values in (given, here)]
        kinds: tuple[tuple[str, set[str], set[str]], ...] = (
            ("memory", _shapes(memory, "", "optimizers."), _shapes(mine, "", "optimizers.")),
            ("optimizers' settings", _shapes(memory, "optimizers."), _shapes(mine, "optimizers.")),
            ("adapted tensors", _shapes(state["source"]), _shapes(self._sources)),
            ("tensors", _shapes(tensors[0], "", "_extra_state"), _shapes(tensors[1], "", "_extra_state")),
        )
        for kind, theirs, ours in kinds:
            if theirs != ours:
                more, missing = (", ".join(sorted(s)[:3]) or "nothing" for s in (theirs - ours, ours - theirs))
                raise ConfigError(
                    f"This state does not fit {type(self).__name__}. Only the state has, among its {kind}: {more}; "
                    f"only this method: {missing}. Build the method on the same net, with the options that the state "
                    "was saved with."
                )

    def _resizes(self, name: str, value: Tensor) -> bool:
        """Whether a saved value is of another shape than a state that is allocated at its first use, and fits.

        One of them may have no value yet, or both be of images of another size. How many there are, an option says.
        """
        if name not in self._rest or value.shape == self._rest[name].shape:
            return False
        mine = self._rest[name]
        has_room = min(mine.ndim, value.ndim) < 2 or len(mine) == len(value)
        return has_room and (is_empty(mine) or is_empty(self._sources[name]))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # parameters in place; buffers are replaced
        for name in self._adaptable:
            replaced = self._lookup(name)
            assert replaced is not None
            self._adaptable[name] = replaced
        before = [*self._rest.values(), *self._sources.values()]  # kept alive: they are told apart by their id
        moved = {id(tensor): fn(tensor) for tensor in {id(t): t for t in before}.values()}  # sources may be shared
        for tensors in (self._rest, self._sources):
            for name, tensor in tensors.items():
                new: Tensor = moved[id(tensor)]
                if name in self._fixed_dtype or name in self._wide:
                    dtype = tensor.dtype if name in self._fixed_dtype else _wide(new.dtype)
                    new = new if new.dtype == dtype else tensor.to(new.device, dtype)  # not by way of half precision
                tensors[name] = new
        return self

    def _lookup(self, name: str) -> Tensor | None:
        """The parameter or buffer of this name."""
        path, _, leaf = name.rpartition(".")
        try:
            tensor = getattr(self.get_submodule(path), leaf, None)
        except AttributeError:
            return None
        return tensor if isinstance(tensor, Tensor) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def is_empty(tensor: Tensor) -> bool:
    """Whether nothing has been written to a state yet."""
    return tensor.is_floating_point() and bool(tensor.isnan().all())


def _shapes(tensors: Mapping[str, Any], prefix: str = "", without: str | None = None) -> set[str]:
    return {
        f"{name.removeprefix(prefix)} {tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__}"
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not (without and name.startswith(without))
    }


def _part(tensors: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What is of a nested method, under the names that it has there."""
    prefix = f"{place}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _without(tensors: Mapping[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """What is of no nested method."""
    prefixes = tuple(f"{place}." for place in places)
    return {name: value for name, value in tensors.items() if not name.startswith(prefixes)}


def take(method: State) -> Moment:
    """The state as it is now, copied."""
    groups = {"tensors": method.adaptable, "rest": method.rest}
    return {group: {name: tensor.detach().clone() for name, tensor in t.items()} for group, t in groups.items()}


def put_back(method: State, moment: Moment) -> None:
    """Bring ``method`` to where it was, exactly."""
    with method.hold(), outside_inference_mode(), torch.no_grad():
        for place, nested in method._nested.items():
            put_back(nested, {group: _part(tensors, place) for group, tensors in moment.items()})
        for name, tensor in method._adaptable.items():
            tensor.copy_(moment["tensors"][name])
        method.set_extra_state({"source": {}, "memory": _without(moment["rest"], method._nested)})


def size(value: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(size(item) for item in values)
