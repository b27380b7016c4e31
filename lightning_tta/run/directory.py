"""The directory of a run follows from its configuration, so that the same command finds the same run.

``<save_dir>/<name>/<method>-<stream>-<digest>`` under a logger, ``<default_root_dir>/<method>-<stream>-<digest>``
without; the digest is over the method, its options, the protocol, and what else changes the predictions. A logger whose
version is text, as in ``TensorBoardLogger("runs", name="a", version="b")``, names the directory itself: ``runs/a/b``.

What is there is a finished run (with ``report.json``), an unfinished one, or one that a live process holds by a lock.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_tta.backbones.weights import CodeInFileError, read_checkpoint
from lightning_tta.errors import ConfigError, DataError, FinishedError, WeightsError
from lightning_tta.files import is_whole_archive, of_all, of_process, own_file, read_json
from lightning_tta.run.processes import ProcessGroup

State = dict[str, Any]
ResumePolicy = Literal["auto", "restart"]
FORMAT = 3
"""Of the states that this version writes."""
STATE, FINAL, LOCK, REPORT = "state.pt", "final_state.pt", "run.lock", "report.json"
GROWING = ("predictions.csv", "batches.jsonl")
CLEARED = (
    *("state*.pt", "final_state*.pt", REPORT, "predictions*.csv", "batches*.jsonl", "guard.jsonl", "config.yaml"),
    "masks/**/*.png",
)
"""What is left of an earlier run is removed in this order: states first, so that no half of a run is continued."""
LOGGED = ("events.out.tfevents.*", "hparams.yaml", "metrics.csv")
FILE_LOGGERS = (TensorBoardLogger, CSVLogger)


class RunDirectory:
    """The directory of one run; every process of the run makes one and calls the same, and all decide the same.

    The Trainer's loggers that would count a version write into the directory from now on.

    Attributes:
        path: The directory.
        identity: What makes this run another one than others, by name.
        digest: Eight hex digits of the identity.
        state: Saved here, the run goes on from it; ``None``: the run starts from the beginning.
    """

    def __init__(self, trainer: Trainer, group: ProcessGroup, identity: Mapping[str, Any]) -> None:
        self.trainer, self.group = trainer, group
        text = json.dumps(identity, sort_keys=True, default=str)
        self.identity: State = json.loads(text)  # as it is read from a file
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        words = [identity["method"], identity.get("protocol.stream"), self.digest]
        name = group.first(lambda: "-".join(str(word) for word in words if word))
        self.is_named = isinstance(trainer.logger, FILE_LOGGERS) and not _counts_versions(trainer.logger)
        trainer.loggers = [_with_version(each, name) if _counts_versions(each) else each for each in trainer.loggers]
        logger = trainer.logger
        if isinstance(logger, FILE_LOGGERS):
            self.path = Path(logger.log_dir)
        elif logger is None:
            self.path = Path(trainer.default_root_dir) / name
        else:
            self.path = Path(logger.save_dir or trainer.default_root_dir) / (logger.name or "") / name
        self.state: State | None = None
        self._lock = DirectoryLock()

    def take(self, resume: ResumePolicy) -> None:
        """Keep others out, and read the state of an unfinished run; without one, what an earlier try left is removed.

        Raises:
            FinishedError: On all processes, if the run is finished.
            ConfigError: On all processes, if another process holds the directory, or another run is in it.
            DataError: On all processes, if a saved state, or a file that goes with it, is damaged.
        """
        in_use = ConfigError(
            f"{self.path} is in use by another process, which runs the same. Wait for it, or stop it; to run beside "
            "it, choose another directory (--trainer.default_root_dir, or the logger's save_dir)."
        )
        if not self.group.first(lambda: self._lock.take(self.path)):  # for all
            raise in_use
        try:
            if resume == "auto":
                self.group.first(self._check)
            if not all(self.group.each(lambda: self._lock.take(self.path, self.group.rank))):  # each says that it lives
                raise in_use
            self.state = self._read() if resume == "auto" else None
            if self.state is None:
                self.group.first(self._clear)
        except BaseException:
            self.release()
            raise

    def open(self, name: str) -> IO[str]:
        """This process's file of that name: empty, or cut back to where the saved state has it."""
        path = self.file(name)
        if self.state is None:
            return path.open("w", newline="")
        file = path.open("a", newline="")
        file.truncate(self.state["bytes"].get(path.name, 0))
        file.seek(0, os.SEEK_END)
        return file

    def file(self, name: str) -> Path:
        """Where this process writes what others write too."""
        return own_file(self.trainer, self.path / name)

    def remove_states(self) -> None:
        """Remove what all processes saved on the way."""
        for path in of_all(self.path / STATE):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let others in."""
        self._lock.release()

    def _check(self) -> None:
        """Refuse a finished run, and in a named directory another one than this."""
        report = self.path / REPORT
        content = read_json(report)
        if report.exists() and content is None:
            warnings.warn(f"{report} cannot be read: the run is done again.", stacklevel=2)
        if content is not None:
            saved = {"method": content.get("method")}
            for prefix, entry in (("method", "options"), ("protocol", "protocol")):
                saved |= {f"{prefix}.{name}": value for name, value in (content.get(entry) or {}).items()}
            compared = ("method", "protocol.")
            lines = differences(saved, {k: v for k, v in self.identity.items() if k.startswith(compared)})
            if content.get("run_digest") != self.digest and not lines:
                lines = [f"digest: {content.get('run_digest')} != {self.digest}"]
            if lines:
                raise self._another("a finished", lines)
            raise FinishedError(
                f"{self.path} is finished: there is nothing to continue. Its report is {report}. To run once more, "
                "replace it with --state.resume restart (in Python StateKeeper(resume='restart')), or choose another "
                "directory (--trainer.default_root_dir, or the logger's save_dir)."
            )
        for path in of_all(self.path / STATE):
            state = read_state(path, head=True)
            if state is not None and state.get("format") != FORMAT:
                raise ConfigError(
                    f"{path} was written by version {state.get('version')} of lightning_tta, whose states cannot be "
                    "continued. Replace the run with --state.resume restart."
                )
            lines = [] if state is None else differences(state["identity"], self.identity)
            if lines:
                raise self._another("an unfinished", lines)

    def _another(self, what: str, lines: Iterable[str]) -> ConfigError:
        return ConfigError(
            f"{self.path} holds {what} run that differs from this one (there != here): {'; '.join(lines)}. Choose "
            "another directory (--trainer.default_root_dir, or the logger's name or version), replace that run with "
            "--state.resume restart, or run with the same settings to continue it."
        )

    def _read(self) -> State | None:
        """This process's state; all go on, or all start anew."""
        path, state = self.file(STATE), None

        def read() -> int | None:
            nonlocal state
            state = read_state(path)
            if state is None:
                return None
            _check_files(path, state)
            return int(state["batches"])

        batches = self.group.each(read)
        if None not in batches:
            rank_zero_info(f"Continuing {self.path} after batch {', '.join(map(str, batches))}.")
            return state
        if any(number is not None for number in batches):
            rank_zero_info(f"Not every process of {self.path} had saved its state, so the run starts anew.")
        elif self.group.first(lambda: any((self.path / name).exists() for name in GROWING)):
            rank_zero_info(
                f"The run in {self.path} ended before its first saved state, so it starts anew. --state.save_every N "
                "saves one after every N batches."
            )
        return None

    def _clear(self) -> None:
        logged = () if self.is_named else LOGGED  # in a directory that was named they may be of a training
        for pattern in (*CLEARED, *logged):
            for path in self.path.glob(pattern):
                path.unlink()


