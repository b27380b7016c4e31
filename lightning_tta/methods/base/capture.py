"""Captured steps: what a method computes on batches of one shape is recorded once, as a CUDA graph, and replayed."""

from __future__ import annotations

import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_tta import collective
from lightning_tta.errors import ConfigError, UnsupportedModelError
from lightning_tta.methods.base.custody import has_address
from lightning_tta.methods.base.execution import Execution
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.base.state import Moment, State, put_back, take
from lightning_tta.metrics import collapse_measures

Outputs = tuple[Tensor, ...]
Key = tuple[Any, ...]
COUNTS = ("forwards", "backwards", "skipped_steps", "nonfinite_images")
"""Counters that every method has."""
STEP = "step"
"""The name of the part that is a whole step."""


Scalars = tuple[dict[str, Tensor], dict[str, Any]]
"""Notes, and counters, which are integers or tensors, by name."""


class Replayable(State):
    """What a captured method is beside its state.

    Attributes:
        model: The net.
        execution: How it computes.
        optimizers: By name.
        scalars: Notes and counters of this batch so far.
    """

    model: nn.Module
    optimizers: dict[str, Optimizer]

    @property
    def name(self) -> str:
        """The method's."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.execution = Execution()
        self.scalars: Scalars = {}, {}
        self._capture = Capture()

    def note(self, **values: Tensor) -> None:
        """Put scalars of this step into :attr:`stats`; they stay on the device until somebody reads them.

        One that is not a number, such as a mean over no sample, is left out there.
        """
        self.scalars[0].update({name: value.detach() for name, value in values.items()})

    def count(self, name: str, number: int | Tensor = 1) -> None:
        """Add to a counter of this batch in :attr:`stats`; it starts at 0 with each batch."""
        counts = self.scalars[1]
        counts[name] = counts.get(name, 0) + number

    def replayed(self, name: str, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(*tensors)``, as a part of a step that may be captured: recorded once and replayed.

        For methods with ``step_on_host``; what comes before and after such a part runs as it is.

        Args:
            name: Of the part: another function, another name.
            function: Of tensors alone; may write to declared state, :meth:`note` and :meth:`count`. What it needs
                beside the tensors given is state, or the same in every call.
            *tensors: Its arguments.

        Returns:
            A tensor, or a tuple of tensors, as the function does, without a graph.
        """
        return self._capture.run(self, name, function, tensors)

    def capture_report(self) -> dict[str, str]:
        """What was captured, by part and shape: ``recorded``, or the reason why not."""
        return self._capture.report()

    def batch_among(self, tensors: Sequence[Tensor]) -> int:
        """Which of them is the batch whose statistics are still to be noted; -1 for none."""
        raise NotImplementedError

    def set_batch(self, x: Tensor) -> None:
        """The same batch, in another tensor."""
        raise NotImplementedError

    def noted_statistics(self) -> Outputs:
        """Statistics of the batch that a part has noted, and that are taken in at the end of the step."""
        raise NotImplementedError

    def note_statistics(self, noted: Outputs) -> None:
        """Counterpart of :meth:`noted_statistics`."""
        raise NotImplementedError

    def compiled(self) -> AbstractContextManager[None]:
        """While active, passes of the net are compiled."""
        raise NotImplementedError


class Recorder(Protocol):
    """What records the work of a device, and repeats it on the same addresses."""

    def reason_against(self, device: torch.device) -> str:
        """Why it cannot record there; empty if it can."""

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """What ``run()`` returns, whose tensors are written anew by each call of the second value."""


