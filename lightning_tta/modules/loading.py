"""Source models from checkpoints and weights files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from lightning_tta.backbones import create_backbone, load_weights
from lightning_tta.backbones.weights import read_checkpoint
from lightning_tta.errors import ConfigError, WeightsError
from lightning_tta.meta.inner_loop import InnerLoop, set_inner_loop
from lightning_tta.meta.mixed_bn import convert_mixed_bn, mixed_batch_norm_layers


def find_checkpoint(path: str | Path) -> Path:
    """A weights file: ``path`` itself, or the newest ``best.ckpt`` in or below it where it is a directory.

    Raises:
        WeightsError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    checkpoints = path.rglob("best.ckpt") if path.is_dir() else ()
    newest = max(checkpoints, key=lambda p: p.stat().st_mtime, default=None)
    if newest is None:
        what = "holds no best.ckpt" if path.is_dir() else "does not exist"
        raise WeightsError(
            f"source_ckpt={str(path)!r} {what}. Give a checkpoint or weights file, or the run directory of a source "
            "training (lightning-tta fit --config configs/digits/source.yaml makes one)."
        )
    return newest


def source_recipe(
    source_ckpt: str | None,
    backbone: str | nn.Module | None = None,
    num_classes: int | None = None,
    backbone_options: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Arguments for :func:`load_source`, in primitives, that make the same net again from any folder.

    ``None`` where there are none: the net was made by its user, or has random weights.
    """
    if isinstance(backbone, nn.Module) or source_ckpt in (None, "none"):
        return None
    pretrained = source_ckpt == "pretrained"
    path = None if pretrained else str(find_checkpoint(str(source_ckpt)).absolute())
    return {
        "source_ckpt": path,
        "backbone": backbone,
        "num_classes": num_classes,
        "pretrained": pretrained,
        "backbone_options": backbone_options,
    }


def load_source(
    source_ckpt: str | None,
    backbone: str | nn.Module | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    backbone_options: dict[str, Any] | None = None,
) -> nn.Module:
    """The source model that a method wraps; arguments as in :class:`~lightning_tta.TestTimeAdaptation`.

    A net that was meta-trained comes with its mixed batch norm, and with the settings of its inner loop (see
    :func:`~lightning_tta.meta.inner_loop.inner_loop_of`).
    """
    options = backbone_options or {}
    if source_ckpt is None and not pretrained and not isinstance(backbone, nn.Module):
        raise ConfigError(
            "No source weights: pass source_ckpt=PATH (a checkpoint of SourceClassifier, or a weights file together "
            "with backbone=NAME), or pretrained=true, or source_ckpt='none' to run a randomly initialised net."
        )
    path = None if source_ckpt is None or source_ckpt == "none" else find_checkpoint(source_ckpt)
    if source_ckpt == "none" and not isinstance(backbone, nn.Module) and not pretrained:
        warnings.warn("source_ckpt='none': the net is randomly initialised and predicts by chance.", stacklevel=2)
    content = read_checkpoint(path) if path is not None and path.suffix == ".ckpt" else None
    saved: dict[str, Any] = content.get("lightning_tta", {}) if isinstance(content, dict) else {}
    meta_trained = path is not None and "mixed_bn" in saved
    weights = None if meta_trained else path  # those of mixed layers are loaded once the net has them
    if isinstance(backbone, nn.Module):
        net = backbone
        if weights is not None:
            load_weights(net, weights)
    elif backbone is not None:
        pretrained = pretrained and not meta_trained
        net = create_backbone(backbone, num_classes, pretrained=pretrained, weights=weights, **options)
    elif path is None:
        raise ConfigError("Which net? Pass backbone=NAME, such as 'timm/test_resnet' or 'cifar/resnet20'.")
    elif saved.get("backbone"):
        net = create_backbone(**saved["backbone"], weights=weights)
    elif meta_trained:
        raise WeightsError(f"{path} was trained with a net of its own. Pass that net: backbone=MODULE.")
    else:
        raise WeightsError(f"{path} does not say which net it is for. Pass backbone=NAME and num_classes=K with it.")
    if path is not None and meta_trained:
        if not mixed_batch_norm_layers(net):
            net = convert_mixed_bn(net, parametrization=saved["mixed_bn"]["parametrisation"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*are left out.*")  # learned inner rates: in saved["meta_ttt"]
            load_weights(net, path)
        set_inner_loop(net, InnerLoop(**saved["meta_ttt"]))
    return net
