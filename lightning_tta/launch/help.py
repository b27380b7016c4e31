"""The texts of help: the options of a class, from its docstrings, and ``predict --help`` on one screen.

The whole help of LightningCLI has hundreds of lines, nearly all of them of Lightning's classes. Importing this module
imports no torch.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tta import methods
from lightning_tta.shipped import CONFIGS

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

    from lightning_tta.methods.base.method import TTAMethod

STREAM = ("stream", "domains", "severity", "num_images", "batch_size", "order_seed")
SOURCE = ("train_batch_size", "augment", "val_domains", "num_workers")
TRAINER = ("accelerator", "devices", "precision", "default_root_dir")
RARE = tuple(
    f"model.{name}"
    for name in (
        *"compile lean classes backbone_options reservoir gate capture select adapters adapter_parts".split(),
        *("processes", "reset_every"),
    )
)
LEFT = 28


def columns(rows: Iterable[tuple[str, str]], left: int = 17, height: int | None = None) -> str:
    """Names in a column ``left`` wide, their texts wrapped on the right, each line in ``height`` lines at most.

    A name that is wider has a line of its own.
    """
    width = min(120, shutil.get_terminal_size().columns) - left - 2
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", max_lines=height, placeholder=" ...")
    lines = []
    for name, text in rows:
        wrapped = [piece for line in text.splitlines() for piece in wrapper.wrap(line) or [""]]
        cells = zip_longest([name] if len(name) < left else [], wrapped, fillvalue="")
        lines += [] if len(name) < left else [f"  {name}"]
        lines += [f"  {label.ljust(left)}{piece}".rstrip() for label, piece in cells]
    return "\n".join(lines)


def without_markup(text: str) -> str:
    """A docstring's text in one line, see :func:`plain_text`."""
    return " ".join(plain_text(text).split())


def plain_text(text: str) -> str:
    """A docstring's text without double backquotes and colons, and without roles: of a reference only its last name."""
    text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", text.replace("``", ""))
    return re.sub(r" ?::$", ":", text, flags=re.MULTILINE)


def class_options(kind: type, key: str = "") -> dict[str, argparse.Action]:
    """The arguments of a class, and of the bases that it hands arguments on to, as options: ``key.argument``.

    The net that a method wraps is none of them.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(kind, key or None, skip={"model"})
    return {name: option for name, option in _options(parser).items() if name != key}


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser by name, without those that show the help of a class."""
    return {action.dest: action for action in parser._actions if not action.dest.endswith(".help")}


def describe_method(name: str) -> str:
    """The docstring of a method, what it says of itself in a few words, and all its options."""
    kind = methods.find(name)
    text = plain_text(re.sub(r"Args:\n(?: .*\n|\n)*", "", f"{inspect.getdoc(kind)}\n").strip())
    about = {} if kind.about is None else vars(kind.about)
    facts = [
        (key, f"{value} (forward / backward a batch)" if key == "passes" else value) for key, value in about.items()
    ]
    options = class_options(kind, "model.method").items()
    rows = [(f"--{name}", f"{without_markup(a.help or '')} (default: {a.default})") for name, a in options]
    return f"{kind.__name__}: {text}\n\n{columns(facts)}\n\n{say_captured(kind)}\n\n{columns(rows, left=32)}"


def say_captured(kind: type[TTAMethod]) -> str:
    """How much of a method's step becomes one CUDA graph."""
    if kind.step_on_host:
        return f"On CUDA, parts of a step are captured as graphs; not the whole, because {kind.step_on_host}."
    return "On CUDA, a step is captured as one graph."


def short_help(command: str, parser: LightningArgumentParser) -> str:
    """The options of this package for a command of Lightning, which has this parser, and how to see all."""
    from lightning_tta.data import ShiftedDataModule, data_modules
    from lightning_tta.modules import MetaTTT, SourceClassifier, TestTimeAdaptation

    predict = command == "predict"
    model: type = TestTimeAdaptation if predict else SourceClassifier
    options = {**_options(parser), **class_options(model, "model"), **class_options(ShiftedDataModule, "data")}

    def lines(names: Iterable[str]) -> str:
        rows = []
        for name in names:
            text, choices = without_markup(options[name].help or ""), str(options[name].metavar)
            short = choices.startswith("{") and choices != "{true,false}" and len(choices) < 30
            rows.append((f"--{name}", f"{choices} {text}" if short else text))
        return columns(rows, left=LEFT, height=1)

    run = [name for name in options if name.startswith(tuple(f"{key}." for key in parser.callback_keys))]
    trainer = [f"trainer.{name}" for name in (*TRAINER, *["max_epochs"] * (command == "fit"))]
    hint = "" if Path(CONFIGS).is_dir() else "\n  (lightning-tta init copies the configurations into this folder)"
    return f"""usage: lightning-tta {command} --config FILE [--OPTION VALUE ...]
FILE, which is optional, sets the same options: configs/digits/{"predict" if predict else "source"}.yaml{hint}

  --model {model.__name__}{"" if predict else f" (or {MetaTTT.__name__})"}
{lines(name for name in class_options(model, "model") if name not in RARE)}
{columns([("--data", ", ".join(data_modules()))], left=LEFT)}
{lines(f"data.{name}" for name in (STREAM if predict else SOURCE))}
  the run
{lines([*run, *trainer, "seed_everything", "ckpt_path"])}

All options: lightning-tta {command} --help all
Of a class:  lightning-tta {command} --data.help DigitsData
Of a method: lightning-tta methods tent"""