class DirectoryLock:
    """Keeps other runs out of a directory; the lock of a process ends with the process, however that ends.

    The first process of a run takes the directory for all. The others have a lock each too, which nobody contests, so
    that the directory is in use as long as one of them lives.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def take(self, directory: Path, rank: int = 0) -> bool:
        """Whether the directory is ours now; what a process left that was killed while it wrote is removed."""
        path = directory / LOCK if rank == 0 else of_process(directory / LOCK, rank)
        if self._lock is not None and Path(self._lock.lock_file) == path:
            return True
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        if not _acquired(lock):
            return False
        if rank == 0:
            if not all(_is_free(other) for other in of_all(path) if other != path):
                lock.release()
                return False
            for name in (STATE, FINAL, GROWING[0], REPORT):  # written whole, beside a temporary file
                for temporary in directory.glob(f".{name.replace('.', '*.')}.*.tmp"):
                    temporary.unlink()
        self.release()
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _acquired(lock: FileLock) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked


def _is_free(path: Path) -> bool:
    lock = FileLock(path)
    free = _acquired(lock)
    lock.release()
    return free


# Loggers


def withhold_loggers(trainer: Trainer) -> list[Logger]:
    """Take away the loggers before Lightning has them write: nobody knows yet where, and whether the run is new.

    Returns the loggers as they came to the Trainer; it needs them again before :class:`RunDirectory` is made.
    """
    loggers: list[Logger] = [getattr(logger, "counting", logger) for logger in trainer.loggers]
    trainer.loggers = []
    return loggers


def _counts_versions(logger: Logger) -> bool:
    """Whether a logger makes a directory ``version_N``; asking it names none and makes none."""
    return isinstance(logger, FILE_LOGGERS) and not isinstance(logger.version, str)


def _with_version(logger: Logger, version: str) -> Logger:
    """The same logger in a directory of that name; ``counting`` is the logger as it was given."""
    kind = type(logger)
    named = copy.copy(logger)  # without an open writer
    named.__class__ = type(kind.__name__, (kind,), {"version": version, "counting": logger})
    return named


# Saved states


def read_state(path: Path, *, head: bool = False) -> State | None:
    """A saved state, or ``None`` if there is none; ``head`` leaves the tensors on disk for now.

    Raises:
        DataError: If the file is damaged, or holds something else.
        ConfigError: If it holds more than tensors and plain values.
    """
    if not path.is_file():
        return None
    state: Any = None
    if is_whole_archive(path):
        try:
            state = read_checkpoint(path, mmap=head)
        except CodeInFileError as error:
            raise ConfigError(f"{path} is no state of a run, remove it: {error}") from error
        except WeightsError:
            pass
    if not isinstance(state, dict) or "identity" not in state:
        raise DataError(
            f"{path} is damaged: its checksum is wrong, or it is no state of a run. Nothing can go on from it. Start "
            "the run anew with --state.resume restart (in Python StateKeeper(resume='restart'))."
        )
    return state


def differences(saved: State, new: State) -> list[str]:
    """One line ``name: saved != new`` for each entry that differs; options only if the method is the same."""
    names = [name for name in {**saved, **new} if saved.get(name) != new.get(name)]
    if "method" in names:
        names = [name for name in names if not name.startswith("method.")]
    return [f"{name}: {saved.get(name)!r} != {new.get(name)!r}" for name in names]


def checksum(path: Path, start: int, end: int, value: int = 0) -> int:
    """The CRC-32 of a file up to byte ``end``, where ``value`` is that of the bytes before ``start``."""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(2**20, end - file.tell())):
            value = zlib.crc32(block, value)
    return value


def _check_files(path: Path, state: State) -> None:
    """Refuse a state if a file that grows with the stream is not what it was when the state was saved."""
    for name, saved in state["bytes"].items():
        file = path.with_name(name)
        size = file.stat().st_size if file.exists() else 0
        wrong = f"has {size} bytes, but {saved} when" if size < saved else None
        expected = state.get("checksums", {}).get(name)  # version 0.1 saved none
        if wrong is None and expected is not None and checksum(file, 0, saved) != expected:
            wrong = "has changed since"
        if wrong:
            raise DataError(
                f"{file} {wrong} the state beside it was saved: the run cannot be continued. Restore the file, or "
                "start anew with --state.resume restart (in Python StateKeeper(resume='restart'))."
            )
