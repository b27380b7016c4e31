"""The progress of one command: a bar of one line on a terminal, gone at the end; else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import progress as bars
from rich.console import Console
from rich.table import Column

from lightning_tta.progress import Pulse

FIRST, GROWTH = 10.0, 1.25
"""Without a terminal: the first line after so many seconds; each following one after so much longer from the start."""
BAR = 10
"""Columns of the bar itself."""


class RunBar(ProgressBar):
    """What a command of Lightning shows of fit, validation, test and predict, in the width that the terminal has.

    Values that would not fit into the line are left out as a whole. Only the first of several processes shows anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._console = Console(stderr=True)
        self._bar: bars.Progress | None = None
        self._task = bars.TaskID(0)
        self._text, self._start, self._next = "", 0.0, FIRST
        self._total, self._pulse = 0, Pulse()
        self._trained = self._to_train = 0  # batches of this fit, and where it began

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.console.print(*args, **kwargs)
        else:
            print(*args, file=sys.stderr, **kwargs)

    # One stage after another

    def _begin(self, text: str, total: float) -> None:
        """Show the progress of something else from now on."""
        self._text, self._total = text, 0 if total == float("inf") else int(total)
        self._pulse = Pulse()
        if not self._enabled or not self._console.is_terminal:
            return
        if self._bar is None:
            fields = [
                bars.TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                bars.BarColumn(BAR),
                bars.MofNCompleteColumn(table_column=Column(no_wrap=True)),
                bars.TextColumn("{task.fields[values]}", table_column=Column(no_wrap=True)),
            ]
            self._bar = bars.Progress(*fields, console=self._console, transient=True)
            self._task = self._bar.add_task(text, total=self._total or None, values="")
            self._bar.start()
        self._bar.reset(self._task, total=self._total or None, description=text, values="")

    def _is_due(self, done: int) -> bool:
        """Whether to show that so many batches are done: some times a second, and the last one of all."""
        return self._enabled and (self._pulse.beats() or done == self._total)

    def _show(self, done: int, left: float | None, values: Mapping[str, str]) -> None:
        """So many batches are done; so many seconds are left, if that is known, of all."""
        count = f"{done}/{self._total}" if self._total else str(done)
        texts = [f"{name} {value}" for name, value in values.items()]
        if left is not None:
            texts.insert(0, f"{str(timedelta(seconds=round(left))).removeprefix('0:')} left")
        if self._bar is not None:
            room = self._console.width - len(self._text) - BAR - max(len(count), 2 * len(str(self._total)) + 1) - 4
            self._bar.update(self._task, completed=done, values=_fitting(texts, room))
        elif time.monotonic() - self._start >= self._next:
            self._next = GROWTH * (time.monotonic() - self._start) + FIRST
            print(", ".join([f"{self._text}, batch {count}", *texts]), file=sys.stderr, flush=True)

    def _end(self) -> None:
        """Take the bar away: what comes next begins a line."""
        self.reset_dataloader_idx_tracker()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin_all(self) -> None:
        self._console = Console(stderr=True)
        self._start, self._next = time.monotonic(), FIRST

    def _left(self, done: float, total: float) -> float | None:
        """Seconds that the rest takes if it goes on as before."""
        spent = time.monotonic() - self._start
        return spent / done * (total - done) if done and total != float("inf") else None

    # Lightning's hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, and what an earlier run did."""
        self._begin_all()
        self._trained = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        self._begin(f"epoch {trainer.current_epoch + 1}{epochs}", self.total_train_batches)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained += 1
        if not self._is_due(batch_idx + 1):
            return
        total, left = self.total_train_batches, None
        if trainer.max_epochs not in (None, -1) and total != float("inf"):
            remaining = (trainer.max_epochs - trainer.current_epoch) * total - batch_idx - 1
            left = self._left(self._trained, self._trained + remaining)
        self._show(batch_idx + 1, left, self._values(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not trainer.state.fn == "fit":
            self._begin_all()

    def on_validation_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin("validate", self.total_val_batches_current_dataloader)

    def on_validation_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if self._is_due(batch_idx + 1):
            self._show(batch_idx + 1, None, {})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._begin_all()

    def on_test_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin("test", self.total_test_batches_current_dataloader)

    def on_test_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if self._is_due(batch_idx + 1):
            self._show(batch_idx + 1, self._left(batch_idx + 1, self._total or float("inf")), {})

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._begin_all()

    def on_predict_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin("predict", self.total_predict_batches_current_dataloader)

    def on_predict_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if not self._is_due(batch_idx + 1):
            return
        summary = getattr(getattr(pl_module, "run", None), "summary", None)
        accuracy = None if summary is None else summary.accuracy
        values = {} if accuracy is None else {"accuracy": f"{accuracy:.3f}"}
        self._show(batch_idx + 1, self._left(batch_idx + 1, self._total or float("inf")), values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:  # back to the epoch
            epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            self._begin(f"epoch {trainer.current_epoch + 1}{epochs}", self.total_train_batches)
        else:
            self._end()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._end()

    def _values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        """The values that the module shows, under their names without what stands before the last slash."""
        values = self.get_metrics(trainer, pl_module)
        short = [name.rpartition("/")[2] for name in values]
        names = [last if short.count(last) == 1 else name for name, last in zip(values, short, strict=True)]
        texts = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in values.values())
        return {name: text for name, text in zip(names, texts, strict=True) if name != "v_num"}


def _fitting(texts: list[str], width: int) -> str:
    """So many of the texts, in order, as fit side by side into the width."""
    line = ""
    for text in texts:
        longer = f"{line}  {text}" if line else text
        if len(longer) > width:
            break
        line = longer
    return line
