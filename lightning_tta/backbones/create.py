"""Build classifiers by name, of timm, torchvision, transformers or your own, with their normalisation inside.

The libraries are imported when a net of theirs is asked for: each takes seconds.
"""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.families import FAMILIES, Built, build, resolve, torchvision_weights
from lightning_tta.backbones.weights import (
    PACKAGE,
    Normalization,
    carried_by,
    check_weights_file,
    fit_state,
    read_description,
    read_state_dict,
    state_digest,
)
from lightning_tta.errors import ConfigError, DataError, UnsupportedModelError, WeightsError, check_choice, check_range

_TOLERANCE = 1e-4  # between two ways of writing the same mean


class Backbone(nn.Module):
    """A classifier that takes pixels: ``net((images - mean) / std)``.

    Views, corruptions and data sets stay in pixels, and the weights' own mean and std cannot be forgotten. ``mean``
    and ``std`` are non-persistent buffers (1, C, 1, 1): the state dict is the net's, each name with ``net.`` before it.

    Args:
        net: Any module from (B, C, H, W) to logits (B, K).
        mean: Mean per channel in units of pixels in [0, 1], length C or 1.
        std: Standard deviation per channel, positive, length C or 1.
        in_chans: Number of channels C.
        name: The net's name in :attr:`info`.
        num_classes: Number of logits K, if known.
        weights: What the weights are: a file's name, an enum or tag, "random", or "module": those that `net` came with.
        pretrained: Whether the weights are published ones: of timm, torchvision, transformers or a package of the
            Python index.
        preprocessing: ``input_size``, ``interpolation`` and ``crop_pct`` the weights were trained for.
        config: Keyword arguments with which :func:`create_backbone` rebuilds the architecture.
        class_names: Names of the K classes, where they are known.

    Attributes:
        task: What the net gives of an image: ``images``, one class, unless a checkpoint says ``pixels`` or
            ``regression``.

    Raises:
        ConfigError: ``mean`` or ``std`` has a wrong length or value.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        in_chans: int = 3,
        name: str = "custom",
        num_classes: int | None = None,
        weights: str = "module",
        pretrained: bool = False,
        preprocessing: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.num_classes = num_classes
        self.weights = weights
        self.pretrained = pretrained
        self.class_names = None if class_names is None else list(class_names)
        self.task = "images"
        self._mean, self._std = _channels("mean", mean, in_chans), _channels("std", std, in_chans)
        self._preprocessing = dict(preprocessing or {})
        self._config = dict(config or {})
        usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        like = next((p for p in net.parameters() if p.dtype in usual and not p.is_meta), torch.zeros(()))
        for key, values in (("mean", self._mean), ("std", self._std)):
            value = torch.tensor(values, dtype=like.dtype, device=like.device).view(1, in_chans, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of ``images`` (B, C, H, W), floats in [0, 1]; what else the net gives, of another task.

        Raises:
            DataError: Wrong number of dimensions or channels, or integer pixels.
        """
        channels = self.mean.shape[1]
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise DataError(
                f"{self.name} takes float images (B, {channels}, H, W) in [0, 1]; got {images.dtype} "
                f"{tuple(images.shape)}. Convert with torchvision's to_dtype(scale=True), or build with in_chans."
            )
        out = self.net((images - self.mean) / self.std)
        out = getattr(out, "logits", out)  # torchvision's GoogLeNet and Inception in train mode
        out = out["out"] if isinstance(out, Mapping) and "out" in out else out  # its nets of segmentation
        if not isinstance(out, Tensor):
            raise UnsupportedModelError(f"{self.name} must return a logits tensor; it returns {type(out).__name__}.")
        return out

    @property
    def preprocessing(self) -> dict[str, Any]:
        """``mean``, ``std``, ``input_size`` (C, H, W), ``interpolation`` and ``crop_pct``, as primitives."""
        rest = {key: self._preprocessing.get(key) for key in ("input_size", "interpolation", "crop_pct")}
        return {"mean": list(self._mean), "std": list(self._std), **rest}

    @property
    def info(self) -> dict[str, Any]:
        """``name``, ``num_classes``, ``pretrained``, ``weights`` and the ``digest`` of the present values."""
        known = {key: getattr(self, key) for key in ("name", "num_classes", "pretrained", "weights")}
        return {**known, "digest": state_digest(self)}

    @property
    def config(self) -> dict[str, Any]:
        """Primitive arguments: ``create_backbone(**config)`` rebuilds the architecture, with random weights.

        Empty where nobody knows how to: for a net that was made elsewhere.
        """
        if not self._config:
            return {}
        return {**copy.deepcopy(self._config), "mean": list(self._mean), "std": list(self._std)}

    def normalizes_with(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Return whether this backbone applies ``mean`` and ``std`` (length C or 1), up to rounding."""
        return _close(self._mean, mean) and _close(self._std, std)


def create_backbone(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Backbone:
    """Build a classifier by name; pixels in [0, 1] go in, logits come out.

    Args:
        name: ``timm/resnet50``, ``torchvision/resnet50``, ``cifar/resnet20``, ...; the family may be left out where
            only one has the name. See :func:`~lightning_tta.backbones.create.list_backbones`. A class of your own, or a
            function that makes a net: ``my_net.MyNet`` or ``path/to/my_net.py:MyNet``. An image classifier of
            transformers, with its weights: ``hf/FOLDER`` that ``save_pretrained`` wrote, or ``hf/NAME`` on the hub.
        num_classes: Number of logits, or of the values of a regression; ``None`` takes the net's own (1000; 10 for the
            CIFAR nets). A net of your own gets it where it takes an argument of this name.
        pretrained: Whether to download the weights of timm or torchvision.
        weights: A weights file (see :func:`~lightning_tta.backbones.create.load_weights`), or the name of
            torchvision weights ("IMAGENET1K_V2").
        mean: Mean per channel, length C or 1; ``None`` takes the weights' own: what the file carries beside them, else
            timm's ``pretrained_cfg``, torchvision's transforms, transformers' ``preprocessor_config.json`` or the
            convention of the CIFAR net. Where nobody knows, the net gets pixels as they are, with a warning if it has
            weights.
        std: Standard deviation per channel, positive; ``None`` as for ``mean``.
        options: Passed to the net's constructor (``img_size=32``, ``in_chans=1``, ``drop_rate=0.1``); primitives only.

    Raises:
        ConfigError: Unknown or ambiguous name, wrong or contradicting options.
        WeightsError: The file is missing or damaged, or does not fit the net.
    """
    if num_classes is not None:
        check_range("num_classes", num_classes, low=1, integer=True)
    for key, values in (("mean", mean), ("std", std)):
        if values is not None:
            _channels(key, values, options.get("in_chans"))
    if pretrained and weights is not None:
        raise ConfigError(f"Give either pretrained=True or weights={str(weights)!r}, not both.")
    for key, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"Option {key} must be a primitive (number, string, list, dict), so that a checkpoint can store it; "
                f"got {type(value).__name__}. For anything else wrap your own net: Backbone(net, mean, std)."
            ) from None
    family, arch = resolve(name)
    enum = torchvision_weights(arch, pretrained, weights) if family == "torchvision" else None
    path = None if weights is None or enum is not None else check_weights_file(weights)
    state = {} if path is None else read_state_dict(path)
    description = {} if path is None else read_description(path)

    downloaded = pretrained or enum is not None
    downloaded |= family == "hf" and weights is None and "architecture" not in options
    built = build(family, arch, num_classes, downloaded if family == "hf" else pretrained, enum, options)
    full_name = arch if family == "own" else f"{family}/{arch}"
    config = {"name": full_name, "num_classes": num_classes if family == "own" else built.num_classes}
    config = {**config, **options, **built.config}
    if isinstance(built.net, Backbone):
        return _take_backbone(built.net, config, mean, std, path, state)
    carried = None
    if path is not None:
        tensors, carried = fit_state(built.net, state, str(path))
        carried = carried_by(description) or carried
        built.net.load_state_dict(tensors, strict=False)
        built.weights = path.name
        if not {"img_size", "image_size", "in_chans"} & {*options}:  # else the images are not those of the weights
            named = ("input_size", "interpolation", "crop_pct")
            built.preprocessing |= {key: description[key] for key in named if key in description}
    pair = _normalization(built, carried, downloaded, mean, std, full_name)
    return Backbone(
        built.net,
        *pair,
        in_chans=built.channels if family != "own" else max(built.channels, *map(len, pair)),
        name=full_name,
        num_classes=built.num_classes,
        weights=built.weights,
        pretrained=downloaded or PACKAGE in description,
        preprocessing=built.preprocessing,
        config=config,
        class_names=built.class_names,
    )


def _take_backbone(
    backbone: Backbone,
    config: Mapping[str, Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    path: Path | None,
    state: Mapping[str, Tensor],
) -> Backbone:
    """A user's own net that is a :class:`Backbone` is taken as it is; weights go into the net inside."""
    own = backbone.preprocessing
    if not backbone.normalizes_with(mean or own["mean"], std or own["std"]):
        raise ConfigError(
            f"{config['name']} is a Backbone with mean {own['mean']} and std {own['std']}; leave mean and std out, or "
            "change them there."
        )
    if path is not None:
        tensors, _ = fit_state(backbone.net, state, str(path))
        backbone.net.load_state_dict(tensors, strict=False)
        backbone.weights = path.name
    backbone.name, backbone._config = config["name"], dict(config)
    return backbone


