"""How a command of Lightning ends: where its results are and what comes next, or what an interrupt has left."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_tta.errors import ConfigError, Interrupted
from lightning_tta.modules.perk import PERK
from lightning_tta.run.directory import STATE
from lightning_tta.run.interrupts import ask, listening
from lightning_tta.run.stream_run import run_of

GRACE = 10.0
"""Seconds that a process has to end by itself after the one that started it is gone."""
EMPTY_PARAMETERS = ("", "{}")


@contextmanager
def interruptible(command: str, trainer: Trainer, model: LightningModule) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with an :class:`~lightning_tta.errors.Interrupted` that says what is kept.

    Lightning itself ends a ``fit`` after SIGTERM, between two batches, and knows what SLURM wants then.
    """
    signals = (signal.SIGINT,) if command == "fit" else (signal.SIGINT, signal.SIGTERM)
    with listening(*signals):
        try:
            yield
        except Interrupted as stop:
            told = stop if str(stop) else _interrupted(command, trainer, model, stop.number)
        except SIGTERMException:
            told = _interrupted(command, trainer, model, signal.SIGTERM)
        else:
            return
    if _was_started(trainer):  # an error of it would have Lightning kill the first process, which may be saving
        raise SystemExit(0)
    raise told


def _interrupted(command: str, trainer: Trainer, model: LightningModule, number: int) -> Interrupted:
    if command == "fit":
        epochs = "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"
        head = f"Stopped in epoch {trainer.current_epoch + 1}{epochs}."
        path = last_checkpoint(trainer)
        if path is None:
            return Interrupted(number, f"{head} No checkpoint was saved yet: the training begins anew.")
        return Interrupted(number, f"{head} The training so far is kept in {path}", ["--ckpt_path", str(path)])
    if command == "predict":
        try:
            directory = run_of(model).directory
        except (ConfigError, AttributeError):  # it has not begun
            return Interrupted(number, "Stopped before the first batch: nothing was written.")
        if any(directory.path.glob(STATE.replace(".", "*."))):
            return Interrupted(number, f"Stopped. What was saved before is kept in {directory.path}")
        return Interrupted(number, f"Stopped. No state is saved in {directory.path}: the run begins anew.")
    return Interrupted(number, f"Stopped. {command} saves nothing on the way: it begins anew.")


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint that a fit has written so far."""
    paths = [
        Path(text)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for text in (callback.last_model_path, callback.best_model_path)
        if text and Path(text).is_file()
    ]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def say_where_weights_are(trainer: Trainer, args: list[str], data: str) -> None:
    """At the end of a fit: the path of the weights, and the command that adapts them."""
    callback = trainer.checkpoint_callback
    best = callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
    if not best:
        return
    path = Path(best)
    folder = path.parents[1] if path.parent.name == "checkpoints" and path.name == "best.ckpt" else path
    print(f"weights: {path}")
    if isinstance(trainer.lightning_module, PERK):
        return  # its own `test` measures it; no method adapts it
    command = ["lightning-tta", "predict", *_predict_options(args, data)]
    command += ["--model.source_ckpt", str(folder), "--model.method", "tent"]
    print(f"adapt them: {shlex.join(command)}")


def say_where_run_is(model: LightningModule) -> None:
    """At the end of a predict run: its directory, and the command that makes a page of it."""
    directory = str(run_of(model).directory.path)
    print(f"page: {shlex.join(['lightning-tta', 'report', directory])}")


def _predict_options(args: list[str], data: str) -> list[str]:
    """The data of a fit as options of predict: the configuration beside that of the fit, else the same class.

    What the command line says of the data is said again.
    """
    first, options = ["--data", data], list[str]()
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        beside = Path(value if equals else following).with_name("predict.yaml") if name in ("-c", "--config") else None
        if beside is not None and beside.is_file():
            first = ["--config", str(beside)]
        if name.startswith("--data."):
            options += [arg] if equals else [arg, following]
    return [*first, *options]


def remove_empty_parameters(trainer: Trainer) -> None:
    """Lightning's loggers write ``hparams.yaml`` also where there is nothing to write."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        directory = getattr(logger, "log_dir", None)
        path = Path(directory) / "hparams.yaml" if directory else None
        if path is not None and path.is_file() and path.read_text().strip() in EMPTY_PARAMETERS:
            path.unlink()


def end_with_parent(trainer: Trainer) -> None:
    """A process that Lightning has started for a device ends soon after the one that started it.

    By itself it would wait for the first process until torch's time-out: minutes, or for ever. It may save its state.
    """
    if _was_started(trainer):
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _was_started(trainer: Trainer) -> bool:
    """Whether another process of this run has started this one: not torchrun, and not SLURM."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    ask(signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
