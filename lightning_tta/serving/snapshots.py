"""Snapshots of a server's state: a few files, each written whole, the newest good one is read."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lightning_tta.errors import ConfigError, DataError, check_range
from lightning_tta.files import is_whole_archive, save_summed, write_whole

FORMAT = 1
"""Of the files; another number, other contents."""


class Snapshots:
    """Writes states to ``snapshot-NUMBER.pt`` in a directory, in a thread of its own, and keeps the latest.

    A file is there whole or not at all, also after a kill or a loss of power, and ends with its checksum. A process has
    the directory for itself.

    Args:
        directory: Made if it does not exist.
        keep: Files to keep, at least 1.
        on_written: Called with the number after each that was written, in the thread that writes.
        on_error: Called with the error of one that could not be written, as on a full disk; the next one is tried.

    Attributes:
        error: Why the latest could not be written; ``None``: it was.
        ended: Whether :meth:`close` was called.

    Raises:
        ConfigError: If another process has the directory.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 3,
        on_written: Callable[[int], None] = lambda number: None,
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        check_range("keep_snapshots", keep, 1, integer=True)
        self.directory, self.keep, self._on_written, self._on_error = directory, keep, on_written, on_error
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(directory / ".lock")
        with suppress(Timeout):
            self._lock.acquire(timeout=0)
        if not self._lock.is_locked:
            raise ConfigError(f"{directory} is in use by another shadow. Close it first, or give another directory.")
        for temporary in directory.glob(".snapshot-*.tmp"):  # of a process that was killed while it wrote
            temporary.unlink()
        self._next: tuple[int, Mapping[str, Any]] | None = None
        self.ended = False
        self.error: Exception | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="lightning_tta snapshots", daemon=True)
        self._thread.start()

    def read(self) -> tuple[int, dict[str, Any]] | None:
        """Number and state of the latest that is good; ``None`` if there is none at all. A damaged one is warned of.

        Raises:
            DataError: If all are damaged.
        """
        damaged: list[str] = []
        for path in reversed(self._paths()):
            state = _read(path)
            if state is not None:
                if damaged:
                    for name in damaged:  # else it would count as the latest for ever
                        (self.directory / name).replace(self.directory / f"{name}.damaged")
                    warnings.warn(
                        f"Damaged (the checksum is wrong): {', '.join(damaged)} in {self.directory}, now renamed to "
                        f"*.damaged. So {path.name}, the one before, is gone on from. Look at the disk.",
                        stacklevel=4,
                    )
                if state.get("format") != FORMAT:
                    raise ConfigError(
                        f"{path} has format {state.get('format')}, of lightning_tta {state.get('version')}; this "
                        f"version reads format {FORMAT}. Use that version, or give another directory."
                    )
                return _number(path), state
            damaged.append(path.name)
        if damaged:
            raise DataError(
                f"All snapshots in {self.directory} are damaged: {', '.join(damaged)}. Nothing can be gone on from. "
                "Put back a copy, or remove them to begin anew."
            )
        return None

    def write(self, number: int, state: Mapping[str, Any]) -> None:
        """Have a state written; it must not change any more. One that still waits is left out for it."""
        with self._change:
            self._next = number, state
            self._change.notify()

    def close(self) -> None:
        """Write what waits, and let others have the directory."""
        with self._change:
            self.ended = True
            self._change.notify()
        self._thread.join()
        self._lock.release()

    def _write_all(self) -> None:
        while True:
            with self._change:
                while self._next is None and not self.ended:
                    self._change.wait()
                if self._next is None:
                    return
                (number, state), self._next = self._next, None
            try:
                content = {"format": FORMAT, **state}
                write_whole(self.directory / f"snapshot-{number:09d}.pt", lambda file: save_summed(content, file))  # noqa: B023
                for path in self._paths()[: -self.keep]:
                    path.unlink(missing_ok=True)
            except Exception as error:  # of the disk, or a state that cannot be saved
                self.error = error
                self._on_error(error)
            else:
                self.error = None
                self._on_written(number)

    def _paths(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted((p for p in self.directory.glob("snapshot-*.pt") if p.stem[9:].isdigit()), key=_number)


def _number(path: Path) -> int:
    return int(path.stem[9:])


def _read(path: Path) -> dict[str, Any] | None:
    if not is_whole_archive(path):
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # of whatever kind: the file is no snapshot
        return None
    return state if isinstance(state, dict) else None
