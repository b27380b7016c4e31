"""One predict run: what it knows, and how it is saved and continued."""

from __future__ import annotations

import time
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.protocol import Protocol
from lightning_tta.data.sharing import Sharing
from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run import state_files
from lightning_tta.run.batches import BatchRecord
from lightning_tta.run.directory import ResumePolicy, RunDirectory
from lightning_tta.run.pace import Pace
from lightning_tta.run.processes import ProcessGroup
from lightning_tta.run.summary import StreamSummary


class StreamRun:
    """What a predict run knows. The module makes it, callbacks get it by :func:`run_of`.

    Args:
        trainer: Runs it.
        method: Adapts; a callback may wrap it, see :meth:`~lightning_tta.run.callbacks.RunCallback.wrap`.
        net: What is known of the net: ``name``, ``weights``, ``digest``.
        protocol: What the run measures.
        data: The data module, or ``None`` with a loader of the user's own.
        domains: Names of the stream's domains, by number.
        frozen: Names of those on which nothing adapts.
        reset: When the method returns to the source: ``never``, ``domain`` or ``batch``.
        reset_every: Also after this many batches.
        classes: The logits that the net was cut to.
        sharing: This process's share of the stream.

    Attributes:
        method: What is called for a batch.
        summary: The account of the stream so far.
        pace: Says which batches a slow method misses; ``None`` where the stream waits.
        last_domain: Number of the domain of the last image; ``None`` before the first batch.
        since_reset: Batches since the last reset.
        batch: The record of the last batch.
        directory: Where the run writes.
        group: The processes of the run.

    Raises:
        ConfigError: If the processes are about to run different things.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: TTAMethod,
        net: dict[str, Any],
        protocol: Protocol,
        data: ShiftedDataModule | None,
        *,
        domains: list[str],
        frozen: list[str],
        reset: str,
        reset_every: int | None,
        classes: list[int] | None,
        sharing: Sharing,
    ) -> None:
        self.trainer, self.net, self.protocol, self.data = trainer, net, protocol, data
        self.reset, self.reset_every, self.classes, self.sharing = reset, reset_every, classes, sharing
        self.callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.method = method
        for callback in self.callbacks:
            if hasattr(callback, "wrap"):
                self.method = callback.wrap(self.method)
        self.summary = StreamSummary(domains, frozen)
        self.frozen = {number for number, name in enumerate(domains) if name in frozen}
        self.pace = Pace(protocol.charge, protocol.interval or 1.0) if protocol.charge else None
        self.last_domain: int | None = None
        self.since_reset = 0
        self.batch: BatchRecord | None = None
        self.device = trainer.strategy.root_device
        self.group = ProcessGroup(trainer.global_rank, trainer.world_size)
        hashes = self.group.gather(protocol.hash)
        if len(set(hashes)) > 1:
            raise ConfigError(
                f"The processes have different protocols ({', '.join(hashes)}): their nets or data differ. Give "
                "all the same source weights and files; for random weights set a seed (--seed_everything)."
            )
        self.directory: RunDirectory
        self.done_before = 0  # batches that the data module leaves out
        self._to_read = 0  # batches that come again, from a loader that cannot start later
        self._saved: dict[str, Any] | None = None
        self._earlier_seconds, self._start = 0.0, time.perf_counter()

    # Before the stream

    def begin(self, resume: ResumePolicy) -> None:
        """Take the directory of this configuration, and read what was saved there.

        Args:
            resume: What to do with a run that is there.

        Raises:
            FinishedError: If the run is finished.
            ConfigError: If the directory is in use, or holds another run.
        """
        self.directory = RunDirectory(self.trainer, self.group, self.identity())
        saved = self._saved = self.directory.take(resume)
        if saved is None:
            return
        self.method.load_state_dict(saved["method"])  # what it allocates moves to the device with it
        if self.data is not None:
            self.done_before = saved["batches"]
            self.data.start_at(self.done_before)
        else:
            self._to_read = saved["batches"]

    def identity(self) -> dict[str, Any]:
        """What makes this run another one than others, by name; the same on all processes."""
        limit = self.trainer.limit_predict_batches
        named: dict[str, Any] = {
            "method": self.method.name,
            **{f"method.{name}": value for name, value in self.method.options.items()},
            "reset_every": self.reset_every,
            "precision": str(self.trainer.precision),
            **({} if limit in (None, 1.0) else {"limit_predict_batches": limit}),
            **{f"protocol.{name}": value for name, value in self.protocol.to_dict().items()},
        }
        for callback in self.callbacks:
            if hasattr(callback, "identity"):
                named |= callback.identity()
        return named

    def restore(self) -> None:
        """Take up what was saved; the method once more, as the strategy has given all processes that of the first."""
        self._start = time.perf_counter()
        if self._saved is not None:
            self.load_state_dict(self._saved)

    @property
    def is_continued(self) -> bool:
        """Whether the run goes on from a saved state."""
        return self._saved is not None

    def open(self, name: str) -> IO[str]:
        """A file that grows with the stream: empty, or cut back to where the saved state has it."""
        return self.directory.open(name, self._saved)

    # Along the stream

    def needs_reset(self, domain: int) -> bool:
        """Whether the method returns to the source before a batch that begins with this domain."""
        if self.last_domain is None:  # the stream starts with the source
            return False
        if self.reset_every is not None and self.since_reset >= self.reset_every:
            return True
        new = domain != self.last_domain and domain not in self.frozen
        return self.reset == "batch" or (self.reset == "domain" and new)

    def is_done(self) -> bool:
        """Whether the batch that has come was done before the run was continued."""
        self._to_read -= 1
        return self._to_read >= 0

    @property
    def total_batches(self) -> float:
        """Batches of the whole stream, as far as the loader knows; else infinity."""
        return self.done_before + sum(self.trainer.num_predict_batches)

    @property
    def tag(self) -> str:
        """Beginning of the names of all curves."""
        return f"adapt/{self.method.name}/{self.protocol.stream}"

    # State

    @property
    def wall_seconds(self) -> float:
        """Of all parts of the run."""
        return self._earlier_seconds + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the stream depends on, in plain values and tensors."""
        return {
            "batches": self.summary.batches,
            "method": self.method.state_dict(),
            "weight_names": self.method.weight_names,
            "lacks": self.method.lacks,
            "summary": self.summary.state_dict(),
            "pace": None if self.pace is None else self.pace.state_dict(),
            "position": [self.last_domain, self.since_reset],
            "callbacks": {c.state_key: state for c in self._remembering() if (state := c.state_dict())},
            "random": state_files.random_state(self.device),
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.method.load_state_dict(state["method"])
        self.summary.load_state_dict(state["summary"])
        if self.pace is not None:
            self.pace.load_state_dict(state["pace"])
        self.last_domain, self.since_reset = state["position"]
        for callback in self._remembering():
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        state_files.set_random_state(state["random"], self.device)
        self._earlier_seconds = state["wall_seconds"]

    def release(self) -> None:
        """Let others have the directory."""
        if self.data is not None:
            self.data.start_at(0)
        self.directory.release()

    def _remembering(self) -> list[Callback]:
        """Callbacks that may have something to remember; the checkpoints of trainings have not."""
        return [callback for callback in self.callbacks if not isinstance(callback, Checkpoint)]


def run_of(pl_module: LightningModule) -> StreamRun:
    """The run of a module.

    Raises:
        ConfigError: If it has none.
    """
    run = getattr(pl_module, "run", None)
    if not isinstance(run, StreamRun):
        raise ConfigError(
            f"Callbacks of a predict run go with TestTimeAdaptation, in predict; this is a {type(pl_module).__name__}."
        )
    return run
