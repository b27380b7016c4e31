"""The report as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_tta.report.blocks import Grid, Note, Section

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Tables and notes; the figures are in the page."""
    parts = [f"# {title}", "The figures are in `report.html`."]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        for block in section.blocks:
            if isinstance(block, Note):
                parts.append(f"**{_md(block.text)}**" if block.warning else _md(block.text))
            elif isinstance(block, Grid):
                rule = ["---" if place < block.left else "---:" for place in range(len(block.header))]
                head, *rows = [[_md(cell).replace("|", "\\|") for cell in row] for row in [block.header, *block.rows]]
                parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows]))
                parts.append(_md(block.caption))
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*").replace("<", "&lt;")


def latex(title: str, sections: Sequence[Section]) -> str:
    r"""The tables of numbers, to ``\input``; needs the package booktabs."""
    parts = [f"% {title}. Needs \\usepackage{{booktabs}}; wide tables: \\resizebox or a smaller font."]
    group = ""
    for section in sections:
        if section.level == 2:
            group = section.title
        for block in section.blocks:
            if isinstance(block, Grid) and block.left == 1:
                parts.append(_tabular(block, group))
            elif isinstance(block, Note) and block.warning:
                parts.append("% " + " ".join(block.text.split()))
    return "\n\n".join(parts) + "\n"


def _tabular(grid: Grid, group: str) -> str:
    columns = "l" * grid.left + "r" * (len(grid.header) - grid.left)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(group)}. {escape(grid.caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(escape, grid.header)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_cell, row)) + r" \\" for row in grid.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A cell; signs are set as signs, a star as a superscript."""
    if text[:1] in ("+", "-") and len(text) > 1:
        star = text.endswith("*")
        value = text.removesuffix("*").replace(" ± ", r" \pm ")
        return f"${value}{'^{*}' if star else ''}$"
    return escape(text)


def escape(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
