"""What a predict run leaves behind: prediction files, curves and the report."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.errors import ConfigError
from lightning_tta.files import environment, write_json
from lightning_tta.report.files import predictions_digest
from lightning_tta.report.terminal import print_report
from lightning_tta.run.directory import GROWING, REPORT
from lightning_tta.run.growing import GrowingFile
from lightning_tta.run.measures import peak_memory, source_accuracy
from lightning_tta.run.processes import merge_predictions
from lightning_tta.run.stream_run import Outputs, RunCallback, StreamRun
from lightning_tta.run.summary import WINDOW, StreamSummary

PREDICTIONS, BATCHES = GROWING
COLUMNS = ("index", "domain", "label", "prediction", "confidence", "entropy")
NAMES = ("file", "class")
"""Columns after those, empty where there are no files, or the classes have no names."""


class PredictionWriter(RunCallback):
    """Appends every batch to ``predictions.csv``, about once a second: one line per image, domains by name.

    ``file`` is the image's file below its folder, ``class`` the name of the predicted class, where they are known. An
    image that could not be predicted has the prediction -1.

    Several processes write ``predictions.rank0.csv`` and so on, of which ``predictions.csv`` is made at the end.
    """

    may_lag = True
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    names: ClassVar[tuple[str, ...]] = NAMES

    def __init__(self) -> None:
        self._file: GrowingFile | None = None

    def on_start(self, run: StreamRun) -> None:
        """Open the file, anew or where a continued run left it."""
        self._begin(run)
        self._file = GrowingFile(run.directory.open(PREDICTIONS))
        if self._file.is_empty:
            csv.writer(self._file).writerow((*self.columns, *self.names))

    def _begin(self, run: StreamRun) -> None:
        self._class_names = run.class_names

    def texts(self, run: StreamRun, output: Outputs) -> dict[str, list[str]]:
        """The columns of :attr:`names`."""
        files = [] if run.batch is None else run.batch.files
        names = self._class_names
        return {
            "file": [printable(name) for name in files] or [""] * len(output["index"]),
            "class": [names[k] if 0 <= k < len(names) else "" for k in output["prediction"].tolist()],
        }

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Write one batch."""
        assert self._file is not None
        if not len(output["index"]):  # another process has all of the batch, or it was no batch
            return
        columns: dict[str, list[Any]] = {name: output[name].tolist() for name in self.columns}
        columns["domain"] = [run.summary.domain_names[number] for number in columns["domain"]]
        for name in {"confidence", "entropy"} & {*columns}:
            columns[name] = [f"{value:.6g}" for value in columns[name]]
        columns |= self.texts(run, output)
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows(zip(*columns.values(), strict=True))
        self._file.write(lines.getvalue())

    def flush(self) -> None:
        """Have it on the disk."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file; what was written stays."""
        if self._file is not None:
            self._file.close()
            self._file = None


def printable(name: str) -> str:
    r"""A file's name on one line of a text file; what cannot stand there is written as ``\n`` or ``\xff``."""
    escaped = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in escaped)


class StreamLogger(RunCallback):
    """Writes the state of the adaptation after every batch to ``batches.jsonl``, one line per batch, for any method.

    About once a second, as :class:`PredictionWriter`.

    Online accuracy, entropy, largest predicted-class share (of the batch, and recent), logit norm and whatever is in
    the method's ``stats``. Of several processes each has its own ``batches.rank0.jsonl`` and so on, of what it has seen
    itself.
    """

    may_lag = True

    def __init__(self) -> None:
        self._file: GrowingFile | None = None

    def on_start(self, run: StreamRun) -> None:
        """Start a new ``batches.jsonl``, or take up the one of a continued run."""
        self._file = GrowingFile(run.directory.open(BATCHES))

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Write one line."""
        if not len(output["index"]) and run.group.world > 1:  # of this batch, other processes had all
            return
        assert self._file is not None
        self._file.write(json.dumps(run.summary.last) + "\n")

    def flush(self) -> None:
        """Have it on the disk."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file; what was written stays."""
        if self._file is not None:
            self._file.close()
            self._file = None


class StreamReport(RunCallback):
    """Writes ``report.json`` when the stream ends, and prints a table by domain.

    On the command line ``--report.measure_forgetting true``.

    Args:
        measure_forgetting: After the stream also predict clean source test images: ``source_accuracy_after``.

    Raises:
        ConfigError: Before the stream, if the data have no clean source images.
    """

    def __init__(self, measure_forgetting: bool = False) -> None:
        self.measure_forgetting = measure_forgetting

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse early what cannot be measured."""
        data = getattr(trainer, "datamodule", None)
        known = isinstance(data, ShiftedDataModule) and data.has_labels
        if self.measure_forgetting and not known:
            raise ConfigError(
                "measure_forgetting needs clean source test images with labels: predict with a data module of "
                "lightning_tta that has them, or leave it out."
            )

    def on_ready(self, run: StreamRun) -> None:
        """Begin to watch the memory."""
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    def on_end(self, run: StreamRun) -> None:
        """Write and print, on the first process, what all have found."""
        summary = _gather(run)
        if not run.trainer.is_global_zero:
            return
        captured = [part for part, how in run.method.capture_report().items() if how == "recorded"]
        report = {
            "method": run.method.name,
            "options": run.method.options,
            "reset_every": run.reset_every,
            "returns": run.method.returns,
            "net": run.net,
            "protocol": run.protocol.to_dict(),
            **summary.result(run.protocol.visits),
            **({"class_names": run.class_names} if run.method.task.kind == "pixels" else {}),
            "window": WINDOW,
            "guard": None,
            "wall_seconds": run.wall_seconds,
            **peak_memory(run.device),
            "precision": run.method.execution.precision or str(run.trainer.precision),
            "execution": {**asdict(run.method.execution), "captured": captured},
            "repeatable": run.device.type == "cpu" or run.method.execution.deterministic,
            "environment": environment(run.device),
            "run_digest": run.directory.digest,
            "predictions_digest": predictions_digest((run.directory.path / PREDICTIONS).read_bytes()),
        }
        if self.measure_forgetting and run.data is not None:
            report["source_accuracy_after"] = source_accuracy(run.method, run.data, run.classes, run.device)
        for callback in run.callbacks:
            report |= callback.results(run)
        path = run.directory.path / REPORT
        write_json(path, report)
        if run.trainer.progress_bar_callback is not None:  # not in quiet runs
            print_report(report, path)


def _gather(run: StreamRun) -> StreamSummary:
    """The account of the whole stream; the first of several processes also writes the whole ``predictions.csv``.

    Raises:
        DataError: If an image was predicted twice, or not at all.
    """
    if run.group.world == 1 or run.data is None:
        return run.summary
    shards = run.group.gather((run.summary, run.directory.file(PREDICTIONS)))
    if run.trainer.is_global_zero:
        order = [index for batch in run.data.stream.batches for index in batch]
        merge_predictions([path for _, path in shards], order, run.directory.path / PREDICTIONS)
    return StreamSummary.merged([summary for summary, _ in shards], together=run.sharing.mode == "synchronised")
