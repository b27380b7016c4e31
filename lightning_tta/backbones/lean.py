"""Passes whose graph keeps what the learned parameters need and no more, with the same gradients.

Where only norm layers learn, torch keeps about two maps for each convolution with norm layer and ReLU: the input of the
norm layer, and the output of the ReLU, which is the input of the next convolution too. The first is needed. Of the
second the ReLU needs one bit a value, and a convolution whose weight does not learn needs the shape. Plain layers run
with these instead; the kernels of both passes are torch's own. After Bhatia and Dangel, "Lowering PyTorch's Memory
Consumption for Selective Differentiation", arXiv 2404.12406; one bit in place of a byte is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Forward = Callable[[Tensor], Tensor]

LARGE = 2**20
"""Of an input with fewer values little is kept, and the host's time for a function in Python shows (some 20 us)."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU)
_MAXIMA = {
    nn.MaxPool2d: torch.ops.aten.max_pool2d_with_indices_backward,
    nn.MaxPool3d: torch.ops.aten.max_pool3d_with_indices_backward,
}
_AVERAGES = {nn.AvgPool2d: torch.ops.aten.avg_pool2d_backward, nn.AvgPool3d: torch.ops.aten.avg_pool3d_backward}
_DIMENSIONS = {nn.MaxPool2d: 4, nn.AvgPool2d: 4, nn.MaxPool3d: 5, nn.AvgPool3d: 5}  # of a batch; others take one image

_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, side by side in the highest byte


class _Shape:
    """Shape, strides and dtype of a tensor, for backward kernels that ask for it and read no value of it."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.strides, self.dtype = x.shape, x.stride(), x.dtype

    def empty(self, like: Tensor) -> Tensor:
        """A tensor of this shape without values, in the dtype of ``like``."""
        return like.new_empty_strided(self.shape, self.strides)


class _Convolution(Function):
    """A convolution whose weight is constant keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, plain: Forward) -> Tensor:
        y, cast = plain(x), getattr(plain, "cast", None)
        ctx.save_for_backward(weight if cast is None else cast.of(weight, y.dtype))
        ctx.set_materialize_grads(False)
        ctx.x, ctx.layer = _Shape(x), layer
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        layer, (weight,) = ctx.layer, ctx.saved_tensors
        x, _, bias = torch.ops.aten.convolution_backward(
            gradient,
            ctx.x.empty(gradient),
            weight.to(gradient.dtype),  # under autocast the layer ran with a copy, which nothing keeps
            None if ctx.bias is None else ctx.bias[0],
            layer.stride,
            layer.padding,
            layer.dilation,
            isinstance(layer, _TRANSPOSED),
            layer.output_padding,
            layer.groups,
            [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]],
        )
        x = None if x is None else x.to(ctx.x.dtype)
        return x, None, None if bias is None else bias.to(ctx.bias[1]), None, None


class _Rectifier(Function):
    """A ReLU, or one of its kind, keeps one bit a value: whether the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, plain: Forward) -> Tensor:
        y = plain(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        ctx.slope = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
        if isinstance(layer, nn.Hardtanh):
            passes = (y > layer.min_val).logical_and_(y < layer.max_val)
        else:  # no value of a ReLU is negative; on a CPU the first is three times as fast
            passes = y > 0 if ctx.slope else y.to(torch.bool)
        ctx.layout = passes.shape, passes.stride()
        ctx.save_for_backward(pack_bits(passes))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        (bits,), (shape, strides) = ctx.saved_tensors, ctx.layout
        return cut(gradient, bits, shape, strides, ctx.slope, select=gradient.device.type != "cpu"), None, None


def cut(
    gradient: Tensor, bits: Tensor, shape: torch.Size, strides: tuple[int, ...], slope: float, *, select: bool
) -> Tensor:
    """A gradient where a bit is set, and ``slope`` times it elsewhere.

    Args:
        gradient: Of the output.
        bits: From :func:`pack_bits`.
        shape: Of the mask that was packed.
        strides: Of the same.
        slope: Of a LeakyReLU; 0.
        select: Whether by ``torch.where``, which reads one byte a value, but is ten times slower on a CPU than the
            layers' own kernels, which read a number.
    """
    if select:
        passes = unpack_bits(bits, shape, strides, torch.bool)
        return torch.where(passes, gradient, gradient * slope if slope else 0)
    signs = unpack_bits(bits, shape, strides, gradient.dtype)
    if slope:
        return torch.ops.aten.leaky_relu_backward(gradient, signs, slope, False)  # type: ignore[no-any-return]
    if torch.is_grad_enabled():  # somebody differentiates the gradient
        return torch.ops.aten.threshold_backward(gradient, signs, 0)  # type: ignore[no-any-return]
    return torch.ops.aten.threshold_backward.grad_input(gradient, signs, 0, grad_input=signs)  # type: ignore[no-any-return]


class _MaxPool(Function):
    """Max pooling keeps the places of the maxima, in 16 bits where that is enough, and not its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        pool = F.max_pool2d_with_indices if isinstance(layer, nn.MaxPool2d) else F.max_pool3d_with_indices
        y, places = pool(
            x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, return_indices=True
        )
        ctx.set_materialize_grads(False)
        ctx.x, ctx.layer = _Shape(x), layer
        ctx.save_for_backward(places.to(_smallest_type(x.shape[2:].numel())))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if gradient is None:
            return None, None
        layer, (places,) = ctx.layer, ctx.saved_tensors
        x = _MAXIMA[type(layer)](
            gradient,
            ctx.x.empty(gradient),
            *(_each(size, gradient.ndim - 2) for size in (layer.kernel_size, layer.stride)),
            *(_each(size, gradient.ndim - 2) for size in (layer.padding, layer.dilation)),
            layer.ceil_mode,
            places.long(),
        )
        return x, None


