"""What a run wants to know of a batch comes to the host in one copy, which nobody has to wait for at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tta.run.summary import BatchRecord


def is_asynchronous(device: torch.device) -> bool:
    """Whether a device works on while the host goes on, so that reading at once makes one of them wait."""
    return device.type == "cuda"


class Readback:
    """Tensors on their way to the host, with the values that they have now.

    The bytes of those on a device are packed there into one tensor, which is copied once: on CUDA into pinned memory,
    in the order of the stream. So whoever reads later gets the same, whatever is written to the tensors meanwhile.

    Args:
        tensors: By name, of any shape and kind; those on the CPU are taken as they are, unless ``pack`` is set.
        pack: Also copy those on the CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pack: bool = False) -> None:
        self._tensors = dict(tensors)
        moved = {name: t.detach() for name, t in tensors.items() if pack or t.device.type != "cpu"}
        moved = dict(sorted(moved.items(), key=lambda item: -item[1].element_size()))  # each begins where its kind may
        self._kinds = {name: (t.shape, t.dtype) for name, t in moved.items()}
        self._packed: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        if not moved:
            return
        packed = torch.cat([t.reshape(-1).view(torch.uint8) for t in moved.values()])
        if packed.device.type == "cuda":
            self._packed = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(packed.device))
        else:
            self._packed = packed.cpu()

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._packed is not None:
            start = 0
            for name, (shape, dtype) in self._kinds.items():
                end = start + math.prod(shape) * dtype.itemsize
                # not a view: pinned memory is scarce, and the account of a stream keeps some of these
                self._tensors[name] = self._packed[start:end].clone().view(dtype).view(shape)
                start = end
            self._packed = None
        return self._tensors


class Moment:
    """A moment in the work of a device: now, or when it has done all that it was given so far."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds between two moments on one device; waits until it is there."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


class UnreadBatch:
    """A batch that was adapted on, of which nobody knows yet what came out.

    Args:
        outputs: What the record is made of beside ``rest``, such as ``logits`` (B, K): tensors on the device.
        stats: What the method's ``stats`` are made of: scalars on the device, and numbers.
        span: When the method began, and when it had done.
        rest: The other fields of its :class:`~lightning_tta.run.summary.BatchRecord`, which the host knows.
        make: Makes the record of ``outputs`` and ``rest``, by name.
        pack: See :class:`Readback`.
    """

    def __init__(
        self,
        outputs: Mapping[str, Tensor],
        stats: Mapping[str, Tensor | float],
        span: tuple[Moment, Moment],
        rest: dict[str, Any],
        *,
        make: Callable[..., BatchRecord] = BatchRecord,
        pack: bool = False,
    ) -> None:
        self._span, self.rest, self._outputs, self._make = span, rest, list(outputs), make
        self._names = list(stats)
        self._numbers = {name: value for name, value in stats.items() if not isinstance(value, Tensor)}
        scalars = {f"stats/{name}": value for name, value in stats.items() if isinstance(value, Tensor)}
        self._readback = Readback({**outputs, **scalars}, pack=pack)

    def __len__(self) -> int:
        return len(self.rest["index"])

    def cost(self) -> tuple[dict[str, float], float]:
        """The method's stats, those that are numbers, and its seconds; waits for the device."""
        tensors, numbers = self._readback.read(), self._numbers
        values = {n: float(numbers[n] if n in numbers else tensors[f"stats/{n}"]) for n in self._names}
        start, end = self._span
        return {name: value for name, value in values.items() if value == value}, end.seconds_since(start)

    def record(self) -> BatchRecord:
        """What came out; waits for the device."""
        stats, seconds = self.cost()
        tensors = self._readback.read()
        outputs = {name: tensors[name] for name in self._outputs}
        return self._make(**outputs, stats=stats, seconds=seconds, **self.rest)


class Transfer:
    """Copies images to a device; to CUDA in a stream of its own, beside what the device is at work on."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, images: Tensor, device: torch.device) -> Tensor:
        """The images on the device."""
        if device.type != "cuda" or images.device.type != "cpu":
            return images.to(device)
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            moved = images.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._stream)
        moved.record_stream(current)  # its memory is not given to others before the current stream is done with it
        return moved
