"""Adapters: small parameters beside a net's own, which learn under the loss of any method that learns by gradients.

``select=`` of :func:`lightning_tta.adapt` says what learns in the place of what the method learns by itself: a word
(``norm``, ``early_norm``, ``all``, ``adapters``: those that the net has already; or a pattern of names), a dict of an
adapter's kind and its options (:data:`KINDS`), or a list of several. A net with new adapters computes what it did
without: they are the identity at the start.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_tta.backbones.norms import batch_norm_layers, norm_layers
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.quantized import FORWARD_ONLY, has_quantized
from lightning_tta.backbones.split import Trial, execution_order, find_head, is_inside, try_pass
from lightning_tta.errors import ConfigError, InputError, UnsupportedModelError, check_choice, check_range, did_you_mean
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.selection import Choice, choice_of, set_choice
from lightning_tta.methods.components.wanted import Wanted, listed, read

Select = Wanted | Sequence[Wanted]
WORDS = ("norm", "early_norm", "all", "adapters")
_SOURCE = "Give other targets=; or learn the net's own parameters: select='norm' or 'all'."


# Added to a weight


class LowRank(nn.Module):
    """``W + sum_i s_i up_i down_i``, a parametrisation of a weight (O, ...); the products have its shape.

    Args:
        weight: The weight, for its shape, dtype and device.
        ranks: Of the products; one larger than the weight's sides allow is cut to these.
        scales: s_i, a buffer, which is saved with the net.
        stds: Of ``down_i`` at the start, a normal draw; ``None``: uniform in +-1 / sqrt(columns). ``up_i`` is 0.
        generator: Of the draw.
    """

    scales: Tensor

    def __init__(
        self,
        weight: Tensor,
        ranks: Sequence[int],
        scales: Sequence[float],
        stds: Sequence[float | None],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        self.number = len(ranks)
        for number, (rank, std) in enumerate(zip(ranks, stds, strict=True)):
            rank = min(rank, rows, columns)
            if std is None:
                down = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
            else:
                down = std * torch.randn(rank, columns, generator=generator)
            wide = at_least_float32(weight.new_zeros(rows, rank))  # small steps would be rounded away in half precision
            self.register_parameter(f"down{number}", nn.Parameter(down.to(wide)))
            self.register_parameter(f"up{number}", nn.Parameter(wide))
        self.register_buffer("scales", weight.new_tensor(list(scales)))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer runs with."""
        for number in range(self.number):
            product = getattr(self, f"up{number}") @ getattr(self, f"down{number}")
            weight = weight + (self.scales[number] * product).view_as(weight).to(weight.dtype)
        return weight


def _weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The weights of linear layers, convolutions and torch's attention, by their layers' names: layer, attribute."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        leaf = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)):
            own = dict(module.named_parameters(recurse=False))
            if leaf in own and own[leaf].is_floating_point():  # else computed, or several for one
                found[name] = module, leaf
    return found


def _add_low_rank(net: nn.Module, targets: str | None, kind: str, seed: int, **options: Any) -> list[str]:
    weights = _weights(net)
    if targets is None:
        chosen = weights.keys() - {_head(net)}
    elif targets == "attention":
        chosen = weights.keys() & attention_layers(net)
    else:
        chosen = {name for name in weights if re.fullmatch(targets, name)}
    weights = {name: value for name, value in weights.items() if name in chosen}
    if not weights:
        raise UnsupportedModelError(
            f"{type(net).__name__} has no layer for the adapters '{kind}' with targets={targets!r}: a linear layer, a "
            f"convolution or torch's attention with a plain weight, and not the last linear layer. {_SOURCE}"
        )
    generator = _generator(seed)
    names = []
    for name, (module, leaf) in weights.items():
        added = LowRank(getattr(module, leaf).detach(), generator=generator, **options)
        parametrize.register_parametrization(module, leaf, added, unsafe=True)
        prefix = f"{name}.parametrizations.{leaf}.0".lstrip(".")
        names += [f"{prefix}.{each}" for each, _ in added.named_parameters()]
    return names


def _generator(seed: int) -> torch.Generator:
    check_range("seed", seed, 0, 2**63 - 1, integer=True)
    return torch.Generator().manual_seed(seed)