class _AveragePool(Function):
    """Average pooling keeps the shape of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, plain: Forward) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.x, ctx.layer = _Shape(x), layer
        return plain(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        layer, number = ctx.layer, gradient.ndim - 2
        sizes = (_each(size, number) for size in (layer.kernel_size, layer.stride, layer.padding))
        how = layer.ceil_mode, layer.count_include_pad, layer.divisor_override
        return _AVERAGES[type(layer)](gradient, ctx.x.empty(gradient), *sizes, *how), None, None


def _smallest_type(number: int) -> torch.dtype:
    return next((t for t in (torch.int16, torch.int32) if number <= torch.iinfo(t).max), torch.int64)


def _each(size: Any, number: int) -> list[int]:
    return list(size) if isinstance(size, (tuple, list)) else [size] * number


def pack_bits(values: Tensor) -> Tensor:
    """A bool tensor, dense in whatever order, as bits in memory's order: (numel / 8,), uint8. Its values are used up.

    As it is where the number of values is no multiple of 8, or the machine keeps the highest byte first.
    """
    if values.numel() % 8 or sys.byteorder == "big":
        return values
    eights = values.as_strided((values.numel(),), (1,)).view(torch.int64).mul_(_GATHER)
    return eights.view(torch.uint8).view(-1, 8)[:, 7].contiguous()


def unpack_bits(bits: Tensor, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What :func:`pack_bits` was given, as 0 and 1 in ``dtype``; its memory is the caller's."""
    if bits.dtype == torch.bool:
        return bits.to(dtype, copy=True)
    number = torch.arange(256, device=bits.device)
    table = ((number[:, None] >> number[:8]) & 1).to(dtype)  # eight values a row, by the byte that holds them
    if dtype == torch.bool:
        table = table.view(torch.int64)  # moved as one
    rows = torch.index_select(table, 0, bits.to(torch.int32))
    return rows.view(dtype).as_strided(shape, strides)


def _output_tells(layer: Any) -> bool:
    """Whether a rectifier's output says which values are cut off, in any dtype."""
    if isinstance(layer, nn.Hardtanh):  # a limit that 16 bits round is not what the kernel compares with
        return all(float(limit).is_integer() and abs(limit) <= 256 for limit in (layer.min_val, layer.max_val))
    return not isinstance(layer, nn.LeakyReLU) or layer.negative_slope >= 0


def _is_cheap_to_keep(x: Tensor) -> bool:
    """Whether an input is small, or kept anyway: torch's ReLU keeps its output."""
    return x.numel() < LARGE or (x.grad_fn is not None and x.grad_fn.name() == "ReluBackward0")


def _lean_forward(layer: Any, only_free: bool, plain: Forward) -> Forward | None:
    """What runs in place of ``plain``, a forward of this layer; ``None`` if it is not one that can keep less."""
    kind = type(layer)

    def wanted(x: Tensor) -> bool:
        return x.requires_grad and torch.is_grad_enabled() and not (only_free and _is_cheap_to_keep(x))

    def rectify(x: Tensor) -> Tensor:
        return _Rectifier.apply(x, layer, plain) if wanted(x) else plain(x)

    def maximum(x: Tensor) -> Tensor:
        fits = x.ndim == _DIMENSIONS[kind] and wanted(x)
        return _MaxPool.apply(x, layer) if fits else plain(x)

    def average(x: Tensor) -> Tensor:
        fits = x.ndim == _DIMENSIONS[kind] and wanted(x)
        return _AveragePool.apply(x, layer, plain) if fits else plain(x)

    def convolve(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias  # which functional_call may have replaced
        learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if weight.requires_grad or x.ndim != weight.ndim or not (learns or wanted(x)):
            return plain(x)
        return _Convolution.apply(x, weight, bias, layer, plain)  # type: ignore[no-any-return]

    if kind in _CONVOLUTIONS or kind in _TRANSPOSED:
        return convolve if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) else None
    if kind in _RECTIFIERS:
        return rectify if _output_tells(layer) and not only_free else None
    if kind in _MAXIMA:
        return None if layer.return_indices else maximum
    return average if kind in _AVERAGES else None


