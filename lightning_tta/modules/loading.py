"""Source models from checkpoints and weights files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn

from lightning_tta.backbones import create_backbone, load_weights
from lightning_tta.backbones.weights import read_checkpoint
from lightning_tta.errors import ConfigError, WeightsError
from lightning_tta.meta.mixed_bn import convert_mixed_bn, mixed_batch_norm_layers


def find_checkpoint(path: str | Path) -> Path:
    """A weights file: ``path`` itself, or the newest ``best.ckpt`` in or below it where it is a directory.

    Raises:
        WeightsError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.rglob("best.ckpt"), key=lambda p: p.stat().st_mtime) if path.is_dir() else []
    if not found:
        what = "holds no best.ckpt" if path.is_dir() else "does not exist"
        raise WeightsError(
            f"source_ckpt={str(path)!r} {what}. Give a checkpoint or weights file, or the run directory of a source "
            "training (lightning-tta fit --config configs/digits/source.yaml makes one)."
        )
    return found[-1]


def load_source(
    source_ckpt: str | None,
    backbone: str | nn.Module | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    backbone_options: dict[str, Any] | None = None,
) -> nn.Module:
    """The source model that a method wraps; arguments as in :class:`~lightning_tta.TestTimeAdaptation`.

    A net that was meta-trained comes with its mixed batch norm, and its inner loop's settings as ``net.meta_ttt``.
    """
    if source_ckpt is None and not pretrained and not isinstance(backbone, nn.Module):
        raise ConfigError(
            "No source weights: pass source_ckpt=PATH (a checkpoint of SourceClassifier, or a weights file together "
            "with backbone=NAME), or pretrained=true, or source_ckpt='none' to run a randomly initialised net."
        )
    path = None if source_ckpt is None or source_ckpt == "none" else find_checkpoint(source_ckpt)
    if source_ckpt == "none" and not isinstance(backbone, nn.Module) and not pretrained:
        warnings.warn("source_ckpt='none': the net is randomly initialised and predicts by chance.", stacklevel=2)
    saved = _description(path)
    if "mixed_bn" in saved:
        assert path is not None
        return _load_meta_trained(path, saved, backbone, num_classes, backbone_options or {})
    if isinstance(backbone, nn.Module):
        if path is not None:
            load_weights(backbone, path)
        return backbone
    if backbone is not None:
        options = backbone_options or {}
        weights = None if path is None else str(path)
        return create_backbone(backbone, num_classes, pretrained=pretrained, weights=weights, **options)
    if path is None:
        raise ConfigError("Which net? Pass backbone=NAME, such as 'timm/test_resnet' or 'cifar/resnet20'.")
    if not saved.get("backbone"):
        raise WeightsError(f"{path} does not say which net it is for. Pass backbone=NAME and num_classes=K with it.")
    return create_backbone(**saved["backbone"], weights=str(path))


def _description(path: Path | None) -> dict[str, Any]:
    """What a checkpoint of ours says of its net; empty for any other file."""
    if path is None or path.suffix != ".ckpt":
        return {}
    saved = read_checkpoint(path)
    if not isinstance(saved, dict):
        return {}
    return cast(dict[str, Any], saved.get("lightning_tta", {}))


def _load_meta_trained(
    path: Path,
    saved: dict[str, Any],
    backbone: str | nn.Module | None,
    num_classes: int | None,
    options: dict[str, Any],
) -> nn.Module:
    if isinstance(backbone, str):
        net: nn.Module = create_backbone(backbone, num_classes, **options)
    elif backbone is not None:
        net = backbone
    elif saved["backbone"]:
        net = create_backbone(**saved["backbone"])
    else:
        raise WeightsError(f"{path} was trained with a net of its own. Pass that net: backbone=MODULE.")
    if not mixed_batch_norm_layers(net):
        net = convert_mixed_bn(net, **saved["mixed_bn"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are left out.*")  # learned inner rates: in saved["meta_ttt"]
        load_weights(net, path)
    net.meta_ttt = saved["meta_ttt"]
    return net
