"""What a predict run leaves behind: prediction files, curves, the report; and its progress bar."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar, TQDMProgressBar

from lightning_tta.errors import ConfigError
from lightning_tta.files import environment, own_file, run_directory, write_json
from lightning_tta.report.terminal import print_report
from lightning_tta.run.summary import WINDOW

if TYPE_CHECKING:
    from lightning_tta.modules.adaptation import TestTimeAdaptation

COLUMNS = ("index", "domain", "label", "prediction", "confidence", "entropy")


def _module(pl_module: LightningModule) -> TestTimeAdaptation:
    from lightning_tta.modules.adaptation import TestTimeAdaptation

    assert isinstance(pl_module, TestTimeAdaptation)
    return pl_module


class PredictionWriter(BasePredictionWriter):
    """Appends every batch to ``predictions.csv`` as it comes: one line per image, domains by name.

    Several processes write ``predictions.rank0.csv`` and so on, of which ``predictions.csv`` is made at the end.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._file: IO[str] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, anew or where a continued run left it; a finished report is never overwritten."""
        directory = run_directory(trainer)
        if (directory / "report.json").exists():
            raise ConfigError(
                f"{directory} already holds the report of a finished run, which would be overwritten. Choose another "
                "directory (--trainer.default_root_dir, or the logger's name or version)."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._file = _module(pl_module).keeper.open(own_file(trainer, directory / "predictions.csv"))
        if self._file.tell() == 0:
            csv.writer(self._file).writerow(COLUMNS)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch and flush it to the system."""
        if prediction is None:  # a batch of a continued run that is done
            return
        summary = _module(pl_module).summary
        assert self._file is not None
        assert summary is not None
        columns = {name: prediction[name].tolist() for name in COLUMNS}
        columns["domain"] = [summary.domain_names[number] for number in columns["domain"]]
        for name in ("confidence", "entropy"):
            columns[name] = [f"{value:.6g}" for value in columns[name]]
        csv.writer(self._file).writerows(zip(*columns.values(), strict=True))
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file; what was written stays."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class StreamLogger(Callback):
    """Logs the state of the adaptation after every batch, for any method.

    To the Trainer's loggers under ``adapt/<method>/<stream>/``: online accuracy, entropy, loss, largest
    predicted-class share (of the batch, and recent), logit norm and whatever else is in the method's ``stats``; the
    online accuracy of each domain under ``.../domain/``. The step is the number of images seen. The same values go
    to ``batches.jsonl``, one line per batch. Of several processes each has its own ``batches.rank0.jsonl`` and so on,
    of what it has seen itself; the loggers get those of the first.
    """

    def __init__(self) -> None:
        self._file = Path("batches.jsonl")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new ``batches.jsonl``, or take up the one of a continued run."""
        self._file = own_file(trainer, run_directory(trainer) / "batches.jsonl")
        _module(pl_module).keeper.open(self._file).close()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log one batch."""
        if outputs is None:
            return
        module = _module(pl_module)
        summary, protocol = module.summary, module.protocol
        assert summary is not None
        assert protocol is not None
        if not len(outputs["index"]) and trainer.world_size > 1:  # of this batch, other processes had all
            return
        row = summary.last
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        scheme = f"adapt/{module.method.name}/{protocol.stream}"
        numbers = {f"{scheme}/{k}": v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
        if row["domain"] != "mixed":
            accuracy = summary.domain_accuracy(row["domain"])
            if accuracy is not None:
                numbers[f"{scheme}/domain/{row['domain']}"] = accuracy
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=summary.images)


class StreamReport(Callback):
    """Writes ``report.json`` when the stream ends, and prints a table by domain."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print, on the first process, what all have found."""
        from lightning_tta.run.measures import measure

        module = _module(pl_module)
        assert module.summary is not None
        assert module.protocol is not None
        assert module.gathering is not None
        path = run_directory(trainer) / "report.json"
        summary = module.gathering.finish(trainer, path.parent, module.summary)
        if not trainer.is_global_zero:
            return
        report = {
            "method": module.method.name,
            "options": module.method.options,
            "returns": module.method.returns,
            "net": module.net_info,
            "protocol": module.protocol.to_dict(),
            **summary.result(),
            "window": WINDOW,
            "guard": module.watch.report() if module.watch is not None else None,
            "wall_seconds": time.perf_counter() - self._start + module.keeper.earlier_seconds,
            **measure(module),
            "precision": str(trainer.precision),
            "environment": environment(module.device),
        }
        write_json(path, report)
        if trainer.progress_bar_callback is not None:  # not in quiet runs
            print_report(report, path)


class StreamProgress(Callback):
    """Shows the running accuracy in the Trainer's own progress bar, rich or tqdm."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the accuracy so far."""
        summary, bar = _module(pl_module).summary, trainer.progress_bar_callback
        if summary is None or summary.accuracy is None:
            return
        text = f"accuracy {summary.accuracy:.3f}"
        if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.predict_progress_bar_id is not None:
            bar.progress.update(bar.predict_progress_bar_id, description=f"{bar.predict_description} {text}")
        elif isinstance(bar, TQDMProgressBar):
            bar.predict_progress_bar.set_postfix_str(text)
