"""The report as sections of tables and figures, and as files: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tta.report import figures, tables
from lightning_tta.report.figures import Looks
from lightning_tta.report.runs import Group, Results, read
from lightning_tta.report.tables import Table
from lightning_tta.report.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 3
"""So many data sets and nets are named in the title."""


@dataclass
class Gallery:
    """Figures side by side where there is room, each with its description."""

    figures: Sequence[tuple[str, Figure]]
    caption: str
    wide: bool = False
    file: str | None = None  # what a picture beside a Markdown file is called; without one there is none


@dataclass
class Section:
    """A heading with warnings, verdicts, tables and figures, in this order."""

    title: str
    tables: Sequence[Table | None] = ()
    verdicts: Sequence[str] = ()
    warnings: Sequence[str] = ()
    galleries: list[Gallery] = field(default_factory=list)
    level: int = 3


def sections(results: Results, looks: Looks) -> list[Section]:
    """All sections, figures drawn."""
    warnings = list(results.warnings)
    if results.missing:
        warnings.append(f"Cells without a result: {len(results.missing)}; see the end.")
    everything = [
        Section("Before you read", warnings=warnings, level=2),
        Section("All groups", [tables.all_groups(results)], _all_verdicts(results), level=2),
        *(section for group in results.groups for section in _group_sections(group, looks)),
        Section("Missing cells", [tables.missing(results)], level=2),
        Section("Options", [tables.options(results)], level=2),
        Section("Versions and hardware", [tables.environment(results)], level=2),
    ]
    for section in everything:
        section.tables = [table for table in section.tables if table is not None]
    return [s for s in everything if s.warnings or s.verdicts or s.tables or s.galleries]


def title(results: Results) -> str:
    """What the page is about: the data and the nets."""
    data = {str(run.protocol["data"]): 0 for group in results.groups for run in group.runs if "data" in run.protocol}
    nets = dict.fromkeys(group.net or group.runs[0].short_net for group in results.groups)
    words = [_listed(list(data), "data sets"), f"net{'s' * (len(nets) > 1)} {_listed(list(nets), '')}" if nets else ""]
    return f"Test-time adaptation: {', '.join(filter(None, words))}" if any(words) else "Test-time adaptation"


def _listed(names: Sequence[str], what: str) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} {what}".strip()


def _all_verdicts(results: Results) -> list[str]:
    several = len(results.groups) > 1
    return [f"{group.title}: {verdict(group).text}" for group in results.groups] if several else []


def _group_sections(group: Group, looks: Looks) -> list[Section]:
    ruling = verdict(group)
    shown = [tables.overview(group, ruling.best), tables.language(group), tables.dense(group)]
    head = Section(group.title, shown, [ruling.text], group.warnings, level=2)
    stream = Section("Along the stream")
    calibration = Section("Calibration", [tables.calibration(group)])
    cost = Section("Cost", [tables.cost(group)])
    guard = Section("Guard events", [tables.guard(group), tables.estimates(group)])
    if estimated := figures.estimates_figure(group, looks):
        pictures = [("accuracy as monitors estimate it along the stream", estimated)]
        guard.galleries.append(Gallery(pictures, figures.estimates_caption(group), wide=True))
    verdicts = dict.fromkeys(tables.choice_text(run.choice) for run in group.runs if run.choice)
    gains = tables.differences(group)
    if gains := {method: gains[method] for method in tables.ranked(group) if method in gains}:
        caption = "Differences to the source with their 95 % intervals; filled: the interval leaves out zero."
        of_gains = figures.differences_figure(gains, looks, group.measure)
        head.galleries.append(Gallery([("differences to source", of_gains)], caption))
    if incomplete := [method for method, runs in group.methods.items() if not all(run.batches for run in runs)]:
        stream.warnings = [f"There is no batches.jsonl beside some reports of {', '.join(incomplete)}."]
    if curves := figures.curves_figure(group, looks):
        described = (f"{figures.first_curve(group)[1]} and {figures.second_curve(group)[1]} along the stream", curves)
        file = re.sub(r"[^\w.=()-]+", "_", group.title.replace(", ", "-")) + ".png"
        stream.galleries.append(Gallery([described], figures.curves_caption(group), wide=True, file=file))
    reliability = [
        (f"reliability of {method}", figures.reliability_figure(bins, method, looks[method], group.kind))
        for method, runs in group.methods.items()
        if (bins := tables.reliability(runs)) is not None
    ]
    if reliability:
        caption = (
            "Reliability: accuracy by confidence, all seeds together; vertical lines are the gap to the mean "
            "confidence of the bin. On the diagonal confidence is honest; below it, too high."
        )
        calibration.galleries.append(Gallery(reliability, caption))
    if points := tables.cost_points(group):
        words, caption = group.measure.words, f"{group.measure.title} against cost. Dashed: "
        caption += "the methods that no other beats in both."
        plots = [
            (f"{words} against {what}", figures.pareto_figure(what, m, looks, words)) for what, m in points.items()
        ]
        cost.galleries.append(Gallery(plots, caption))
    return [
        head,
        Section("Choice", tables.choices(group), list(verdicts)),
        Section("By domain", tables.by_domain(group) if len(group.parts) > 1 else []),
        stream,
        calibration,
        cost,
        Section("Forgetting", [tables.forgetting(group)]),
        guard,
        Section("Protocol", [tables.protocol(group)]),
    ]


def write_report(runs: Sequence[Path], output: Path | None = None, results: Results | None = None) -> list[Path]:
    """Write ``report.html`` and ``report.md``.

    Args:
        runs: Run directories, directories of such, or ``report.json`` or ``benchmark.json`` files.
        output: Directory to write to; by default that of the one run or benchmark, else ``report``.
        results: The runs as they were read, if they were.

    Returns:
        The files.

    Raises:
        DataError: If a run has no result.
    """
    from jinja2 import Environment

    results = results or read(runs)
    if output is None:
        (output,) = set(results.directories) if len(set(results.directories)) == 1 else (Path("report"),)
    output.mkdir(parents=True, exist_ok=True)
    looks = figures.looks(results.methods)
    count, name = sum(len(group.runs) for group in results.groups), title(results)
    subtitle = f"Runs: {count}. {results.found}"
    if any(group.labelled for group in results.groups):
        subtitle += "Accuracies are in percent; differences in points."
    template = files("lightning_tta.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    with figures.drawing():
        everything = sections(results, looks)
        page = Environment(autoescape=True, trim_blocks=True).from_string(template)
        html = page.render(title=name, subtitle=subtitle, sections=everything, looks=looks, as_image=figures.as_image)
    (output / "report.html").write_text(html, encoding="utf-8")
    text = markdown(name, f"{subtitle} The figures are in `report.html`.", everything)
    (output / "report.md").write_text(text, encoding="utf-8")
    return [output / "report.html", output / "report.md"]


def markdown(title: str, subtitle: str, sections: Sequence[Section], pictures: Path | None = None) -> str:
    """Verdicts, tables and warnings; with ``pictures``, a directory, the curves too, which are written there."""
    blocks = [f"# {_escape(title)}", subtitle]
    for section in sections:
        blocks.append(f"{'#' * section.level} {_escape(section.title)}")
        blocks += [f"**{_escape(text)}**" for text in section.warnings]
        blocks += [f"> {_escape(text)}" for text in section.verdicts]
        for table in filter(None, section.tables):
            rule = ["---" if column < table.left else "---:" for column in range(len(table.header))]
            head, *rows = [[_escape(cell).replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
            for row, cells in zip(table.rows, rows, strict=True):
                cells[0] = f"**{cells[0]}** (best)" if row[0] == table.best else cells[0]
            blocks += [f"**{_escape(table.title)}**"] if table.title != section.title else []
            blocks += ["\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows]), _escape(table.note)]
        for gallery in section.galleries:
            if pictures and gallery.file:
                ((description, figure),) = gallery.figures
                figure.savefig(pictures / gallery.file, dpi=130)
                blocks += [f"![{description}]({gallery.file.replace(' ', '%20')})", _escape(gallery.caption)]
    return "\n\n".join(blocks) + "\n"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: names may hold anything."""
    text = re.sub(r"([\\*`$]|\](?=[(\[])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")