def add_lora(
    net: nn.Module, rank: int = 8, alpha: float | None = None, targets: str | None = None, seed: int = 0
) -> list[str]:
    """LoRA: ``W + (alpha / rank) up down`` in the place of a weight W; a convolution's as a matrix (O, I * k * k).

    Exported, it is added to the weight. Formula from the paper: Hu et al., ICLR 2022, arXiv 2106.09685.

    Args:
        net: The net.
        rank: At least 1.
        alpha: > 0; ``None``: the rank, a scale of 1.
        targets: ``attention``: the linear layers over tokens that are in no MLP, and torch's attention layers; or a
            pattern that the layers' names match as a whole; ``None``: all linear layers, convolutions and torch's
            attention layers, but not the last linear layer.
        seed: Of the first values.
    """
    check_range("rank", rank, 1, integer=True)
    if alpha is not None:
        check_range("alpha", alpha, 0, low_open=True)
    scale = 1.0 if alpha is None else alpha / rank
    return _add_low_rank(net, targets, "lora", seed, ranks=[rank], scales=[scale], stds=[None])


def add_vida(
    net: nn.Module, ranks: Sequence[int] = (1, 128), targets: str | None = "attention", seed: int = 0
) -> list[str]:
    """ViDA's pairs: ``W + s1 up1 down1 + s2 up2 down2``, of a low and a high rank r; down ~ N(0, 1 / r^4), up = 0.

    Under another method than ``vida`` both scales stay 1. Exported, it is added to the weight. From the authors' code
    (their standard deviation is 1 / r^2): Liu et al., ICLR 2024, arXiv 2306.04344.

    Args:
        net: The net.
        ranks: The low and the high one, at least 1.
        targets: As of ``lora``.
        seed: Of the first values.
    """
    if not isinstance(ranks, (list, tuple)) or len(ranks) != 2:
        raise ConfigError(f"ranks must be two numbers, a low and a high one; got {ranks!r}.")
    for rank in ranks:
        check_range("ranks", rank, 1, integer=True)
    stds = [1 / rank**2 for rank in ranks]
    return _add_low_rank(net, targets, "vida", seed, ranks=ranks, scales=[1.0, 1.0], stds=stds)


# Beside a module


class Beside:
    """Base of what runs in the place of a module's forward; comes before the module's own class.

    Attributes:
        kind: Of the adapter.
        beside: The adapter's class and the module's own.
    """

    kind: ClassVar[str]
    beside: ClassVar[tuple[type[Beside], type[nn.Module]]]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The module's pass with the adapter."""
        return super().forward(*inputs, **options)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, self.beside, self.__getstate__()


_CLASSES: dict[tuple[type[Beside], type[nn.Module]], type[nn.Module]] = {}


