"""The guard of a predict run: a callback that shows what the method answers to monitors, and acts."""

from __future__ import annotations

import json
import warnings
from collections import deque
from dataclasses import asdict
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_tta.errors import ConfigError, DataError, check_range
from lightning_tta.guard.monitors.base import TakesLabels
from lightning_tta.guard.watch import Action, Watch, WatchSettings, check_names_of_settings
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run import own_loader
from lightning_tta.run.board import log_numbers
from lightning_tta.run.stream_run import Outputs, RunCallback, StreamRun, run_of
from lightning_tta.run.summary import WINDOW


class Guard(RunCallback):
    """Puts a :class:`Watch` around the method of a predict run: warns, resets, rolls back or stops adapting.

    Alarms of all monitors go to ``guard.jsonl`` as they come. What monitors say of each batch, with the estimates of
    accuracy as ``<monitor>_accuracy``, goes to ``batches.jsonl``, and to TensorBoard under ``guard/``; there also
    ``guard_alarms``, the number of alarms so far. ``report.json`` has under ``guard`` the settings, monitors, alarms,
    and the mean of each estimate, of the stream and by domain, beside the accuracy on the same images. The settings are
    part of the method, not of the protocol.

    Monitors that need source images get validation images of the data module, as many as ``--input.source_images``
    says. No label reaches the method; only the monitor ``labels`` gets some, where ``labels_every`` is set.

    On the command line: ``--trainer.callbacks+=lightning_tta.Guard --trainer.callbacks.monitors '[collapse, poem]'``.

    Args:
        action: As in :class:`~lightning_tta.guard.watch.WatchSettings`.
        labels_every: The label of one image in so many becomes known to monitors that take labels, at least 1;
            ``None``: none does.
        labels_delay: So many batches after the image's own, at least 0.
        settings: The others of :class:`~lightning_tta.guard.watch.WatchSettings`.

    Raises:
        ConfigError: If a setting is out of range, or there are several processes; when the run begins, if labels are to
            be told, and no monitor takes them.
    """

    def __init__(
        self, action: Action = "rollback", labels_every: int | None = None, labels_delay: int = 0, **settings: Any
    ) -> None:
        if labels_every is not None:
            check_range("labels_every", labels_every, 1, integer=True)
        check_range("labels_delay", labels_delay, 0, integer=True)
        if labels_delay and labels_every is None:
            raise ConfigError(
                f"labels_delay={labels_delay} says when labels become known, and none does: set labels_every, too, as "
                "labels_every=20, or leave labels_delay out."
            )
        self.labels_every, self.labels_delay = labels_every, labels_delay
        check_names_of_settings("Guard", settings)
        self.settings = WatchSettings(action, **settings)
        self.watch: Watch | None = None
        self._begin()

    def _begin(self) -> None:
        self._waiting: list[list[Any]] = []  # names and labels of each of the last batches
        self._totals: dict[
            str, dict[str, list[float]]
        ] = {}  # by monitor and domain: images, estimates, labelled, right
        self._recent: deque[list[float]] = deque(maxlen=WINDOW)  # labelled and right images of the last batches
        self._errors: dict[str, list[float]] = {}  # by monitor: batches, sum of absolute errors

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several processes, which would act on their own."""
        if trainer.world_size > 1:
            raise ConfigError("Guard is for one process so far. Use --trainer.devices 1, or leave it out.")

    def identity(self) -> dict[str, Any]:
        """A guarded run may predict otherwise."""
        labels = {"labels_every": self.labels_every, "labels_delay": self.labels_delay} if self.labels_every else {}
        return {"guard": {**asdict(self.settings), **labels}}

    def wrap(self, method: TTAMethod) -> TTAMethod:
        """A watch around the method."""
        self.watch = None  # that of an earlier run
        self.watch = Watch(method, **asdict(self.settings))
        self._begin()
        if self.labels_every:
            self.watch.tell([], [])  # refuses if nobody listens
        elif silent := [name for name, monitor in self.watch.monitors.items() if isinstance(monitor, TakesLabels)]:
            warnings.warn(
                f"Monitor {', '.join(map(repr, silent))} gets no label from this run, and so estimates nothing: set "
                "labels_every, as labels_every=20, or call watch.tell(index, labels) yourself.",
                stacklevel=2,
            )
        return cast(TTAMethod, self.watch)  # has all of its interface

    def results(self, run: StreamRun) -> dict[str, Any]:
        """What the watch has seen."""
        if self.watch is None:
            return {"guard": None}
        return {"guard": {**self.watch.report(), "estimates": self._estimates()}}

    def on_ready(self, run: StreamRun) -> None:
        """Begin ``guard.jsonl`` with the alarms of the first part of a continued run."""
        assert self.watch is not None
        path = run.directory.path / "guard.jsonl"
        earlier: list[str] = []  # alarms that the saved state only counts
        if self.watch.dropped_events and path.exists():
            earlier = path.read_text().splitlines(keepends=True)[: self.watch.dropped_events]
        path.unlink(missing_ok=True)
        if earlier:
            path.write_text("".join(earlier))

        def append(event: dict[str, Any]) -> None:
            with path.open("a") as file:
                file.write(json.dumps(event) + "\n")

        for event in self.watch.events:
            append(event)
        self.watch.on_event = append

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the watch what the batch's images are called."""
        assert self.watch is not None
        self.watch.next_index = None
        image = batch.get("image") if isinstance(batch, dict) else None
        if not isinstance(image, Tensor):  # the module refuses it
            return
        try:
            index, _ = own_loader.index_of(batch, len(image), run_of(pl_module).seen)
        except DataError:  # the same
            return
        damaged = batch.get("damaged")
        self.watch.next_index = (index if damaged is None else index[~damaged.cpu()]).tolist()

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Count the batches that the method did not see, too; log, compare, and let labels become known."""
        assert self.watch is not None
        self.watch.next_batch = run.summary.batches
        stats = {} if run.batch is None else run.batch.stats  # empty where the method was not called
        numbers = {name: value for name, value in self.watch.numbers.items() if name in stats}
        for logger in run.trainer.loggers:
            log_numbers(logger, {f"guard/{name}": value for name, value in numbers.items()}, run.summary.images)
        self._compare(run.summary.last, numbers)
        self._tell(run, output)

    def _compare(self, row: dict[str, Any], numbers: dict[str, float]) -> None:
        """Add the batch's estimates, and what was right; where the source answered, they say nothing of each other."""
        assert self.watch is not None
        if "accuracy" not in row or "source_answered" in numbers:
            self._recent.clear()
            return
        labelled = float(row.get("labelled_images", row["images"])) if row["accuracy"] is not None else 0.0
        right = labelled * (row["accuracy"] or 0.0)
        self._recent.append([labelled, right])
        for name in self.watch.monitors:
            estimate = numbers.get(f"{name}_accuracy")
            if estimate is None:
                continue
            sums = self._totals.setdefault(name, {}).setdefault(str(row["domain"]), [0.0] * 4)
            for place, value in enumerate((row["images"], row["images"] * estimate, labelled, right)):
                sums[place] += value
            known, hits = (sum(column) for column in zip(*self._recent, strict=True))
            if known:
                errors = self._errors.setdefault(name, [0.0, 0.0])
                errors[0] += 1
                errors[1] += abs(estimate - hits / known)

    def _estimates(self) -> dict[str, Any]:
        """By monitor: mean estimate and accuracy over the same images, of all and by domain; the mean error."""

        def means(sums: list[float]) -> dict[str, Any]:
            images, estimates, labelled, right = sums
            return {"estimate": estimates / images, "accuracy": right / labelled if labelled else None}

        estimates: dict[str, Any] = {}
        for name, domains in self._totals.items():
            batches, error = self._errors.get(name, [0.0, 0.0])
            estimates[name] = {
                **means([sum(column) for column in zip(*domains.values(), strict=True)]),
                "mean_absolute_error": error / batches if batches else None,
                "domains": {domain: means(sums) for domain, sums in domains.items()},
            }
        return estimates

    def _tell(self, run: StreamRun, output: Outputs) -> None:
        """Labels of this batch wait; those that have waited long enough become known."""
        if not self.labels_every or not len(output["index"]):
            return
        assert self.watch is not None
        position = run.summary.images - len(output["index"])
        chosen = [k for k in range(len(output["index"])) if (position + k) % self.labels_every == 0]
        chosen = [k for k in chosen if int(output["label"][k]) >= 0 <= int(output["prediction"][k])]
        self._waiting.append([output["index"][chosen].tolist(), output["label"][chosen].tolist()])
        while len(self._waiting) > self.labels_delay:
            self.watch.tell(*self._waiting.pop(0))

    def state_dict(self) -> dict[str, Any]:
        """The sums for the report, and the labels that wait."""
        return {
            "waiting": self._waiting,
            "totals": self._totals,
            "recent": list(self._recent),
            "errors": self._errors,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self._begin()
        self._waiting, self._totals = state_dict["waiting"], state_dict["totals"]
        self._recent.extend(state_dict["recent"])
        self._errors = state_dict["errors"]
