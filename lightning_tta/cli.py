"""The command line: LightningCLI's fit, validate, test and predict, plus benchmark, report, stream and export."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import lightning_tta.data
import lightning_tta.methods
import lightning_tta.modules  # classes are found by short name only once they are imported
from lightning_tta.board import FitBoard
from lightning_tta.errors import ConfigError, FinishedError, LightningTTAError

DESCRIPTION = "Test-time adaptation of image classifiers: train a source model, adapt it on a shifted stream, compare."
HELP = f"""usage: lightning-tta [-h] [--version] COMMAND ...

{DESCRIPTION}

commands (lightning-tta COMMAND --help lists the options of each):
  fit         train a source model           lightning-tta fit --config configs/digits/source.yaml
  validate    evaluate it on source validation images
  test        evaluate it on clean source test images
  predict     adapt it on a stream           lightning-tta predict --config configs/digits/predict.yaml
                                               --model.source_ckpt runs/digits/source --model.method ZeroSiam
  benchmark   methods x streams x nets       lightning-tta benchmark --config configs/digits/benchmark.yaml
  report      tables and an HTML page        lightning-tta report runs/digits/benchmark
  methods     the methods, in a table        lightning-tta methods
  streams     the kinds of stream, in a table
  stream      a stream before it is run      lightning-tta stream --config configs/digits/predict.yaml
  export      adapted weights of a run       lightning-tta export runs/digits/predict/version_0
                                               --output adapted.safetensors

help on a method or data set: lightning-tta predict --model.method.help Tent, --data.help DigitsData
"""


class TTACLI(LightningCLI):
    """LightningCLI with this package's defaults and checks."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":  # else all outputs of the stream are kept in memory
            parser.set_defaults(return_predictions=False)
            parser.set_defaults({"model": {"class_path": "lightning_tta.TestTimeAdaptation"}})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Check ``--ckpt_path`` instead of merging its hyper-parameters, which replaces the model asked for."""
        config = self.config[self.config["subcommand"]]
        path = config.get("ckpt_path")
        if path is None or not Path(path).is_file():
            if path is not None and str(path) not in ("best", "last", "hpc", "registry"):
                raise ConfigError(f"--ckpt_path {path}: no such file.")
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        wanted = config["model"]["class_path"].rpartition(".")[2]
        given = saved.get("lightning_tta", {}).get("class", "a class of another package")
        if given != wanted:
            raise ConfigError(
                f"--ckpt_path {path} was written by {given}, but the model is {wanted}. --ckpt_path resumes a run of "
                "the same class. Source weights to adapt go to --model.source_ckpt."
            )


class _ParseOnlyCLI(TTACLI):
    """Stops after the checks of the parser: no net is built, no data read."""

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
        LightningTTAError: If the configuration, data or weights are wrong.
        SystemExit: With code 2 after a message, if the arguments do not parse.
    """
    with warnings.catch_warnings():  # notebooks, tests and the benchmark call this beside another command line
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            return _build_cli(_ParseOnlyCLI if parse_only else TTACLI, args)
        except (ValueError, TypeError) as error:
            cause = _our_error(error)
            if cause is None:
                raise
            raise cause from None


def _our_error(error: BaseException | None) -> LightningTTAError | None:
    """Our error inside the one that jsonargparse makes of whatever a constructor raises."""
    while error is not None and not isinstance(error, LightningTTAError):
        error = error.__cause__ or error.__context__
    return error


def _build_cli(kind: type[TTACLI], args: list[str] | dict[str, Any]) -> TTACLI:
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={
            "inference_mode": False,
            "use_distributed_sampler": False,
            "default_root_dir": "runs",
            "callbacks": [FitBoard()],
        },
        parser_kwargs={"description": DESCRIPTION},
        args=args,
    )


def _run_benchmark(args: list[str]) -> None:
    from lightning_tta.benchmark import Benchmark

    _run_function(Benchmark, "benchmark", args).run()


