"""Results as text: the table of one run, the comparison of several, the benchmark's JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_tta.data.protocol import Protocol
from lightning_tta.errors import ConfigError
from lightning_tta.files import write_json
from lightning_tta.report import write_report
from lightning_tta.report.blocks import percent
from lightning_tta.report.runs import read, result_file
from lightning_tta.report.style import looks
from lightning_tta.report.write import write_picture

Row = Mapping[str, Any]


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation in percent; one value alone has no spread."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else f"{known[0]:.1f}"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table for the terminal; the first ``left`` columns are text, the others are numbers."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        made.add_column(name, justify="left" if number < left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


# One run and several ---------------------------------------------------------------------------------------------


def print_report(report: Mapping[str, Any], path: Path) -> None:
    """Print a run's table by domain, and where its files are."""
    protocol = report["protocol"]
    rows = [
        [name, str(row["images"]), percent(row["accuracy"]), percent(row["largest_class_share"])]
        for name, row in report["domains"].items()
    ]
    rows.append(["all", str(report["images"]), percent(report["accuracy"]), ""])
    title = f"{report['method']}, {protocol['stream']} stream, reset {protocol['reset']}, protocol {protocol['hash']}"
    console = Console(soft_wrap=True)
    console.print(table(title, ["domain", "images", "accuracy %", "largest class %"], rows))
    console.print(
        f"{report['forwards']} forward and {report['backwards']} backward passes, "
        f"{1000 * (report['seconds_per_batch'] or 0):.1f} ms per batch, {report['resets']} resets, "
        f"{report['skipped_steps']} steps skipped, {report['nonfinite_images']} non-finite images"
    )
    said = {name: value for name, value in protocol.items() if name not in ("domains", "hash") and value is not None}
    console.print("protocol: " + ", ".join(f"{name} {value}" for name, value in said.items()), highlight=False)
    if str(protocol["weights"]).endswith("random"):
        console.print(
            "[bold red]The net is randomly initialised: these numbers say nothing of a trained one.[/bold red]"
        )
    for line in _incidents(report):
        console.print(line, highlight=False)
    console.print(f"report: {path}", highlight=False)


def _incidents(report: Mapping[str, Any]) -> list[str]:
    """What a run's guard did, and what was skipped; reports of older versions have neither."""
    lines = []
    if report.get("skipped_batches"):
        lines.append(f"skipped: {report['skipped_batches']} bad batches with {report['skipped_images']} images")
    guard = report.get("guard")
    if guard is not None:
        events = guard["events"]
        lines.append(f"guard ({guard['settings']['action']}): {len(events)} alarms" + ", stopped" * guard["stopped"])
        if guard.get("on_probation"):
            lines[-1] += f", {guard['on_probation']} batches predicted by the source on probation"
        lines += [f"  batch {event['batch']}: {event['reason']}, {event['action']}" for event in events[:10]]
        lines += [f"  ... and {len(events) - 10} more"] * (len(events) > 10)
    return lines


def report(runs: list[Path], *, allow_different: bool = False, output: Path | None = None, latex: bool = False) -> None:
    """Print the tables of finished runs, and write the same with figures as ``report.html`` and ``report.md``.

    Several single runs are compared; where their protocols differ the page says so, the terminal refuses.

    Args:
        runs: Run directories, or ``report.json`` or ``benchmark.json`` files.
        allow_different: Compare although the protocols differ.
        output: Directory to write to; by default that of the one run or benchmark, else ``report``.
        latex: Also write ``report.tex``, tables for LaTeX with booktabs.

    Raises:
        DataError: If a run has no result, or a result was changed after it was written.
        ConfigError: If the runs to compare have different protocols.
    """
    console = Console(soft_wrap=True)
    singles: list[tuple[Path, dict[str, Any]]] = []
    for run in runs:
        path = result_file(run)
        content = json.loads(path.read_text())
        if "rows" in content:
            _print_benchmark(content["rows"], content["skipped"], console)
        else:
            singles.append((path, content))
    for path, content in singles:
        print_report(content, path)
    written = write_report(runs, output, as_latex=latex)
    console.print(f"written: {', '.join(str(path) for path in written)}", highlight=False)
    if len(singles) > 1:
        _compare(singles, allow_different, console)


def _compare(singles: list[tuple[Path, dict[str, Any]]], allow_different: bool, console: Console) -> None:
    first_path, first = singles[0]
    protocol = Protocol.from_dict(first["protocol"])
    for path, content in singles[1:]:
        differences = protocol.diff(Protocol.from_dict(content["protocol"]))
        if differences and not allow_different:
            lines = "\n  ".join(differences)
            raise ConfigError(
                f"{first_path} and {path} were measured under different protocols and are not comparable:\n  {lines}\n"
                "Run them under one protocol, or pass --allow_different true to see them side by side."
            )
    domains = list(dict.fromkeys(name for _, content in singles for name in content["domains"]))
    header = ["domain", *[content["method"] for _, content in singles]]
    rows = [
        [name, *[percent(content["domains"].get(name, {}).get("accuracy")) for _, content in singles]]
        for name in domains
    ]
    rows.append(["all", *[percent(content["accuracy"]) for _, content in singles]])
    if allow_different:
        rows.append(["protocol", *[content["protocol"]["hash"] for _, content in singles]])
    console.print(table("accuracy %", header, rows))


