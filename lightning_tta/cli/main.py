"""The command line: LightningCLI's fit, validate, test and predict, plus benchmark, report, stream and export."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import lightning_tta.data
import lightning_tta.methods
import lightning_tta.modules  # classes are found by short name only once they are imported
from lightning_tta.backbones.weights import read_checkpoint
from lightning_tta.cli.commands import COMMANDS
from lightning_tta.errors import ConfigError, FinishedError, LightningTTAError
from lightning_tta.launch.messages import MODE, closest, explained, our_error
from lightning_tta.run.board import FitBoard
from lightning_tta.run.config_file import RunConfig
from lightning_tta.run.options import add_options
from lightning_tta.run.progress import FitProgress

DESCRIPTION = "Test-time adaptation of image classifiers: train a source model, adapt it on a shifted stream, compare."
HELP = f"""usage: lightning-tta [-h] [--version] [--print_completion {{bash,zsh}}] COMMAND ...

{DESCRIPTION}

commands (lightning-tta COMMAND --help lists the options of each):
  fit         train a source model           lightning-tta fit --config configs/digits/source.yaml
  validate    evaluate it on source validation images
  test        evaluate it on clean source test images
  predict     adapt it on a stream           lightning-tta predict --config configs/digits/predict.yaml
                                               --model.source_ckpt runs/digits/source --model.method zerosiam
  benchmark   methods x streams x nets       lightning-tta benchmark --config configs/digits/benchmark.yaml
  report      tables and an HTML page        lightning-tta report runs/digits/benchmark
  methods     the methods, in a table        lightning-tta methods
  streams     the kinds of stream, in a table
  stream      a stream before it is run      lightning-tta stream --config configs/digits/predict.yaml
  export      adapted weights of a run       lightning-tta export runs/digits/predict
                                               --output adapted.safetensors

help on a method or data set: lightning-tta predict --model.method.help tent, --data.help DigitsData
a configuration, commented:   lightning-tta predict --model.method tent --data DigitsData --print_config=comments
completion with Tab:          lightning-tta --print_completion bash
"""


METHOD_OPTIONS = ("--model.method", "--model.method.help", "--model.init_args.method")
READABLE = 40
"""So many subclasses are listed in help and comments; ``torch.nn.Module`` has a thousand."""


class _ShortLists(DefaultHelpFormatter):
    """Counts known subclasses where they are too many to read."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        head, _, names = text.partition(", known subclasses: ")
        count = names.count(",") + 1
        return text if count <= READABLE else f"{head}, {count} known subclasses)"


class TTACLI(LightningCLI):
    """LightningCLI with this package's defaults and checks."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose help, and the comments of ``--print_config=comments``, can be read."""
        return super().init_parser(formatter_class=_ShortLists, parser_mode=MODE, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in short what does not."""
        parsers = self._subcommand_parsers
        for each in (parser, *parsers.values()):
            each.exit_on_error = False
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            name = args["subcommand"] if isinstance(args, dict) else next((a for a in args if a in parsers), None)
            if name in parsers:
                raise explained(error, parsers[name], f"lightning-tta {name}") from None
            commands = (*parsers, *COMMANDS)
            wrong = f"{args[0]!r} is no command.{closest(args[0], commands)}"
            raise ConfigError(f"{wrong} Give one of: {', '.join(commands)}.\nHelp: lightning-tta --help") from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer; what it does not accept is the configuration's fault."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"The Trainer refuses its options: {text} Change what --trainer sets.") from error

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":  # else all outputs of the stream are kept in memory
            parser.set_defaults(return_predictions=False)
            parser.set_defaults({"model": {"class_path": "lightning_tta.TestTimeAdaptation"}})
            add_options(parser)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Check ``--ckpt_path`` instead of merging its hyper-parameters, which replaces the model asked for."""
        config = self.config[self.config["subcommand"]]
        path = config.get("ckpt_path")
        if path is None or not Path(path).is_file():
            if path is not None and str(path) not in ("best", "last", "hpc", "registry"):
                raise ConfigError(f"--ckpt_path {path}: no such file.")
            return
        saved = read_checkpoint(path)
        wanted = config["model"]["class_path"].rpartition(".")[2]
        ours = saved.get("lightning_tta", {}) if isinstance(saved, dict) else {}
        given = ours.get("class", "a class of another package")
        if given != wanted:
            raise ConfigError(
                f"--ckpt_path {path} was written by {given}, but the model is {wanted}. --ckpt_path resumes a run of "
                "the same class. Source weights to adapt go to --model.source_ckpt."
            )


class _ParseOnlyCLI(TTACLI):
    """Stops after the checks of the parser: no net is built, no data read."""

    def _set_seed(self) -> None:
        """Leave the generators alone."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def run_lightning(args: list[str] | dict[str, Any], *, parse_only: bool = False) -> TTACLI:
    """Run fit, validate, test or predict.

    Args:
        args: As on the command line, or a nested dict with ``subcommand``.
        parse_only: Only check the configuration.

    Raises:
        LightningTTAError: If the arguments do not parse, or the configuration, data or weights are wrong.
    """
    with warnings.catch_warnings():  # notebooks, tests and the benchmark call this beside another command line
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            args = _name_classes(args) if isinstance(args, list) else args
            return _build_cli(_ParseOnlyCLI if parse_only else TTACLI, args)
        except (ValueError, TypeError) as error:
            cause = our_error(error)
            if cause is None:
                raise
            raise cause from None


def _name_classes(args: list[str]) -> list[str]:
    """The arguments with ``--model.method tent`` as ``--model.method lightning_tta.methods.Tent``."""
    methods = lightning_tta.methods.available_methods().items()
    classes = {name: f"lightning_tta.methods.{kind.__name__}" for name, kind in methods}
    found: list[str] = []
    for arg in args:
        option, equals, value = arg.partition("=")
        if equals and option in METHOD_OPTIONS:
            arg = f"{option}={classes.get(value, value)}"
        elif found and found[-1] in METHOD_OPTIONS:
            arg = classes.get(arg, arg)
        found.append(arg)
    return found


def lightning_parsers() -> dict[str, LightningArgumentParser]:
    """The parsers of fit, validate, test and predict."""
    cli = run_lightning(["predict", "--model.method=Source", "--data=DigitsData"], parse_only=True)
    return cli._subcommand_parsers


def _build_cli(kind: type[TTACLI], args: list[str] | dict[str, Any]) -> TTACLI:
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=RunConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={
            "inference_mode": False,
            "use_distributed_sampler": False,
            "default_root_dir": "runs",
            "callbacks": [FitBoard(), FitProgress()],
        },
        parser_kwargs={"description": DESCRIPTION},
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Run a command; what users, tests and notebooks call.

    Args:
        args: As on the command line, without the program's name; ``None`` takes ``sys.argv``.

    Raises:
        SystemExit: With code 2 after a message, if the configuration, data or weights are wrong. A run that was to be
            continued and is finished is no error.
    """
    args = sys.argv[1:] if args is None else args
    try:
        if not args or args[0] in ("-h", "--help"):
            print(HELP)
        elif args[0] == "--version":
            from lightning_tta import __version__

            print(__version__)
        elif args[0] == "--print_completion":
            from lightning_tta.cli.completion import completion_script

            print(completion_script(args[1] if len(args) > 1 else ""))
        elif args[0] in COMMANDS:
            COMMANDS[args[0]](args[1:])
        else:
            run_lightning(args)
    except FinishedError as done:
        rank_zero_only(print)(done)
    except LightningTTAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
