"""The files that hold a run's state: read and written safely, and compared."""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from lightning_tta.backbones.weights import CodeInFileError, read_checkpoint
from lightning_tta.data.sharing import own_batches
from lightning_tta.errors import ConfigError, WeightsError
from lightning_tta.files import of_all, of_process, write_whole
from lightning_tta.guard.callback import Guard

if TYPE_CHECKING:
    from lightning_tta.modules.adaptation import TestTimeAdaptation

State = dict[str, Any]
STATE, FINAL, LOCK = "state.pt", "final_state.pt", "state.lock"
WHOLE = (STATE, FINAL, "predictions.csv", "report.json")  # written whole, beside a temporary file


def read_state(path: Path, *, head: bool = False) -> State | None:
    """A saved state, or ``None`` if there is none or it is damaged. Runs no code from the file.

    Args:
        path: The file.
        head: Leave the tensors on disk until somebody looks at them.

    Raises:
        ConfigError: If the file holds more than tensors and plain values.
    """
    if not path.is_file():
        return None
    try:
        state = read_checkpoint(path, mmap=head)
    except CodeInFileError as error:
        raise ConfigError(f"{path} is no state of a run, remove it: {error}") from error
    except WeightsError:
        warnings.warn(f"{path} cannot be read and is ignored.", stacklevel=2)
        return None
    if not isinstance(state, dict) or "identity" not in state:
        warnings.warn(f"{path} is no state of a run and is ignored.", stacklevel=2)
        return None
    return state


def identity(module: TestTimeAdaptation) -> State:
    """What must agree for a run to be continued, by name."""
    assert module.protocol is not None
    sharing, share = module.sharing, {}
    if sharing.world > 1:
        batches = repr(own_batches(module.trainer.datamodule)).encode()  # type: ignore[attr-defined]
        digest = hashlib.sha256(batches).hexdigest()[:12]
        share = {"share": f"batches {digest} of process {sharing.rank} of {sharing.world}"}
    guards = [guard for guard in module.trainer.callbacks if isinstance(guard, Guard)]  # type: ignore[attr-defined]
    return {
        **share,
        **({"guard": [guard.settings for guard in guards]} if guards else {}),
        "method": module.method.name,
        **{f"method.{name}": value for name, value in module.method.options.items()},
        "reset_every": module.reset_every,
        "source_images": module.source_images,
        "memory_format": str(module.memory_format),
        "precision": str(module.trainer.precision),
        **{f"protocol.{name}": value for name, value in module.protocol.to_dict().items()},
    }


def differences(saved: State, own: State) -> list[str]:
    """One line ``name: saved != own`` for each entry that differs, but none that follows from another.

    Options are compared if the method is the same, shares if there are as many processes.
    """
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if "method" in names:
        names = [name for name in names if not name.startswith("method.")]
    if "protocol.world_size" in names:
        names = [name for name in names if name != "share"]
    return [f"{name}: {saved.get(name)!r} != {own.get(name)!r}" for name in names]


class DirectoryLock:
    """Keeps other runs out of a directory; each process's part ends with the process, however that ends.

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
            if not all(_free(other) for other in of_all(path) if other != path):
                lock.release()
                return False
            for left in (left for name in WHOLE for left in directory.glob(f".{name.replace('.', '*.')}.*.tmp")):
                left.unlink()
        self.release()
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _free(path: Path) -> bool:
    lock = FileLock(path)
    free = _acquired(lock)
    lock.release()
    return free


def write_state(path: Path, state: State) -> None:
    """Save a state, whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def bytes_on_disk(path: Path) -> int:
    """The size of a file, once all of it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def check_lengths(path: Path, state: State) -> None:
    """Whether the files that grow with the stream are still as long as when a state was saved.

    Args:
        path: Where the state is, beside them.
        state: It.

    Raises:
        ConfigError: If one is shorter.
    """
    for name, wanted in state["bytes"].items():
        file = path.with_name(name)
        found = file.stat().st_size if file.exists() else 0
        if found < wanted:
            raise ConfigError(
                f"{file} has {found} bytes, but {wanted} when the state beside it was saved: the run cannot be "
                f"continued. Restore the file, or remove {path.name} to start from the beginning."
            )


def random_state(device: torch.device) -> State:
    """The global random states, for methods of users that draw from them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the global state is what is saved
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [str(name), torch.tensor(np.asarray(keys).astype("int64")), *rest],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Counterpart of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))  # noqa: NPY002
