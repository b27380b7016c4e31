"""16-bit copies of frozen weights, kept from pass to pass: autocast makes them anew in each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tta.backbones.norms import replaced_forwards
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.quantized import is_quantized

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_version = attrgetter("_version")
_address: Callable[[Any], int] = Tensor.data_ptr


class FrozenCasts:
    """Copies, in autocast's dtype, of the weights of a net's convolutions and linear layers that do not learn.

    A layer with torch's own forward then computes what it computes under autocast without its cache, to the last bit:
    autocast casts nothing that has its dtype already. Names, parameters and state dict stay as they are. A weight that
    learns, that has another tensor in its place (``functional_call``) or was written to since the call began is cast
    anew; so is every weight in a region without autocast, in that autocast's dtype, and in what torch.compile traces.

    A copy is made at its first use and keeps its address: a call that begins after its weight was written to, in place
    or by ``to()``, writes to it first. The copies take half the memory of the float32 weights they are of.

    Args:
        model: The net.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._casts: list[_Cast] | None = None  # None: not looked for yet
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self._states: dict[tuple[torch.device, torch.dtype], tuple[int, int]] = {}
        self._current: tuple[torch.device, torch.dtype] | None = None

    def __reduce__(self) -> tuple[type[FrozenCasts], tuple[nn.Module]]:
        return FrozenCasts, (self.model,)  # a copy makes copies of its own

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for cast in self._casts or () for copy in cast.copies.values())

    def drop(self) -> None:
        """Forget all copies, as after a conversion of the net."""
        self.__init__(self.model)  # type: ignore[misc]

    def active(self, device: torch.device) -> AbstractContextManager[None]:
        """While active, layers run with the copies, where the caller's autocast is on; costs next to nothing if not."""
        if not torch.is_autocast_enabled(device.type):
            return nullcontext()
        self._refresh(device, torch.get_autocast_dtype(device.type))
        mine = {layer: forward for layer, forward in self._forwards.items() if "forward" not in vars(layer)}
        return replaced_forwards(mine) if mine else nullcontext()

    def keep_up(self) -> None:
        """Bring the copies that there are up to date, where no layer will look: a recorded pass reads them."""
        for kind in list(self._states):
            self._refresh(*kind)

    def _refresh(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._casts is None:
            self._casts, self._forwards = _find(self.model, device.type)
        sources = [cast.source for cast in self._casts]
        state = sum(map(_version, sources)), sum(map(_address, sources))
        if self._current != (device, dtype) or state != self._states.get((device, dtype)):
            for cast in self._casts:
                cast.refresh(dtype)
            self._states[device, dtype], self._current = state, (device, dtype)


class _Cast:
    """A parameter and its copy."""

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy, if it is one of ``weight`` as it is now in this dtype; else ``weight``."""
        copy = self.copy
        fits = weight is self.source and copy is not None and copy.dtype == dtype and self.version == weight._version
        return copy if fits and copy is not None else weight

    def __init__(self, source: nn.Parameter) -> None:
        self.source = source
        self.copies: dict[torch.dtype, Tensor] = {}  # each keeps its address: a recording may read it
        self._of: dict[torch.dtype, tuple[int, int]] = {}  # which source they are of
        self.copy: Tensor | None = None  # the one in use
        self.version = -1  # of the source, when it was copied

    def refresh(self, dtype: torch.dtype) -> None:
        source, copy = self.source, self.copies.get(dtype)
        if source.requires_grad or source.dtype != torch.float32:
            self.copy, self.version = None, -1
            return
        if copy is None or self._of[dtype] != _where(source):
            with outside_inference_mode(), torch.no_grad():
                fresh = source.detach().to(dtype)
                if copy is None or (copy.device, copy.stride()) != (fresh.device, fresh.stride()):
                    self.copies[dtype] = fresh
                else:
                    copy.copy_(fresh)
            self._of[dtype] = _where(source)
        self.copy, self.version = self.copies[dtype], source._version


def _where(source: Tensor) -> tuple[int, int]:
    return source._version, source.data_ptr()


def _find(model: nn.Module, kind: str) -> tuple[list[_Cast], dict[nn.Module, Callable[[Tensor], Tensor]]]:
    """Layers with torch's own forward and parameters of their own, and what they run with while copies are used."""
    casts: dict[int, _Cast] = {}
    forwards = {}
    for layer in model.modules():
        run = _run(layer)
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if run is None or weight is None or weight.is_inference() or (bias is not None and bias.is_inference()):
            continue
        if is_quantized(weight):
            continue
        own = [casts.setdefault(id(p), _Cast(p)) for p in (weight, bias) if p is not None]
        forwards[layer] = _forward(layer, run, own[0], own[1] if bias is not None else None, kind)
    return list(casts.values()), forwards


def _run(layer: nn.Module) -> Callable[..., Tensor] | None:
    """What torch's own forward of a layer calls with input, weight and bias; ``None`` for other layers."""
    if "forward" in vars(layer):
        return None
    if type(layer).forward is nn.Linear.forward:
        return functional.linear
    for kind in _CONVOLUTIONS:
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return layer._conv_forward if type(layer)._conv_forward is kind._conv_forward else None
    return None


def _forward(
    layer: nn.Module, run: Callable[..., Tensor], weight: _Cast, bias: _Cast | None, kind: str
) -> Callable[[Tensor], Tensor]:
    plain, slots = layer.forward, layer._parameters

    def forward(input: Tensor) -> Tensor:
        copy = weight.copy
        if (
            copy is None
            or slots["weight"] is not weight.source
            or weight.source._version != weight.version
            or weight.source.requires_grad
            or torch.compiler.is_compiling()
            or not torch.is_autocast_enabled(kind)
            or torch.get_autocast_dtype(kind) != copy.dtype
        ):
            return plain(input)  # type: ignore[no-any-return]
        offset = slots["bias"]
        if bias is not None and offset is bias.source and bias.copy is not None and offset._version == bias.version:
            offset = offset if offset.requires_grad else bias.copy  # type: ignore[assignment]
        return run(input, copy, offset)

    forward.cast = weight  # type: ignore[attr-defined]  # for what wraps it
    return forward
