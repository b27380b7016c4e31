"""Source models from checkpoints and weights files."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_tta.auxiliary.base import Trained, note_trained
from lightning_tta.backbones import Backbone, create_backbone, load_weights, state_digest
from lightning_tta.backbones.families import TRANSFORMERS, resolve
from lightning_tta.backbones.gpt import create_gpt
from lightning_tta.backbones.own import check_not_beside, find_net, is_import_path
from lightning_tta.backbones.split import find_head
from lightning_tta.backbones.weights import digest_of, read_checkpoint, read_description
from lightning_tta.errors import ConfigError, WeightsError
from lightning_tta.meta.inner_loop import InnerLoop, set_inner_loop
from lightning_tta.meta.mixed_bn import convert_mixed_bn, mixed_batch_norm_layers
from lightning_tta.methods.components.adapters import KINDS, Select, put_in
from lightning_tta.methods.components.wanted import listed
from lightning_tta.modules.training import find_checkpoint


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

    A language model of :class:`~lightning_tta.SourceLanguageModel` comes with its tokenizer, as ``net.tokenizer``.
    A net that was meta-trained comes with its mixed batch norm, and with the settings of its inner loop (see
    :func:`~lightning_tta.meta.inner_loop.inner_loop_of`); one that was trained with auxiliary losses comes with their
    heads (see :func:`~lightning_tta.auxiliary.base.find_trained`).
    """
    options = check_options(backbone_options)
    pretrained_only = isinstance(backbone, str) and backbone.startswith(TRANSFORMERS) and "architecture" not in options
    if source_ckpt is None and pretrained_only:
        pretrained = True  # a folder or name of transformers is one with weights
    if source_ckpt is None and not pretrained and not isinstance(backbone, nn.Module):
        raise ConfigError(
            "No source weights: pass source_ckpt=PATH (a checkpoint of SourceClassifier, or a weights file together "
            "with backbone=NAME), or source_ckpt='pretrained', or source_ckpt='none' to run a randomly initialised net."
        )
    if source_ckpt == "none" and pretrained_only:
        raise ConfigError(f"backbone={backbone!r} comes with its weights: leave source_ckpt='none' out.")
    path = None if source_ckpt is None or source_ckpt == "none" else find_checkpoint(source_ckpt)
    if source_ckpt == "none" and not isinstance(backbone, nn.Module) and not pretrained:
        warnings.warn("source_ckpt='none': the net is randomly initialised and predicts by chance.", stacklevel=2)
    content = read_checkpoint(path) if path is not None and path.suffix == ".ckpt" else None
    saved = _entry(content, path)
    meta_trained = path is not None and "mixed_bn" in saved
    adapted = saved.get("adapters") or []
    later = meta_trained or bool(adapted)
    weights = None if later else path  # those of mixed layers and adapters are loaded once the net has them
    with warnings.catch_warnings():
        if "auxiliary" in saved:
            warnings.filterwarnings("ignore", message=".*are left out.*")  # the heads, which note_trained() takes
        net = _build(backbone, path, weights, saved, content, num_classes, pretrained and not later, options)
    if path is not None and meta_trained:
        if not mixed_batch_norm_layers(net):
            net = convert_mixed_bn(net, parametrization=saved["mixed_bn"]["parametrisation"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*are left out.*")  # learned inner rates: in saved["meta_ttt"]
            load_weights(net, path)
        set_inner_loop(net, InnerLoop(**saved["meta_ttt"]))
    if path is not None and adapted:
        put_in(core_of(net), adapted)
        load_weights(net, path)
    if saved.get("auxiliary"):
        note_trained(net, {kind: _trained(kind, o, content, path) for kind, o in saved["auxiliary"].items()})
    if isinstance(net, Backbone) and saved.get("task"):
        net.task = saved["task"]
    if isinstance(net, Backbone) and saved.get("class_names"):
        net.class_names = list(saved["class_names"])
    if "digest" in saved and state_digest(net) != saved["digest"]:
        raise WeightsError(
            f"The weights in {path} are not those that were saved (digest {state_digest(net)}, saved "
            f"{saved['digest']}): the file is damaged, or the net has changed since. Copy or train it again."
        )
    return net


def _build(
    backbone: str | nn.Module | None,
    path: Any,
    weights: Any,
    saved: dict[str, Any],
    content: Any,
    num_classes: int | None,
    pretrained: bool,
    options: dict[str, Any],
) -> nn.Module:
    """The net that was given or named, here or in its checkpoint, with its weights."""
    if isinstance(backbone, nn.Module):
        net = backbone
        if weights is not None:
            load_weights(net, weights)
    elif backbone is not None:
        options = {**_hyper_parameters(backbone, content), **options}
        if "num_classes" in options:
            own_classes = options.pop("num_classes")
            num_classes = own_classes if num_classes is None else num_classes
        net = create_backbone(backbone, num_classes, pretrained=pretrained, weights=weights, **options)
        mean, std = (net.preprocessing[key] for key in ("mean", "std"))
        if weights is not None and any(mean) and not {"mean", "std"} & {*options}:  # none: a warning has said it
            rank_zero_info(
                f"{path}: images are normalized with mean {mean}, std {std}. Other values: "
                "--model.backbone_options '{mean: [...], std: [...]}'."
            )
    elif path is None:
        raise ConfigError("Which net? Pass backbone=NAME, such as 'timm/test_resnet' or 'cifar/resnet20'.")
    elif saved.get("language"):
        net = create_gpt(**{name: value for name, value in saved["language"].items() if name != "name"})
        load_weights(net, path)
    elif path.suffix == ".safetensors" and "num_classes" in (described := read_description(path)):
        net = create_backbone(described["net"], described["num_classes"], weights=weights, **options)
    elif saved.get("backbone"):
        if resolve(saved["backbone"]["name"])[0] == "own":
            check_not_beside(saved["backbone"]["name"], path)
        try:
            net = create_backbone(**saved["backbone"], weights=weights)
        except ConfigError as error:
            raise WeightsError(
                f"{path} is of the net {saved['backbone']['name']}, which is missing: {error}"
            ) from error
    elif saved:
        raise WeightsError(
            f"{path} was trained with a net that was made in Python. Pass that net: backbone=MODULE, or the import "
            "path of its class: backbone=my_net.MyNet."
        )
    else:
        raise WeightsError(
            f"{path} does not say which net it is for. Pass backbone=NAME with it, such as torchvision/resnet18 or, "
            "for a class of your own, my_net.MyNet (backbone=MODULE in Python); and num_classes=K."
        )
    return net


def _entry(content: Any, path: Any) -> dict[str, Any]:
    """What a checkpoint of this package says of its net; empty of another make.

    Raises:
        WeightsError: If it says something else than :func:`describe_net` writes: changed, or from elsewhere.
    """
    saved = content.get("lightning_tta", {}) if isinstance(content, dict) else {}
    kinds = {
        "backbone": dict,
        "language": dict,
        "class_names": list,
        "task": str,
        "adapters": list,
        "mixed_bn": dict,
        "meta_ttt": dict,
        "auxiliary": dict,
        "digest": str,
    }
    fits = isinstance(saved, dict) and all(isinstance(saved.get(k) or kind(), kind) for k, kind in kinds.items())
    backbone = (saved.get("backbone") if fits else None) or {"name": ""}
    if not fits or not isinstance(backbone.get("name"), str) or {"weights", "pretrained"} & {*backbone}:
        raise WeightsError(
            f"{path}: its entry 'lightning_tta' is not as SourceClassifier writes it, nor as "
            "SourceLanguageModel does. Train or copy again."
        )
    entry: dict[str, Any] = saved
    return entry


def _trained(kind: str, options: Any, content: Any, path: Any) -> Trained:
    """The options and tensors of an auxiliary.

    Raises:
        WeightsError: If its options are no dict, or its tensors are missing.
    """
    prefix = f"auxiliary.{kind}."
    state = content.get("state_dict", {})
    tensors = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if not isinstance(options, dict) or not tensors:
        raise WeightsError(f"{path} says that it has the auxiliary {kind!r}, but has none. Train or copy again.")
    return Trained(options, tensors)


def check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a backbone.

    Raises:
        ConfigError: If one has an option of its own, beside them.
    """
    for name in {"name", "num_classes", "pretrained", "weights"} & {*(options or {})}:
        own = "backbone" if name == "name" else name
        raise ConfigError(f"backbone_options must not have {name!r}: give it as --model.{own}, {own}=... in Python.")
    return dict(options or {})


def _hyper_parameters(backbone: str, content: Any) -> dict[str, Any]:
    """The arguments with which a user's own LightningModule was made, as its checkpoint says."""
    saved = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not saved or "lightning_tta" in content or not is_import_path(backbone):
        return {}
    make = find_net(backbone) if resolve(backbone)[0] == "own" else None
    if not (inspect.isclass(make) and issubclass(make, LightningModule)):
        return {}
    parameters = inspect.signature(make).parameters
    return {name: value for name, value in saved.items() if name in parameters}


def core_of(net: nn.Module) -> nn.Module:
    """The net inside a backbone, whose weights a file holds; or the net itself."""
    return net.net if isinstance(net, Backbone) else net


def train_adapters(net: nn.Module, adapters: Select) -> None:
    """Put adapters into a net, in place; they and the last linear layer learn, and nothing else."""
    core = core_of(net)
    words, names = put_in(core, adapters)
    if words or not names:
        raise ConfigError(f"adapters must be kinds of adapters: {', '.join(KINDS)}; got {adapters!r}.")
    net.__dict__["_tta_adapters"] = listed(adapters)
    net.requires_grad_(False)
    find_head(core)[1].requires_grad_(True)
    for name in names:
        core.get_parameter(name).requires_grad_(True)


def describe_net(net: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint with the weights of ``net`` under ``backbone.`` says of it, for :func:`load_source`.

    The digest is that of the weights in the checkpoint, which a callback may have averaged.
    """
    state = checkpoint["state_dict"]
    weights = {name: state.get(f"backbone.{name}", value) for name, value in net.state_dict().items()}
    return {
        "backbone": net.config if isinstance(net, Backbone) else None,
        "class_names": net.class_names if isinstance(net, Backbone) else None,
        **({"task": net.task} if isinstance(net, Backbone) and net.task != "images" else {}),
        **({"adapters": net.__dict__["_tta_adapters"]} if "_tta_adapters" in net.__dict__ else {}),
        "digest": digest_of(weights),
    }
