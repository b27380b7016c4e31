"""The table of commands. Each imports what it needs when it is called: torch alone takes two seconds."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tta import methods
from lightning_tta.errors import ConfigError
from lightning_tta.launch.help import columns, describe_method
from lightning_tta.shipped import copy_configurations

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """A command: what it does, an example after its name, and what takes the arguments after its name."""

    summary: str
    example: str
    run: Callable[[list[str]], None]


def overview() -> str:
    """The text of ``lightning-tta --help``."""
    rows = []
    for name, (summary, example, _) in COMMANDS.items():
        rows.append((name, f"{summary}\nlightning-tta {name} {example}" if example else summary))
    return f"""usage: lightning-tta [--help] [--version] COMMAND ...

Test-time adaptation over images, tokens, pixels and values: train a source
model, adapt it on a shifted stream, compare.

{columns(rows)}

a command's options:   lightning-tta predict --help
a method's options:    lightning-tta methods tent
a data set's options:  lightning-tta predict --data.help DigitsData
a commented file:      lightning-tta predict --model.method tent
                         --data DigitsData --print_config=comments"""


@contextmanager
def _importing() -> Iterator[None]:
    """Import what stays until the end without looking for garbage in it, which is a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lightning(name: str, args: list[str]) -> None:
    with _importing():
        from lightning_tta.launch.lightning import run_lightning

    run_lightning([name, *args])


def make_parser(name: str) -> tuple[Callable[..., Any], ArgumentParser]:
    """What benchmark, reproduce, report, export, weights or init calls, and the parser that its signature makes."""
    with _importing():
        from jsonargparse import ArgumentParser

        from lightning_tta.launch.trust import close_parsers

    close_parsers()
    parser = ArgumentParser(prog=f"lightning-tta {name}", description=COMMANDS[name].summary, exit_on_error=False)
    if name == "benchmark":
        with _importing():
            from lightning_tta.benchmark.runner import Benchmark

        parser.add_argument("-c", "--config", action="config", help="Path to a YAML file with these options.")
        parser.add_class_arguments(Benchmark)
        return Benchmark, parser
    if name == "report":
        from lightning_tta.report.terminal import report

        text = "Run directories, or their report.json or benchmark.json."
        parser.add_argument("runs", nargs="+", type=Path, help=text)
        parser.add_function_arguments(report, skip={"runs"})
        return report, parser
    if name == "reproduce":
        from lightning_tta.cli.reproduce import reproduce

        parser.add_argument("name", nargs="?", help="The claim; without one, the list of all.")
        parser.add_function_arguments(reproduce, skip={"name"})
        return reproduce, parser
    if name == "init":
        parser.add_argument("folder", nargs="?", default=".", help="Where configs/ is put; made if it does not exist.")
        return copy_configurations, parser
    if name == "weights":
        with _importing():
            from lightning_tta.backbones.packaged import PACKAGED, convert_packaged

        parser.add_argument("name", choices=tuple(PACKAGED), help="Which weights.")
        parser.add_argument("--out", type=Path, help="The file, ending in .safetensors; by default NAME.safetensors.")
        return (lambda name, out: convert_packaged(name, out)), parser
    with _importing():
        from lightning_tta.exporting import export_run
        from lightning_tta.launch.lightning import build_method

    parser.add_function_arguments(export_run, as_positional=True, skip={"build"})
    return partial(export_run, build=build_method), parser


def call(name: str, args: list[str]) -> Any:
    """Call reproduce, report, export, weights, init, or benchmark (then built, not run) with the arguments after it."""
    function, parser = make_parser(name)
    try:
        options = parser.instantiate(parser.parse_args(args)).as_dict()
    except argparse.ArgumentError as error:
        from lightning_tta.launch.messages import explain

        raise explain(error, parser, parser.prog) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"A file of the configuration is no UTF-8 text: {error}. Give a YAML file.") from error
    options.pop("config", None)
    return function(**options)


def _init(args: list[str]) -> None:
    target = call("init", args)
    change = "" if target.parent == Path(".") else f"    cd {target.parent}\n"
    print(
        f"copied to {target}. Next, for example:\n{change}    lightning-tta benchmark {COMMANDS['benchmark'].example}"
    )


def _list_stream(args: list[str]) -> None:
    with _importing():
        from lightning_tta.cli.stream import print_stream
        from lightning_tta.launch.lightning import build_data

    print_stream(build_data(args))


def _run_doctor(args: list[str]) -> None:
    with _importing():
        from lightning_tta.cli.doctor import run_doctor

    run_doctor(args)


def _run_choose(args: list[str]) -> None:
    with _importing():
        from lightning_tta.cli.choose import run_choose

    run_choose(args)


def _list_streams(args: list[str]) -> None:
    if args:
        raise ConfigError(f"streams takes no argument; got {args[0]!r}. It lists all kinds of stream.")
    from lightning_tta.data.streams import MEANING, default_reset

    print(columns((kind, f"{meaning}; reset: {default_reset(kind)}") for kind, meaning in MEANING.items()))


def _list_methods(args: list[str]) -> None:
    if args:
        print(describe_method(args[0]))
        return
    rows = []
    for name in methods.names():
        about = methods.about(name)
        rows.append((name, f"{about['does']} ({about['paper']})"))
    print(f"{columns(rows)}\n\nOptions of one: lightning-tta methods tent")


COMMANDS = {
    "fit": Command("train a source model", "--config configs/digits/source.yaml", partial(_lightning, "fit")),
    "validate": Command("evaluate it on source validation images", "", partial(_lightning, "validate")),
    "test": Command("evaluate it on clean source test images", "", partial(_lightning, "test")),
    "predict": Command(
        "adapt it on a stream",
        "--config configs/digits/predict.yaml --model.source_ckpt runs/digits/source --model.method zerosiam",
        partial(_lightning, "predict"),
    ),
    "doctor": Command(
        "look at a net and its images; say which methods suit; write a configuration",
        "--config configs/digits/predict.yaml --model.source_ckpt runs/digits/source",
        _run_doctor,
    ),
    "choose": Command(
        "try methods on the first batches without labels; say which suits the stream, or none",
        "--config configs/digits/predict.yaml --model.source_ckpt runs/digits/source",
        _run_choose,
    ),
    "benchmark": Command(
        "methods x streams x nets, in one table",
        "--config configs/digits/benchmark.yaml",
        lambda args: call("benchmark", args).run(),
    ),
    "reproduce": Command(
        "rerun a paper's claim, ours beside the published figures; without NAME the list",
        "tent --check true",
        lambda args: call("reproduce", args),
    ),
    "report": Command(
        "tables and an HTML page of finished runs", "runs/digits/benchmark", lambda args: call("report", args)
    ),
    "export": Command(
        "the net that a predict run adapted: .safetensors, .pt, .pt2 or .onnx",
        "runs/digits/predict --output adapted.onnx",
        lambda args: print(f"adapted net: {call('export', args)}"),
    ),
    "weights": Command(
        "write the trained weights of an installed package as .safetensors",
        "efficientnet_lite0",
        lambda args: print(f"weights: {call('weights', args)}"),
    ),
    "methods": Command("list the methods, or describe one", "tent", _list_methods),
    "streams": Command("list the kinds of stream", "", _list_streams),
    "stream": Command("list the batches that predict would get", "--config configs/digits/predict.yaml", _list_stream),
    "init": Command("copy the shipped configurations to FOLDER/configs", "FOLDER", _init),
}
