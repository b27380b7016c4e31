"""Plain text for a terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable


def columns(rows: Iterable[tuple[str, str]], left: int = 17, height: int | None = None) -> str:
    """Names on the left, their texts wrapped on the right.

    Args:
        rows: Each name with its text, whose lines stay apart.
        left: Width of the left column.
        height: At most so many lines of each text.
    """
    width = min(120, shutil.get_terminal_size().columns) - left - 2
    lines = []
    for name, text in rows:
        for line in text.splitlines() or [""]:
            wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", max_lines=height, placeholder=" ...")
            for wrapped in wrapper.wrap(line) or [""]:
                lines.append(f"  {name.ljust(left)}{wrapped}".rstrip())
                name = ""
    return "\n".join(lines)


def without_markup(text: str) -> str:
    """A docstring's text in one line, without double backquotes and roles: of a reference only its last name."""
    return " ".join(re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", text.replace("``", "")).split())
