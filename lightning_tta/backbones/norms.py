"""Normalisation layers of any net: finding them by type, and choosing which statistics BatchNorm uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils import parametrize

from lightning_tta import collective
from lightning_tta.backbones.copying import copy_net
from lightning_tta.backbones.split import execution_order, is_inside, parts_by_depth
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32

NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""The norm layers torch knows: BatchNorm (SyncBatchNorm too), InstanceNorm, GroupNorm, LayerNorm, RMSNorm."""

StatisticsRule = Callable[[str, _BatchNorm, Tensor], "tuple[Tensor, Tensor] | None"]
"""Given (layer name, layer, input): the mean and variance (C,) to normalise with, or None for the batch's own."""


def is_norm_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of :data:`NORM_TYPES`, or a user's "...norm..." that normalises.

    That has one-dimensional parameters, and depends on statistics: of its input, so that it is no affine map of it, or
    running ones, which are buffers of the parameters' size. ``(x - mean) / std`` of pixels is none.
    """
    if isinstance(module, NORM_TYPES):
        return True
    parameters = list(module.parameters(recurse=False))
    if not parameters or "norm" not in type(module).__name__.lower() or any(p.ndim != 1 for p in parameters):
        return False
    shapes = {p.shape for p in parameters}
    return any(b.shape in shapes for b in module.buffers(recurse=False)) or not _is_affine(module, len(parameters[0]))


@torch.no_grad()
def _is_affine(module: nn.Module, width: int) -> bool:
    """Whether a layer of this width maps f(x) + f(y) = f(x + y) + f(0); tried on layouts of images and of tokens."""
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
        except Exception:  # not this layer's layout
            continue
        return torch.allclose(apart, joint, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))
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
            "or fused net has none: adapt the one it was made from. "
            "Use method 'source' (no adaptation) for this net, or put normalisation layers into it."
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
    return mean, (deviation * deviation).sum(list(dims)) / (count - int(unbiased))


def batch_moments(x: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of ``x`` (B, C, ...), in at least float32; where processes are joined, of all of them."""
    dims = [0, *range(2, x.ndim)]
    if collective.is_joined():
        return collective.moments(x, dims, unbiased=unbiased)[:2]
    return moments(x, dims, unbiased=unbiased)


class _Swap:
    """Forward hooks of one BatchNorm layer: other statistics while it runs, its own afterwards."""

    def __init__(self, name: str, rule: StatisticsRule) -> None:
        self.name, self.rule = name, rule
        self.source: tuple[Tensor | None, Tensor | None] | None = None  # while the layer runs

    def before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        assert isinstance(layer, _BatchNorm)
        x = inputs[0]
        one_pixel = x.shape[1:].numel() == x.shape[1]
        if layer.running_mean is not None and one_pixel and collective.count(x) == 1:
            return None  # one value a channel has no variance: this layer keeps its source statistics
        statistics = self.rule(self.name, layer, x)
        self.source = (layer.running_mean, layer.running_var)
        if statistics is None and collective.is_joined():
            like = x if layer.weight is None else layer.weight
            _set_statistics(layer, like.new_zeros(x.shape[1]), like.new_full((x.shape[1],), 1 - layer.eps))
            shape = (1, -1, *[1] * (x.ndim - 2))
            mean, var = (moment.reshape(shape) for moment in batch_moments(x))
            return (((x - mean) * (var + layer.eps).rsqrt()).to(x.dtype), *inputs[1:])
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
def bn_statistics(model: nn.Module, rule: StatisticsRule) -> Iterator[None]:
    """While active, every BatchNorm layer of ``model`` (in eval mode) normalises with what ``rule`` returns.

    The running statistics are never written and are back in place after each call, also after an error. The layer's
    forward runs, so any subclass of torch's BatchNorm works. A layer that sees one value per channel, which has no
    variance, keeps its source statistics. Gradients flow through the batch's statistics (where ``rule``, see
    :data:`StatisticsRule`, returns None), not into those that ``rule`` returns.
    """
    with ExitStack() as stack:
        for name, layer in batch_norm_layers(model).items():
            swap = _Swap(name, rule)
            stack.callback(swap.after, layer, None, None)  # hooks do not run after a KeyboardInterrupt inside the layer
            stack.callback(layer.register_forward_pre_hook(swap.before).remove)
            # prepended: where rules are nested, the inner one ends first
            stack.callback(layer.register_forward_hook(swap.after, prepend=True, always_call=True).remove)
        yield


def batch_statistics(
    model: nn.Module, source_weight: float = 0.0, *, unbiased: bool = False
) -> AbstractContextManager[None]:
    """BatchNorm with the current batch's statistics, or with a mixture of source and batch.

    ``mean = w * source + (1 - w) * batch``, variance likewise (no cross term), ``w = source_weight``. With ``w = 0``
    the layers run as in training mode, gradients through the statistics included; a mixture is detached. See
    :func:`bn_statistics`.

    Args:
        model: Any net in eval mode; one without BatchNorm is left as it is.
        source_weight: Weight on the source statistics, in [0, 1].
        unbiased: Whether a mixture takes the batch variance with the n - 1 denominator.
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
        mean = torch.lerp(mean.to(layer.running_mean), layer.running_mean, source_weight)
        return mean, torch.lerp(var.to(layer.running_var), layer.running_var, source_weight)

    return bn_statistics(model, rule)


def weighted_batch_statistics(model: nn.Module, weights: Tensor) -> AbstractContextManager[None]:
    """BatchNorm with the statistics of the samples of a batch that count, as if the others were not in it.

    ``weights`` (B,), bool or >= 0, say how much each sample counts. Without gradient through the statistics. A layer
    that sees one value per channel, of one sample that counts, keeps its source statistics.
    """
    source = {name: (layer.running_mean, layer.running_var) for name, layer in batch_norm_layers(model).items()}

    def rule(name: str, layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype, x = x.dtype if layer.weight is None else layer.weight.dtype, at_least_float32(x.detach())
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
    before = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
            if module in before:
                module.forward = before[module]


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