def _run_report(args: list[str]) -> None:
    from lightning_tta.report import report

    parser = ArgumentParser(prog="lightning-tta report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=str, help="Run directories, or their report.json or benchmark.json.")
    parser.add_argument("--allow_different", type=bool, default=False, help="Compare although protocols differ.")
    parser.add_argument("--output", type=str | None, default=None, help="Directory of report.html and report.md.")
    parser.add_argument("--latex", type=bool, default=False, help="Also write report.tex.")
    given = parser.parse_args(args)
    output = None if given.output is None else Path(given.output)
    report([Path(run) for run in given.runs], allow_different=given.allow_different, output=output, latex=given.latex)


def _run_export(args: list[str]) -> None:
    """Write the weights that a predict run adapted (one with --model.save_every) as plain safetensors."""
    from lightning_tta.exporting import export_run

    parser = ArgumentParser(prog="lightning-tta export", description=_run_export.__doc__)
    parser.add_argument("run", type=str, help="Directory of the run.")
    parser.add_argument("--output", type=str, default="adapted.safetensors", help="Where the weights go.")
    parser.add_argument("--process", type=int | None, default=None, help="Of several processes, whose net.")
    given = parser.parse_args(args)
    print(f"adapted weights: {export_run(given.run, given.output, given.process)}")


def _run_stream(args: list[str]) -> None:
    """List a stream and draw it, before anything is run on it."""
    from rich.console import Console

    from lightning_tta.data.drawing import draw_stream, list_stream
    from lightning_tta.report import table

    parser = ArgumentParser(prog="lightning-tta stream", description=_run_stream.__doc__)
    parser.add_argument("-c", "--config", action="config", help="Path to a YAML file: its part 'data' is taken.")
    parser.add_subclass_arguments(lightning_tta.data.ShiftedDataModule, "data", required=True)
    parser.add_argument("--picture", type=str, default="stream.png", help="Where the picture goes (.png or .svg).")
    parser.add_argument("--batches", type=int, default=20, help="How many batches to list.")
    given = parser.parse_args(_only_data(args))
    data = parser.instantiate_classes(given).data
    rows = list_stream(data)
    cells = [
        [
            str(row["batch"]),
            str(row["images"]),
            ", ".join(f"{name} {count}" for name, count in list(row["domains"].items())[:4])
            + (", ..." if len(row["domains"]) > 4 else ""),
            str(row["classes"]),
            f"{100 * row['largest_class']:.0f}",
        ]
        for row in rows[: given.batches]
    ]
    console = Console(soft_wrap=True)
    description = data.describe()
    title = f"{data.name}: {description['stream']} stream, {description['images']:,} images, {len(rows):,} batches"
    console.print(table(title, ["batch", "images", "domains", "classes", "largest class %"], cells))
    if len(rows) > given.batches:
        console.print(f"... and {len(rows) - given.batches} more")
    console.print(", ".join(f"{key} {value}" for key, value in description.items() if key != "domains"))
    console.print(f"order {data.stream.digest}, picture: {draw_stream(data, given.picture)}", highlight=False)


def _print_table(what: str) -> None:
    """Print the methods, or the kinds of stream."""
    import re

    from rich.console import Console

    from lightning_tta.data.streams import MEANING, default_reset
    from lightning_tta.methods import available_methods
    from lightning_tta.report import table

    if what == "methods":
        header = ["method", "what it does", "logits from", "source data", "paper"]
        rows = []
        for name, kind in available_methods().items():
            text = (kind.__doc__ or "").replace("`", "")
            paper = re.search(r"arXiv[: ](\d{4}\.\d{5})", text) or re.search(r"(NeurIPS|CVPR|ICCV) \d{4}", text)
            needs = "first" if "prepare" in vars(kind) else "-"
            rows.append([name, text.split("\n")[0], kind.returns, needs, paper.group(0) if paper else "-"])
    else:
        header = ["stream", "order", "reset"]
        rows = [[name, meaning, default_reset(name)] for name, meaning in MEANING.items()]
    Console().print(table(what, header, rows, left=len(header)))


def _only_data(args: list[str]) -> list[str]:
    """The arguments with the part ``data`` of a predict configuration in its place."""
    import json

    import yaml

    found: list[str] = []
    rest = iter(args)
    for arg in rest:
        name, _, value = arg.partition("=")
        if name not in ("-c", "--config"):
            found.append(arg)
            continue
        path = Path(value or next(rest, ""))
        if not path.is_file():
            raise ConfigError(f"--config {path}: no such file.")
        part = (yaml.safe_load(path.read_text()) or {}).get("data")
        if not isinstance(part, dict):
            raise ConfigError(f"--config {path} has no part 'data'. Give a configuration of predict, or --data CLASS.")
        found += ["--data", json.dumps(part)]
    return found


def _run_function(target: Callable[..., Any], name: str, args: list[str]) -> Any:
    parser = ArgumentParser(prog=f"lightning-tta {name}", description=(target.__doc__ or "").split("\n\n")[0])
    parser.add_argument("-c", "--config", action="config", help="Path to a YAML file with these options.")
    parser.add_class_arguments(target)
    values = parser.instantiate_classes(parser.parse_args(args))
    return target(**{key: value for key, value in values.as_dict().items() if key != "config"})


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
        elif args[0] == "benchmark":
            _run_benchmark(args[1:])
        elif args[0] == "report":
            _run_report(args[1:])
        elif args[0] == "export":
            _run_export(args[1:])
        elif args[0] == "stream":
            _run_stream(args[1:])
        elif args[0] in ("methods", "streams"):
            _print_table(args[0])
        else:
            run_lightning(args)
    except FinishedError as done:
        rank_zero_only(print)(done)
    except LightningTTAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
