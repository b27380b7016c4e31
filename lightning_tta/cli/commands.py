"""The commands beside LightningCLI's own: benchmark, report, stream, export, and the tables of methods and streams."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

import lightning_tta.data
from lightning_tta.errors import ConfigError
from lightning_tta.launch.messages import instantiate, parse


def benchmark_parser() -> ArgumentParser:
    """Options of ``benchmark``: the arguments of the class."""
    from lightning_tta.benchmark.runner import Benchmark

    parser = ArgumentParser(prog="lightning-tta benchmark", description=(Benchmark.__doc__ or "").split("\n\n")[0])
    parser.add_argument("-c", "--config", action="config", help="Path to a YAML file with these options.")
    parser.add_class_arguments(Benchmark)
    return parser


def build_benchmark(args: list[str]) -> Any:
    """The benchmark of these arguments, checked and not yet run."""
    from lightning_tta.benchmark.runner import Benchmark

    parser = benchmark_parser()
    values = instantiate(parser, parse(parser, args))
    return Benchmark(**{key: value for key, value in values.as_dict().items() if key != "config"})


def _run_benchmark(args: list[str]) -> None:
    build_benchmark(args).run()


def report_parser() -> ArgumentParser:
    """Options of ``report``."""
    from lightning_tta.report.terminal import report

    parser = ArgumentParser(prog="lightning-tta report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=str, help="Run directories, or their report.json or benchmark.json.")
    parser.add_argument("--allow_different", type=bool, default=False, help="Compare although protocols differ.")
    parser.add_argument("--output", type=str | None, default=None, help="Directory of report.html and report.md.")
    parser.add_argument("--latex", help=argparse.SUPPRESS)
    return parser


def _run_report(args: list[str]) -> None:
    from lightning_tta.report.terminal import report

    given = parse(report_parser(), args)
    output = None if given.output is None else Path(given.output)
    if given.latex is not None:
        raise ConfigError("--latex is gone. Turn report.md into LaTeX: pandoc report.md -o report.tex")
    report([Path(run) for run in given.runs], allow_different=given.allow_different, output=output)


def export_parser() -> ArgumentParser:
    """Options of ``export``."""
    parser = ArgumentParser(prog="lightning-tta export", description=_run_export.__doc__)
    parser.add_argument("run", type=str, help="Directory of the run.")
    parser.add_argument("--output", type=str, default="adapted.safetensors", help="Where the weights go.")
    parser.add_argument("--process", type=int | None, default=None, help="Of several processes, whose net.")
    return parser


def _run_export(args: list[str]) -> None:
    """Write the weights that a predict run adapted (one with --model.save_every) as plain safetensors."""
    from lightning_tta.exporting import export_run

    given = parse(export_parser(), args)
    print(f"adapted weights: {export_run(given.run, given.output, given.process)}")


def stream_parser() -> ArgumentParser:
    """Options of ``stream``."""
    parser = ArgumentParser(prog="lightning-tta stream", description=_run_stream.__doc__)
    parser.add_argument("-c", "--config", action="config", help="Path to a YAML file: its part 'data' is taken.")
    parser.add_subclass_arguments(lightning_tta.data.ShiftedDataModule, "data", required=True)
    parser.add_argument("--picture", type=str, default="stream.png", help="Where the picture goes (.png or .svg).")
    parser.add_argument("--batches", type=int, default=20, help="How many batches to list.")
    return parser


def _run_stream(args: list[str]) -> None:
    """List a stream and draw it, before anything is run on it."""
    from rich.console import Console

    from lightning_tta.cli.stream import check_picture, draw_stream, list_stream
    from lightning_tta.report.tables import Table
    from lightning_tta.report.terminal import print_table

    parser = stream_parser()
    given = parse(parser, only_data(args))
    check_picture(given.picture)
    data = instantiate(parser, given).data
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
    print_table(console, Table(title, ["batch", "images", "domains", "classes", "largest class %"], cells))
    if len(rows) > given.batches:
        console.print(f"... and {len(rows) - given.batches} more")
    console.print(", ".join(f"{key} {value}" for key, value in description.items() if key != "domains"))
    console.print(f"order {data.stream.digest}, picture: {draw_stream(data, given.picture)}", highlight=False)


def only_data(args: list[str]) -> list[str]:
    """The arguments with the part ``data`` of a predict configuration in its place."""
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
        try:
            content = yaml.safe_load(path.read_bytes())
        except yaml.YAMLError as error:
            raise ConfigError(f"--config {path} is no YAML file: {' '.join(str(error).split())}.") from error
        part = content.get("data") if isinstance(content, dict) else None
        if not isinstance(part, dict):
            raise ConfigError(f"--config {path} has no part 'data'. Give a configuration of predict, or --data CLASS.")
        found += ["--data", json.dumps(part)]
    return found


def _print_table(what: str) -> None:
    """Print the methods, or the kinds of stream."""
    from rich.console import Console

    from lightning_tta.data.streams import MEANING, default_reset
    from lightning_tta.methods import available_methods
    from lightning_tta.report.tables import Table
    from lightning_tta.report.terminal import print_table

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
    print_table(Console(), Table(what, header, rows, left=len(header)))


PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "benchmark": benchmark_parser,
    "report": report_parser,
    "stream": stream_parser,
    "export": export_parser,
}
"""What each command takes; shell completion and the test of the README's commands ask here too."""

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "benchmark": _run_benchmark,
    "report": _run_report,
    "stream": _run_stream,
    "export": _run_export,
    "methods": lambda args: _print_table("methods"),
    "streams": lambda args: _print_table("streams"),
}
"""Each takes the arguments after its name."""