class CudaGraphs:
    """Records CUDA graphs, all with one pool of memory: their results must be copied before another one is replayed."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None

    def reason_against(self, device: torch.device) -> str:
        """Empty on CUDA, where nobody else is recording."""
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and the batch is on '{device}'"
        return "the caller is recording a CUDA graph" if torch.cuda.is_current_stream_capturing() else ""

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """Record, without running. Other threads, such as those of a data loader, may go on."""
        with torch.cuda.device(device):
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = run()
        return result, graph.replay


make_recorder: Callable[[], Recorder] = CudaGraphs


@dataclass
class Recording:
    """A part of a method for inputs of one shape.

    Attributes:
        inputs: Where its inputs go.
        outputs: Where its results stand after a replay.
        replay: Repeats it.
        names: Of the scalars in ``packed``: notes, then counters that are tensors.
        notes: How many of them are notes.
        packed: The scalars (N,), float64.
        counts: Counters that are the same each time.
        single: Whether the part returns one tensor, and not a tuple.
        statistics: Those of the batch that it notes, if it is the part that does.
    """

    inputs: list[Tensor]
    outputs: Outputs
    replay: Callable[[], None]
    names: list[str]
    notes: int
    packed: Tensor | None
    counts: dict[str, int]
    single: bool
    statistics: Outputs


class Capture:
    """Records and replays the parts of one method. A copy of the method gets one of its own, which is empty.

    A part is a function of tensors that reads and writes tensors alone: those given, and declared state in place. Per
    part, shape and setting there are :attr:`WARM_UPS` plain calls, then the recording, which is used only if it gives
    what the plain step gives: the first one runs both ways from the same state. Of what differs in kind, the plain path
    is taken: a batch with unusable samples, hooks on the net, modes of torch that look at operations, several processes
    that adapt as one.

    Attributes:
        WARM_UPS: Plain calls before a recording. What torch sets up at the first calls of a shape cannot be recorded.
        LIMIT: At most this many recordings; what comes beyond takes the plain path.
    """

    WARM_UPS: ClassVar[int] = 2
    LIMIT: ClassVar[int] = 16

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all recordings: the tensors are other ones now."""
        self.recorder = make_recorder()
        self.recordings: dict[Key, Recording] = {}
        self.plain: dict[Key, str] = {}  # why a part is not replayed
        self._calls: dict[Key, int] = {}
        self._net: _Net | None = None
        self._layout: Any = None
        self._settings: Key = ()
        self.active = self._inside = False
        self.why_not = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        return Capture()

    def __reduce__(self) -> tuple[type[Capture], tuple[()]]:
        return Capture, ()

    @contextmanager
    def deciding(self, method: Replayable, x: Tensor, usable: bool) -> Iterator[None]:
        """Decide whether the call inside may record and replay, see :meth:`begin`; outside nothing may."""
        self.begin(method, x, usable)
        try:
            yield
        finally:
            self.active = False

    def begin(self, method: Replayable, x: Tensor, usable: bool) -> None:
        """Decide whether this call may record and replay.

        Args:
            method: The method.
            x: The batch (B, ...).
            usable: Whether all of its samples are.

        Raises:
            ConfigError: If ``capture=True`` and the device or the processes do not allow it.
        """
        self.active = False
        if method.execution.capture is False:
            self.why_not = "capture=False"
            return
        self.why_not = self.recorder.reason_against(x.device)
        if not self.why_not and collective.is_joined():
            self.why_not = "several processes adapt as one"
        if self.why_not:
            for option in ("capture", "compile"):
                if getattr(method.execution, option) is True:
                    raise ConfigError(f"{option}=True is not possible: {self.why_not}. Use {option}=False.")
            return
        self.why_not = "" if usable else "the batch has images that are left out"
        if self._net is None:
            self._net = _Net(method)
        self.why_not = self.why_not or self._looked_at(self._net)
        self.active = not self.why_not
        layout = (method.layout, *self._net.baked()) if self.active else None
        if self.active and self._layout != layout:
            self.clear()
            self._net = _Net(method)
            self._layout, self.active = (method.layout, *self._net.baked()), True
        self._settings = _settings(method) if self.active else ()

    def _looked_at(self, net: _Net) -> str:
        """Who looks inside a pass of the net; empty if nobody does."""
        if net.has_hooks() or torch_modules._has_any_global_hook():  # type: ignore[no-untyped-call]
            return "the net has hooks"
        modes = _get_current_dispatch_mode_stack() or _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if modes or torch.is_anomaly_enabled():
            return "a mode of torch looks at each operation"
        return ""

    def key(self, name: str, tensors: Sequence[Tensor], batch: int = -1) -> Key:
        """What must be the same for a recording to be used; ``batch``: which tensor is to be accounted for."""
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        return name, kinds, batch, self._settings, _modes(tensors[0].device.type)

    def replay(self, method: Replayable, found: Recording, tensors: Sequence[Tensor]) -> Any:
        """The results of a part, copied, with its notes and counts in the method's."""
        with torch.no_grad():
            for place, tensor in zip(found.inputs, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
            found.replay()
            outputs = tuple(output.clone() for output in found.outputs)
            if found.statistics:
                method.note_statistics(tuple(tensor.clone() for tensor in found.statistics))
            if found.packed is not None:
                scalars = found.packed.clone().unbind()
                method.note(**dict(zip(found.names[: found.notes], scalars, strict=False)))
                for name, scalar in zip(found.names[found.notes :], scalars[found.notes :], strict=True):
                    method.count(name, scalar)
        for name, number in found.counts.items():
            method.count(name, number)
        return outputs[0] if found.single else outputs

    def run(
        self,
        method: Replayable,
        name: str,
        function: Callable[..., Any],
        tensors: Sequence[Tensor],
        key: Key | None = None,
    ) -> Any:
        """A part: replayed, recorded for the next time, or as it is."""
        if not self.active or self._inside:
            return _without_graph(function(*tensors))
        self._inside = True
        try:
            return self._run(method, name, function, tensors, key)
        finally:
            self._inside = False

    def _run(
        self, method: Replayable, name: str, function: Callable[..., Any], tensors: Sequence[Tensor], key: Key | None
    ) -> Any:
        batch = method.batch_among(tensors)
        key = self.key(name, tensors, batch) if key is None else key
        found = self.recordings.get(key)
        if found is not None:
            return self.replay(method, found, tensors)
        if key in self.plain and method.execution.capture is True:
            raise self._refusal(method, key)
        if key not in self._calls:
            self._make_room()
        self._calls[key] = self._calls.get(key, 0) + 1
        if key in self.plain or self._calls[key] <= self.WARM_UPS or len(self.recordings) >= self.LIMIT:
            return _without_graph(function(*tensors))
        return self._record(method, key, function, tensors, batch)

    def _make_room(self) -> None:
        """Where there are many, forget what is of settings that are no longer those of the method."""
        if len(self.recordings) >= self.LIMIT or len(self._calls) >= 16 * self.LIMIT:
            kept: list[dict[Key, Any]] = [self.recordings, self._calls, self.plain]
            for entries in kept:
                for key in [key for key in entries if key[3] != self._settings]:
                    del entries[key]

    def _record(
        self, method: Replayable, key: Key, function: Callable[..., Any], tensors: Sequence[Tensor], batch: int
    ) -> Any:
        """Run the part as it is and recorded, from the same state; keep the recording if it agrees."""
        notes, counts = map(dict, method.scalars)
        before, drawn, undeclared = take(method), _host_randomness(), _undeclared(method)
        expected = _without_graph(function(*tensors))
        reason = "" if _host_randomness() == drawn else "it draws random numbers on the host"
        reason = reason or _change(undeclared, _undeclared(method))
        if reason:
            self.plain[key] = reason
            return self._refused(method, key, expected, before)
        after, scalars = take(method), method.scalars
        noted = method.noted_statistics() if batch >= 0 else ()
        found = None
        try:
            put_back(method, before)
            found = self._recorded(method, key[0], function, tensors, batch)
            put_back(method, before)
            method.scalars = dict(notes), dict(counts)
            result = self.replay(method, found, tensors)
            reason = _difference(_as_tuple(expected), _as_tuple(result), before, after, take(method))
        except Exception as error:  # torch's, CUDA's, of memory; the plain step has just run
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
        if not reason:
            assert found is not None
            self.recordings[key] = found
            return result
        put_back(method, after)
        method.scalars = scalars
        if noted:
            method.note_statistics(noted)
        self.plain[key] = reason
        return self._refused(method, key, expected, before)

    def _refused(self, method: Replayable, key: Key, result: Any, before: Moment) -> Any:
        """The result of the plain step, which is taken back where it is refused."""
        if method.execution.capture is True:
            put_back(method, before)
            raise self._refusal(method, key)
        warnings.warn(
            f"A step of '{method.name}' cannot be captured, and runs as it is: {self.plain[key]}. With capture=False "
            "it is not tried.",
            stacklevel=2,
        )
        return result

    def _refusal(self, method: Replayable, key: Key) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"A step of '{method.name}' cannot be captured: {self.plain[key]}. With capture=True it does not run "
            "otherwise. Use capture='auto' or False."
        )

    def _recorded(
        self, method: Replayable, name: str, function: Callable[..., Any], tensors: Sequence[Tensor], batch: int
    ) -> Recording:
        inputs = [tensor.detach().clone() for tensor in tensors]
        names: list[str] = []
        counts: dict[str, int] = {}
        shape: dict[str, int] = {}

        def run() -> tuple[Outputs, Tensor | None, Outputs]:
            if batch >= 0:
                method.set_batch(inputs[batch])
            method.scalars = {}, dict.fromkeys(COUNTS, 0)
            outputs = function(*inputs)
            shape["single"] = isinstance(outputs, Tensor)
            if name == STEP:
                method.note(**collapse_measures(outputs))
            scalars = dict(method.scalars[0])
            shape["notes"] = len(scalars)
            for counter, number in method.scalars[1].items():
                if isinstance(number, Tensor):
                    scalars[f"{counter} "] = number  # a note may have the same name
                else:
                    counts[counter] = number
            names[:] = [scalar.rstrip() for scalar in scalars]
            packed = torch.stack([s.detach().double().view(()) for s in scalars.values()]) if scalars else None
            noted = method.noted_statistics() if batch >= 0 else ()
            return tuple(output.detach() for output in _as_tuple(outputs)), packed, noted

        with ExitStack() as stack:
            if method.execution.compile:
                stack.enter_context(method.compiled())
                run()  # compiles, forward and backward; what it wrote is put back
                counts.clear()
            stack.enter_context(recording())
            (outputs, packed, noted), replay = self.recorder.record(run, inputs[0].device)
        if batch >= 0:
            method.set_batch(tensors[batch])
        single, notes = bool(shape["single"]), shape["notes"]
        return Recording(inputs, outputs, replay, names, notes, packed, counts, single, noted)

    def report(self) -> dict[str, str]:
        """By part and shape: ``recorded``, or why not."""
        seen = {_label(key): f"plain: {reason}" for key, reason in self.plain.items()}
        seen |= {_label(key): "recorded" for key in self.recordings}
        full = f"plain: there are {len(self.recordings)} recordings already"
        waiting = {
            _label(key): full if number > self.WARM_UPS else f"plain so far: {number} of {self.WARM_UPS} calls"
            for key, number in self._calls.items()
        }
        return {**waiting, **seen, **({"last batch": f"plain: {self.why_not}"} if self.why_not else {})}


