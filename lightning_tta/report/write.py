"""Writes the report's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_tta.report.content import sections
from lightning_tta.report.curves import caption, stream_picture
from lightning_tta.report.page import page
from lightning_tta.report.runs import Group, read, result_file
from lightning_tta.report.style import Look, drawing, looks, save_png
from lightning_tta.report.text import latex, markdown


def write_report(runs: Sequence[Path], output: Path | None = None, *, as_latex: bool = False) -> list[Path]:
    """Write ``report.html`` and ``report.md``, and ``report.tex`` if asked to.

    Args:
        runs: Run directories, or ``report.json`` or ``benchmark.json`` files.
        output: Directory to write to; by default that of the one run or benchmark, else ``report``.
        as_latex: Also write the tables for LaTeX (booktabs).

    Returns:
        The files.

    Raises:
        DataError: If a run has no result.
    """
    files = [result_file(run) for run in runs]
    if output is None:
        output = files[0].parent if len(set(files)) == 1 else Path("report")
    output.mkdir(parents=True, exist_ok=True)
    material = read(runs)
    looked = looks(material.methods)
    made = sections(material, looked)
    count = sum(len(group.runs) for group in material.groups)
    subtitle = (
        f"{count} run{'s' * (count != 1)} in {len(material.groups)} comparison{'s' * (len(material.groups) != 1)}. "
        "Accuracies are in percent; differences in points."
    )
    texts = {"report.html": page(material.title, subtitle, made, looked), "report.md": markdown(material.title, made)}
    if as_latex:
        texts["report.tex"] = latex(material.title, made)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return [output / name for name in texts]


def write_picture(group: Group, looked: Mapping[str, Look], path: Path) -> str | None:
    """Write the figure along the stream as PNG; returns its caption, or ``None`` where there are no batches."""
    with drawing():
        figure = stream_picture(group, looked)
        if figure is None:
            return None
        save_png(figure, path)
    return caption(group)
