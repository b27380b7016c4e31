"""Normalisation layers of any net: finding them by type, and choosing which statistics BatchNorm uses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils import parametrize

from lightning_tta import collective
from lightning_tta.backbones.copying import copy_net
from lightning_tta.backbones.quantized import FORWARD_ONLY
from lightning_tta.backbones.split import execution_order, is_inside, parts_by_depth
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32

NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""The norm layers torch knows: BatchNorm (SyncBatchNorm too), InstanceNorm, GroupNorm, LayerNorm, RMSNorm."""

StatisticsRule = Callable[[str, _BatchNorm, Tensor], "tuple[Tensor, Tensor] | None"]
"""Given (layer name, layer, input): the mean and variance (C,) to normalise with, or None for the batch's own."""


def is_norm_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of :data:`NORM_TYPES`, or a user's "...norm..." that normalises.

    That has one-dimensional parameters, and depends on statistics: of its input, so that it is no affine map of it and
    does not take each value by itself, or running ones, which are buffers of the parameters' size. ``(x - mean) / std``
    of pixels is none, clamped or not.
    """
    if isinstance(module, NORM_TYPES):
        return True
    parameters = list(module.parameters(recurse=False))
    if not parameters or "norm" not in type(module).__name__.lower() or any(p.ndim != 1 for p in parameters):
        return False
    shapes = {p.shape for p in parameters}
    return any(b.shape in shapes for b in module.buffers(recurse=False)) or not _is_affine_or_pointwise(
        module, len(parameters[0])
    )


@torch.no_grad()
def _is_affine_or_pointwise(module: nn.Module, width: int) -> bool:
    """Whether a layer of this width maps f(x) + f(y) = f(x + y) + f(0), or each value apart from the others.

    Tried on layouts of images and of tokens.
    """
    try:
        twin = copy_net(module).eval()
    except UnsupportedModelError:
        return False
    like = next(twin.parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():  # a scale that is still 0 would hide what the layer does
        parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    for shape in ((2, width, 4, 4), (2, 4, width), (2, width)):
        x, y = (torch.randn(shape, generator=generator).to(like) for _ in range(2))
        try:
            apart = twin.forward(x) + twin.forward(y)
            joint = twin.forward(x + y) + twin.forward(torch.zeros_like(x))
            half = (torch.rand(shape, generator=generator) < 0.5).to(x.device)
            changed = (twin.forward(torch.where(half, x, 3 * y)) != twin.forward(x)) | apart.isnan()
        except Exception:  # not this layer's layout
            continue
        is_affine = torch.allclose(apart, joint, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))
        return is_affine or (changed.shape == half.shape and not bool(changed[half].any()))
    return False


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All normalisation layers of ``model`` by module name, in the net's own order."""
    return {name: module for name, module in model.named_modules() if is_norm_layer(module)}


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The affine weight and bias of every normalisation layer, by parameter name; a shared parameter once.

    Of a user's own norm layer: all parameters, whatever their names. Of a weight that is computed (parametrised or
    pruned): what it is computed from.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.
    """
    names: dict[nn.Parameter, str] = {}
    for layer_name, layer in norm_layers(model).items():
        for name, parameter in layer.named_parameters(layer_name, recurse=False):
            leaf = name.rpartition(".")[2].removesuffix("_orig")
            if not isinstance(layer, NORM_TYPES) or leaf in ("weight", "bias"):
                names.setdefault(parameter, name)
        if parametrize.is_parametrized(layer):
            computed = layer.get_submodule("parametrizations")
            for name, parameter in computed.named_parameters(f"{layer_name}.parametrizations".lstrip(".")):
                names.setdefault(parameter, name)
    if not names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no normalisation layer with affine parameters, which this method adapts. "
            "Allowed: nets with BatchNorm, GroupNorm, LayerNorm, InstanceNorm (affine) or RMSNorm layers; a quantised "
            "or fused net has none: adapt the one it was made from, or use a method without gradients "
            f"({FORWARD_ONLY}). "
            "Or use method 'source' (no adaptation) for this net, or put normalisation layers into it."
        )
    return {name: parameter for parameter, name in names.items()}


def early_norm_parameters(model: nn.Module, frozen_fraction: float) -> dict[str, nn.Parameter]:
    """:func:`norm_parameters` without those of the last stages or blocks of the net and of what comes after them.

    Of the stages or blocks (:func:`~lightning_tta.backbones.split.parts_by_depth`; in a net without such each norm
    layer is one), the last ``frozen_fraction``, in [0, 1], rounded up, but not the first one, and all norm layers
    behind are left out. Depth is the order of execution; layers that do not run are left out; where no pass can be
    tried, it is the net's own order. With 0.25: ``layer4`` of a ResNet; of a ViT with 12 blocks the last 3 and the
    final norm.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.
    """
    check_range("frozen_fraction", frozen_fraction, 0, 1)
    parameters = norm_parameters(model)
    layers = list(dict.fromkeys(map(owner, parameters)))
    order = execution_order(model)
    if order is not None and not set(layers).isdisjoint(order):
        layers = sorted(set(layers).intersection(order), key=order.index)
    first = {
        part: next(i for i, layer in enumerate(layers) if is_inside(layer, part))
        for part in parts_by_depth(model, layers) or layers
    }
    parts = sorted(first, key=first.__getitem__)
    frozen = min(math.ceil(frozen_fraction * len(parts) - 1e-9), len(parts) - 1)
    if frozen > 0:
        layers = layers[: first[parts[-frozen]]]
    return {name: p for name, p in parameters.items() if owner(name) in layers}


def owner(parameter: str) -> str:
    """The name of the layer that a parameter belongs to, also where the layer's weight is computed from it."""
    layer, computed, _ = parameter.rpartition(".parametrizations.")
    return layer if computed else parameter.rpartition(".")[0]


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """All BatchNorm layers (any dimension, subclasses and SyncBatchNorm included) by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def moments(x: Tensor, dims: Sequence[int], *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``x`` over ``dims``, in at least float32.

    On a CPU in two passes: torch's own reduction in one pass is ten times slower there.
    """
    x = at_least_float32(x)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dim=list(dims), correction=int(unbiased))
        return mean, var
    center = x.mean(list(dims), keepdim=True)
    mean, deviation = center.squeeze(list(dims)), x - center
    count = x.numel() // max(mean.numel(), 1)
    squares = deviation * deviation if deviation.requires_grad else deviation.mul_(deviation)
    return mean, squares.sum(list(dims)) / (count - int(unbiased))


