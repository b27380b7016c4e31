"""Folders of the library peft: an adapter, and the name of the net that it was trained on."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

from lightning_tta.errors import ConfigError, WeightsError, in_one_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_adapter(name: str) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (Path(name) / CONFIG).is_file()


def base_of(name: str, download: bool = False) -> str:
    """The net that an adapter is for, as its configuration names it.

    A folder is looked for from the working directory, and beside the adapter's.

    Args:
        name: The adapter's folder.
        download: Whether the net may be fetched.

    Raises:
        WeightsError: If the adapter cannot be used here, or its net is not there.
    """
    settings = _settings(name)
    if _has_net(Path(name)):
        raise WeightsError(
            f"net={name!r} holds a net and an adapter of peft: which one is meant is not clear. Move {CONFIG} and "
            f"{WEIGHTS} to a folder of their own, and name the net's in {CONFIG}; or away, to take the net alone."
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightsError(
            f"net={name!r} holds an adapter of peft whose {CONFIG} does not name its net. Write the folder of the net "
            "there, as base_model_name_or_path."
        )
    places = [Path(base), Path(name).parent / base, Path(name).parent / Path(base).name]
    for place in places:
        if place.is_dir():
            if has_adapter(str(place)):
                raise WeightsError(
                    f"net={name!r} holds an adapter of peft for {base!r}, which has an adapter itself. Merge that one "
                    "into its net first (merge_and_unload of peft), and save the net."
                )
            return str(place)
    if download:
        return base
    raise WeightsError(
        f"net={name!r} holds an adapter of peft for the net {base!r}, and there is no such folder. Put the net there "
        f"or beside the adapter's folder, or change base_model_name_or_path in {CONFIG}; or allow it to be "
        "fetched from the hub: --model.download true."
    )


def merge(net: Any, name: str) -> Any:
    """The net with the adapter of a folder added to its weights, in their dtype; no layer of peft is left.

    Raises:
        ConfigError: If peft is not installed.
        WeightsError: If the adapter is damaged, is not for this net, or cannot be added to weights.
    """
    peft: Any = _library(name)
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is an error below
        try:
            saved = load_file(Path(name) / WEIGHTS)
            adapted = peft.PeftModel.from_pretrained(net, name, torch_device="cpu", local_files_only=True)
            expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
            missing, unknown = expected.keys() - saved.keys(), saved.keys() - expected.keys() - {*adapted.state_dict()}
            merged = None if missing or unknown else adapted.merge_and_unload(safe_merge=True)
        except Exception as error:  # damaged files provoke any
            raise WeightsError(
                f"net={name!r}: the adapter of peft there cannot be added to the weights of its net, a "
                f"{type(net).__name__}: {in_one_line(error)[:300]}"
            ) from error
    if merged is None:
        what = f"has no weights for {min(missing)}" if missing else f"has weights for {min(unknown)}, of another net"
        raise WeightsError(f"net={name!r}: the adapter of peft there does not fit a {type(net).__name__}: it {what}.")
    return merged


def _has_net(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _library(name: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ConfigError(
            f'net={name!r} holds an adapter, which needs the library peft: pip install "lightning-tta[language]".'
        ) from None


def _settings(name: str) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
        WeightsError: If it is damaged, or the adapter is of a kind that is not part of weights.
    """
    peft: Any = _library(name)
    try:
        settings = json.loads((Path(name) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"net={name!r}: its {CONFIG} cannot be read: {in_one_line(error)}") from error
    kinds: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    kind = str(settings.get("peft_type")) if isinstance(settings, dict) else ""
    if kind not in kinds:
        raise WeightsError(
            f"net={name!r}: its {CONFIG} names no kind of adapter of peft (peft_type: {kind or 'none'})."
        )
    problem = ""
    if issubclass(kinds[kind], peft.PromptLearningConfig) or kind == "ADAPTION_PROMPT":
        problem = "it adds tokens to the prompt, and nothing to weights"
    elif settings.get("task_type") not in (None, "CAUSAL_LM"):
        problem = f"its task is {settings['task_type']}, and not CAUSAL_LM"
    elif settings.get("megatron_config"):
        problem = "it is for Megatron, which is other code"
    elif not (Path(name) / WEIGHTS).is_file():
        problem = f"there is no {WEIGHTS} beside it"
    if problem:
        raise WeightsError(
            f"net={name!r} holds an adapter of peft ({kind}) that cannot be used: {problem}. Give one that is added to "
            "the weights of a causal language model, such as LoRA, in safetensors; or the net without it."
        )
    return dict(settings)