def list_backbones(family: str | None = None) -> list[str]:
    """Return the qualified names that :func:`create_backbone` knows, of one family or of all.

    Args:
        family: "cifar", "torchvision" or "timm".
    """
    if family is not None:
        check_choice("family", family, tuple(FAMILIES))
    return [f"{name}/{arch}" for name in FAMILIES if family in (None, name) for arch in FAMILIES[name].names()]


def load_weights(net: nn.Module, path: str | Path, *, strict: bool = True, prefix: str | None = None) -> None:
    """Load a weights file into ``net``, in place; when an error is raised nothing has been changed.

    Prefixes such as ``module.`` or ``model.backbone.net.`` are found by structure: the one under which the net's
    names occur. Entries beside it (metrics, losses) are left out with a warning.

    Args:
        net: The net, or a :class:`Backbone` around it.
        path: A ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt`` file.
        strict: Whether every name and shape must fit (BatchNorm's ``num_batches_tracked`` may be missing). If
            ``False``, what fits is loaded and the rest is listed in a warning.
        prefix: The prefix to take, dot included, where several fit (a student and its teacher, say).

    Raises:
        WeightsError: The file cannot be read, does not fit (the names are listed), or carries another mean and std
            than the backbone applies.
    """
    backbone = net if isinstance(net, Backbone) else None
    core = net if backbone is None else backbone.net
    tensors, carried = fit_state(core, read_state_dict(path), str(path), strict=strict, prefix=prefix)
    carried = carried_by(read_description(path)) or carried
    if carried and backbone and not backbone.normalizes_with(carried.mean, carried.std):
        raise WeightsError(
            f"{path} carries its own normalisation ({carried}), but the backbone applies mean "
            f"{backbone.preprocessing['mean']}, std {backbone.preprocessing['std']}: build it with the file's mean and "
            "std."
        )
    if carried and not backbone:
        warnings.warn(
            f"{path} carries its own normalisation ({carried}), which {type(net).__name__} does not apply: wrap the "
            "net in a Backbone with this mean and std.",
            stacklevel=2,
        )
    core.load_state_dict(tensors, strict=False)
    if backbone:
        backbone.weights = Path(path).name


