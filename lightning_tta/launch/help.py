"""``predict --help`` on one screen: the options of this package, from signatures and docstrings.

The whole help of LightningCLI has hundreds of lines, nearly all of them of Lightning's classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Literal, get_args, get_origin

from lightning.pytorch.cli import LightningArgumentParser

from lightning_tta.data import ShiftedDataModule, data_modules
from lightning_tta.launch.options import class_options, options_of
from lightning_tta.launch.text import columns, without_markup
from lightning_tta.modules import MetaTTT, SourceClassifier, TestTimeAdaptation

STREAM = ("stream", "domains", "severity", "num_images", "batch_size", "order_seed")
SOURCE = ("train_batch_size", "augment", "val_domains", "num_workers")
LEFT = 28
TRAINER = ("accelerator", "devices", "precision", "default_root_dir")


def short_help(command: str, parser: LightningArgumentParser) -> str:
    """The options of this package for fit, validate, test or predict, a line each, and how to see all.

    Args:
        command: Its name.
        parser: Its parser, which knows the options of the callbacks that the command always has.
    """
    predict, training = command == "predict", command == "fit"
    model: type = TestTimeAdaptation if predict else SourceClassifier
    own = class_options(model, "model")
    data = [f"data.{name}" for name in (STREAM if predict else SOURCE)]
    actions = options_of(parser)
    run = [name for name in actions if name.startswith(tuple(f"{key}." for key in parser.callback_keys))]
    run += [f"trainer.{name}" for name in (*TRAINER, *["max_epochs"] * training)]
    return f"""usage: lightning-tta {command} --config FILE [--OPTION VALUE ...]
FILE, which is optional, sets the same options: configs/digits/{"predict" if predict else "source"}.yaml

  --model {model.__name__}{"" if predict else f" (or {MetaTTT.__name__})"}
{_lines(own, own)}
{columns([("--data", ", ".join(data_modules()))], left=LEFT)}
{_lines(class_options(ShiftedDataModule, "data"), data)}
  the run
{_lines(actions, [*run, "seed_everything", "ckpt_path"])}

All options: lightning-tta {command} --help all
Of a class:  lightning-tta {command} --data.help DigitsData
Of a method: lightning-tta methods tent"""


def _lines(options: dict[str, argparse.Action], names: Iterable[str]) -> str:
    """A line for each option: what it may be, where that is short, and as much of its description as fits."""
    rows = []
    for name in names:
        kind = getattr(options[name], "_typehint", None)
        choices = f"{'|'.join(get_args(kind))}: " if get_origin(kind) is Literal else ""
        text = without_markup(options[name].help or "")
        rows.append((f"--{name}", choices + text if len(choices) < 30 else text))
    return columns(rows, left=LEFT, height=1)
