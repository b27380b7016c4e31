"""How far long work has come: the bars of many runs, and a line for each run below them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich import markup
from rich import progress as bars
from rich.console import Console
from rich.errors import LiveError
from rich.table import Column

PATIENCE = 2.0  # seconds of work before a progress bar appears
PULSE = 0.1
"""Seconds between two updates of a bar: nobody sees more, and each takes as long as a small step."""

_GRID: ContextVar[bars.Progress | None] = ContextVar("grid", default=None)


class Pulse:
    """Says whether something that happens often is to be shown again."""

    def __init__(self) -> None:
        self._next = -math.inf

    def beats(self) -> bool:
        """Whether the last time that it was is long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + PULSE
        return True


def with_progress(count: int, text: str) -> Iterator[int]:
    """Yield ``range(count)``; work that takes more than two seconds shows a progress bar, gone at the end."""
    start, bar = time.monotonic(), None
    try:
        for number in range(count):
            if bar is None and time.monotonic() - start > PATIENCE:
                bar = bars.Progress(console=Console(stderr=True), transient=True)
                task = bar.add_task(markup.escape(text), total=count)
                try:
                    bar.start()
                except LiveError:  # another bar is on the screen
                    bar.disable = True
            if bar is not None:
                bar.update(task, completed=number)
            yield number
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def grid(console: Console) -> Iterator[bars.Progress]:
    """The bars of many runs; a run that takes longer than two seconds gets a line of its own for as long as it runs.

    Nothing is shown where the console is no terminal.
    """
    name = bars.TextColumn("{task.description}", table_column=Column(overflow="fold"))
    columns = (bars.BarColumn(10), bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    # the estimate is by all runs so far: by default those of the last 30 seconds count, often none
    with bars.Progress(
        name, *columns, console=console, speed_estimate_period=math.inf, disable=not console.is_terminal
    ) as progress:
        token = _GRID.set(progress)
        try:
            yield progress
        finally:
            _GRID.reset(token)


class GridLine:
    """The line of one run below the bars of :func:`grid`; without a grid nothing is shown."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._task: bars.TaskID | None = None

    def show(self, text: str, done: int, total: int | None) -> None:
        """Say how far the run has come, once it has taken more than two seconds."""
        progress = _GRID.get()
        if progress is None:
            return
        if self._task is None and time.monotonic() - self.start > PATIENCE:
            self._task = progress.add_task(f"  {text}", total=total, completed=done)
        elif self._task is not None:
            progress.update(self._task, description=f"  {text}", completed=done)

    def close(self) -> None:
        """Take the line away."""
        progress = _GRID.get()
        if progress is not None and self._task is not None:
            progress.remove_task(self._task)
        self._task = None
