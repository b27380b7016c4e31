"""The files that hold a run's state: read and written safely, and compared."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_tta.backbones.weights import CodeInFileError, read_checkpoint
from lightning_tta.errors import ConfigError, WeightsError
from lightning_tta.files import write_whole

State = dict[str, Any]
STATE, FINAL = "state.pt", "final_state.pt"
FORMAT = 2
"""Of the states that this version writes."""


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


def differences(saved: State, new: State) -> list[str]:
    """One line ``name: saved != new`` for each entry that differs; options only if the method is the same."""
    names = [name for name in {**saved, **new} if saved.get(name) != new.get(name)]
    if "method" in names:
        names = [name for name in names if not name.startswith("method.")]
    return [f"{name}: {saved.get(name)!r} != {new.get(name)!r}" for name in names]


def write_state(path: Path, state: State) -> None:
    """Save a state, whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def bytes_on_disk(path: Path) -> int:
    """The size of a file, once all of it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def check_lengths(path: Path, state: State) -> None:
    """Refuse a state if a file that grows with the stream is shorter than when it was saved."""
    for name, wanted in state["bytes"].items():
        file = path.with_name(name)
        size = file.stat().st_size if file.exists() else 0
        if size < wanted:
            raise ConfigError(
                f"{file} has {size} bytes, but {wanted} when the state beside it was saved: the run cannot be "
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
