"""Corrupted images on disk: made once, in parallel, and mapped into memory by every later run."""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_tta.data.images import Images
from lightning_tta.data.storage.memo import with_progress
from lightning_tta.errors import DataError

_CHUNK = 32
_WORTH_WORKERS = 4.0  # seconds of work


def default_folder() -> Path:
    """``$LIGHTNING_TTA_CACHE``, else ``lightning_tta`` in the user's cache folder."""
    own = os.environ.get("LIGHTNING_TTA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_tta"


class MappedImages(Images):
    """Rows of an ``.npy`` file of uint8 images, read when asked for and never all at once.

    Args:
        path: The file: (N, C, H, W), or (N, H, W, C) with ``channels_last``.
        labels: Labels of the rows in use, shape (M,).
        first: The first row in use.
        shape: The shape the file must have; ``None`` for any with four dimensions.
        channels_last: Whether the file has its channels last.

    Raises:
        DataError: If the file is missing, cut short, or has other contents.
    """

    def __init__(
        self,
        path: Path,
        labels: Tensor,
        *,
        first: int = 0,
        shape: Sequence[int] | None = None,
        channels_last: bool = False,
    ) -> None:
        self.path, self.labels, self.first, self.channels_last = path, labels, first, channels_last
        self._rows = open_array(path, np.uint8, shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = open_array(self.path, np.uint8, None)

    def image(self, position: int) -> Tensor:
        """One image."""
        return self.images(torch.tensor([position]))[0]

    def images(self, positions: Tensor) -> Tensor:
        """Several images, in one copy."""
        pixels = torch.from_numpy(self._rows[positions.numpy() + self.first])
        return pixels.permute(0, 3, 1, 2).contiguous() if self.channels_last else pixels


def open_array(path: Path, dtype: Any, shape: Sequence[int] | None) -> np.memmap[Any, np.dtype[Any]]:
    """Map an ``.npy`` file into memory.

    Raises:
        DataError: If it is missing, no such file, cut short, or of another type or shape.
    """
    wanted = "uint8 images with four dimensions" if shape is None else f"{np.dtype(dtype)} {tuple(shape)}"
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {kind}. Expected an .npy file with {wanted}.")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is not a readable .npy file ({error}). Expected {wanted}: fetch or save it again."
        ) from error
    if (
        not isinstance(found, np.memmap)
        or found.dtype != dtype
        or (found.ndim != 4 if shape is None else found.shape != tuple(shape))
    ):
        what = f"{found.dtype} {found.shape}" if hasattr(found, "dtype") else "several arrays"
        raise DataError(f"{path} holds {what}. Expected {wanted}.")
    return found


class _Chunks(Dataset[Tensor]):
    def __init__(self, images: Images, start: int) -> None:
        self.images, self.start = images, start

    def __len__(self) -> int:
        return -(-(len(self.images) - self.start) // _CHUNK)

    def __getitem__(self, number: int) -> Tensor:
        first = self.start + number * _CHUNK
        return self.images.images(torch.arange(first, min(first + _CHUNK, len(self.images))))


def on_disk(images: Images, key: str, folder: Path, text: str) -> Images:
    """The same images from a file in ``folder``, which is made if no process has made it yet.

    Args:
        images: What to store, all of one size.
        key: Says what they are, completely: equal keys share a file.
        folder: Where the files are; made if it does not exist.
        text: Names the work in the progress bar.
    """
    if not len(images):
        return images
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # several runs may want the same file
            if not path.exists():
                _write(images, path, text)
    return MappedImages(path, images.labels)


def _write(images: Images, path: Path, text: str) -> None:
    """Write all images beside ``path``, then give the file its name: it is whole or it is not there."""
    start = time.perf_counter()
    first = images.images(torch.arange(min(8, len(images))))
    pace = (time.perf_counter() - start) / len(first)
    partial = path.with_suffix(".partial")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(images), *first.shape[1:]))
    array[: len(first)] = first.numpy()
    chunks = _Chunks(images, len(first))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if cores > 1 and pace * len(images) > _WORTH_WORKERS else 0
    made = iter(DataLoader(chunks, batch_size=None, num_workers=workers))
    done = len(first)
    for _ in with_progress(len(chunks), text):
        chunk = next(made)
        array[done : done + len(chunk)] = chunk.numpy()
        done += len(chunk)
    array.flush()
    del array
    partial.replace(path)
