"""How far long work has come and how long the rest takes: of a whole fit, and of the runs inside a benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.errors import LiveError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PATIENCE = 2.0  # seconds of work before a progress bar appears

_GRID: ContextVar[Progress | None] = ContextVar("grid", default=None)


def with_progress(count: int, text: str) -> Iterator[int]:
    """Yield ``range(count)``; work that takes more than two seconds shows a progress bar, gone at the end."""
    start, bar = time.monotonic(), None
    try:
        for number in range(count):
            if bar is None and time.monotonic() - start > PATIENCE:
                bar = Progress(console=Console(stderr=True), transient=True)
                task = bar.add_task(text, total=count)
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
def grid(console: Console) -> Iterator[Progress]:
    """The bars of many runs; a run that takes longer than two seconds gets a line of its own for as long as it runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # the estimate is by all runs so far: by default those of the last 30 seconds count, often none
    with Progress(*columns, console=console, speed_estimate_period=float("inf")) as progress:
        token = _GRID.set(progress)
        try:
            yield progress
        finally:
            _GRID.reset(token)


class RunProgress(Callback):
    """Shows what is left of a run: in the Trainer's rich bar for a fit, as a line below a benchmark's bars there."""

    def __init__(self) -> None:
        self._start = 0.0
        self._before = 0
        self._line: TaskID | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, and what an earlier run did."""
        self._start, self._before = time.monotonic(), self._trained(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what is left of all epochs."""
        if trainer.max_epochs is None or trainer.max_epochs < 1 or trainer.num_training_batches == float("inf"):
            return
        done = self._trained(trainer, batch_idx + 1)
        total = trainer.max_epochs * int(trainer.num_training_batches)
        epoch = f"Epoch {trainer.current_epoch}/{trainer.max_epochs - 1}"
        self._show(f"fit, {epoch.lower()}", done, total)
        bar, spent = trainer.progress_bar_callback, time.monotonic() - self._start
        if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
            left = timedelta(seconds=round(spent / (done - self._before) * (total - done)))
            text = f"{epoch}, {left} left in all" if spent > PATIENCE else epoch
            bar.progress.update(bar.train_progress_bar_id, description=text)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._start = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show what is left of the stream."""
        total = sum(trainer.num_predict_batches)
        self._show("predict", batch_idx + 1, int(total) if total != float("inf") else None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the line away."""
        self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the line away."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the line away."""
        self._close()

    @staticmethod
    def _trained(trainer: Trainer, batches: int) -> int:
        return trainer.current_epoch * int(min(trainer.num_training_batches, 2**40)) + batches

    def _show(self, text: str, done: int, total: int | None) -> None:
        progress = _GRID.get()
        if progress is None:
            return
        if self._line is None and time.monotonic() - self._start > PATIENCE:
            self._line = progress.add_task(f"  {text}", total=total, completed=done)
        elif self._line is not None:
            progress.update(self._line, description=f"  {text}", completed=done)

    def _close(self) -> None:
        progress = _GRID.get()
        if progress is not None and self._line is not None:
            progress.remove_task(self._line)
        self._line = None