def batch_moments(x: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of ``x`` (B, C, ...), in at least float32; where processes are joined, of all of them."""
    dims = [0, *range(2, x.ndim)]
    if collective.is_joined():
        return collective.moments(x, dims, unbiased=unbiased)[:2]
    return moments(x, dims, unbiased=unbiased)


def merged_moments(old: Tensor, new: Tensor, weight: Tensor | float) -> Tensor:
    """Mean and variance, in rows (2, C), of a mixture: share ``weight`` of ``new``, 0-dimensional, the rest ``old``.

    The law of total variance: ``(1 - w) var_old + w var_new + w (1 - w) (mean_new - mean_old)^2``.
    """
    distance = new[0] - old[0]
    merged = torch.lerp(old, new, weight)
    merged[1].addcmul_(distance, distance * (weight - weight * weight))
    return merged


class MomentsRecord:
    """Mean and biased variance that the BatchNorm layers of a net took of a batch, in one pass.

    Goes to :func:`batch_statistics`. From :meth:`begin` to :meth:`end` the pass is recorded, at next to no cost:
    torch's own kernel computes the moments anyway, and writes them to tensors that stand in for the layer's running
    statistics. Of a layer that runs several times in the pass, the moments of all its inputs.

    Args:
        model: The net.

    Attributes:
        places: Where each layer has its channels in rows of means and variances (2, C), the layers one after the other.
        is_on: Whether the present pass is recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = batch_norm_layers(model)
        sizes = [layer.num_features for layer in layers.values()]
        ends = list(itertools.accumulate(sizes))
        self.layers = layers
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] | None = None  # making them costs time
        self.places = {n: slice(end - size, end) for n, end, size in zip(layers, ends, sizes, strict=True)}
        tensors = (t for layer in layers.values() for t in (layer.weight, layer.running_mean) if t is not None)
        self._like = next(tensors, torch.zeros(())).detach().new_zeros(())
        self.is_on = False
        self._sources: list[tuple[dict[str, Any], Tensor | None]] = []
        self._lengths: dict[str, int] = {}  # values a channel, of the layers to which torch's kernel wrote
        self._taken: dict[str, tuple[Tensor, int]] = {}  # moments (2, C) that came in another way, and of how many runs
        self._make_room()

    def _make_room(self) -> None:
        """New tensors: old ones may hold NaN, which the kernel would keep, or belong to a graph."""
        sizes = [place.stop - place.start for place in self.places.values()]
        widths = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        rows = torch.split(self._like.new_zeros(2 * sum(widths)), widths * 2)
        if widths != sizes:
            rows = tuple(row[:size] for row, size in zip(rows, sizes * 2, strict=True))
        means, variances = rows[: len(sizes)], rows[len(sizes) :]
        self._rows = dict(zip(self.places, zip(means, variances, strict=True), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": None, "_sources": []}  # which hold these layers, not those of a copy

    def begin(self) -> None:
        """Record the coming pass."""
        self.is_on = True
        self._lengths, self._taken = {}, {}
        self._make_room()

    def end(self) -> None:
        """Record no more."""
        self.is_on = False

    def result(self, old: Tensor, number: Tensor) -> Tensor:
        """What was recorded (2, C), in the dtype of ``old`` (2, C), which layers that did not run keep.

        One value a channel counts as a batch without variance, if ``number``, 0-dimensional, of the passes that ``old``
        is from is positive; else its layer keeps ``old`` too.
        """
        moments, factors = dict(self._rows), []
        for name, place in self.places.items():
            length = self._lengths.get(name, 0)
            factors.append((length - 1) / length if length else 1.0)  # torch's kernel writes the unbiased variance
            if name in self._taken:
                value = self._taken[name][0].to(old.dtype)
                mean, var = (
                    value
                    if len(value) == 2
                    else torch.where(number > 0, torch.cat([value, torch.zeros_like(value)]), old[:, place])
                )
                moments[name] = (mean, var)
            elif not length:
                moments[name] = (old[0, place], old[1, place])
        means, variances = zip(*moments.values(), strict=True)
        return torch.cat([*means, *torch._foreach_mul(variances, factors)]).view(2, -1).to(old.dtype)

    def fits(self, layer: _BatchNorm) -> bool:
        """Whether torch's kernel can write here while this layer, with torch's own forward, runs."""
        like = layer.running_mean if layer.weight is None else layer.weight
        same = like is None or (like.dtype, like.device) == (self._like.dtype, self._like.device)
        same = same and isinstance(layer, tuple(_DIMENSIONS))
        return same and type(layer).forward is _BatchNorm.forward and "forward" not in vars(layer)

    def forwards(self) -> Mapping[nn.Module, Callable[[Tensor], Tensor]]:
        """:meth:`forward` of each layer that :meth:`fits`."""
        if self._forwards is None:
            fitting = {name: layer for name, layer in self.layers.items() if self.fits(layer)}
            self._forwards = {layer: self.forward(name, layer) for name, layer in fitting.items()}
            self._sources = [(vars(layer), layer.running_mean) for layer in fitting.values()]
        usual = all("forward" not in slot and slot["_buffers"]["running_mean"] is m for slot, m in self._sources)
        return self._forwards if usual else {x: self.forward(n, x) for n, x in self.layers.items() if self.fits(x)}

    def forward(self, name: str, layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
        """In place of the layer's forward: the same with statistics of the batch, which are written here."""
        plain, source = layer.forward, layer.running_mean
        dimensions = next(d for kind, d in _DIMENSIONS.items() if isinstance(layer, kind))

        def forward(x: Tensor) -> Tensor:
            if layer.running_mean is not source or x.ndim not in dimensions:
                return plain(x)  # another rule is active inside this one, or the layer refuses the input
            length = x.numel() // max(layer.num_features, 1)
            if source is not None and length == 1:
                self.take_one(name, x)
                return plain(x)  # one value a channel has no variance: this layer keeps its source statistics
            again = self.is_on and (name in self._lengths or name in self._taken)
            mean, var = map(torch.zeros_like, self._rows[name]) if again else self._rows[name]
            y = batch_norm(x, mean, var, layer.weight, layer.bias, True, 1.0, layer.eps)
            if again:
                self.take(name, mean, var * ((length - 1) / length))
            elif self.is_on:
                self._lengths[name] = length
            return y

        return forward

    def take(self, name: str, mean: Tensor, var: Tensor) -> None:
        """Note moments (C,) that somebody else has computed."""
        if not self.is_on:
            return
        moments, number = torch.stack([mean, var]), 1
        if name in self._lengths:  # of an earlier run of the layer
            length = self._lengths.pop(name)
            first, var = self._rows[name]
            self._taken[name] = (torch.stack([first, var * ((length - 1) / length)]), 1)
        if name in self._taken:
            earlier, number = self._taken[name]
            number += 1
            moments = merged_moments(earlier.to(moments), moments, 1 / number)
        self._taken[name] = (moments, number)

    def take_one(self, name: str, x: Tensor) -> None:
        """Note an input with one value a channel."""
        if self.is_on:
            self._taken.setdefault(name, (batch_moments(x.detach())[0][None], 1))


_DIMENSIONS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_ALIGNED = 16
"""Channels: the rows of each layer begin where vectorised kernels expect them."""


class _Swap:
    """Forward hooks of one BatchNorm layer: other statistics while it runs, its own afterwards."""

    def __init__(self, name: str, rule: StatisticsRule, record: MomentsRecord | None = None) -> None:
        self.name, self.rule, self.record = name, rule, record
        self.source: tuple[Tensor | None, Tensor | None] | None = None  # while the layer runs

    def before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        assert isinstance(layer, _BatchNorm)
        x = inputs[0]
        one_pixel = x.shape[1:].numel() == x.shape[1]
        if layer.running_mean is not None and one_pixel and collective.count(x) == 1:
            if self.record is not None:
                self.record.take_one(self.name, x)
            return None  # one value a channel has no variance: this layer keeps its source statistics
        statistics = self.rule(self.name, layer, x)
        self.source = (layer.running_mean, layer.running_var)
        has_graph = statistics is not None and any(moment.requires_grad for moment in statistics)
        if has_graph or (statistics is None and collective.is_joined()):
            like = x if layer.weight is None else layer.weight
            _set_statistics(layer, like.new_zeros(x.shape[1]), like.new_full((x.shape[1],), 1 - layer.eps))
            shape = (1, -1, *[1] * (x.ndim - 2))
            moments = statistics or batch_moments(x)
            if statistics is None and self.record is not None:
                self.record.take(self.name, *(moment.detach() for moment in moments))
            mean, var = (moment.reshape(shape) for moment in moments)
            return (((x - mean) * (var + layer.eps).rsqrt()).to(x.dtype), *inputs[1:])
        if statistics is None and self.record is not None and self.record.is_on:  # moments cost a pass over x
            self.record.take(self.name, *batch_moments(x.detach()))
        _set_statistics(layer, *(statistics or (None, None)))
        return None

    def after(self, layer: nn.Module, inputs: object, output: object) -> None:
        if self.source is not None:
            _set_statistics(layer, *self.source)
            self.source = None


def _set_statistics(layer: nn.Module, mean: Tensor | None, var: Tensor | None) -> None:
    layer.running_mean = mean  # type: ignore[assignment]  # a buffer may be None: batch statistics in eval mode
    layer.running_var = var  # type: ignore[assignment]


@contextmanager
def bn_statistics(
    model: nn.Module, rule: StatisticsRule, record: MomentsRecord | None = None, *, but: Container[nn.Module] = ()
) -> Iterator[None]:
    """While active, every BatchNorm layer of ``model`` (in eval mode) normalises with what ``rule`` returns.

    The running statistics are never written and are back in place after each call, also after an error. The layer's
    forward runs, so any subclass of torch's BatchNorm works. A layer that sees one value per channel, which has no
    variance, keeps its source statistics. Gradients flow through the batch's statistics (where ``rule``, see
    :data:`StatisticsRule`, returns None), and into those that ``rule`` returns with a graph. ``record`` gets the
    moments of layers with the batch's own statistics; layers in ``but`` are left alone.
    """
    with ExitStack() as stack:
        for name, layer in batch_norm_layers(model).items():
            if layer in but:
                continue
            swap = _Swap(name, rule, record)
            stack.callback(swap.after, layer, None, None)  # hooks do not run after a KeyboardInterrupt inside the layer
            stack.callback(layer.register_forward_pre_hook(swap.before).remove)
            # prepended: where rules are nested, the inner one ends first
            stack.callback(layer.register_forward_hook(swap.after, prepend=True, always_call=True).remove)
        yield


@contextmanager
def fixed_statistics(model: nn.Module, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While active, the BatchNorm layers in ``statistics`` have this mean and variance (C,) for running statistics."""
    layers = batch_norm_layers(model)
    before = {name: (layers[name].running_mean, layers[name].running_var) for name in statistics}
    try:
        for name, (mean, var) in statistics.items():
            _set_statistics(layers[name], mean, var)
        yield
    finally:
        for name, source in before.items():
            _set_statistics(layers[name], *source)


def _recorded_statistics(model: nn.Module, rule: StatisticsRule, record: MomentsRecord) -> AbstractContextManager[None]:
    """The batch's own statistics, recorded; without hooks where a layer's forward is torch's own."""
    forwards = {} if collective.is_joined() else record.forwards()
    if len(forwards) == len(record.layers):
        return replaced_forwards(forwards)
    return _both(replaced_forwards(forwards), bn_statistics(model, rule, record, but=forwards))


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


def batch_statistics(
    model: nn.Module, source_weight: float = 0.0, *, unbiased: bool = False, record: MomentsRecord | None = None
) -> AbstractContextManager[None]:
    """BatchNorm with the current batch's statistics, or with a mixture of source and batch.

    ``mean = w * source + (1 - w) * batch``, variance likewise (no cross term), ``w = source_weight``. With ``w = 0``
    the layers run as in training mode, gradients through the statistics included; a mixture is detached. See
    :func:`bn_statistics`.

    Args:
        model: Any net in eval mode; one without BatchNorm is left as it is.
        source_weight: Weight on the source statistics, in [0, 1].
        unbiased: Whether a mixture takes the batch variance with the n - 1 denominator.
        record: Gets the moments of the batch in the passes that it records; not of an unbiased mixture.
    """
    check_range("source_weight", source_weight, 0, 1)

    def rule(name: str, layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if source_weight == 0:
            return None
        if layer.running_mean is None or layer.running_var is None:
            raise UnsupportedModelError(
                f"BatchNorm layer '{name}' keeps no running statistics (track_running_stats=False), so there is no "
                "source to mix with. Use source_weight=0."
            )
        mean, var = batch_moments(x.detach(), unbiased=unbiased)
        if record is not None:
            record.take(name, mean, var)
        mean = torch.lerp(mean.to(layer.running_mean), layer.running_mean, source_weight)
        return mean, torch.lerp(var.to(layer.running_var), layer.running_var, source_weight)

    if source_weight == 0 and record is not None:
        return _recorded_statistics(model, rule, record)
    return bn_statistics(model, rule, record)


def weighted_batch_statistics(model: nn.Module, weights: Tensor) -> AbstractContextManager[None]:
    """BatchNorm with the statistics of the samples of a batch that count, as if the others were not in it.

    ``weights`` (B,), bool or >= 0, say how much each sample counts. With gradient through the statistics. A layer that
    sees one value per channel, of one sample that counts, keeps its source statistics.
    """
    source = {name: (layer.running_mean, layer.running_var) for name, layer in batch_norm_layers(model).items()}

    def rule(name: str, layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype, x = x.dtype if layer.weight is None else layer.weight.dtype, at_least_float32(x)
        dims, column = [0, *range(2, x.ndim)], weights.to(x).view(-1, *(1,) * (x.ndim - 1))
        number = column.sum() * (x[0].numel() // x.shape[1])
        mean = torch.where(column > 0, column * x, 0).sum(dims) / number
        deviation = (x - mean.view(-1, *(1,) * (x.ndim - 2))).square()
        var = torch.where(column > 0, column * deviation, 0).sum(dims) / number
        source_mean, source_var = source[name]
        if source_mean is not None and source_var is not None:
            mean, var = torch.where(number > 1, mean, source_mean), torch.where(number > 1, var, source_var)
        return mean.to(dtype), var.to(dtype)

    return bn_statistics(model, rule)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While active, each module runs with the ``forward`` given for it."""
    slots = [(vars(module), forward) for module, forward in forwards.items()]  # setattr of a module is slow
    before = [(slot, slot["forward"]) for slot, _ in slots if "forward" in slot]
    try:
        for slot, forward in slots:
            slot["forward"] = forward
        yield
    finally:
        for slot, _ in slots:
            slot.pop("forward", None)
        for slot, own in before:
            slot["forward"] = own


def grouped_batch_statistics(model: nn.Module, groups: int) -> AbstractContextManager[None]:
    """BatchNorm with the statistics of each of ``groups`` equal batches, one after the other along dimension 0.

    One pass over all then gives what a pass over each with :func:`batch_statistics` gives. ``model`` is in eval mode.
    """
    return replaced_forwards({layer: _by_group(layer, groups) for layer in batch_norm_layers(model).values()})


def _by_group(layer: _BatchNorm, groups: int) -> Callable[[Tensor], Tensor]:
    plain_forward, source = layer.forward, (layer.running_mean, layer.running_var)

    def forward(x: Tensor) -> Tensor:
        before = (layer.running_mean, layer.running_var)  # another rule may be active
        outputs = []
        try:
            for group in x.chunk(groups):
                keeps_source = source[0] is not None and group.numel() == group.shape[1]  # else: no variance
                _set_statistics(layer, *(source if keeps_source else (None, None)))
                outputs.append(plain_forward(group))
        finally:
            _set_statistics(layer, *before)
        return torch.cat(outputs)

    return forward


class _Affine(Function):
    """The derivatives keep x and the gradient, no copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.set_materialize_grads(False)  # zeros would look like gradients where none comes through
        return (x * scale).add_(shift).to(x.dtype)  # faster on a CPU than addcmul, which does not broadcast well

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if gradient is None:
            return None, None, None
        x, scale = ctx.saved_tensors
        wide = gradient.to(scale.dtype)
        return (wide * scale).to(x.dtype), (wide * x).sum_to_size(scale.shape), wide.sum_to_size(scale.shape)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * x + shift``, both broadcast over x; twice differentiable, and keeps x and the scale for backward."""
    return _Affine.apply(x, scale, shift)  # type: ignore[no-any-return]


def shortcut_norms(model: nn.Module) -> set[str]:
    """Names of the norm layers in the shortcuts of residual blocks (often called downsample).

    A shortcut is a Sequential inside a block, itself no Sequential, that holds one 1x1 convolution, its norm layer
    and no activation.
    """
    harmless = nn.Identity | nn.AvgPool2d | nn.MaxPool2d | nn.Dropout
    names: set[str] = set()
    for name, module in model.named_modules():
        block, _, _ = name.rpartition(".")
        if not isinstance(module, nn.Sequential) or isinstance(model.get_submodule(block), nn.Sequential):
            continue
        leaves = {f"{name}.{leaf}": layer for leaf, layer in module.named_modules() if not list(layer.children())}
        leaves = {leaf: layer for leaf, layer in leaves.items() if not isinstance(layer, harmless)}
        kernels = [layer.kernel_size for layer in leaves.values() if isinstance(layer, nn.Conv2d)]
        norms = {leaf for leaf, layer in leaves.items() if is_norm_layer(layer)}
        if kernels == [(1, 1)] and len(norms) == 1 and len(leaves) == 2:
            names |= norms
    return names
