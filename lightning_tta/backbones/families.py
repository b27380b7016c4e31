"""Where nets come from: the names and builders of timm, torchvision and the CIFAR literature.

timm and torchvision are imported when a net or a name of theirs is asked for: both take seconds.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_tta.backbones.cifar import CIFAR_NETS
from lightning_tta.backbones.huggingface import build_transformers
from lightning_tta.backbones.own import build_own, is_import_path
from lightning_tta.errors import ConfigError, WeightsError


@dataclass
class Built:
    """A net and what its family knows about its input (``input_size`` is (C, H, W) in pixels) and weights.

    ``mean`` is ``None`` where nobody knows how the weights' images were normalised; ``config`` are further arguments
    that rebuild the net.
    """

    net: nn.Module
    num_classes: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    preprocessing: dict[str, Any]
    weights: str = "random"
    channels: int = 3
    class_names: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)


def _preprocessing(size: Sequence[int], interpolation: str = "bilinear", crop_pct: float = 1.0) -> dict[str, Any]:
    return {"input_size": list(size), "interpolation": interpolation, "crop_pct": crop_pct}


def resolve(name: str) -> tuple[str, str]:
    """Split a name into family and architecture; raise :class:`ConfigError` with what else it may mean."""
    if name.startswith(TRANSFORMERS):
        return "hf", name.partition("/")[2]
    if name.endswith(".py") or ":" in name:
        return _own(name)
    prefix, _, arch = name.rpartition("/")
    if prefix and prefix not in FAMILIES:
        raise ConfigError(f"Unknown family {prefix!r} in {name!r}; families: {', '.join(FAMILIES)}.")
    known = {family: source.names() for family, source in FAMILIES.items() if prefix in ("", family)}
    untagged = arch.partition(".")[0]  # a name of timm may end in the tag of its weights: resnet50.a1_in1k
    families = [family for family in known if (untagged if family == "timm" else arch) in known[family]]
    if len(families) == 1:
        return families[0], arch
    if families:
        raise ConfigError(f"{name!r} is ambiguous; say which: {', '.join(f'{f}/{arch}' for f in families)}.")
    if not prefix and is_import_path(name):
        return "own", name
    similar = [f"{f}/{match}" for f in known for match in difflib.get_close_matches(untagged, known[f], n=3)]
    raise ConfigError(
        f"Unknown backbone {name!r}; similar: {', '.join(similar) or 'none'}. See list_backbones(). A net of "
        "your own is given as my_net.MyNet (module and class), or path/to/my_net.py:MyNet."
    )


def _own(name: str) -> tuple[str, str]:
    if is_import_path(name):
        return "own", name
    raise ConfigError(f"Backbone {name!r} names no class. Give my_net.MyNet, or path/to/my_net.py:MyNet.")


def torchvision_weights(arch: str, pretrained: bool, weights: str | Path | None) -> Any:
    """Return the weights enum member that the arguments name, or ``None`` where ``weights`` is a file or not given."""
    from torchvision import models

    members = models.get_model_weights(arch).__members__
    if pretrained:
        return members["DEFAULT"]
    if isinstance(weights, str) and weights in members:
        return members[weights]
    if isinstance(weights, str) and not Path(weights).suffix and not Path(weights).exists():
        raise ConfigError(
            f"weights={weights!r} is neither a file nor a name of weights of torchvision/{arch}: {', '.join(members)}."
        )
    return None


def build(
    family: str, arch: str, num_classes: int | None, pretrained: bool, enum: Any, options: Mapping[str, Any]
) -> Built:
    """Construct a net (``enum``: of torchvision's weights, or ``None``); errors of libraries become ours."""
    try:
        return _BUILDERS[family](arch, num_classes, pretrained, enum, options)
    except (ConfigError, WeightsError):
        raise
    except OSError as error:  # what the download clients raise without a network
        raise WeightsError(
            f"The pretrained weights of {family}/{arch} cannot be fetched ({error}). Fetch them where there is a "
            "network, and give the file as weights=..."
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        listed = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ConfigError(f"{family}/{arch} cannot be built with {listed}: {error}") from error


def _cifar(arch: str, num_classes: int | None, pretrained: bool, enum: Any, options: Mapping[str, Any]) -> Built:
    if pretrained:
        raise ConfigError(f"cifar/{arch} has no weights to download: give a file as weights=...")
    spec = CIFAR_NETS[arch]
    classes = 10 if num_classes is None else num_classes
    net = spec.build(num_classes=classes, **spec.fixed, **options)
    channels = options.get("in_chans", 3)
    return Built(net, classes, spec.mean, spec.std, _preprocessing((channels, 32, 32)), channels=channels)


def _torchvision(arch: str, num_classes: int | None, pretrained: bool, enum: Any, options: Mapping[str, Any]) -> Built:
    from torchvision import models

    # Without weights: the input that the first weights published for the net were trained with.
    recipe = enum or next(iter(models.get_model_weights(arch)))
    if arch in models.list_models(module=models.segmentation):
        return _torchvision_segmentation(arch, num_classes, enum, recipe, options)
    if not recipe.meta.get("categories"):
        raise ConfigError(f"{recipe} has features only, no classifier; choose other weights.")
    classes = len(recipe.meta["categories"])
    if enum is not None and num_classes not in (None, classes):
        raise ConfigError(
            f"{enum} has {classes} classes, not {num_classes}. Leave num_classes out, or fine-tune timm's net of this "
            "kind, which gets a new classifier."
        )
    classes = num_classes or classes
    net = models.get_model_builder(arch)(weights=enum, num_classes=classes, **options)
    transforms = recipe.transforms()
    size = options.get("image_size", transforms.crop_size[0])
    crop_pct = round(transforms.crop_size[0] / transforms.resize_size[0], 4)
    preprocessing = _preprocessing((3, size, size), str(transforms.interpolation.value), crop_pct)
    weights = enum.name if enum is not None else "random"
    names = list(enum.meta["categories"]) if enum is not None else None
    return Built(net, classes, transforms.mean, transforms.std, preprocessing, weights, class_names=names)


def _torchvision_segmentation(
    arch: str, num_classes: int | None, enum: Any, recipe: Any, options: Mapping[str, Any]
) -> Built:
    """A net that gives a class for each pixel; without ``enum`` all of it is random, what it is built on included."""
    from torchvision import models

    names = list(recipe.meta["categories"])
    if enum is not None and num_classes not in (None, len(names)):
        raise ConfigError(f"{enum} has {len(names)} classes, not {num_classes}. Leave num_classes out.")
    arguments: dict[str, Any] = {"weights": enum, "weights_backbone": None, "aux_loss": None, **options}
    if arch.startswith("lraspp"):
        del arguments["aux_loss"]
    net = models.get_model_builder(arch)(num_classes=num_classes or len(names), **arguments)
    transforms = recipe.transforms()
    weights = enum.name if enum is not None else "random"
    known = names if enum is not None else None
    return Built(net, num_classes or len(names), transforms.mean, transforms.std, {}, weights, class_names=known)


def _timm(arch: str, num_classes: int | None, pretrained: bool, enum: Any, options: Mapping[str, Any]) -> Built:
    import timm

    arguments = dict(options) if num_classes is None else {"num_classes": num_classes, **options}
    net: Any = timm.create_model(arch, pretrained=pretrained, **arguments)
    recipe = net.pretrained_cfg
    channels, height, width = recipe["input_size"]
    size = options.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    size = (options.get("in_chans", channels), height, width)
    preprocessing = _preprocessing(size, recipe["interpolation"], recipe["crop_pct"])
    weights = (recipe.get("tag") or "pretrained") if pretrained else "random"
    return Built(net, net.num_classes, recipe["mean"], recipe["std"], preprocessing, weights, channels=size[0])


def _import_path(name: str, num_classes: int | None, pretrained: bool, enum: Any, options: Mapping[str, Any]) -> Built:
    if pretrained:
        raise ConfigError(f"{name} has no weights to download: give a file as weights=...")
    net, classes = build_own(name, num_classes, options)
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    channels = options.get("in_chans", first.in_channels if first is not None else 3)
    return Built(net, classes, None, None, {}, channels=channels)


def _transformers(name: str, num_classes: int | None, pretrained: bool, enum: Any, options: Mapping[str, Any]) -> Built:
    return Built(**build_transformers(name, num_classes, pretrained, options))


def _torchvision_names() -> list[str]:
    from torchvision import models

    return sorted(models.list_models(module=models) + models.list_models(module=models.segmentation))


def _timm_names() -> list[str]:
    import timm

    return sorted(timm.list_models())


class Family(NamedTuple):
    """Where nets come from: their names, sorted, and what :func:`build` calls, without ``family``."""

    names: Callable[[], list[str]]
    build: Callable[[str, int | None, bool, Any, Mapping[str, Any]], Built]


FAMILIES: dict[str, Family] = {
    "cifar": Family(lambda: sorted(CIFAR_NETS), _cifar),
    "torchvision": Family(_torchvision_names, _torchvision),
    "timm": Family(_timm_names, _timm),
}

TRANSFORMERS = ("hf/", "transformers/")
_BUILDERS = {**{name: family.build for name, family in FAMILIES.items()}, "hf": _transformers, "own": _import_path}