class _Functions(TorchFunctionMode):
    """``torch.nn.functional.relu`` and its other names, as the layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RELUS and args and args[0].requires_grad and torch.is_grad_enabled():
            return _Rectifier.apply(args[0], _RELU, lambda x: func(x, *args[1:], **kwargs))
        return func(*args, **kwargs)


_RELUS = (F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_)
_RELU = nn.ReLU()


def _calls_relu(module: nn.Module) -> bool:
    """Whether the forward of a module names a function ``relu``."""
    code = getattr(type(module).forward, "__code__", None)
    names = set() if code is None or type(module).__module__.startswith("torch.nn.") else set(code.co_names)
    return not names.isdisjoint({"relu", "relu_"} - {name for name, _ in module.named_children()})


@dataclass
class _Plan:
    """What :func:`lean_backward` puts in place.

    Attributes:
        forwards: By layer.
        over: Those over a forward with a kept cast of the weight, and that forward, by layer.
        weighted: The layers whose weights must not learn.
        calls_relu: Whether the net calls the function.
    """

    forwards: dict[nn.Module, Forward]
    over: dict[nn.Module, tuple[Forward, Forward | None]]
    weighted: list[nn.Module]
    calls_relu: bool


_PLANS: WeakKeyDictionary[nn.Module, dict[bool, _Plan]] = WeakKeyDictionary()


def _plan(model: nn.Module, only_free: bool) -> _Plan:
    plans = _PLANS.setdefault(model, {})
    if only_free not in plans:
        layers = [layer for layer in model.modules() if layer is not model and _is_plain(layer)]
        forwards = {layer: _lean_forward(layer, only_free, partial(type(layer).forward, layer)) for layer in layers}
        plans[only_free] = _Plan(
            {layer: forward for layer, forward in forwards.items() if forward is not None},
            {},
            [layer for layer in layers if isinstance(layer, _CONVOLUTIONS + _TRANSPOSED)],
            not only_free and any(map(_calls_relu, model.modules())),
        )
    return plans[only_free]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer runs its class's forward, or that with a kept cast of its weight (``casts.FrozenCasts``)."""
    forward = vars(layer).get("forward")
    return forward is None or hasattr(forward, "cast")


@contextmanager
def lean_backward(model: nn.Module, *, only_free: bool = False) -> Iterator[None]:
    """While active, passes of ``model`` keep for the backward pass what learns needs, and give the same gradients.

    Convolutions (also transposed ones) whose weight does not require gradients keep no input; ReLU, ReLU6, Hardtanh and
    LeakyReLU one bit a value; max pooling the places of the maxima, in 16 bits where that is enough; average pooling
    nothing. That is so of layers of exactly torch's types, and of ``torch.nn.functional.relu`` in the forward of one of
    the net's modules. A layer that has a ``forward`` of its own, padding by name or by other values than zeros, runs as
    it is. Norm layers do: what they keep is needed. Linear layers do: torch keeps no input of one whose weight is
    constant. Where a convolution learns, its input is kept, which is the output of the layer before: such a net runs as
    it is. Hooks, autocast, ``functional_call``, checkpointing and second derivatives work as without this.

    Args:
        model: Any net. Its layers' forwards are replaced; that of a net that is a single layer is not.
        only_free: Only what adds no operation to the plain pass: convolutions and pooling, where their input has at
            least :data:`LARGE` values and no ReLU keeps it. The bits of a ReLU cost time: by the bytes that are read
            and written, 7 more for each value of 4 bytes on a GPU, where the plain ReLU needs 20 in both passes.
    """
    plan = _plan(model, only_free)
    learns = any(layer.weight.requires_grad for layer in plan.weighted)
    installed: list[tuple[dict[str, Any], Forward | None]] = []
    try:
        for layer, forward in ({} if learns else plan.forwards).items():
            attributes = layer.__dict__  # not setattr: a module's costs more than all the rest
            before = attributes.get("forward")
            if before is not None and hasattr(before, "cast"):
                if layer not in plan.over or plan.over[layer][0] is not before:
                    plan.over[layer] = before, _lean_forward(layer, only_free, before)
                forward = plan.over[layer][1] or before
            elif before is not None:
                continue
            installed.append((attributes, before))
            attributes["forward"] = forward
        with _Functions() if plan.calls_relu and not learns else nullcontext():
            yield
    finally:
        for attributes, before in installed:
            attributes.pop("forward", None)
            if before is not None:
                attributes["forward"] = before