def _label(key: Key) -> str:
    return f"{key[0]} {' '.join('x'.join(map(str, kind[0])) for kind in key[1])}"


def _as_tuple(outputs: Any) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _without_graph(outputs: Any) -> Any:
    return outputs.detach() if isinstance(outputs, Tensor) else tuple(output.detach() for output in outputs)


def _modes(device: str) -> Key:
    """What of torch's global settings goes into a recording."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    exact = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return autocast, exact, torch.backends.cuda.matmul.fp32_precision, convolutions.fp32_precision


_PLAIN = (bool, int, float, str, type(None))


class _Is:
    """An object as itself: equal to nothing else, and kept, so that no other one gets its address."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _settings(method: Replayable) -> Key:
    """What a step may have been made of beside its state: options, learning rates, objectives and filters.

    Plain values count, of the method and of the objects that it holds; of those objects it also counts which they are.
    """
    values: list[Any] = [method.execution]
    parts = (module for name, module in method._modules.items() if name != "model" and module is not None)
    held: list[object] = [*getattr(method, "filters", ()), *parts]
    _add_plain(method, values, held)
    for each in held:
        values.append(_Is(each))
        _add_plain(each, values, None)
    for optimizer in method.optimizers.values():
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


class _Net:
    """What of a method's modules is looked at before each replay: who looks inside, and what a recording holds fixed.

    That are addresses of tensors, whether they learn, forwards that were put in place of a module's own, and the plain
    attributes of modules other than torch's.
    """

    def __init__(self, method: nn.Module) -> None:
        modules = [module for module in method.modules() if module is not method]
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks: list[Mapping[Any, Any]] = [getattr(module, name) for module in modules for name in names]
        self._slots = [vars(module) for module in modules]
        own = [vars(m) for m in modules if not type(m).__module__.startswith("torch.nn.")]
        names_of = ((slots, [name for name, value in slots.items() if _is_setting(name, value)]) for slots in own)
        self._plain = [(slots, name) for slots, names in names_of for name in names]
        self._tensors = [tensor for tensor in (*method.parameters(), *method.buffers()) if has_address(tensor)]

    def has_hooks(self) -> bool:
        return any(self._hooks) or any(tensor._backward_hooks for tensor in self._tensors)

    def baked(self) -> Key:
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


