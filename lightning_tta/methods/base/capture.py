"""Captured steps: what a method computes on batches of one shape is recorded once, as a CUDA graph, and replayed."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tta import collective
from lightning_tta.errors import ConfigError, UnsupportedModelError
from lightning_tta.methods.base import recorder
from lightning_tta.methods.base.baked import Key, Modules, change, host_randomness, settings, undeclared
from lightning_tta.methods.base.execution import Execution
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.base.recorder import modes
from lightning_tta.methods.base.state import Moment, State, put_back, take
from lightning_tta.metrics import collapse_measures

Outputs = tuple[Tensor, ...]
COUNTS = ("forwards", "backwards", "skipped_steps", "nonfinite_images")
"""Counters that every method has."""
STEP = "step"
"""The name of the part that is a whole step."""


Scalars = tuple[dict[str, Tensor], dict[str, Any]]
"""Notes, and counters, which are integers or tensors, by name."""


class Replayable(State, ABC):
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
    @abstractmethod
    def name(self) -> str:
        """The method's."""

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

    def check_capture(self, device: torch.device) -> None:
        """Refuse ``capture=True`` and ``compile=True`` where nothing can be recorded.

        Raises:
            ConfigError: With the reason.
        """
        if self.execution.capture is not False:
            self._capture.check(self.execution, device)

    def capture_report(self) -> dict[str, str]:
        """What was captured, by part and shape: ``recorded``, or the reason why not."""
        return self._capture.report()

    @abstractmethod
    def batch_among(self, tensors: Sequence[Tensor]) -> int:
        """Which of them is the batch whose statistics are still to be noted; -1 for none."""

    @abstractmethod
    def set_batch(self, x: Tensor) -> None:
        """The same batch, in another tensor."""

    @abstractmethod
    def noted_statistics(self) -> Outputs:
        """Statistics of the batch that a part has noted, and that are taken in at the end of the step."""

    @abstractmethod
    def note_statistics(self, noted: Outputs) -> None:
        """Counterpart of :meth:`noted_statistics`."""

    @abstractmethod
    def compiled(self) -> AbstractContextManager[None]:
        """While active, passes of the net are compiled."""


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
        self.recorder = recorder.make_recorder()
        self.recordings: dict[Key, Recording] = {}
        self.plain: dict[Key, str] = {}  # why a part is not replayed
        self._calls: dict[Key, int] = {}
        self._net: Modules | None = None
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
        self.why_not = self.check(method.execution, x.device)
        if self.why_not:
            return
        self.why_not = "" if usable else "the batch has images that are left out"
        if self._net is None:
            self._net = Modules(method)
        self.why_not = self.why_not or self._net.who_looks()
        self.active = not self.why_not
        layout = (method.layout, *self._net.held()) if self.active else None
        if self.active and self._layout != layout:
            self.clear()
            self._net = Modules(method)
            self._layout, self.active = (method.layout, *self._net.held()), True
        self._settings = (method.execution, *settings(method, method.optimizers.values())) if self.active else ()

    def check(self, execution: Execution, device: torch.device) -> str:
        """Why nothing can be recorded on a device; empty where something can.

        Raises:
            ConfigError: If that is so, and it was asked for.
        """
        reason = self.recorder.reason_against(device)
        reason = reason or ("several processes adapt as one" if collective.is_joined() else "")
        for option in ("capture", "compile"):
            if reason and getattr(execution, option) is True:
                raise ConfigError(f"{option}=True is not possible: {reason}. Use {option}=False.")
        return reason

    def key(self, name: str, tensors: Sequence[Tensor], batch: int = -1) -> Key:
        """What must be the same for a recording to be used; ``batch``: which tensor is to be accounted for."""
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        return name, kinds, batch, self._settings, modes(tensors[0].device.type)

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
        before, drawn, known = take(method), host_randomness(), undeclared(method)
        expected = _without_graph(function(*tensors))
        reason = "" if host_randomness() == drawn else "it draws random numbers on the host"
        reason = reason or change(known, undeclared(method))
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
