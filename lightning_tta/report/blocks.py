"""What a report is made of, before it becomes HTML, Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Note:
    """A paragraph; a warning is set off."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: the first ``left`` columns are text.

    Attributes:
        header: Names of the columns.
        rows: Cells as text; ``*`` at a cell's end marks a difference whose interval leaves out zero.
        caption: What it shows.
        left: How many columns hold text.
        methods: Whether the first column names methods.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    left: int = 1
    methods: bool = False


@dataclass(frozen=True)
class Pictures:
    """Figures side by side where there is room.

    Attributes:
        items: Description and inline SVG of each.
        caption: What they show.
        wide: Whether each takes the page's whole width.
    """

    items: Sequence[tuple[str, str]]
    caption: str
    wide: bool = False


Block = Note | Grid | Pictures


@dataclass
class Section:
    """A heading with blocks."""

    title: str
    level: int
    blocks: list[Block] = field(default_factory=list)


def percent(value: float | None, half: float | None = None) -> str:
    """A share as a percentage, with the half width of its interval where there is one."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def number(value: float | None, half: float | None = None, digits: int = 3) -> str:
    """A number, with the half width of its interval where there is one."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")