_BY_THE_WAY = frozenset({"scalars", "_unrecorded"})
"""Attributes of a method that a step may replace, and that are accounted for."""


def _undeclared(method: Replayable) -> dict[str, Any]:
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


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Why a step that has changed more than its state cannot be recorded; empty if it has not."""
    missing = object()
    for name in {**before, **after}:
        old, new = before.get(name, missing), after.get(name, missing)
        if old != new and not (old != old and new != new):  # NaN has not changed
            return f"it changes '{name}', which is no declared state, so that a replay would not"
    return ""


def _host_randomness() -> Key:
    """Where the host's generators stand: what they give would be the same in each replay."""
    numpy = sys.modules.get("numpy")
    legacy = () if numpy is None else numpy.random.get_state()  # a tuple with an array
    others = [item.tobytes() if hasattr(item, "tobytes") else item for item in legacy]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), tuple(others)


@torch.no_grad()
def _difference(expected: Outputs, result: Outputs, before: Moment, plain: Moment, replayed: Moment) -> str:
    """How a replay differs from the plain step, beyond rounding; empty if it does not.

    Results must be close. A state must have moved as far: where a gradient is rounding noise, Adam moves either way.
    """
    for one, other in zip(expected, result, strict=True):
        half = one.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(one.device.type)
        if one.shape != other.shape or not torch.allclose(
            one.double(), other.double(), rtol=0.05 if half else 1e-3, atol=0.05 if half else 1e-3, equal_nan=True
        ):
            return "its results differ from those of the plain step"
    for group, tensors in before.items():
        for name, old in tensors.items():
            one, other = plain[group][name], replayed[group][name]
            if not old.is_floating_point():
                if not torch.equal(one, other):
                    return f"the state '{name}' differs from that of the plain step"
                continue
            one, other, old = (t.double().nan_to_num(nan=1e30) for t in (one, other, old))
            moved, moved_too = (one - old).norm(), (other - old).norm()
            if bool((moved - moved_too).abs() > 0.1 * moved + 1e-4 * (1e-6 + old.norm())):
                return f"the state '{name}' differs from that of the plain step"
    return ""
