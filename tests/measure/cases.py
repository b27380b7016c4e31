"""Cases that run one after the other: each guarded, within a budget of seconds, written to a file as they come."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
LINES = 6  # of a traceback


@dataclass(frozen=True)
class Case:
    """What is run, and what is known of it before.

    Attributes:
        section: Of its table.
        name: Of its row.
        seconds: What it may take on a GPU; it is left out where less is left.
        run: Returns the row's columns.
        rank: Cases of a lower rank come first.
        not_here: Why it cannot run here; empty if it can.
    """

    section: str
    name: str
    seconds: float
    run: Callable[[], Row]
    rank: int = 0
    not_here: str = ""

    @property
    def label(self) -> str:
        """Its name in the account."""
        return f"{self.section}: {self.name}"


class Account:
    """What was measured, what went wrong, and what was left out and why.

    Args:
        head: Of the machine: hardware, versions, date.
        budget: Seconds from now.
        path: A JSON file, rewritten after each case.
    """

    def __init__(self, head: Row, budget: float = float("inf"), path: Path | None = None) -> None:
        self.head, self.path = head, path
        self.rows: dict[str, dict[str, Row]] = {}
        self.errors: dict[str, list[str]] = {}
        self.left_out: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self.deadline = time.monotonic() + budget

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def go_on(self) -> None:
        """Take up what the file has: its cases are not run again."""
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text())
            self.rows, self.errors, self.notes = found["rows"], found["errors"], found["notes"]

    def save(self) -> None:
        """Rewrite the file."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            names = ("head", "rows", "errors", "left_out", "notes")
            self.path.write_text(json.dumps({name: getattr(self, name) for name in names}, indent=1, default=str))

    def is_done(self, case: Case) -> bool:
        """Whether it was run, with or without success."""
        return case.name in self.rows.get(case.section, {}) or case.label in self.errors

    def run(self, case: Case) -> None:
        """Run a case, or say why not."""
        if self.is_done(case):
            return
        self.left_out.pop(case.label, None)
        if case.not_here:
            self.left_out[case.label] = case.not_here
        elif self.left() < case.seconds:
            self.left_out[case.label] = f"{self.left():.0f} s left, it may take {case.seconds:.0f}"
        else:
            start = time.monotonic()
            with self.guarded(case.label):
                self.rows.setdefault(case.section, {})[case.name] = case.run()
            print(f"{case.label}: {time.monotonic() - start:.1f} s, {self.left():.0f} left", flush=True)
        if torch.cuda.is_initialized():
            gc.collect()
            with contextlib.suppress(RuntimeError):  # of a GPU that answers no more
                torch.cuda.empty_cache()
        self.save()

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """An exception in here is written down, and the run goes on."""
        try:
            yield
        except Exception as error:  # whatever it is, the other cases may go
            self.errors[what] = [
                line for line in traceback.format_exc().strip().splitlines() if set(line) - set(" ^~")
            ][-LINES:]
            print(f"!! {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)

    def text(self) -> str:
        """All as Markdown: a table a section, then errors, notes, and what was left out."""
        lines = [f"- {name}: {value}" for name, value in self.head.items()]
        for section, rows in self.rows.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            lines += ["", f"## {section}", "", _line(["", *columns]), f"|---|{'---:|' * len(columns)}"]
            lines += [_line([name, *(_cell(row.get(column)) for column in columns)]) for name, row in rows.items()]
        for title, entries in (("Errors", self.errors), ("Notes", self.notes), ("Not run", self.left_out)):
            if entries:
                lines += ["", f"## {title}", ""]
                lines += [f"- {name}: {_said(value)}" for name, value in entries.items()]
        return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(entry)}" for name, entry in value.items())
    return " / ".join(line.strip() for line in value) if isinstance(value, list) else str(value)
