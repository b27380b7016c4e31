"""How far a run has come: in the bar of a Trainer in Python, and below the bars of a benchmark."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_tta.progress import GridLine, Pulse
from lightning_tta.run.stream_run import Outputs, RunCallback, StreamRun


class StreamProgress(RunCallback):
    """Shows a stream's accuracy so far in the Trainer's own bar, rich or tqdm, and its length below a benchmark's."""

    may_lag = True

    def __init__(self) -> None:
        self._line, self._pulse = GridLine(), Pulse()

    def on_start(self, run: StreamRun) -> None:
        """Note the time."""
        self._line, self._pulse = GridLine(), Pulse()

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Show the accuracy, and what is left of the stream."""
        total = run.total_batches
        if not self._pulse.beats() and run.summary.batches < total:
            return
        self._line.show("predict", run.summary.batches, int(total) if total != float("inf") else None)
        bar, accuracy = run.trainer.progress_bar_callback, run.summary.accuracy
        if accuracy is None:
            return
        text = f"accuracy {accuracy:.3f}"
        if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.predict_progress_bar_id is not None:
            bar.progress.update(bar.predict_progress_bar_id, description=f"{bar.predict_description} {text}")
        elif isinstance(bar, TQDMProgressBar):
            bar.predict_progress_bar.set_postfix_str(text)

    def close(self) -> None:
        """Take the line away."""
        self._line.close()


class FitProgress(Callback):
    """Shows how far a fit has come below a benchmark's bars."""

    def __init__(self) -> None:
        self._line = GridLine()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._line = GridLine()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show how many batches of all epochs are done."""
        if trainer.max_epochs is None or trainer.max_epochs < 1 or trainer.num_training_batches == float("inf"):
            return
        done = _trained(trainer, batch_idx + 1)
        total = trainer.max_epochs * int(trainer.num_training_batches)
        self._line.show(f"fit, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", done, total)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the line away."""
        self._line.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the line away."""
        self._line.close()


def _trained(trainer: Trainer, batches: int) -> int:
    return trainer.current_epoch * int(min(trainer.num_training_batches, 2**40)) + batches
