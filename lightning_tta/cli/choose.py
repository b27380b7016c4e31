"""``lightning-tta choose``: candidates on the first batches of a stream, and the configuration of the best one."""

from __future__ import annotations

import argparse
import csv
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lightning_tta.choosing.choice import Choice, choose
from lightning_tta.cli.doctor import METHOD, changed
from lightning_tta.data import ShiftedDataModule
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.errors import ConfigError, DataError
from lightning_tta.launch.lightning import check_configurations, run_lightning
from lightning_tta.methods import find
from lightning_tta.methods.components.additions import OPTIONS
from lightning_tta.modules import TestTimeAdaptation

OF_THE_MODULE = ("reset_every", *OPTIONS)
"""Options of a candidate that are no options of its method: ``--model.statistics`` and so on."""
SHOWN = ("evenness", "steadiness", "order", "agreement_source", "labels")  # what decides


def make_parser() -> argparse.ArgumentParser:
    """The parser of what is not an option of ``predict``."""
    parser = argparse.ArgumentParser(prog="lightning-tta choose", add_help=False, allow_abbrev=False)
    parser.add_argument("--candidates", default="default")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--labels", default=None)
    parser.add_argument("--output", default="runs/choose", type=Path)
    parser.add_argument("--help", "-h", action="store_true")
    return parser


def run_choose(args: list[str]) -> None:
    """Print the verdict and a table; write ``choice.json``, ``choice.md``, ``predict.yaml`` and ``method.yaml``.

    Args:
        args: Those of ``predict``, without a method, and those of :func:`make_parser`.

    Raises:
        LightningTTAError: If the arguments do not parse, the folder has a choice, or net and images do not fit.
    """
    parser = make_parser()
    parser.exit_on_error = False
    try:
        own, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error} See lightning-tta choose --help.") from error
    if own.help:
        print(HELP)
        return
    if (own.output / "choice.json").exists():
        raise ConfigError(f"{own.output} has a choice already. Name another folder with --output, or remove it.")
    if own.output.exists() and not own.output.is_dir():
        raise ConfigError(f"--output {own.output} is a file. Name a folder, which is made.")
    candidates, labels = read_candidates(own.candidates), read_labels(own.labels)
    built = run_lightning(["predict", METHOD, *rest], build_only=True)
    config = built.config["predict"].as_dict()
    (plain,) = check_configurations([["predict", METHOD, "--data=DigitsData"]])
    module, data = built.model, built.datamodule
    if not isinstance(module, TestTimeAdaptation):
        raise ConfigError(f"choose looks at what predict adapts; the model is a {type(module).__name__}.")
    if module.task != "images":
        raise ConfigError(f"choose is for one class an image, and the task of this net is {module.task!r}.")
    if not isinstance(data, ShiftedDataModule):
        raise ConfigError(f"choose needs a data module of this package; got a {type(data).__name__}.")
    if isinstance(data, FileData):
        data.fit_to_net({**module.preprocessing, **module.net_info})
    net = module.method.model.to(built.trainer.strategy.root_device)
    choice = choose(net, data, candidates, own.budget, labels, batches=own.batches)
    choice.write(own.output)
    method, further = of_predict(choice)
    (own.output / "method.yaml").write_text(yaml.safe_dump(method, sort_keys=False))
    config["model"]["init_args"] |= {"method": method, **further}
    written = own.output / "predict.yaml"
    comment = f"# By lightning-tta choose: {choice.name}\n# lightning-tta predict --config {written}\n"
    written.write_text(comment + yaml.safe_dump(changed(config, plain.as_dict()), sort_keys=False))
    print(f"{table(choice)}\n\n{choice.why}\n\nEvery score: {own.output / 'choice.md'}")
    options = "".join(f" --model.{name} {value}" for name, value in further.items() if not isinstance(value, dict))
    print(f"Run it: lightning-tta predict --config {written}")
    print(f"On other data: lightning-tta predict --model.method {own.output / 'method.yaml'}{options} ...")


