"""One predict run: what it knows, how it is saved and continued, and the base of the callbacks that follow it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch import Tensor

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.protocol import Protocol
from lightning_tta.data.sharing import Sharing
from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import take
from lightning_tta.run.directory import ResumePolicy, RunDirectory
from lightning_tta.run.own_loader import BatchTrail
from lightning_tta.run.pace import Pace
from lightning_tta.run.processes import ProcessGroup
from lightning_tta.run.readback import UnreadBatch, is_asynchronous
from lightning_tta.run.summary import BatchRecord, StreamSummary

Outputs = dict[str, Tensor]
"""What ``predict_step`` returns for a batch, see :class:`~lightning_tta.run.summary.BatchRecord`."""


@dataclass(eq=False, repr=False)
class StreamRun:
    """What a predict run knows. The module makes it, callbacks get it by :func:`run_of`.

    Args:
        trainer: Runs it.
        method: Is called for a batch; a callback may wrap it, see :meth:`RunCallback.wrap`.
        net: What is known of the net: ``name``, ``weights``, ``digest``.
        protocol: What the run measures.
        data: The data module, or ``None`` with a loader of the user's own.
        reset_every: The method returns to the source after this many batches, beside the protocol's resets.
        classes: The logits that the net was cut to.
        sharing: This process's share of the stream.
        recipe: Arguments of :func:`~lightning_tta.modules.loading.load_source` that make the net again, if there are.
        account_of: Makes the account of the stream from the names of its domains and those that count.

    Attributes:
        summary: The account of the stream so far.
        frozen: Numbers of the domains on which nothing adapts.
        pace: Says which batches a slow method misses; ``None`` where the stream waits.
        last_domain: Number of the domain of the last image; ``None`` before the first batch.
        since_reset: Batches since the last reset.
        batch: The record of the last batch in the account.
        defers: Whether a batch is accounted for while the device is at work on the next one, see :meth:`defer`.
        directory: Where the run writes.
        group: The processes of the run.

    Raises:
        ConfigError: If the processes are about to run different things.
    """

    trainer: Trainer
    method: TTAMethod
    net: dict[str, Any]
    protocol: Protocol
    data: ShiftedDataModule | None
    reset_every: int | None
    classes: list[int] | None
    sharing: Sharing
    recipe: dict[str, Any] | None = None
    account_of: Callable[[list[str], list[str] | None], StreamSummary] = StreamSummary

    def __post_init__(self) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self.callbacks = [callback for callback in callbacks if isinstance(callback, RunCallback)]
        self._stateful = [c for c in callbacks if not isinstance(c, Checkpoint)]  # of users too; those are of trainings
        for callback in self.callbacks:
            self.method = callback.wrap(self.method)
        domains, data = list(self.protocol.domains), self.data
        frozen = [] if data is None else data.frozen_domains
        self.summary = self.account_of(domains, None if data is None else data.counted_domains)
        self.frozen = {number for number, name in enumerate(domains) if name in frozen}
        self._hosts = range(len(domains)) if data is None else data.stream.hosts
        self.pace = Pace(self.protocol.charge, self.protocol.interval or 1.0) if self.protocol.charge else None
        self.last_domain: int | None = None
        self.since_reset = 0
        self.batch: BatchRecord | None = None
        self.defers = False
        self._unread: UnreadBatch | None = None
        self.device = self.trainer.strategy.root_device
        self.group = ProcessGroup(self.trainer.global_rank, self.trainer.world_size)
        hashes = self.group.gather(self.protocol.hash)
        if len(set(hashes)) > 1:
            raise ConfigError(
                f"The processes have different protocols ({', '.join(hashes)}): their nets or data differ. Give "
                "all the same source weights and files; for random weights set a seed (--seed_everything)."
            )
        self.directory: RunDirectory
        self.done_before = 0  # batches that the data module leaves out
        self._to_read = 0  # batches that come again, from a loader that cannot start later
        self.trail = BatchTrail()  # of such a loader
        self._saved_trail: list[Any] = [0, ""]
        self._earlier_seconds, self._start = 0.0, time.perf_counter()

    # Before the stream

    def begin(self, resume: ResumePolicy) -> None:
        """Take the directory of this configuration, and read what was saved there.

        Raises:
            FinishedError: If the run is finished.
            ConfigError: If the directory is in use, or holds another run.
        """
        self.directory = RunDirectory(self.trainer, self.group, self.identity())
        self.directory.take(resume)
        saved = self.directory.state
        if saved is None:
            return
        self.method.load_state_dict(saved["method"])  # what it allocates moves to the device with it
        if self.data is not None:
            self.done_before = saved["batches"]
            self.data.start_at(self.done_before)
        else:
            self._to_read, self._saved_trail = saved["batches"], saved.get("trail", [0, ""])

    def identity(self) -> dict[str, Any]:
        """What makes this run another one than others, by name; the same on all processes."""
        limit, precision = self.trainer.limit_predict_batches, self.method.execution.precision
        identity: dict[str, Any] = {
            "method": self.method.name,
            **{f"method.{name}": value for name, value in self.method.options.items()},
            "reset_every": self.reset_every,
            "precision": str(self.trainer.precision),
            **({} if precision is None else {"model.precision": precision}),
            **({} if limit in (None, 1.0) else {"limit_predict_batches": limit}),
            **{f"protocol.{name}": value for name, value in self.protocol.to_dict().items()},
        }
        for callback in self.callbacks:
            identity |= callback.identity()
        return identity

    def restore(self) -> None:
        """Take up what was saved; the method once more, as the strategy has given all processes that of the first."""
        self._start = time.perf_counter()
        if self.group.world > 1:
            with self.method.hold(changed=True):
                pass  # the strategy has written to the net, and the method shall know that this was meant
        if self.directory.state is not None:
            self.load_state_dict(self.directory.state)

    # Along the stream

    def needs_reset(self, domain: int) -> bool:
        """Whether the method returns to the source before a batch that begins with this domain."""
        if self.last_domain is None:  # the stream starts with the source
            return False
        if self.reset_every is not None and self.since_reset >= self.reset_every:
            return True
        new = self._host(domain) != self._host(self.last_domain) and domain not in self.frozen
        return self.protocol.reset == "batch" or (self.protocol.reset == "domain" and new)

    def _host(self, domain: int) -> int:
        """The domain that a batch belongs to: for polluting images that which they pollute."""
        return self._hosts[domain] if domain < len(self._hosts) else domain  # a loader may name new ones on the way

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the logits; empty where they are not known."""
        names = list(self.data.class_names) if self.data is not None else []
        if not names:
            names = list(getattr(self.method.model, "class_names", None) or [])
        if self.classes is not None:
            return [names[k] for k in self.classes] if names and max(self.classes) < len(names) else []
        return names

    def is_done(self, batch: Any) -> bool:
        """Whether the batch that has come was done before the run was continued.

        Raises:
            ConfigError: If a loader of the user's own gives other batches than before.
        """
        if self.data is None:
            self.trail.add(batch)
            if self._to_read:
                self.trail.check(self._saved_trail)
        self._to_read -= 1
        return self._to_read >= 0

    def check_end(self) -> None:
        """Raise :class:`ConfigError` if a loader ended before the batch from which the run was to be continued."""
        if self._to_read > 0:
            self.trail.check(self._saved_trail, ended=True)

    @property
    def total_batches(self) -> float:
        """Batches of the whole stream, as far as the loader knows; else infinity."""
        return self.done_before + sum(self.trainer.num_predict_batches)

    # What came of it

    def account(self, record: BatchRecord) -> Outputs:
        """Take a batch into the account; what its predict step returns."""
        self.batch = record
        self.summary.update(record)
        return record.outputs()

    def may_defer(self, pl_module: LightningModule) -> bool:
        """Whether nobody sees when a batch is accounted for: then nobody needs to wait for the device.

        Who wants the predictions back, times the method against the stream, or has a callback of his own for every
        batch, gets what he asks for at once.
        """
        trainer = self.trainer
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        watched = any(_overrides(pl_module, LightningModule, name) for name in _BATCH_HOOKS)
        return (
            is_asynchronous(self.device)
            and self.pace is None
            and self.sharing.joined == 1
            and not trainer.predict_loop.return_predictions
            and not watched
            and all(map(_may_lag, callbacks))
        )

    def defer(self, batch: UnreadBatch) -> None:
        """Account for a batch when the next one is on its way, and before anything is saved: see :meth:`settle`."""
        self._unread = batch

    def settle(self) -> None:
        """Account for the batch that was deferred, if there is one: the turn of the callbacks comes now."""
        unread, self._unread = self._unread, None
        if unread is None:
            return
        outputs = self.account(unread.record())
        for callback in self.callbacks:
            callback.on_batch(self, outputs)
        if self.batch is not None:
            self.batch.images = None  # those of two more batches are on the device

    @property
    def batches(self) -> int:
        """Batches so far, one that was deferred included."""
        return self.summary.batches + (self._unread is not None)

    @property
    def seen(self) -> int:
        """Images so far, one that was deferred included, and those that could not be used."""
        return self.summary.images + self.summary.skipped_images + (0 if self._unread is None else len(self._unread))

    def write(self) -> None:
        """Have all that is known so far in the files."""
        self.settle()
        for callback in self.callbacks:
            callback.flush()

    # State

    @property
    def wall_seconds(self) -> float:
        """Since the run first began; the time between a kill and the next start does not count."""
        return self._earlier_seconds + time.perf_counter() - self._start

    def result(self) -> dict[str, Any]:
        """What the method may change, as it is now, and what it takes to make net and method again."""
        moment = take(self.method)
        rest = {name: value for name, value in moment["rest"].items() if not name.startswith("optimizers.")}
        return {**self._origin(), "moment": {**moment, "rest": rest}}

    def _origin(self) -> dict[str, Any]:
        names = [] if self.data is None else list(self.data.class_names or ())
        if names and self.classes is not None:  # a net may have logits that the data have no name for
            names = [names[k] if k < len(names) else "" for k in self.classes]
        return {
            "recipe": self.recipe,
            "classes": self.classes,
            "class_names": names or None,
            "image_shape": self.method.image_shape,
            "domain_names": self.summary.domain_names,
            "position": [self.last_domain, self.since_reset],
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the stream depends on, in plain values and tensors."""
        return {
            **self._origin(),
            "batches": self.summary.batches,
            "trail": [self.trail.batches, self.trail.digest],
            "method": self.method.state_dict(),
            "summary": self.summary.state_dict(),
            "pace": None if self.pace is None else self.pace.state_dict(),
            "callbacks": {c.state_key: state for c in self._stateful if (state := c.state_dict())},
            "random": _random_state(self.device),
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.method.load_state_dict(state["method"])
        self.summary.load_state_dict(state["summary"])
        if self.pace is not None:
            self.pace.load_state_dict(state["pace"])
        self.last_domain, self.since_reset = state["position"]
        for callback in self._stateful:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        _set_random_state(state["random"], self.device)
        self._earlier_seconds = state["wall_seconds"]

    def release(self) -> None:
        """Let others have the directory."""
        if self.data is not None:
            self.data.start_at(0)
        self.directory.release()


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


class RunCallback(Callback):
    """Takes Lightning's hooks once; a subclass implements those of these methods that it needs.

    Python: ``Trainer(callbacks=[StateKeeper(save_every=50)])``; those that the Trainer has not,
    :class:`~lightning_tta.TestTimeAdaptation` adds with their defaults.

    Attributes:
        may_lag: Whether :meth:`on_batch` needs nothing but its arguments' account: then it may be called when the
            method is at work on the next batch.
    """

    may_lag: ClassVar[bool] = False

    def identity(self) -> dict[str, Any]:
        """Options that change what is predicted, by name: a run with others is another run."""
        return {}

    def wrap(self, method: TTAMethod) -> TTAMethod:
        """The method, or something with its interface around it, which is then called in its place."""
        return method

    def results(self, run: StreamRun) -> dict[str, Any]:
        """Entries for ``report.json``."""
        return {}

    def on_start(self, run: StreamRun) -> None:
        """The directory is known, and what was saved has been read."""

    def on_ready(self, run: StreamRun) -> None:
        """The method is prepared; the first batch comes next."""

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """A batch was predicted, and counted in ``run.summary``; not called for those done before a kill."""

    def flush(self) -> None:
        """What was written shall be on the disk: a state that counts it is about to be saved."""

    def on_end(self, run: StreamRun) -> None:
        """The stream has ended."""

    def close(self) -> None:
        """The run has ended, in whatever way."""

    # Lightning's hooks

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.on_start(run_of(pl_module))

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.on_ready(run_of(pl_module))

    def on_predict_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        if outputs:  # not one that was done before, or was deferred
            self.on_batch(run_of(pl_module), outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.on_end(run_of(pl_module))
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        run = getattr(pl_module, "run", None)
        if isinstance(run, StreamRun):
            with suppress(Exception):  # the device may be what has failed; it is the first error that counts
                run.settle()
        self.close()


_BATCH_HOOKS = ("on_predict_batch_start", "on_predict_batch_end")


def _overrides(instance: object, base: type, name: str) -> bool:
    return getattr(type(instance), name) is not getattr(base, name)


def _may_lag(callback: Callback) -> bool:
    """Whether a callback of the Trainer does not see when a batch is accounted for."""
    if isinstance(callback, RunCallback):
        return callback.may_lag or not any(
            _overrides(callback, RunCallback, name) for name in ("on_batch", *_BATCH_HOOKS)
        )
    return isinstance(callback, ProgressBar) or not any(_overrides(callback, Callback, name) for name in _BATCH_HOOKS)


def _random_state(device: torch.device) -> dict[str, Any]:
    """The global random states, for methods of users that draw from them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the global state is what is saved
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [str(name), torch.tensor(np.asarray(keys).astype("int64")), *rest],
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))  # noqa: NPY002