def _class_beside(adapter: type[Beside], base: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class ``base`` with an adapter; it says it is ``base``, and has its signature."""
    if (adapter, base) in _CLASSES:
        return _CLASSES[adapter, base]

    @functools.wraps(base.forward)
    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        return adapter.forward(self, *inputs, **options)

    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    body["beside"] = adapter, base
    _CLASSES[adapter, base] = type(base.__name__, (adapter, base), body)
    return _CLASSES[adapter, base]


def _blank(adapter: type[Beside], base: type[nn.Module]) -> nn.Module:
    made = _class_beside(adapter, base)
    return made.__new__(made)


def _put_beside(adapter: type[Beside], module: nn.Module, name: str, parameters: Mapping[str, Tensor]) -> list[str]:
    """Give a module an adapter and its parameters, none of which is a module: a chain would run it."""
    if isinstance(module, Beside):
        owner = f"'{name}'" if name else "The net"
        raise ConfigError(f"{owner} has an adapter already ('{module.kind}'), and takes one. Choose other targets.")
    for leaf, value in parameters.items():
        module.register_parameter(f"{adapter.kind}_{leaf}", nn.Parameter(value))
    module.__class__ = _class_beside(adapter, type(module))
    return [f"{name}.{adapter.kind}_{leaf}".lstrip(".") for leaf in parameters]


class _AdaptFormer(Beside):
    kind = "adaptformer"
    adaptformer_scale: float

    def forward(self, *inputs: Any, **options: Any) -> Any:
        own: Any = self
        hidden = F.relu(F.linear(inputs[0], own.adaptformer_down, own.adaptformer_down_bias))
        added = F.linear(hidden, own.adaptformer_up, own.adaptformer_up_bias)
        return super().forward(*inputs, **options) + self.adaptformer_scale * added


def add_adaptformer(
    net: nn.Module, bottleneck: int = 64, scale: float = 0.1, targets: str | None = None, seed: int = 0
) -> list[str]:
    """AdaptFormer: ``MLP(x) + scale * Up(ReLU(Down(x)))``, Up = 0 at the start.

    The MLPs are modules with two or three linear layers, D -> H -> D with H > D, over features of width D. Formula from
    the paper: Chen et al., NeurIPS 2022, arXiv 2205.13535. There x is what comes before the block's normalisation, of
    which a module says nothing; here it is the MLP's own input.

    Args:
        net: A transformer, or another net with MLPs.
        bottleneck: Width of the hidden layer, at least 1. Authors: 64.
        scale: > 0. Authors: 0.1.
        targets: A pattern that the MLPs' names match as a whole; ``None``: all.
        seed: Of the first values.
    """
    check_range("bottleneck", bottleneck, 1, integer=True)
    check_range("scale", scale, 0, low_open=True)
    generator = _generator(seed)
    names = []
    blocks = {name: width for name, width in mlp_blocks(net).items() if targets is None or re.fullmatch(targets, name)}
    if not blocks:
        raise UnsupportedModelError(
            f"{type(net).__name__} has no MLP for the adapters 'adaptformer' with targets={targets!r}: a module with "
            "linear layers D -> H -> D, H > D, that takes and returns features of width D. torch's own "
            f"TransformerEncoderLayer has none either: use select={{'kind': 'lora'}}. {_SOURCE}"
        )
    for name, width in blocks.items():
        module = net.get_submodule(name)
        like = next(module.parameters()).detach()
        down = (2 * torch.rand(bottleneck, width, generator=generator) - 1) / math.sqrt(width)
        tensors = {"down": down.to(like), "down_bias": like.new_zeros(bottleneck)}
        tensors |= {"up": like.new_zeros(width, bottleneck), "up_bias": like.new_zeros(width)}
        names += _put_beside(_AdaptFormer, module, name, tensors)
        module.adaptformer_scale = float(scale)  # type: ignore[assignment]
    return names


class _Activation(Beside):
    kind = "activation"
    activation_slope: float

    def forward(self, *inputs: Any, **options: Any) -> Any:
        own: Any = self
        shifted = inputs[0] - own.activation_shift
        side = torch.sigmoid(self.activation_slope * shifted)
        gain = own.activation_negative + (own.activation_positive - own.activation_negative) * side
        mine = shifted.clone() if getattr(self, "inplace", False) else shifted  # it writes to its input
        return super().forward(mine, *inputs[1:], **options) + gain * shifted


def add_activations(
    net: nn.Module,
    share: float | None = None,
    slope: float = 1.0,
    norm: Literal["auto"] | bool = "auto",
    targets: str | None = None,
) -> list[str]:
    """AcTTA's activations: ``phi(x - c) + [n + (p - n) sigmoid(slope (x - c))] (x - c)``; c, n, p = 0 at the start.

    An activation is a module without parameters that treats each value by itself, and is no gate with values in [0, 1];
    functions that a forward calls are none. One that runs several times has its three numbers once. From a digest of
    the paper (its code was not published): AcTTA, CVPR 2026, arXiv 2603.26096; the slope and which activations of a net
    without attention count as early are our reading.

    Args:
        net: The net.
        share: Of the activations, in the order of execution, those that learn, in (0, 1]. ``None``: a half, of nets
            with attention or LayerNorm a quarter.
        slope: Of the sigmoid.
        norm: Whether the norm layers learn too; ``auto``: in nets without BatchNorm, as in the paper.
        targets: A pattern that the activations' names match as a whole; ``None``: all.
    """
    tokens = not batch_norm_layers(net)
    share = (0.25 if tokens else 0.5) if share is None else share
    check_range("share", share, 0, 1, low_open=True)
    check_choice("norm", norm, ("auto", True, False))
    check_range("slope", slope)
    order = execution_order(net)
    modules = dict(net.named_modules())
    found = [name for name in (modules if order is None else order) if is_activation(modules[name])]
    found = [name for name in found if targets is None or re.fullmatch(targets, name)]
    if not found:
        raise UnsupportedModelError(
            f"{type(net).__name__} runs no activation as a module with targets={targets!r} (does its forward call "
            f"torch.nn.functional.relu? Write nn.ReLU() in its place). {_SOURCE}"
        )
    like = next(p for p in net.parameters() if p.is_floating_point()).detach()
    names = []
    for name in found[: max(1, round(share * len(found)))]:
        zeros = {leaf: like.new_zeros(()) for leaf in ("shift", "negative", "positive")}
        names += _put_beside(_Activation, modules[name], name, zeros)
        modules[name].activation_slope = float(slope)
    return names + (["norm"] if norm is True or (norm == "auto" and tokens and norm_layers(net)) else [])


def is_activation(module: nn.Module) -> bool:
    """Whether a module without parameters maps each value by itself, not affinely, and not all into [0, 1]."""
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return False
    x = torch.tensor([[-1e3, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 1e3]])
    try:
        with torch.no_grad():
            y, back = module(x.clone()), module(x.flip(1).clone()).flip(1)
    except Exception:  # it takes no vectors
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y, back, atol=1e-5):
        return False
    slopes = y.diff() / x.diff()
    is_gate = bool((y >= 0).all() & (y <= 1).all())
    return not is_gate and not torch.allclose(slopes, slopes[:, :1].expand_as(slopes), atol=1e-4)


class _Buffer(Beside):
    kind = "buffer"

    def forward(self, *inputs: Any, **options: Any) -> Any:
        own: Any = self
        x = inputs[0]
        pointwise, spatial = F.conv2d(x, own.buffer_pointwise), F.conv2d(x, own.buffer_spatial, padding=1)
        added = own.buffer_scales[0] * pointwise + own.buffer_scales[1] * spatial
        return super().forward(x + own.buffer_alpha * added, *inputs[1:], **options)


def add_buffer(
    net: nn.Module,
    alpha: float = 1e-5,
    share: float = 0.5,
    targets: str | None = None,
    seed: int = 0,
) -> list[str]:
    """Buffer layers: a convolution gets ``x + alpha (s1 conv1x1(x) + s2 conv3x3(x))``; s1 = s2 = 0.5 at the start.

    alpha, s1, s2 and the two kernels learn. The kernels are random at the start, so the net differs from the source's
    by about alpha; with ``alpha=0`` by nothing, and then alpha alone learns in the first step. From the authors' code:
    Kim et al., NeurIPS 2025, arXiv 2510.21271. They choose stages by hand; the share is ours.

    Args:
        net: A net with two-dimensional convolutions.
        alpha: >= 0. Authors: 1e-5.
        share: Of the convolutions after the first, in the order of execution, those that get one, in (0, 1].
        targets: A pattern that the convolutions' names match as a whole, in place of the share.
        seed: Of the kernels: uniform, as torch's convolutions have them.
    """
    check_range("alpha", alpha, 0)
    check_range("share", share, 0, 1, low_open=True)
    modules = dict(net.named_modules())
    order = execution_order(net) or list(modules)
    found = [name for name in order if isinstance(modules[name], nn.Conv2d)]
    if targets is None:
        later = found[1:]
        chosen = later[: max(1, round(share * len(later)))] if later else found
    else:
        chosen = [name for name in found if re.fullmatch(targets, name)]
    if not chosen:
        raise UnsupportedModelError(
            f"{type(net).__name__} runs no two-dimensional convolution with targets={targets!r} that a buffer layer "
            f"could stand before. {_SOURCE}"
        )
    generator = _generator(seed)
    names = []
    for name in chosen:
        layer = modules[name]
        assert isinstance(layer, nn.Conv2d)
        width, like = layer.in_channels, next(layer.parameters()).detach()
        tensors = {"alpha": like.new_tensor(alpha), "scales": like.new_full((2,), 0.5)}
        for leaf, size in (("pointwise", 1), ("spatial", 3)):
            bound = 1 / math.sqrt(width * size * size)
            kernel = bound * (2 * torch.rand(width, width, size, size, generator=generator) - 1)
            tensors[leaf] = kernel.to(like)
        names += _put_beside(_Buffer, layer, name, tensors)
    return names


class _Prompt(Beside):
    kind = "prompt"

    def forward(self, *inputs: Any, **options: Any) -> Any:
        own: Any = self
        x = inputs[0]
        if x.shape[1:] != own.prompt_pixels.shape[1:]:
            raise InputError(
                f"The visual prompt has {tuple(own.prompt_pixels.shape[1:])} values (C, H, W), and images came of "
                f"{tuple(x.shape[1:])}. Give the images' size: select={{'kind': 'prompt', 'size': {x.shape[-1]}}}."
            )
        pixels = own.prompt_pixels
        if own.prompt_border:
            edge = own.prompt_border
            pixels = pixels - F.pad(pixels[..., edge:-edge, edge:-edge], [edge] * 4)
        return super().forward(x + pixels.to(x.dtype), *inputs[1:], **options)


def add_prompt(net: nn.Module, border: int | None = None, size: int | Sequence[int] | None = None) -> list[str]:
    """A visual prompt: pixels, 0 at the start, that are added to each image, everywhere or in a frame.

    What the net gets is not cut to [0, 1]. Formula from the paper: Bahng et al., arXiv 2203.17274, whose prompt is a
    frame around the image; here the frame lies over its border, so that the net sees images of its size.

    Args:
        net: The net.
        border: Width of the frame in pixels; ``None``: the whole image.
        size: Of the images: pixels along a side, or height and width. ``None``: what the net says, as a Backbone does.
    """
    known = getattr(net, "preprocessing", None) or {}
    shape = list(known.get("input_size") or []) if size is None else []
    if size is not None:
        sides: list[Any] = list(size) if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2:
            raise ConfigError(f"size is the side of the images, or their height and width; got {size!r}.")
        for side in sides:
            check_range("size", side, 1, integer=True)
        widths = [m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
        shape = [widths[0] if widths and widths[0] in (1, 3) else 3, *sides]
    if len(shape) != 3:
        raise ConfigError(
            f"select 'prompt': {type(net).__name__} does not say how large its images are. Give it: "
            "select={'kind': 'prompt', 'size': 32}."
        )
    if border is not None:
        check_range("border", border, 1, (min(shape[1:]) - 1) // 2, integer=True)
    like = next(p for p in net.parameters() if p.is_floating_point()).detach()
    names = _put_beside(_Prompt, net, "", {"pixels": like.new_zeros(1, *shape)})
    net.prompt_border = border or 0  # type: ignore[assignment]
    return names


KINDS: dict[str, Callable[..., list[str]]] = {
    "lora": add_lora,
    "vida": add_vida,
    "adaptformer": add_adaptformer,
    "activations": add_activations,
    "buffer": add_buffer,
    "prompt": add_prompt,
}
"""By the word in ``select``. Each puts its adapters into a net, and returns the names of their parameters."""


# Choosing


@torch.no_grad()
def choose(net: nn.Module, select: Select) -> Choice:
    """Put adapters into a net, in place, and say to the method that comes what it is to learn.

    Args:
        net: The net, before the method is made.
        select: See :mod:`~lightning_tta.methods.components.adapters`.

    Raises:
        ConfigError: If it names no such thing, or a choice was made before.
        UnsupportedModelError: If an adapter has no place in the net, or the net is quantised.
    """
    if choice_of(net) is not None:
        raise ConfigError("select: what learns in this net was chosen before. Give the net itself, not one that was.")
    before = set(adapter_names(net))
    words, names = put_in(net, select)
    return set_choice(
        net, Choice(words, names, finish, tuple(name for name in adapter_names(net) if name not in before))
    )


@torch.no_grad()
def put_in(net: nn.Module, select: Select) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Put adapters into a net, in place.

    Args:
        net: Any net.
        select: As of :func:`choose`.

    Returns:
        The words in ``select``, and the names of the parameters of its adapters.

    Raises:
        ConfigError: If it names no such thing.
        UnsupportedModelError: If an adapter has no place in the net, or the net is quantised.
    """
    if not isinstance(select, (str, Mapping, Sequence)) or not select:
        raise ConfigError(
            f"select must be a word, a dict with 'kind' and its options, or a list of these; got {select!r}."
        )
    if has_quantized(net):
        raise UnsupportedModelError(
            f"No gradient reaches what is to learn in {type(net).__name__}, which is quantised. Use a method without "
            f"gradients ({FORWARD_ONLY}), or adapt the net that it was made from."
        )
    wanted: list[str | tuple[str, dict[str, Any]]] = []
    for item in listed(select):  # all are read before the net changes
        if isinstance(item, str) and (item in WORDS or item not in KINDS):
            _check_word(net, item)
            wanted.append(item)
        else:
            wanted.append(read(item, "select", KINDS))
            _check_targets(*wanted[-1])
    frees = any(p.requires_grad for p in net.parameters())
    words: list[str] = []
    names: list[str] = []
    with outside_inference_mode(), torch.no_grad():
        for entry in wanted:
            if entry == "adapters":
                names += adapter_names(net)
            elif isinstance(entry, str):
                words.append(entry)
            else:
                new = KINDS[entry[0]](net, **entry[1])
                words += [name for name in new if name in WORDS]
                names += [name for name in new if name not in WORDS]
    if not frees:  # a net for inference, whose flags say nothing: not these either
        for name in names:
            net.get_parameter(name).requires_grad_(False)
    return tuple(dict.fromkeys(words)), tuple(dict.fromkeys(names))


def _check_targets(kind: str, options: Mapping[str, Any]) -> None:
    targets = options.get("targets")
    try:
        re.compile("" if targets is None else targets)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"select {kind!r}: targets must be a pattern of names (a regular expression), or None; got {targets!r} "
            f"({error})."
        ) from error


