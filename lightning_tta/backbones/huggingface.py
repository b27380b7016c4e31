"""Nets of the library transformers: a folder of ``save_pretrained``, or a name on the Hugging Face hub."""

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_tta.backbones.adapter_folders import base_of, has_adapter, merge
from lightning_tta.errors import ConfigError, WeightsError, did_you_mean, in_one_line

_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def build_transformers(name: str, num_classes: int | None, load: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """What :class:`~lightning_tta.backbones.families.Built` needs of a classifier; ``load``: with its weights.

    ``options`` are entries of the model's configuration; ``architecture``, as a checkpoint stores it, is a whole
    configuration, with which nothing else is read. No code of a folder or the hub is run.

    Raises:
        ConfigError: transformers is not installed, or has no image classifier of this kind.
        WeightsError: The folder or name has none, or cannot be fetched.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            f'hf/{name} needs the library transformers: pip install "lightning-tta[transformers]".'
        ) from None
    options = dict(options)
    architecture = options.pop("architecture", None)
    auto = transformers.AutoModelForImageClassification
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        if architecture is not None:
            try:
                config = transformers.AutoConfig.for_model(**architecture)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"hf/{name}: architecture is no configuration of a model: {error}") from error
            recipe: dict[str, Any] = {}
        else:
            config = _read(transformers.AutoConfig, name)
            recipe = _recipe(name)
        own_classes = config.num_labels
        for key, value in options.items():
            if not hasattr(config, key):
                raise ConfigError(f"hf/{name} has no option {key!r}.{did_you_mean(key, config.to_dict())}")
            setattr(config, key, value)
        if num_classes not in (None, own_classes):
            config.num_labels = num_classes
        transformers.utils.logging.disable_progress_bar()
        try:
            net = _read_weights(auto, name, config) if load else auto.from_config(config)
        except WeightsError:
            raise
        except ValueError as error:
            raise ConfigError(f"hf/{name} is no image classifier: {' '.join(str(error).split())[:300]}") from error
    if load and config.num_labels != own_classes:
        warnings.warn(
            f"hf/{name} has weights for {own_classes} classes; the classifier for {config.num_labels} is random until "
            "it is trained.",
            stacklevel=2,
        )
    channels = getattr(config, "num_channels", 3)
    names = [config.id2label[position] for position in range(config.num_labels)]
    return {
        "net": net.train(),  # as the other libraries give it; from_pretrained gives it in eval mode
        "num_classes": config.num_labels,
        **_normalization(recipe),
        "preprocessing": _preprocessing(recipe, channels) if recipe else {},
        "weights": Path(name).name if load else "random",
        "channels": channels,
        "class_names": None if names == [f"LABEL_{i}" for i in range(len(names))] else names,
        "config": {"architecture": json.loads(config.to_json_string(use_diff=False))},
    }


def load_causal_model(name: str, dtype: str = "auto", download: bool = False) -> Any:
    """A causal language model with its weights, in safetensors. No code of a folder or the hub is run.

    Args:
        name: A folder that ``save_pretrained`` wrote; with ``download`` also a name on the hub. One that holds an
            adapter of peft stands for its net with the adapter added to the weights.
        dtype: ``auto``, as the weights are saved; or the name of one of torch, such as ``bfloat16``.
        download: Whether files may be fetched.

    Raises:
        ConfigError: If transformers is not installed, or peft for an adapter.
        WeightsError: If there is none, or the adapter cannot be added.
    """
    if not Path(name).is_dir() and not download:
        raise WeightsError(
            f"net={name!r} is no folder. Give one that save_pretrained wrote, with config.json and model.safetensors; "
            "or allow the name to be fetched from the hub: --model.download true."
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            f'net={name!r} needs the library transformers: pip install "lightning-tta[language]".'
        ) from None
    transformers.utils.logging.disable_progress_bar()
    folder = base_of(name, download) if has_adapter(name) else name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        try:
            net, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=not download,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # damaged files provoke any
            raise WeightsError(
                f"net={folder!r} has no causal language model of transformers with weights in safetensors: "
                f"{in_one_line(error)[:300]}"
            ) from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(f"net={folder!r} has no weights for {', '.join(missing[:4])}. Give a causal language model.")
    return (net if folder == name else merge(net, name)).eval()


def _read_weights(auto: Any, name: str, config: Any) -> Any:
    """The net with its weights; layers for which there are none are named: transformers makes them random."""
    net, found = _read(auto, name, config=config, ignore_mismatched_sizes=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        warnings.warn(
            f"hf/{name} has no weights for {', '.join(missing[:4])}{more}: they are random, and the net predicts by "
            "chance until it is trained.",
            stacklevel=3,
        )
    return net


def _read(kind: Any, name: str, **options: Any) -> Any:
    """``from_pretrained``; a folder is read without the network, and code in it is not run, nor asked about."""
    try:
        return kind.from_pretrained(name, local_files_only=Path(name).is_dir(), trust_remote_code=False, **options)
    except Exception as error:  # damaged files provoke any
        text = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"hf/{name} needs code of its own, which is not run. If you trust it, make the net in Python, and give "
                "it to adapt or TestTimeAdaptation."
            ) from error
        if isinstance(error, OSError):
            kind_of = "is neither a folder that save_pretrained wrote nor a name that can be fetched"
            raise WeightsError(f"hf/{name} {kind_of}: {text}") from error
        if "GLOBAL" in str(error):
            raise WeightsError(
                f"hf/{name} has weights in a file that holds more than tensors: to read it, code would have to run, "
                "which is refused. Take or make a model.safetensors."
            ) from error
        if isinstance(error, ValueError):  # of another kind of model
            raise
        raise WeightsError(f"hf/{name} cannot be read ({type(error).__name__}): {text}") from error


def _recipe(name: str) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``; empty where there is none."""
    hub: Any = importlib.import_module("transformers.utils")
    try:
        path = hub.cached_file(name, "preprocessor_config.json", local_files_only=Path(name).is_dir())
    except OSError:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}. Save it again, or remove it and give mean and std.") from error
    if not isinstance(content, dict) or (content.get("image_mean") is None) != (content.get("image_std") is None):
        raise WeightsError(f"{path} must be a mapping, with image_mean and image_std or neither.")
    return content


def _normalization(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """``mean`` and ``std`` for pixels in [0, 1]; the recipe's own are for 0-255 times ``rescale_factor``."""
    if not recipe:
        return {"mean": None, "std": None}
    scale = 255 * (recipe.get("rescale_factor", 1 / 255) if recipe.get("do_rescale", True) else 1)
    normalizes = recipe.get("do_normalize", True) and recipe.get("image_mean") is not None
    mean, std = (recipe["image_mean"], recipe["image_std"]) if normalizes else ([0.0], [1.0])
    mean, std = ([value] if isinstance(value, (int, float)) else value for value in (mean, std))
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}


def _preprocessing(recipe: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """``input_size``, ``interpolation`` and ``crop_pct``."""
    resized, cropped = _side(recipe.get("size")), _side(recipe.get("crop_size"))
    crops = recipe.get("do_center_crop", False) and cropped is not None and resized is not None
    size = cropped if crops else resized
    return {
        "input_size": None if size is None else [channels, size, size],
        "interpolation": _INTERPOLATION.get(recipe.get("resample", 2), "bilinear"),
        "crop_pct": round(cropped / resized, 4) if crops and cropped and resized else 1.0,
    }


def _side(size: Any) -> int | None:
    """The side of a square, as versions of transformers write it."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) else None
