"""Runs that were killed go on: the state of a run is saved as the stream goes, and taken up by the same command."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_tta._version import __version__
from lightning_tta.errors import ConfigError, Interrupted, check_choice, check_range
from lightning_tta.files import save_summed, write_whole
from lightning_tta.run.directory import FINAL, FORMAT, GROWING, STATE, ResumePolicy, checksum
from lightning_tta.run.interrupts import received, waiting
from lightning_tta.run.stream_run import RunCallback, StreamRun, run_of


class StateKeeper(RunCallback):
    """Saves the state of a run: ``--state.save_every 50``, ``Trainer(callbacks=[StateKeeper(save_every=50)])``.

    Every run ends with ``final_state.pt``, which holds what the method may change and no more, for
    ``lightning-tta export``. ``save_every=N`` also writes ``state.pt`` into the run's directory before the first batch
    and after every N, whole or not at all. The same command then goes on from there: predictions and report are
    those of a run that was never interrupted, apart from timings. Images of batches that are done are not read again.

    Several processes with whole domains each (``replicas``) have a state each, ``state.rank0.pt`` and so on. They go on
    if each of them has a state: each from its own last save, however far apart these are. What stops one, such as a run
    that is finished, stops all.

    Ctrl-C and SIGTERM end the stream after the batch that is being done, with its state saved whatever ``save_every``
    is. A second Ctrl-C ends the process at once.

    TensorBoard's curves go on in the same directory; the points between the last save and the end of the first part are
    there twice. (Lightning's CSVLogger starts its metrics.csv anew; batches.jsonl has all.)

    Args:
        save_every: Save the whole state after every so many batches, so that a run that was killed can go on. ``None``:
            only save the end.
        resume: What happens to a run that is already in the directory of this configuration, see
            :mod:`lightning_tta.run.directory`. ``auto``: an unfinished one goes on from its last saved state, or starts
            anew where none was saved, and a finished one raises :class:`~lightning_tta.errors.FinishedError`.
            ``restart``: it is removed, and runs anew.

    Raises:
        ConfigError: If an option is out of range, or the Trainer shortens a stream that is saved: it would count from
            where the run goes on.
    """

    def __init__(self, save_every: int | None = None, resume: ResumePolicy = "auto") -> None:
        if save_every is not None:
            check_range("save_every", save_every, 1, integer=True)
        check_choice("resume", resume, ("auto", "restart"))
        self.save_every: int | None = save_every
        self.resume: ResumePolicy = resume
        self._waiting = ExitStack()
        self._sums: dict[str, tuple[int, int]] = {}  # of the files that grow: so many bytes, and their checksum

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be continued."""
        limit = trainer.limit_predict_batches
        if self.save_every is not None and limit not in (None, 1.0):
            raise ConfigError(
                f"limit_predict_batches={limit} does not go with save_every: it would count from where the run goes "
                "on. Limit the stream itself, such as with --data.num_images."
            )

    def on_start(self, run: StreamRun) -> None:
        """Begin with files of which nothing is known."""
        self._sums = {}

    def on_ready(self, run: StreamRun) -> None:
        """Save the beginning, with what the method prepared."""
        if run.directory.state is None and self.save_every is not None:
            self._save(run, STATE)
        self._waiting.enter_context(waiting())

    may_lag = True  # it asks for what is due before it saves

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Save after every so many batches, but not after the last: there must be something left to continue.

        Raises:
            Interrupted: After any batch but the last, if the process has got a signal; the state is then saved.
        """
        run = run_of(pl_module)
        done = run.batches
        if outputs is None or done >= run.total_batches:
            return
        stop, reason = received(trainer), _why_not(run)
        if (stop and not reason) or (self.save_every is not None and done % self.save_every == 0):
            self._save(run, STATE)
        if stop:
            run.write()
            raise Interrupted(stop, _what_is_kept(run, reason))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, before the report says that the run is finished."""
        run = run_of(pl_module)
        run.settle()
        run.check_end()
        if run.sharing.mode != "synchronised" or trainer.is_global_zero:  # else all have the same
            self._save(run, FINAL)

    def on_end(self, run: StreamRun) -> None:
        """Nothing is left to continue: the first process, which writes the report, removes the states of all.

        Raises:
            Interrupted: If the process has got a signal since the last batch but one.
        """
        if run.trainer.is_global_zero:
            run.directory.remove_states()
        if stop := received(run.trainer):
            text = f"Stopped after the last batch. The run is finished: {run.directory.path}"
            raise Interrupted(stop, text, again=None)

    def close(self) -> None:
        """Leave signals to others."""
        self._waiting.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the directory."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "predict")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the directory."""
        if getattr(pl_module, "run", None) is not None:
            run_of(pl_module).release()

    def _save(self, run: StreamRun, name: str) -> None:
        run.write()
        for path in map(run.directory.file, GROWING):
            with path.open("rb") as file:  # all of it must be on the disk before the state is
                os.fsync(file.fileno())
            size, (start, value) = path.stat().st_size, self._sums.get(path.name, (0, 0))
            self._sums[path.name] = size, checksum(path, start, size, value)
        sizes = {name: size for name, (size, _) in self._sums.items()}
        sums = {name: value for name, (_, value) in self._sums.items()}
        identity = run.directory.identity
        content = run.result() if name == FINAL else run.state_dict()
        state = {"version": __version__, "format": FORMAT, "identity": identity, **content}
        state |= {"bytes": sizes, "checksums": sums}
        write_whole(run.directory.file(name), lambda file: save_summed(state, file))


def _why_not(run: StreamRun) -> str | None:
    """Why the state of this run cannot be saved; ``None`` if it can."""
    if run.trainer.limit_predict_batches not in (None, 1.0):
        return "its Trainer limits the batches (limit_predict_batches)"
    return "its processes adapt as one (synchronised)" if run.sharing.joined > 1 else None


def _what_is_kept(run: StreamRun, reason: str | None) -> str:
    total = "" if run.total_batches == float("inf") else f" of {int(run.total_batches)}"
    head = f"Stopped after batch {run.summary.batches}{total}."
    if reason is None:
        return f"{head} What is done is kept in {run.directory.path}"
    return (
        f"{head} Its predictions are kept in {run.directory.file(GROWING[0])}, but the run begins anew next time: it "
        f"cannot go on, as {reason}."
    )
