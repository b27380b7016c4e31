"""The report in the terminal: the tables of one run, of several, of a benchmark."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lightning_tta.files import write_json
from lightning_tta.report import figures, tables, write_report
from lightning_tta.report.document import markdown, sections
from lightning_tta.report.runs import PROMPTS, Group, Results, Run, protocol_problem, read, repeat_problem
from lightning_tta.report.tables import Table
from lightning_tta.report.verdict import verdict

COUNTS = ("forwards", "backwards", "resets", "skipped_steps", "nonfinite_images", "skipped_batches", "skipped_images")
MARK = " (best)"


def print_table(console: Console, table: Table) -> None:
    """Print a table and its note; cells are never cut: where the terminal is too narrow, it wraps the lines."""
    shown = RichTable(
        title=Text(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column, (name, *cells) in enumerate(zip(table.header, *table.rows, strict=True)):
        width = max([*map(len, cells), *map(len, name.split()), 1])
        header = Text(textwrap.fill(name, width, break_long_words=False, break_on_hyphens=False))
        shown.add_column(header, justify="left" if column < table.left else "right", no_wrap=True)
    for row in table.rows:
        best = table.best is not None and row[0] == table.best
        shown.add_row(Text(row[0] + MARK * best), *map(Text, row[1:]), style="bold" if best else None)
    width = console.measure(shown, options=console.options.update(width=10_000)).maximum
    Console(file=console.file, width=max(console.width, width)).print(shown)
    if table.note:
        console.print(Text(f"{table.note}\n"), style="dim")


def print_report(report: Mapping[str, Any], path: Path) -> None:
    """Print a run's table by domain, and where its files are."""
    console, run = Console(), Run(str(report.get("method", "")), "", report, path.parent)
    print_table(console, tables.one_run(report))
    protocol = report.get("protocol") or {}
    settings = {
        name: tables.said(value) if isinstance(value, list) else value
        for name, value in protocol.items()
        if name not in ("domains", "hash") and value is not None
    }
    count = {name: report.get(name) or 0 for name in (*COUNTS, "seconds_per_batch")}  # older reports lack some
    kind = run.kind
    ending = f"{count['nonfinite_images']} non-finite {kind.samples}"
    if kind is PROMPTS:
        ending = f"{report.get('generated_tokens')} tokens generated"
    lines = [
        f"{count['forwards']} forward and {count['backwards']} backward passes, "
        f"{1000 * count['seconds_per_batch']:.1f} ms per batch, {count['resets']} resets, "
        f"{count['skipped_steps']} steps skipped, {ending}",
        f"options: {tables.options_of(run)}",
        "protocol: " + ", ".join(f"{kind.entry(name)} {value}" for name, value in settings.items()),
    ]
    what = "prompts with an answer" if kind is PROMPTS else f"images with {kind.truth}"
    if 0 < (known := report.get("labelled_images", 0)) < report["images"]:
        lines.insert(0, f"accuracy: of the {known} {what}, among {report['images']}")
    if kind is PROMPTS:
        lines.insert(0, _of_answers(report))
    if polluting := report.get("polluting_images"):
        share = 100 * polluting / report["images"]
        lines.insert(0, f"polluting images: {polluting} of {report['images']} ({share:.0f} %), in no measure")
    if count["skipped_batches"]:
        lines.append(f"skipped: {count['skipped_batches']} bad batches with {count['skipped_images']} {kind.samples}")
    elif count["skipped_images"]:
        lines.append(f"skipped: {count['skipped_images']} {kind.samples} that could not be used")
    if guard := report.get("guard"):
        events = guard.get("events", [])
        action, stopped = (guard.get("settings") or {}).get("action"), ", stopped" * bool(guard.get("stopped"))
        lines.append(f"guard ({action}): {len(events) + guard.get('dropped_events', 0)} alarms{stopped}")
        if guard.get("on_probation"):
            lines[-1] += f", {guard['on_probation']} batches predicted by the source on probation"
        said = [
            f"batch {event.get('batch')}: {event.get('reason')}, {event.get('action')} ({event.get('monitor')})"
            for event in run.alarms[:10]
        ]
        lines += [f"  {text}" for text in said] + [f"  ... and {len(events) - 10} more"] * (len(events) > 10)
    lines += [sentence.removesuffix(".") for sentence in run.unestimated]
    if (estimated := tables.estimates(Group("", [run]))) is not None:
        lines += [
            f"accuracy as '{monitor}' estimates it: {estimate} %, in truth {truth} %, mean error {error} points"
            for _, _, monitor, estimate, truth, error in estimated.rows
        ]
    if run.choice:
        lines.append(tables.choice_text(run.choice))
    if problem := repeat_problem(report):
        lines.append(problem)
    if str(protocol.get("weights")).endswith("random"):
        console.print(
            Text("The net is randomly initialised: these numbers say nothing of a trained one."), style="bold red"
        )
    console.print(Text("\n".join([*lines, f"report: {path}"])), soft_wrap=True)


