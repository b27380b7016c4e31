"""``lightning-tta doctor``: the net and images of a configuration of ``predict``, and what to start with."""

from __future__ import annotations

import argparse
import pydoc
import textwrap
from pathlib import Path
from typing import Any

import yaml

from lightning_tta.data import ShiftedDataModule
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.diagnosis import Diagnosis, doctor
from lightning_tta.errors import ConfigError, DataError
from lightning_tta.launch.help import class_options
from lightning_tta.launch.lightning import check_configurations, run_lightning
from lightning_tta.modules import TestTimeAdaptation

METHOD = "--model.method=source"


def run_doctor(args: list[str]) -> None:
    """Print what is found, and write the configuration to start with.

    Args:
        args: Those of ``predict``; ``--output FILE`` (``doctor.yaml``) is the file to write.

    Raises:
        LightningTTAError: If the arguments do not parse, the file exists, or net and images do not fit.
    """
    parser = argparse.ArgumentParser(prog="lightning-tta doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", default="doctor.yaml", type=Path)
    parser.add_argument("--help", "-h", action="store_true")
    own, rest = parser.parse_known_args(args)
    if own.help:
        print(HELP)
        return
    if own.output.exists():
        raise ConfigError(f"{own.output} exists. Name another file with --output FILE, or remove it.")
    built = run_lightning(["predict", METHOD, *rest], build_only=True)
    config = built.config["predict"].as_dict()
    (plain,) = check_configurations([["predict", METHOD, "--data=DigitsData"]])
    module = built.model
    if not isinstance(module, TestTimeAdaptation):
        raise ConfigError(f"doctor looks at what predict adapts; the model is a {type(module).__name__}.")
    if module.task != "images":
        raise ConfigError(f"doctor is for one class an image, and the task of this net is {module.task!r}.")
    found = diagnose(module, built.datamodule)
    print(found)
    config["model"]["init_args"] |= found.configuration()
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text(_text(changed(config, plain.as_dict()), found, own.output))
    print(f"\nA configuration to start with: {own.output}. Run it: lightning-tta predict --config {own.output}")


def diagnose(module: TestTimeAdaptation, data: Any) -> Diagnosis:
    """The net of a module on the first batch of a data module's stream.

    Raises:
        DataError: If the stream has no batch of images.
    """
    if isinstance(data, ShiftedDataModule):
        data.marks_damaged = True  # one that cannot be read is left out, and said by the run
    data.prepare_data()
    data.setup("predict")
    if isinstance(data, FileData):
        data.fit_to_net({**module.preprocessing, **module.net_info})
    batch = next(iter(data.predict_dataloader()), None)
    images = batch.get("image") if isinstance(batch, dict) else batch
    if images is None:
        raise DataError(f"{type(data).__name__} gives no batch of images: it is empty, or its batches have no 'image'.")
    if isinstance(batch, dict) and "damaged" in batch:
        images = images[~batch["damaged"]]
    labels = batch.get("label") if isinstance(batch, dict) else None
    labelled = isinstance(data, ShiftedDataModule) and labels is not None and bool((labels >= 0).any())
    names = data.class_names if labelled and module.classes is None else None
    return doctor(module.method.model, images, class_names=names)


def changed(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that differs from the defaults; of a class from those of its constructor."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        default = defaults.get(name)
        if isinstance(value, dict) and "class_path" in value:
            own = _constructor_defaults(value["class_path"])
            arguments = changed(value.get("init_args") or {}, own)
            value = {"class_path": value["class_path"], **({"init_args": arguments} if arguments else {})}
        elif isinstance(value, dict) and isinstance(default, dict):
            value = changed(value, default) or default
        if value != default and name not in ("config", "callbacks"):  # those of the command line are there anyway
            kept[name] = value
    return kept


def _constructor_defaults(class_path: str) -> dict[str, Any]:
    kind = pydoc.locate(class_path)
    return {name: option.default for name, option in class_options(kind).items()} if isinstance(kind, type) else {}


def _text(config: dict[str, Any], found: Diagnosis, path: Path) -> str:
    lines = ["By lightning-tta doctor.", *(line for text in found.warnings for line in textwrap.wrap(text, 110))]
    comments = [f"# {line}" for line in lines]
    others = [f"{trial.method} {trial.options or ''}".strip() for trial in found.recommended[1:]]
    comments += [f"# Also worth a try: {', '.join(others)}; and source, to compare with."] if others else []
    return "\n".join([*comments, f"# lightning-tta predict --config {path}", yaml.safe_dump(config, sort_keys=False)])


HELP = """usage: lightning-tta doctor [--output FILE] [options of predict]

Looks at a net and the first batch of a stream, tries every method on them, says
what suits and what it costs, and writes a configuration to start with.

  lightning-tta doctor --config configs/digits/predict.yaml \\
      --model.source_ckpt runs/digits/source --output start.yaml

--output FILE   the configuration to write (doctor.yaml); never overwrites
All other options are those of predict, without the method: lightning-tta predict --help"""
