"""``lightning-tta reproduce``: the list of claims, what one needs, and ours beside the paper's figures."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_tta.errors import ConfigError, Interrupted, LightningTTAError
from lightning_tta.files import read_json
from lightning_tta.launch.help import columns
from lightning_tta.report.terminal import print_table
from lightning_tta.reproduce import page
from lightning_tta.reproduce.claims import load, names
from lightning_tta.reproduce.planning import Settings
from lightning_tta.reproduce.rerun import JSON, Reproduction


def reproduce(
    name: str | None = None,
    *,
    root: str = "data",
    paths: dict[str, str] | None = None,
    weights: dict[str, str] | None = None,
    output: str = "runs/reproduce",
    only: str | list[str] | None = None,
    rows: str | list[str] | None = None,
    check: bool = False,
    download: bool = False,
    seeds: int | None = None,
    workers: int = 4,
    jobs: int = 1,
    trainer: dict[str, Any] | None = None,
    net: str | None = None,
    images: int | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Rerun the claims of a paper with its constants, and print ours beside the published figures.

    Args:
        name: The claim, or a file like those of the package; none: the list.
        root: Folder of the data sets, and of ``weights/``; ``--check true`` says what is looked for where.
        paths: Data sets elsewhere: place -> path, such as ``--paths.imagenet_c /data/imagenet-c``.
        weights: Weights files: net -> file, such as ``--weights.wrn_28_10 Standard.pt``.
        output: Folder of the results; a claim writes ``reproduce.json`` and ``reproduce.md`` to one of its name in it.
            The same command goes on where one was stopped, and runs nothing twice.
        only: Parts to run.
        rows: Rows to run: methods, or patterns of ``PART/NET/METHOD``, such as ``*/vit_base/*``.
        check: Only say what would run, what is missing, and how to get it.
        download: Fetch what is missing and can be fetched: several GB.
        seeds: So many of the claim's seeds, where it has several; by default all.
        workers: Processes that read images.
        jobs: Runs side by side.
        trainer: Arguments of the Trainer, such as ``{accelerator: cpu}``.
        net: Another net, without trained weights, to try the command; what comes out is no reproduction.
        images: At most so many images of each domain, to try the command; what comes out is no reproduction.
        training: Options of source trainings that differ from the claim's; what comes out is no reproduction.
    """
    given = {**locals()}
    console = Console()
    if name is None:
        console.print(Text(overview()), soft_wrap=True)
        return
    settings = Settings(
        root=Path(root).expanduser(),
        output=Path(output),
        paths=paths or {},
        weights=weights or {},
        only=_listed(only),
        rows=_listed(rows),
        download=download and not check,
        net=net,
        images=images,
        training=training or {},
        seeds=seeds,
        trainer=trainer or {},
        workers=workers,
        jobs=jobs,
    )
    reproduction = Reproduction(load(name), settings)
    width = min(120, console.width) if console.is_terminal else None
    console.print(Text(page.describe(reproduction.claim, reproduction.plans, width)), soft_wrap=True)
    if check:
        return
    failure = None
    try:
        result = reproduction.run(_command(given))
    except (ConfigError, Interrupted):
        raise
    except LightningTTAError as error:  # some cells failed; the others are shown first
        failure, result = error, read_json(reproduction.output / JSON) or {}
    for label, part in result["parts"].items():
        if not part["cells"]:
            console.print(Text(page.nothing_ran(label, part)), soft_wrap=True)
            continue
        console.print(Text(f"{label}: {part['title']}", style="bold"))
        for table in page.narrow_tables(part):
            print_table(console, table)
        for line in page.left_out(part):
            console.print(Text(line), soft_wrap=True)
        for rank in part["rankings"]:
            console.print(Text(page.ranking(rank)), soft_wrap=True)
    if text := page.warning(result):
        console.print(Text(text, style="bold red"), soft_wrap=True)
    console.print(
        Text(f"{page.summary(result)}\nwritten: {reproduction.output}/reproduce.json and reproduce.md"), soft_wrap=True
    )
    if failure is not None:
        raise failure


def overview() -> str:
    """The list of claims: their names, papers, and parts."""
    rows = []
    for name in names():
        claim = load(name)
        counts = f"{_count(len(claim.parts), 'part')}, {_count(claim.figures(), 'published figure')}"
        rows.append((name, f"{claim.title}\n{counts}: {', '.join(claim.parts)}"))
    return (
        f"Papers whose results can be rerun:\n\n{columns(rows)}\n\n"
        "What of one can run here, and what is missing: lightning-tta reproduce tent --check true\n"
        "Run what is there, ours beside theirs:         lightning-tta reproduce tent --root DATA"
    )


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"


def _command(given: dict[str, Any]) -> str:
    """The command with these options."""
    words = ["lightning-tta", "reproduce", given["name"]]
    for option, parameter in inspect.signature(reproduce).parameters.items():
        value = given[option]
        if option != "name" and value != parameter.default:
            words += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _listed(given: str | list[str] | None) -> list[str] | None:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given