def _of_answers(report: Mapping[str, Any]) -> str:
    """How sure the accuracy is, and whether the answers are one string, in a line."""
    ends = report.get("accuracy_interval")
    words = [f"accuracy between {100 * ends[0]:.1f} and {100 * ends[1]:.1f} % (95 %, Clopper-Pearson)"] if ends else []
    if report.get("largest_class_share") is not None:
        most = str(report.get("most_frequent_answer", ""))[:40]
        words.append(f"most frequent answer {most!r} ({100 * report['largest_class_share']:.1f} %)")
        words.append(f"token entropy {report['entropy']:.3f} nats, logit norm {report['logit_norm']:.2f}")
    return ", ".join(words) or "no answers"


def report(runs: list[Path], *, allow_different: bool = False, output: Path | None = None) -> None:
    """Print the tables of finished runs, and write the same with figures as ``report.html`` and ``report.md``.

    Each group of runs has a verdict: which method is best, how much, how sure, at what cost. Several paths are there to
    be compared: unlike protocols are refused before anything is printed or written. One folder may hold anything at any
    depth: each protocol in it is a part of its own.

    Args:
        runs: Run directories, directories of such, or ``report.json`` or ``benchmark.json`` files.
        allow_different: Show paths side by side although their protocols differ; the page says how they do.
        output: Directory to write to; by default that of the one run or benchmark, else ``report``.

    Raises:
        DataError: If a run has no result, or the protocol of one to compare was changed after it was written.
        ConfigError: If the runs to compare have different protocols.
    """
    console = Console()
    results = read(runs, allow_different=allow_different)
    written = write_report(runs, output, results)  # first: the terminal's reader may leave, as after `| head`
    if results.found:
        console.print(Text(results.found))
    if len(results.singles) == 1 == len(results.groups):
        ((run,), (group,)) = results.singles, results.groups
        for text in filter(None, [*results.warnings, protocol_problem(run), run.predictions_problem]):
            console.print(Text(text), style="red")
        print_report(run.report, run.directory / "report.json")
        console.print(Text(verdict(group).text), style="bold")
    else:
        print_results(results, console)
    console.print(Text(f"written: {', '.join(map(str, written))}"), soft_wrap=True)


def print_results(results: Results, console: Console) -> None:
    """Print each group's verdict, its ranking, of single runs the domains, and its cost; warnings and missing cells."""
    for text in results.warnings:
        console.print(Text(text), style="bold red")
    for group in results.groups:
        domains = tables.by_domain(group)[:1] if results.singles and len(group.parts) > 1 else []
        ruling = verdict(group)
        console.print(Text(f"{ruling.text}\n"), style="bold")
        shown = (tables.overview(group, ruling.best), tables.language(group), tables.dense(group))
        for table in (*shown, *domains, tables.cost(group)):
            if table is not None:
                print_table(console, table)
        for text in group.warnings:
            console.print(Text(text), style="red")
    for cell, reason in results.missing:
        console.print(Text(f"left out: {cell}: {reason}"))


def write_benchmark(result: Mapping[str, Any], output: Path, console: Console) -> None:
    """Write ``benchmark.json``, ``benchmark.md`` and one plot per net and stream, and print the tables."""
    write_json(output / "benchmark.json", result)
    environment, results = result["environment"], read([output])
    subtitle = (
        f"{environment['device']}; torch {environment['torch']}, lightning_tta {environment['lightning_tta']}; "
        f"{result['seconds']:.0f} s for what was not finished before."
    )
    with figures.drawing():
        everything = sections(results, figures.looks(results.methods))
        text = markdown("Benchmark", subtitle, everything, pictures=output)
    (output / "benchmark.md").write_text(text, encoding="utf-8")
    print_results(results, console)
    console.print(Text(f"written: {output}/benchmark.json, benchmark.md and plots"), soft_wrap=True)
