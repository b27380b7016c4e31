"""Runs that were killed go on: the whole state of a run, saved as the stream goes, and taken up again.

``save_every=N`` writes ``state.pt`` into the run's directory before the first batch and after every N, whole or not at
all, and ``final_state.pt`` at the end. ``resume="auto"`` goes on from there: predictions and report are then those of
a run that was never interrupted, apart from timings. Images of batches that are done are not read again.

Which directory? One that was named (a logger with a version, or no logger) is continued if its state belongs to the
same run, and refused if it does not. Under a logger that counts its versions, it is the newest unfinished version
whose state belongs to the same run: same method, options, protocol and precision; if there is none, a new run starts.
A run in use by another process is left alone. If the run is finished, :class:`~lightning_tta.errors.FinishedError`.

Several processes with whole domains each (``replicas``) have a state each, ``state.rank0.pt`` and so on. They choose
one directory, and go on if each of them has a state of the same run among as many processes: each from its own last
save, however far apart these are. What stops one, such as a run that is finished, stops all.

TensorBoard's curves go on in the same directory; the points between the last save and the end of the first part are
there twice. (Lightning's CSVLogger starts its metrics.csv anew; batches.jsonl has all.)
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_tta._version import __version__
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.files import of_all, own_file, run_directory
from lightning_tta.run import state_files
from lightning_tta.run.finding import Search, take
from lightning_tta.run.group import ProcessGroup
from lightning_tta.run.state_files import FINAL, STATE, State

if TYPE_CHECKING:
    from lightning_tta.methods.base.method import TTAMethod
    from lightning_tta.modules.adaptation import TestTimeAdaptation
    from lightning_tta.run.summary import StreamSummary

ResumePolicy = Literal["never", "auto"]
CountingLogger = TensorBoardLogger | CSVLogger
OUTPUTS = ("predictions.csv", "batches.jsonl")


class StateKeeper(Callback):
    """Saves the state of a run, and finds and restores it; the module calls what is no hook."""

    def __init__(self, save_every: int | None, resume: ResumePolicy) -> None:
        if save_every is not None:
            check_range("save_every", save_every, 1, integer=True)
        check_choice("resume", resume, ("never", "auto"))
        self.save_every, self.resume = save_every, resume
        self.earlier_seconds = 0.0
        self.group = ProcessGroup()
        self._state: State | None = None  # of the run to be continued
        self._lock = state_files.DirectoryLock()
        self._counting: CountingLogger | None = None
        self._directory = Path()
        self._identity: State = {}
        self._start = 0.0
        self._to_read = 0  # batches of a loader that cannot start later

    # Before the stream -----------------------------------------------------------------------------------------------

    @property
    def given(self) -> list[str]:
        """The options that save or continue, as far as they are used."""
        return ["save_every"] * (self.save_every is not None) + ["resume='auto'"] * (self.resume == "auto")

    def look_at(self, module: TestTimeAdaptation) -> None:
        """Notice a logger that will count its versions; the Trainer is about to ask it for the next one.

        Several processes find here what one finds in ``prepare_data``: that is called on the first of them alone, and
        what it raised there the others would learn only when the loggers have made a new version.

        Raises:
            FinishedError: On all processes, if the run is finished.
            ConfigError: On all processes, as :meth:`find`.
        """
        trainer, logger = module.trainer, module.trainer.logger
        self.earlier_seconds, self._state, self._identity, self._to_read = 0.0, None, {}, 0  # of an earlier run
        counts = isinstance(logger, (TensorBoardLogger, CSVLogger)) and logger._version is None
        self._counting = cast(CountingLogger, logger) if counts else None
        self.group = ProcessGroup()
        if trainer.world_size > 1 and self.resume == "auto" and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.setup_environment()  # the Trainer's next step, which may be done twice
            self.group = ProcessGroup(trainer.global_rank, trainer.world_size)
            try:
                self._find(module)
            except BaseException:
                self._release(trainer)  # no hook would
                raise

    def find(self, module: TestTimeAdaptation) -> None:
        """Choose the directory and read its state, if there is one process.

        Raises:
            FinishedError: If the run is finished.
            ConfigError: If the directory holds another run, or one in use.
        """
        if module.trainer.world_size == 1 and self.resume == "auto":
            self._find(module)

    def _find(self, module: TestTimeAdaptation) -> None:
        limit = module.trainer.limit_predict_batches
        if limit not in (None, 1.0):
            raise ConfigError(
                f"limit_predict_batches={limit} does not go with resume='auto': it would count from where the run goes "
                "on. Limit the stream itself, such as with --data.num_images."
            )
        search = Search(module, self.group, self._lock)
        if self._counting is None:
            search.named(run_directory(module.trainer))
        else:
            found = search.newest(Path(self._counting.root_dir))
            if found is not None:
                self._counting._version = int(found.name.removeprefix("version_"))
        self._state = search.state

    def begin(self, module: TestTimeAdaptation) -> None:
        """The directory is known: take it, load the method on the CPU, and skip the batches that are done.

        Raises:
            ConfigError: If the directory is in use.
        """
        trainer = module.trainer
        self._directory, self._identity = run_directory(trainer), state_files.identity(module)
        if self.group.world != trainer.world_size:
            self.group = ProcessGroup(trainer.global_rank, trainer.world_size)
        if self.save_every is not None and not take(self._lock, self.group, self._directory):
            raise ConfigError(f"{self._directory} is in use by another process. Choose another directory.")
        if self._state is None:
            self.group.first(self._clear)
            return
        module.method.load_state_dict(self._state["method"])
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ShiftedDataModule):
            data.start_at(self._state["batches"])
        else:
            self._to_read = self._state["batches"]

    def open(self, path: Path) -> IO[str]:
        """A file that grows with the stream: empty, or cut back to where the saved state has it."""
        if self._state is None:
            return path.open("w", newline="")
        file = path.open("a", newline="")
        file.truncate(self._state["bytes"].get(path.name, 0))
        file.seek(0, os.SEEK_END)
        return file

    def restore(self, module: TestTimeAdaptation) -> None:
        """Everything but the method, which :meth:`begin` loaded."""
        self._start = time.perf_counter()
        if self._state is None:
            return
        if self.group.world > 1:
            _put_back(module.method, self._state["method"])
        assert module.summary is not None
        module.summary.load_state_dict(self._state["summary"])
        if module.pace is not None:
            module.pace.load_state_dict(self._state["pace"])
        module._last_domain, module._since_reset = self._state["position"]
        for callback in _others(module.trainer):
            if callback.state_key in self._state["callbacks"]:
                callback.load_state_dict(self._state["callbacks"][callback.state_key])
        state_files.set_random_state(self._state["random"], module.device)
        self.earlier_seconds = self._state["wall_seconds"]

    def is_done(self) -> bool:
        """Whether the batch that has come was done before."""
        self._to_read -= 1
        return self._to_read >= 0

    # While it runs ---------------------------------------------------------------------------------------------------

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the beginning, with what the method prepared."""
        if self.save_every is not None and self._state is None:
            self._save(trainer, pl_module, STATE)
        self._state = None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save after every so many batches, but not after the last: there must be something left to continue."""
        if self.save_every is None or outputs is None or batch_idx + 1 >= sum(trainer.num_predict_batches):
            return
        if _test_time(pl_module)[1].batches % self.save_every == 0:
            self._save(trainer, pl_module, STATE)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, before the report says that the run is finished."""
        if self.save_every is not None:
            self._save(trainer, pl_module, FINAL)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is nothing left to continue: the first process has written the report, and has all done."""
        if self.given and trainer.is_global_zero:
            self._remove(STATE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the directory."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the directory."""
        self._release(trainer)

    # Internals -------------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        module, summary = _test_time(pl_module)
        outputs = [own_file(trainer, self._directory / file) for file in OUTPUTS]
        state = {
            "version": __version__,
            "identity": self._identity,
            "batches": summary.batches,
            "method": module.method.state_dict(),
            "weight_names": module.method.weight_names,
            "lacks": module.method.lacks,
            "summary": summary.state_dict(),
            "pace": None if module.pace is None else module.pace.state_dict(),
            "position": [module._last_domain, module._since_reset],
            "callbacks": {c.state_key: kept for c in _others(trainer) if (kept := c.state_dict())},
            "random": state_files.random_state(module.device),
            "bytes": {path.name: state_files.bytes_on_disk(path) for path in outputs},
            "wall_seconds": self.earlier_seconds + time.perf_counter() - self._start,
        }
        state_files.write_state(own_file(trainer, self._directory / name), state)

    def _clear(self) -> None:
        """Remove the states of a run that this one overwrites."""
        if not (self._directory / "report.json").exists():
            self._remove(STATE)
            self._remove(FINAL)

    def _remove(self, name: str) -> None:
        for path in of_all(self._directory / name):
            path.unlink(missing_ok=True)

    def _release(self, trainer: Trainer) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ShiftedDataModule):
            data.start_at(0)
        self._lock.release()


def _test_time(pl_module: LightningModule) -> tuple[TestTimeAdaptation, StreamSummary]:
    from lightning_tta.modules.adaptation import TestTimeAdaptation

    assert isinstance(pl_module, TestTimeAdaptation)
    assert pl_module.summary is not None
    return pl_module, pl_module.summary


def _others(trainer: Trainer) -> list[Callback]:
    """Callbacks that may have something to remember, of whatever kind; the checkpoints of trainings have not."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if not isinstance(callback, (Checkpoint, StateKeeper))]


def _put_back(method: TTAMethod, saved: State) -> None:
    """Tensors as this process saved them: the strategy has since given all processes those of the first."""
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in [*method.named_parameters(), *method.named_buffers()]:
            if name in saved:
                tensor.copy_(saved[name])
