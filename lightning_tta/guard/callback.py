"""The guard of a predict run: a callback that watches the method for collapse and acts."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_tta.errors import ConfigError
from lightning_tta.files import run_directory
from lightning_tta.guard.watch import Action, Compare, Watch


class Guard(Callback):
    """Watches any method for collapse, and warns, resets, rolls back or stops adapting: see :class:`Watch`.

    Alarms go to ``guard.jsonl`` as they come, to ``report.json`` under ``guard`` with these settings, and to
    ``batches.jsonl`` and TensorBoard as ``guard_alarms``, their number so far. The settings are part of the method,
    not of the protocol.

    On the command line: ``--trainer.callbacks+=lightning_tta.Guard --trainer.callbacks.action=stop``.

    Args:
        action: ``warn``, ``reset`` (to the source), ``rollback`` (to the last healthy snapshot) or ``stop`` (the same,
            and only predict from then on).
        compare: What is normal: ``source`` (what the source predicts: one more forward pass a batch) or ``history``
            (the stream so far: no cost, later and less sure).
        window: Batches that are judged together, at least 2.
        history: Healthy batches that make the history, at least 1.
        share_excess: How far the most predicted class's share may be above the reference, in (0, 1].
        entropy_floor: Mean entropy that counts as near zero, as a share of log K, in [0, 1].
        norm_ratio: How many times the reference the logit norm may be, above 1.
        snapshot_every: Batches from snapshot to snapshot, at least 1.
        retries: Alarms within ``history`` batches after which reset and rollback stop adapting; ``null``: no limit.
        probation: The source predicts until so many batches, at least 0, went by without alarm, from the start and
            after each alarm; ``null``: two windows with ``source``, none with ``history`` or ``warn``.

    Raises:
        ConfigError: If an argument is out of range, or the Trainer does not run TestTimeAdaptation.
    """

    def __init__(
        self,
        action: Action = "rollback",
        compare: Compare = "source",
        window: int = 8,
        history: int = 64,
        share_excess: float = 0.3,
        entropy_floor: float = 0.01,
        norm_ratio: float = 3.0,
        snapshot_every: int = 16,
        retries: int | None = 3,
        probation: int | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {n: v for n, v in locals().items() if n not in ("self", "__class__")}
        Watch.check(**self.settings)
        self._watch: Watch | None = None
        self._saved: dict[str, Any] | None = None  # of a run that is continued

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several processes, which would act on their own."""
        if trainer.world_size > 1:
            raise ConfigError("Guard is for one process so far. Use --trainer.devices 1, or leave it out.")

    def state_dict(self) -> dict[str, Any]:
        """What the watch has seen, for a run that saves its state."""
        return {} if self._watch is None else {"watch": self._watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`; taken up at the first batch."""
        self._saved = state_dict["watch"]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new account."""
        _module(pl_module).watch = self._watch = self._saved = None
        (run_directory(trainer) / "guard.jsonl").unlink(missing_ok=True)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look on from the first batch, when the method is prepared."""
        module = _module(pl_module)
        if module.watch is None:
            module.watch = self._watch = Watch(module.method, **self.settings)
            if self._saved is not None:
                module.watch.load_state_dict(self._saved)
                for event in module.watch.events:
                    self._write(trainer, event)
            module.watch.on_event = lambda event: self._write(trainer, event)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Put the number of alarms beside the batch's other measures."""
        module = _module(pl_module)
        if module.watch is not None and module.summary is not None:
            module.summary.last["guard_alarms"] = float(len(module.watch.events))

    @staticmethod
    def _write(trainer: Trainer, event: dict[str, Any]) -> None:
        with (run_directory(trainer) / "guard.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")


def _module(pl_module: LightningModule) -> Any:
    if not hasattr(pl_module, "watch"):
        raise ConfigError(f"Guard watches TestTimeAdaptation, in predict; this is a {type(pl_module).__name__}.")
    return pl_module