# The benchmark ---------------------------------------------------------------------------------------------------


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by net and stream."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["net"], row["stream"]), []).append(row)
    return groups


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def _mismatch(rows: Sequence[Row]) -> list[int]:
    """Seeds whose rows do not all have one protocol."""
    hashes: dict[int, set[str]] = {}
    for row in rows:
        hashes.setdefault(row["seed"], set()).add(row["protocol_hash"])
    return [seed for seed, found in hashes.items() if len(found) > 1]


def summary_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Accuracy (mean ± standard deviation over seeds) of one net and stream, gain over source, cost.

    The gain is paired: the mean over seeds of the difference to ``source`` under the same protocol.
    """
    methods = _by_method(rows)
    source = {row["protocol_hash"]: row["accuracy"] for row in methods.get("source", [])}
    base = mean(row["seconds_per_batch"] for row in methods["source"]) if "source" in methods else None
    table = []
    for method, found in methods.items():
        gains = [
            100 * (row["accuracy"] - source[row["protocol_hash"]]) for row in found if row["protocol_hash"] in source
        ]
        shares = [max(domain["largest_class_share"] for domain in row["domains"].values()) for row in found]
        seconds = mean(row["seconds_per_batch"] for row in found)
        table.append(
            [
                method,
                spread([row["accuracy"] for row in found]),
                f"{mean(gains):+.1f}" if gains else "-",
                spread([row.get("ece") for row in found]),
                spread(shares),
                f"{found[0]['forwards']}/{found[0]['backwards']}",
                f"{1000 * seconds:.1f}",
                f"{seconds / base:.2f}" if base else "-",
            ]
        )
    header = ["method", "accuracy %", "gain", "ECE %", "largest class %", "fwd/bwd", "ms/batch", "x source"]
    return header, table


def domain_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Accuracy by domain of one net and stream, mean over seeds."""
    methods = _by_method(rows)
    domains = list(dict.fromkeys(name for row in rows for name in row["domains"]))
    table = []
    for domain in domains:
        cells = []
        for found in methods.values():
            values = [row["domains"][domain]["accuracy"] for row in found if domain in row["domains"]]
            cells.append(percent(mean(values)) if values and None not in values else "-")
        table.append([domain, *cells])
    return ["domain", *methods], table


def _print_benchmark(rows: Sequence[Row], skipped: Sequence[Mapping[str, str]], console: Console) -> None:
    for (net, stream), found in _groups(rows).items():
        seeds = len({row["seed"] for row in found})
        console.print(table(f"net {net}, stream {stream}, {seeds} seed{'s' * (seeds > 1)}", *summary_table(found)))
        for seed in _mismatch(found):
            console.print(f"[red]seed {seed}: the rows have different protocols and are not comparable[/red]")
    for entry in skipped:
        console.print(f"left out: {entry['cell']}: {entry['reason']}", highlight=False)


def write_benchmark(result: Mapping[str, Any], output: Path, console: Console) -> None:
    """Write ``benchmark.json``, ``benchmark.md`` and one plot per net and stream, and print the tables."""
    write_json(output / "benchmark.json", result)
    material = read([output])
    looked = looks(material.methods)
    environment = result["environment"]
    parts = [
        "# Benchmark",
        "Accuracy in percent, mean ± standard deviation over seeds; gain over `source` in points, paired by protocol. "
        "Largest class: the share of the most predicted class in the worst domain; near 100 after a collapse.",
        f"{environment['device']}; torch {environment['torch']}, lightning_tta {environment['lightning_tta']}; "
        f"{result['seconds']:.0f} s for what was not finished before.",
    ]
    for ((net, stream), found), group in zip(_groups(result["rows"]).items(), material.groups, strict=True):
        parts.append(f"## {net}, {stream}")
        parts.append(_markdown(*summary_table(found)))
        parts.extend(
            f"**Seed {seed}: the rows have different protocols and are not comparable.**" for seed in _mismatch(found)
        )
        image = f"{net}-{stream}.png"
        caption = write_picture(group, looked, output / image)
        if caption is not None:
            parts += [f"![accuracy and predicted-class share along the stream]({image})", caption]
        parts.append(_markdown(*domain_table(found)))
        hashes = sorted({f"seed {row['seed']}: {row['protocol_hash']}" for row in found})
        parts.append("Protocols: " + ", ".join(hashes) + ".")
    if result["skipped"]:
        parts.append("## Left out")
        parts.append("\n".join(f"- {entry['cell']}: {entry['reason']}" for entry in result["skipped"]))
    (output / "benchmark.md").write_text("\n\n".join(parts) + "\n")
    _print_benchmark(result["rows"], result["skipped"], console)
    console.print(f"written: {output}/benchmark.json, benchmark.md and plots", highlight=False)
