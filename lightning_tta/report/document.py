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
    """Figures side by side where there is room: description and figure of each."""

    figures: Sequence[tuple[str, Figure]]
    caption: str
    wide: bool = False
    file: str | None = None


@dataclass
class Section:
    """A heading with warnings, tables and figures, in this order."""

    title: str
    level: int = 3
    warnings: Sequence[str] = ()
    tables: Sequence[Table | None] = ()
    galleries: list[Gallery] = field(default_factory=list)
    number: int = 0


def sections(results: Results, looks: Looks, *, page: bool) -> list[Section]:
    """All sections, figures drawn; of these, without a ``page``, only the curves along the stream."""
    warnings = list(results.warnings)
    if results.missing:
        warnings.append(f"Cells without a result: {len(results.missing)}; see the end.")
    found = [Section("Before you read", 2, warnings)]
    if len(results.groups) > 1:
        found.append(Section("All groups", 2, tables=[tables.all_groups(results)]))
    for group in results.groups:
        found += _group(group, looks, page)
    found.append(Section("Missing cells", 2, tables=[tables.missing(results)]))
    found.append(Section("Versions and hardware", 2, tables=[tables.environment(results)]))
    for number, section in enumerate(found):
        section.number = number
        section.tables = [table for table in section.tables if table is not None]
    return [section for section in found if section.warnings or section.tables or section.galleries]


def _group(group: Group, looks: Looks, page: bool) -> list[Section]:
    head = Section(group.title, 2, group.warnings, [tables.overview(group)])
    stream = Section("Along the stream")
    calibration = Section("Calibration", tables=[tables.calibration(group)])
    cost = Section("Cost", tables=[tables.cost(group)])
    curves = figures.curves_figure(group, looks)
    lacking = [method for method, runs in group.methods.items() if not all(run.batches for run in runs)]
    if lacking:
        stream.warnings = [f"There is no batches.jsonl beside some reports of {', '.join(lacking)}."]
    if curves is not None:
        caption, file = figures.curves_caption(group), f"{group.title.replace(', ', '-')}.png"
        stream.galleries.append(Gallery([("accuracy and class share along the stream", curves)], caption, True, file))
    if page:
        gains = tables.differences(group)
        if gains:
            caption = "Differences to the source with their 95 % intervals; filled: the interval leaves out zero."
            shown = [("differences to source", figures.differences_figure(gains, looks))]
            head.galleries.append(Gallery(shown, caption))
        bins = {m: found for m, runs in group.methods.items() if (found := tables.reliability(runs)) is not None}
        if bins:
            caption = (
                "Reliability: accuracy by confidence, all seeds together; vertical lines are the gap to the mean "
                "confidence of the bin. On the diagonal confidence is honest; below it, too high."
            )
            shown = [(f"reliability of {m}", figures.reliability_figure(b, m, looks[m])) for m, b in bins.items()]
            calibration.galleries.append(Gallery(shown, caption))
        points = tables.cost_points(group)
        if points:
            caption = "Accuracy against cost. Dashed: the methods that no other beats in both."
            shown = [("accuracy against cost", figures.pareto_figure(points, looks))]
            cost.galleries.append(Gallery(shown, caption, wide=True))
    domains = tables.by_domain(group) if len(group.domains) > 1 else []
    rest = [
        Section("Forgetting", tables=[tables.forgetting(group)]),
        Section("Guard events", tables=[tables.guard(group)]),
        Section("Protocol", tables=[tables.protocol(group)]),
    ]
    return [head, Section("By domain", tables=domains), stream, calibration, cost, *rest]


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
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        files("lightning_tta.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    with figures.drawing():
        found = sections(results, looks, page=True)
        page = template.render(title=TITLE, subtitle=subtitle, sections=found, looks=looks, as_image=figures.as_image)
    texts = {"report.html": page, "report.md": markdown(TITLE, f"{subtitle} The figures are in `report.html`.", found)}
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return [output / name for name in texts]


def write_markdown(results: Results, path: Path, title: str, subtitle: str) -> None:
    """Write the tables as Markdown, with the curves along the stream as pictures beside the file."""
    with figures.drawing():
        found = sections(results, figures.looks(results.methods), page=False)
        path.write_text(markdown(title, subtitle, found, path.parent), encoding="utf-8")


def markdown(title: str, subtitle: str, sections: Sequence[Section], pictures: Path | None = None) -> str:
    """Tables and warnings, and links to the curves, which are written to ``pictures``, where that is given."""
    parts = [f"# {title}", subtitle]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [f"**{_escape(text)}**" for text in section.warnings]
        for table in section.tables:
            assert table is not None
            rule = ["---" if place < table.left else "---:" for place in range(len(table.header))]
            head, *rows = [[_escape(cell).replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
            parts += [f"**{_escape(table.title)}**"] if table.title != section.title else []
            parts += ["\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows]), _escape(table.note)]
        for gallery in section.galleries if pictures else ():
            if pictures and gallery.file:
                ((alt, figure),) = gallery.figures
                figure.savefig(pictures / gallery.file, dpi=130)
                parts += [f"![{alt}]({gallery.file.replace(' ', '%20')})", gallery.caption]
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*").replace("<", "&lt;")
