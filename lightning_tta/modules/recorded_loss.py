"""A training loss and its gradients as one recording a shape, for losses of thousands of small operations."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_tta.errors import ConfigError, UnsupportedModelError, in_one_line
from lightning_tta.methods.base import recorder
from lightning_tta.methods.base.execution import Capture
from lightning_tta.methods.base.recorder import hooks_of, modes, who_looks

Losses = tuple[Tensor, ...]
"""The loss, and further scalars."""


@dataclass
class _Recording:
    """Of one shape.

    Attributes:
        inputs: Where its inputs go.
        losses: Where its results stand after a replay.
        gradients: The same; ``None`` for parameters that the loss does not depend on.
        replay: Repeats it.
        checked: Whether it has given what the plain way gives.
        replays: Number of replays so far.
    """

    inputs: list[Tensor]
    losses: Losses
    gradients: list[Tensor | None]
    replay: Callable[[], None]
    checked: bool = False
    replays: int = 0


class _Replayed(Function):
    """The loss of a replay, whose gradients by the parameters are there already."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.number = recording, recording.replays
        return recording.losses[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.recording
        if recording.replays != ctx.number:
            raise RuntimeError(
                "backward() of a recorded loss came after the next one was computed, which has overwritten its "
                "gradients. Call it before that, or set capture=False."
            )
        scaled = iter(torch._foreach_mul([g for g in recording.gradients if g is not None], factor))
        return None, *(None if gradient is None else next(scaled) for gradient in recording.gradients)


class RecordedLoss:
    """Computes a loss of tensors; where it can, forward and backward are recorded once a shape and replayed.

    A replay costs the host one call. The loss that comes back is differentiable by the parameters as the plain one is,
    so that accumulation, clipping and hooks of gradients are what they were. Per shape there are :attr:`WARM_UPS`
    plain calls, then the recording; the call after that takes both ways, on a batch of its own, and the recording is
    used only if loss and gradients agree. Else, and where torch refuses to record, a warning says why, and the plain
    way is taken from then on.

    Args:
        capture: ``auto``: where it can; ``True``: refuse to go on where it cannot; ``False``: never.

    Attributes:
        WARM_UPS: What torch sets up at the first calls of a shape cannot be recorded.
        LIMIT: At most this many recordings.
    """

    WARM_UPS: ClassVar[int] = 2
    LIMIT: ClassVar[int] = 8

    def __init__(self, capture: Capture = "auto") -> None:
        if capture not in (True, False, "auto"):
            raise ConfigError(f"capture must be True, False or 'auto'; got {capture!r}.")
        self.capture: Capture = capture
        self.clear()

    def clear(self) -> None:
        """Forget all recordings, and give their memory back."""
        self.recorder = recorder.make_recorder()
        self.recordings: dict[Hashable, _Recording] = {}
        self.failed: dict[Hashable, str] = {}
        """Why a shape is not replayed."""
        self._calls: dict[Hashable, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedLoss:
        return RecordedLoss(self.capture)

    def __reduce__(self) -> tuple[type[RecordedLoss], tuple[Capture]]:
        return RecordedLoss, (self.capture,)

    def check(self, device: torch.device, processes: int) -> None:
        """Refuse ``capture=True`` where nothing can be recorded.

        Raises:
            ConfigError: With the reason.
        """
        reason = self._reason_against(device, processes)
        if self.capture is True and reason:
            raise ConfigError(f"capture=True is not possible: {reason}. Use capture='auto' or False.")

    def __call__(
        self,
        net: nn.Module,
        function: Callable[..., Losses],
        tensors: Sequence[Tensor],
        *,
        settings: Hashable = (),
        processes: int = 1,
    ) -> Losses:
        """``function(*tensors)``, plainly or replayed.

        Args:
            net: What it runs, and by whose parameters the loss is differentiated.
            function: Of tensors alone: the loss, and scalars without gradient. It asks the host nothing, and what it
                needs beside the tensors given and those of ``net`` is the same in every call, or in ``settings``.
            tensors: Its arguments.
            settings: What tells one function from another.
            processes: How many processes train together; several take the plain way.
        """
        device = tensors[0].device
        if self.capture is False or self._reason_against(device, processes) or who_looks(hooks_of(net.modules())):
            return function(*tensors)
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        key = (
            settings,
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
            tuple(t.data_ptr() for t in itertools.chain(net.parameters(), net.buffers())),
            tuple(id(parameter) for parameter in parameters),
            modes(device.type),
        )
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if key in self.failed or calls <= self.WARM_UPS:
            return function(*tensors)
        found = self.recordings.get(key)
        if found is None:
            if len(self.recordings) < self.LIMIT:  # before the plain way: its graph would hold nodes of another stream
                self._try(key, lambda: self._record(key, function, tensors, parameters))
            return function(*tensors)
        if not found.checked:
            return self._checked(key, found, function, tensors, parameters)
        return _replayed(found, tensors, parameters)

    def _reason_against(self, device: torch.device, processes: int) -> str:
        if processes > 1:
            return "several processes train together"
        if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
            return "gradients in float16 need the scaled loss"
        return self.recorder.reason_against(device)

    def _record(
        self, key: Hashable, function: Callable[..., Losses], tensors: Sequence[Tensor], parameters: list[nn.Parameter]
    ) -> str:
        inputs = [tensor.detach().clone() for tensor in tensors]
        device = inputs[0].device.type
        # Without the cache of casts: it holds those of weights as they are now.
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )

        def run() -> tuple[Losses, list[Tensor | None]]:
            with autocast:
                losses = function(*inputs)
            gradients = torch.autograd.grad(losses[0], parameters, allow_unused=True)
            return tuple(value.detach() for value in losses), list(gradients)

        (losses, gradients), replay = self.recorder.record(run, inputs[0].device)
        self.recordings[key] = _Recording(inputs, losses, gradients, replay)
        return ""

    def _checked(
        self,
        key: Hashable,
        found: _Recording,
        function: Callable[..., Losses],
        tensors: Sequence[Tensor],
        parameters: list[nn.Parameter],
    ) -> Losses:
        losses = function(*tensors)
        expected = torch.autograd.grad(losses[0], parameters, retain_graph=True, allow_unused=True)

        def compare() -> str:
            again = _replayed(found, tensors, parameters)
            pairs = [*zip(losses, again, strict=True), *zip(expected, found.gradients, strict=True)]
            return _difference(pairs, 1e-9 if losses[0].dtype == torch.float64 else 1e-3)

        self._try(key, compare)
        found.checked = key not in self.failed
        return losses

    def _try(self, key: Hashable, run: Callable[[], str]) -> None:
        """Run something that gives a reason why the shape takes the plain way, or fails."""
        try:
            reason = run()
        except (RuntimeError, NotImplementedError) as error:  # torch's, CUDA's, of memory too
            reason = in_one_line(error)
        if not reason:
            return
        self.failed[key] = reason
        self.recordings.pop(key, None)
        text = f"The training step cannot be recorded, and runs as it is: {reason}."
        if self.capture is True:
            raise UnsupportedModelError(f"{text} Use capture='auto' or False.")
        warnings.warn(f"{text} With capture=False it is not tried.", stacklevel=4)


def _replayed(found: _Recording, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Losses:
    with torch.no_grad():
        for place, tensor in zip(found.inputs, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        found.replay()
        found.replays += 1
        others = [value.clone() for value in found.losses[1:]]
    return _Replayed.apply(found, *parameters), *others


@torch.no_grad()
def _difference(pairs: Iterable[tuple[Tensor | None, Tensor | None]], tolerance: float) -> str:
    """How a replay differs from the plain way, beyond rounding; empty if it does not."""
    distances, lengths = [], []
    for one, other in pairs:
        if one is None or other is None:
            if one is not other:
                return "another set of parameters has gradients"
            continue
        distances.append((one.detach().double() - other.detach().double()).norm())
        lengths.append(one.detach().double().norm())
    distance, length = torch.stack(distances), torch.stack(lengths)
    largest = length.max().clamp_min(torch.finfo(length.dtype).tiny)
    # Where a gradient is 0 but for rounding, as that of a convolution's bias before BatchNorm, only its size counts.
    close = distance <= tolerance * length + 0.1 * tolerance * largest
    same = bool((close | (length.isnan() & distance.isnan())).all())
    return "" if same else "its loss or its gradients differ from those of the plain way"