def of_predict(choice: Choice) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method as a configuration names it, and the further options of the module."""
    kind = find(choice.method)
    options = {name: value for name, value in choice.options.items() if name not in OF_THE_MODULE}
    method: dict[str, Any] = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    if options:
        method["init_args"] = options
    return method, {name: value for name, value in choice.options.items() if name in OF_THE_MODULE}


def read_candidates(text: str) -> Any:
    """Names with commas between, a YAML list, or a file of one.

    Raises:
        ConfigError: If it is no YAML.
    """
    path = Path(text)
    try:
        if path.suffix in (".yaml", ".yml", ".json"):
            text = path.read_text(encoding="utf-8")
        elif "[" not in text and "{" not in text:
            return [name.strip() for name in text.split(",")]
        value = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        why = "it cannot be read" if isinstance(error, OSError) else "no YAML"
        raise ConfigError(
            f"--candidates {text}: {why} ({' '.join(str(error).split())}). Give names, tent,zerosiam; or a list, "
            "'[tent, {method: tent, lr: 1.0e-3, statistics: auto}]'; or a file of such a list."
        ) from error
    return _with_numbers(value)


def _with_numbers(value: Any) -> Any:
    """YAML takes 1e-3 for a text."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_labels(text: str | None) -> dict[int, int] | int | None:
    """A number, or the labels of a file with the columns ``index`` and ``label``.

    Raises:
        ConfigError: If it is neither.
        DataError: If the file has other columns, no whole numbers, or an index twice.
    """
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    if not Path(text).is_file():
        raise ConfigError(f"--labels {text}: neither a number nor a file. Give a CSV file of index,label.")
    with Path(text).open(newline="", encoding="utf-8") as file:
        try:
            rows = [(int(row["index"]), int(row["label"])) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{text}: expected the columns index and label, whole numbers; got {error!r}.") from error
    twice = [index for index, count in Counter(index for index, _ in rows).items() if count > 1]
    if twice:
        raise DataError(f"{text}: index {twice[0]} is there more than once. Give one label for each image.")
    return dict(rows)


def table(choice: Choice) -> str:
    """The scores that decide, for the terminal; the chosen one is marked."""
    shown = [name for name in SHOWN if any(name in each["scores"] for each in choice.candidates)]
    widths = [max(len(name), 6) for name in ["passes", *shown]]
    left = " " * (sum(widths) + 2 * len(widths))
    wrapper = textwrap.TextWrapper(max(shutil.get_terminal_size().columns, len(left) + 20), subsequent_indent=left)

    def line(cells: list[str], name: str) -> str:
        numbers = "".join(f"{cell:>{width}}  " for cell, width in zip(cells, widths, strict=True))
        return "\n".join(wrapper.wrap(f"{numbers}{name}"))

    lines = [line(["passes", *shown], "candidate")]
    for each in choice.candidates:
        cells = [f"{each['scores'][name]:.3f}" if name in each["scores"] else "" for name in shown]
        name = f"{'* ' if each['name'] == choice.name else ''}{each['name']}"
        lines.append(line([str(each["passes"]), *cells], f"{name}: {each['problem']}" if each["problem"] else name))
    return "\n".join([*lines, *(f"! {note}" for note in choice.left_out)])


HELP = """usage: lightning-tta choose [--candidates C] [--budget P] [--batches N]
                            [--labels L] [--output FOLDER] [options of predict]

Runs candidates side by side on the first batches of a stream, scores them without
labels, and says which is better than the source, if one clearly is. Writes
choice.json, choice.md (every score), predict.yaml (a configuration to run) and
method.yaml.

  lightning-tta choose --config configs/digits/predict.yaml \\
      --model.source_ckpt runs/digits/source

--candidates C   default (a grid that suits the net); names, tent,zerosiam; a list
                 '[tent, {method: tent, lr: 1.0e-3, statistics: auto,
                 reset_every: 50}]'; or a YAML file of a list
--budget P       forward and backward passes over a batch, of all together
--batches N      of the stream, that are looked at (8)
--labels L       a CSV file of index,label; or a number: so many labels that the data
                 has
--output FOLDER  for what is written (runs/choose); never overwrites a choice
All other options are those of predict, without the method: lightning-tta predict --help"""