def _check_word(net: nn.Module, word: str) -> None:
    if word == "adapters" and not adapter_names(net):
        raise UnsupportedModelError(
            f"select='adapters': {type(net).__name__} has none. Name a kind: {', '.join(KINDS)}; or give a net that "
            "was trained with them."
        )
    if word in WORDS:
        return
    try:
        fits = any(re.fullmatch(word, name) for name, _ in net.named_parameters())
    except re.error:
        fits = False
    if not fits:
        raise ConfigError(
            f"Unknown select {word!r}: no parameter of {type(net).__name__} has a name that it matches as a whole."
            f"{did_you_mean(word, (*WORDS, *KINDS))} Available: {', '.join((*WORDS, *KINDS))}; or a pattern of names."
        )


def adapters_of(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that are an adapter or have one, by name."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, (LowRank, Beside)))


def adapter_names(net: nn.Module) -> list[str]:
    """The names of all parameters of a net's adapters."""
    names = []
    for name, module in adapters_of(net):
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        kind = module.kind if isinstance(module, Beside) else ""
        names += [f"{name}.{leaf}".lstrip(".") for leaf in own if leaf.startswith(kind)]
    return names


@torch.no_grad()
def merge(net: nn.Module) -> list[str]:
    """Add to the weights, in place, what adapters add to them; their modules go.

    Returns:
        The kinds of the adapters that stay, for they are no part of a weight.
    """
    for module in list(net.modules()):
        lists = dict(getattr(module, "parametrizations", {}).items()) if parametrize.is_parametrized(module) else {}
        for leaf, parts in lists.items():
            if not any(isinstance(part, LowRank) for part in parts):
                continue
            weight, flag = getattr(module, leaf).detach().clone(), parts.original.requires_grad
            computed: Any = module.parametrizations
            del computed[leaf]
            if not computed:  # by hand: torch takes the property off the class, which copies share
                del module.parametrizations
                module.__class__ = type(module).__bases__[0]
            module.register_parameter(leaf, nn.Parameter(weight, requires_grad=flag))
    return list(dict.fromkeys(module.kind for _, module in adapters_of(net) if isinstance(module, Beside)))


def given_state(net: nn.Module, choice: Choice | None = None) -> dict[str, Any]:
    """The state dict of a net, as it was before adapters were put in for this choice."""
    added = set() if choice is None else set(choice.added)
    products = {name.rpartition(".")[0] for name in added if "parametrizations." in name}
    state: dict[str, Any] = {}
    for name, value in net.state_dict().items():
        place, _, leaf = name.rpartition(".")
        if name in added or place in products:
            continue
        if leaf == "original" and f"{place}.0" in products:
            name = "".join(place.rsplit("parametrizations.", 1))
        state[name] = value
    return state


def finish(net: nn.Module) -> None:
    """Make an adapted net as plain as it can be: merge, and warn of the adapters that stay."""
    left = merge(net)
    if left:
        warnings.warn(
            f"The exported net keeps its adapters ({', '.join(left)}), which are no part of a weight: its state dict "
            "has more names than that of the net that was adapted. Save it as a program (.pt2, .onnx); or load the "
            "weights into a net with the same adapters.",
            stacklevel=4,
        )


# Where they go


def _head(net: nn.Module) -> str | None:
    try:
        return find_head(net)[0]
    except UnsupportedModelError:
        return None


def _linear_calls(net: nn.Module) -> tuple[Trial, list[tuple[str, nn.Linear, Tensor]]]:
    """A pass, and the linear layers in the order in which they first run, each with its input."""
    trial = try_pass(net, instead="name the layers: targets='...'")
    modules, seen = dict(net.named_modules()), {}
    for name, inputs, _ in trial.calls:
        layer = modules.get(name)
        if isinstance(layer, nn.Linear) and name not in seen and inputs:
            seen[name] = (name, layer, inputs[0])
    return trial, list(seen.values())


def _in_mlps(calls: Sequence[tuple[str, nn.Linear, Tensor]]) -> list[list[str]]:
    """The linear layers of each MLP: D -> H (-> H as a gate) -> D, H > D, one after the other below one module."""
    groups = []
    for number, (name, last, _) in enumerate(calls):
        parent = name.rpartition(".")[0]
        firsts: list[str] = []
        for other, first, _ in reversed(calls[max(0, number - 2) : number]):
            fits = first.in_features == last.out_features and first.out_features in (
                last.in_features,
                2 * last.in_features,
            )
            if other.rpartition(".")[0] != parent or not fits or last.in_features <= last.out_features:
                break
            firsts.append(other)
        if firsts:
            groups.append([*firsts, name])
    return groups


def mlp_blocks(net: nn.Module) -> dict[str, int]:
    """The MLPs that are modules with the shapes (..., D) -> (..., D), by name: their widths D.

    Raises:
        UnsupportedModelError: If no pass through the net can be tried.
    """
    trial, calls = _linear_calls(net)
    shapes = {name: (inputs, output) for name, inputs, output in trial.calls}
    found = {}
    linear = [name for name, _, _ in calls]
    for group in _in_mlps(calls):
        parent = group[0].rpartition(".")[0]
        inside = [name for name in linear if is_inside(name, parent)]
        width = net.get_submodule(group[-1]).out_features
        inputs, output = shapes.get(parent, ((), None))
        x = inputs[0] if inputs else None
        same = isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape
        if parent and sorted(inside) == sorted(group) and same and x.shape[-1] == width:  # type: ignore[union-attr]
            found[parent] = int(width)  # type: ignore[arg-type]
    return found


def attention_layers(net: nn.Module) -> list[str]:
    """Linear layers over tokens (B, N, D) that are in no MLP, and torch's attention layers with theirs."""
    _, calls = _linear_calls(net)
    torchs = [name for name, module in net.named_modules() if isinstance(module, nn.MultiheadAttention)]
    apart = {_head(net), *(name for group in _in_mlps(calls) for name in group)}
    names = [name for name, _, x in calls if x.ndim == 3 and name not in apart]
    return [*names, *torchs, *(f"{name}.out_proj" for name in torchs)]