def _normalization(
    built: Built,
    carried: Normalization | None,
    downloaded: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: str,
) -> list[Sequence[float]]:
    """Mean and std: the arguments, else the weights' own; a warning where both are known and differ, or none is."""
    trained, channels = carried or built, built.channels
    if trained.mean is None and None in (mean, std) and built.weights != "random":
        warnings.warn(
            f"With which mean and std was {name} trained? Nothing says it, so the net gets pixels in [0, 1] as they "
            "are. Give backbone_options={mean: [...], std: [...]} (mean=..., std=... in Python, or wrap the net: "
            "Backbone(net, mean, std)); [0] and [1] if this is right.",
            stacklevel=3,
        )
    pair: list[Sequence[float]] = []
    for key, value, default in (("mean", mean, trained.mean or (0.0,)), ("std", std, trained.std or (1.0,))):
        if value is None and len(default) not in (1, channels):
            raise ConfigError(
                f"The net takes {channels} channels, but its own {key} has {len(default)}: {list(default)}. Give "
                "mean and std of length 1 or of that many channels."
            )
        if value is not None and (downloaded or carried) and not _close(value, default):
            warnings.warn(
                f"{key}={list(value)} differs from the {key} {list(default)} that the weights ({built.weights}) were "
                "trained with; accuracy will suffer unless this is meant.",
                stacklevel=3,
            )
        pair.append(default if value is None else value)
    return pair


def _channels(key: str, values: Sequence[float], in_chans: int | None) -> tuple[float, ...]:
    """Check a mean or std and return it with one value a channel; ``None`` channels: as many as there are."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not is_list or len(values) not in (1, in_chans or len(values)):
        raise ConfigError(f"{key} must be a list of 1 or {in_chans or 3} numbers, one a channel; got {values!r}.")
    for value in values:
        check_range(key, value, low=0 if key == "std" else None, low_open=key == "std")
    if key == "mean" and max(values) > 1:  # of pixels from 0 to 255: logits of dark noise, and nobody would notice
        raise ConfigError(
            f"mean is that of pixels in [0, 1]; got {list(values)}. Divide mean and std by 255 if they are for pixels "
            "from 0 to 255."
        )
    return tuple(float(value) for value in values) * ((in_chans or len(values)) // len(values))


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return (len(a) == len(b) or 1 in (len(a), len(b))) and torch.allclose(a, b, rtol=0, atol=_TOLERANCE)
