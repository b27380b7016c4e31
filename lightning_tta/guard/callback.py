"""The guard of a predict run: a callback that watches the method for collapse and acts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from lightning_tta.errors import ConfigError
from lightning_tta.guard.watch import Action, Watch, WatchSettings
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run.stream_run import Outputs, RunCallback, StreamRun


class Guard(RunCallback):
    """Puts a :class:`Watch` around the method of a predict run: warns, resets, rolls back or stops adapting.

    Alarms go to ``guard.jsonl`` as they come, to ``report.json`` under ``guard`` with these settings, and to
    ``batches.jsonl`` and TensorBoard as ``guard_alarms``, their number so far. The settings are part of the method,
    not of the protocol.

    On the command line: ``--trainer.callbacks+=lightning_tta.Guard --trainer.callbacks.action=stop``.

    Args:
        action: As in :class:`~lightning_tta.guard.watch.WatchSettings`.
        settings: The others of :class:`~lightning_tta.guard.watch.WatchSettings`.

    Raises:
        ConfigError: If a setting is out of range, or there are several processes.
    """

    def __init__(self, action: Action = "rollback", **settings: Any) -> None:
        self.settings = WatchSettings(action, **settings)
        self.watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several processes, which would act on their own."""
        if trainer.world_size > 1:
            raise ConfigError("Guard is for one process so far. Use --trainer.devices 1, or leave it out.")

    def identity(self) -> dict[str, Any]:
        """A guarded run may predict otherwise."""
        return {"guard": asdict(self.settings)}

    def wrap(self, method: TTAMethod) -> TTAMethod:
        """A watch around the method."""
        self.watch = None  # that of an earlier run
        self.watch = Watch(method, **asdict(self.settings))
        return cast(TTAMethod, self.watch)  # has all of its interface

    def results(self, run: StreamRun) -> dict[str, Any]:
        """What the watch has seen."""
        return {"guard": None if self.watch is None else self.watch.report()}

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

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Count the batches that the method did not see, too."""
        assert self.watch is not None
        self.watch.next_batch = run.summary.batches
