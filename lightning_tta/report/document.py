"""The report as sections of tables and figures, and as files: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tta.report import figures, tables
from lightning_tta.report.figures import Looks
from lightning_tta.report.runs import Group, Results, read, result_files
from lightning_tta.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Test-time adaptation"


@dataclass
class Gallery:
    """Figures side by side where there is room, each with its description."""

    figures: Sequence[tuple[str, Figure]]
    caption: str
    wide: bool = False
    file: str | None = None  # what a picture beside a Markdown file is called; without one there is none


@dataclass
class Section:
    """A heading with warnings, tables and figures, in this order."""

    title: str
    tables: Sequence[Table | None] = ()
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
        Section("All groups", [tables.all_groups(results)] if len(results.groups) > 1 else [], level=2),
        *(section for group in results.groups for section in _group_sections(group, looks)),
        Section("Missing cells", [tables.missing(results)], level=2),
        Section("Versions and hardware", [tables.environment(results)], level=2),
    ]
    for section in everything:
        section.tables = [table for table in section.tables if table is not None]
    return [section for section in everything if section.warnings or section.tables or section.galleries]


def _group_sections(group: Group, looks: Looks) -> list[Section]:
    head = Section(group.title, [tables.overview(group)], group.warnings, level=2)
    stream = Section("Along the stream")
    calibration = Section("Calibration", [tables.calibration(group)])
    cost = Section("Cost", [tables.cost(group)])
    if gains := tables.differences(group):
        caption = "Differences to the source with their 95 % intervals; filled: the interval leaves out zero."
        head.galleries.append(Gallery([("differences to source", figures.differences_figure(gains, looks))], caption))
    if incomplete := [method for method, runs in group.methods.items() if not all(run.batches for run in runs)]:
        stream.warnings = [f"There is no batches.jsonl beside some reports of {', '.join(incomplete)}."]
    if curves := figures.curves_figure(group, looks):
        described = ("accuracy and class share along the stream", curves)
        file = f"{group.title.replace(', ', '-')}.png"
        stream.galleries.append(Gallery([described], figures.curves_caption(group), wide=True, file=file))
    reliability = [
        (f"reliability of {method}", figures.reliability_figure(bins, method, looks[method]))
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
        caption = "Accuracy against cost. Dashed: the methods that no other beats in both."
        described = ("accuracy against cost", figures.pareto_figure(points, looks))
        cost.galleries.append(Gallery([described], caption, wide=True))
    return [
        head,
        Section("By domain", tables.by_domain(group) if len(group.domains) > 1 else []),
        stream,
        calibration,
        cost,
        Section("Forgetting", [tables.forgetting(group)]),
        Section("Guard events", [tables.guard(group)]),
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

    if output is None:
        parents = {file.parent for run in runs for file in result_files(run)}
        output = parents.pop() if len(parents) == 1 else Path("report")
    output.mkdir(parents=True, exist_ok=True)
    results = results or read(runs)
    looks = figures.looks(results.methods)
    count = sum(len(group.runs) for group in results.groups)
    subtitle = f"Runs: {count}. Accuracies are in percent; differences in points."
    template = files("lightning_tta.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    with figures.drawing():
        everything = sections(results, looks)
        page = Environment(autoescape=True, trim_blocks=True).from_string(template)
        html = page.render(title=TITLE, subtitle=subtitle, sections=everything, looks=looks, as_image=figures.as_image)
    (output / "report.html").write_text(html, encoding="utf-8")
    text = markdown(TITLE, f"{subtitle} The figures are in `report.html`.", everything)
    (output / "report.md").write_text(text, encoding="utf-8")
    return [output / "report.html", output / "report.md"]


def markdown(title: str, subtitle: str, sections: Sequence[Section], pictures: Path | None = None) -> str:
    """Tables and warnings, and links to the curves, which are written to ``pictures``, where that is given."""
    blocks = [f"# {title}", subtitle]
    for section in sections:
        blocks.append(f"{'#' * section.level} {section.title}")
        blocks += [f"**{_escape(text)}**" for text in section.warnings]
        for table in filter(None, section.tables):
            rule = ["---" if column < table.left else "---:" for column in range(len(table.header))]
            head, *rows = [[_escape(cell).replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
            blocks += [f"**{_escape(table.title)}**"] if table.title != section.title else []
            blocks += ["\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows]), _escape(table.note)]
        for gallery in section.galleries:
            if pictures and gallery.file:
                ((description, figure),) = gallery.figures
                figure.savefig(pictures / gallery.file, dpi=130)
                blocks += [f"![{description}]({gallery.file.replace(' ', '%20')})", gallery.caption]
    return "\n\n".join(blocks) + "\n"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*").replace("<", "&lt;")
