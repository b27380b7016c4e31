"""Pixels that were read or corrupted once: kept in memory up to a limit, or in files that every later run maps."""

import errno
import hashlib
import io
import json
import os
import shutil
import struct
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.data.images import Images, KeptImages, StackedImages
from lightning_tta.data.storage.paths import check_file
from lightning_tta.data.threads import one_thread
from lightning_tta.errors import DataError
from lightning_tta.files import write_whole
from lightning_tta.progress import with_progress

_CHUNK = 32  # images
_WORTH_WORKERS = 4.0  # seconds of work
_BLOCK = 2**24  # bytes
_MARK = b"lightning_tta"
_TAIL = 8 + len(_MARK)


class ImageCache:
    """Images by key, in memory and on disk; beyond ``limit`` bytes in memory the least recently used are dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pixels: OrderedDict[Hashable, tuple[Tensor, Tensor | None]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes in memory now."""
        return sum(pixels.nbytes for pixels, _ in self._pixels.values())

    def clear(self) -> None:
        """Drop everything that is in memory."""
        self._pixels.clear()

    def in_memory(self, images: Images, key: Hashable, text: str, *, sets: int = 1) -> Images:
        """The same images in memory, computed once per process and key; unchanged where ``sets`` like them do not fit.

        All have one size. Nobody may write into the pixels that come back. ``text`` names the work in a progress bar.
        """
        if isinstance(images, StackedImages) or not len(images):
            return images
        if key not in self._pixels:
            if sets * images.estimated_bytes() > self.limit:
                return images
            self._pixels[key] = _stacked(images, text)
            while self.nbytes > self.limit:
                self._pixels.popitem(last=False)
        self._pixels.move_to_end(key)
        pixels, readable = self._pixels[key]
        return StackedImages(pixels, images.labels, images, readable)

    @staticmethod
    def on_disk(images: Images, key: str, folder: Path, text: str) -> Images:
        """The same images from a file in ``folder``, which is written if no process has written it yet.

        Equal keys share a file: a key says completely what the images are. A file carries a checksum, which is compared
        once in each process; one that does not fit is written anew. Where the folder cannot be written, the images are
        made when asked for, with a warning.
        """
        if not len(images):
            return images
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
        damaged = _damaged_rows(path)
        if damaged is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with FileLock(path.with_suffix(".lock")):  # several runs may want the same file
                    damaged = _damaged_rows(path)
                    if damaged is None:
                        _check_space(folder, images.estimated_bytes())
                        write_whole(path, lambda file: _write_npy(file, images, text, path.stem))
                        damaged = _damaged_rows(path) or []
            except OSError as error:
                warnings.warn(
                    f"{folder} cannot keep corrupted images ({error.strerror or error}): they are made anew in each "
                    "run. Make room, or choose another folder with --data.cache_dir or $LIGHTNING_TTA_CACHE.",
                    stacklevel=2,
                )
                return images
        return MappedImages(path, images.labels, origin=images, readable=_all_but(damaged, len(images)))


CACHE = ImageCache(limit=2**30)


def default_folder() -> Path:
    """``$LIGHTNING_TTA_CACHE``, else ``lightning_tta`` in the user's cache folder."""
    chosen = os.environ.get("LIGHTNING_TTA_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_tta"


def _check_space(folder: Path, needed: int) -> None:
    """Raise :class:`OSError` before anything is written where it cannot all be written."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed, {os.strerror(errno.ENOSPC)}")


@lru_cache(maxsize=1024)
def _verified_rows(path: Path, stamp: tuple[int, ...]) -> tuple[int, ...] | None:
    """Rows of images that could not be read when the file was written; ``None`` of a damaged or former file.

    After the array come those rows as JSON, then the JSON's length, the CRC of the file's name and of all before,
    and a mark.
    """
    size = stamp[0]
    with path.open("rb") as file:
        if size < _TAIL:
            return None
        file.seek(size - _TAIL)
        length, wanted, mark = struct.unpack(f"<II{len(_MARK)}s", file.read())
        if mark != _MARK or length > size - _TAIL:
            return None
        file.seek(0)
        rest, crc, block = size - _TAIL, zlib.crc32(path.stem.encode()), b""
        while rest:
            block = file.read(min(rest, _BLOCK))
            if not block:
                return None
            crc, rest = zlib.crc32(block, crc), rest - len(block)
        file.seek(size - _TAIL - length)
        if crc == wanted:
            return tuple(json.loads(file.read(length)))
    warnings.warn(f"{path} is damaged: its checksum does not fit. It is made anew.", stacklevel=4)
    return None


def _damaged_rows(path: Path) -> Sequence[int] | None:
    """The same of a file that may not exist, compared once as long as the file does not change."""
    try:
        state = path.stat()
    except OSError:
        return None
    return _verified_rows(path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))


def _all_but(rows: Sequence[int], count: int) -> Tensor | None:
    """Which of ``count`` images are not among ``rows``, bool; ``None`` where all are."""
    if not rows:
        return None
    readable = torch.ones(count, dtype=torch.bool)
    readable[list(rows)] = False
    return readable


@one_thread()
def _pixels_of(images: Images, positions: Tensor) -> tuple[Tensor, Tensor]:
    return images.try_images(positions)


def _chunks(images: Images, text: str) -> Iterator[tuple[Tensor, Tensor]]:
    """All pixels, some images at a time, by worker processes where the time of the first says that it is worth it."""
    compute = partial(_pixels_of, images)
    first, *rest = torch.split(torch.arange(len(images)), _CHUNK)
    start = time.perf_counter()
    yield compute(first)
    seconds = (time.perf_counter() - start) * len(rest)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chunks = map(compute, rest)
    if cores > 1 and seconds > _WORTH_WORKERS:
        generator = torch.Generator()  # the global random state must not tell whether a file was there
        options = {"batch_size": None, "num_workers": cores, "generator": generator}
        chunks = iter(DataLoader(rest, collate_fn=compute, **options))  # type: ignore[arg-type]
    for _ in with_progress(len(rest), text):
        yield next(chunks)


def _stacked(images: Images, text: str) -> tuple[Tensor, Tensor | None]:
    """All pixels, uint8 (N, C, H, W), and which images could be read (N,), ``None``: all."""
    pixels, readable, end = torch.empty(0), torch.ones(len(images), dtype=torch.bool), 0
    for chunk, usable in _chunks(images, text):
        pixels = pixels if end else chunk.new_empty(len(images), *chunk.shape[1:])
        start, end = end, end + len(chunk)
        pixels[start:end], readable[start:end] = chunk, usable
    return pixels, None if bool(readable.all()) else readable


def _write_npy(file: IO[bytes], images: Images, text: str, name: str) -> None:
    """The same as an ``.npy`` file, with a tail as :func:`_verified_rows` reads it."""
    crc, end, damaged = zlib.crc32(name.encode()), 0, list[int]()

    def write(content: bytes | memoryview) -> None:
        nonlocal crc
        crc = zlib.crc32(content, crc)
        file.write(content)

    for chunk, usable in _chunks(images, text):
        if not end:
            head = io.BytesIO()
            shape = (len(images), *chunk.shape[1:])
            np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
            write(head.getvalue())
        write(chunk.contiguous().numpy().data)
        damaged += ((~usable).nonzero()[:, 0] + end).tolist()
        end += len(chunk)
    rows = json.dumps(damaged).encode()
    write(rows)
    file.write(struct.pack(f"<II{len(_MARK)}s", len(rows), crc, _MARK))


class MappedImages(KeptImages):
    """Rows ``first`` to ``first + len(labels)`` of an ``.npy`` file of uint8 images, read when asked for.

    The file has the shape ``shape``: (N, C, H, W), or (N, H, W, C) with ``channels_last``.
    """

    def __init__(
        self,
        path: Path,
        labels: Tensor,
        first: int = 0,
        shape: Sequence[int] | None = None,
        channels_last: bool = False,
        origin: Images | None = None,
        readable: Tensor | None = None,
    ) -> None:
        self.path, self.labels, self.first, self.channels_last = path, labels, first, channels_last
        self.origin, self.readable = origin, readable
        self._rows = open_images(path, shape)

    def __getstate__(self) -> dict[str, Any]:
        wanted = self.readable is not None or self.has_targets
        return {**self.__dict__, "_rows": None, "origin": self.origin if wanted else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = open_images(self.path)  # each worker process maps the file itself

    def pixels_of(self, positions: Tensor) -> Tensor:
        """Several images, in one copy."""
        pixels = torch.from_numpy(self._rows[positions.numpy() + self.first])
        return pixels.permute(0, 3, 1, 2).contiguous() if self.channels_last else pixels


def open_images(path: Path, shape: Sequence[int] | None = None) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Map an ``.npy`` file of uint8 images into memory."""
    wanted = "uint8 images with four dimensions" if shape is None else f"uint8 {tuple(shape)}"
    rows = load_npy(path, wanted, mmap_mode="r")
    right_shape = rows.ndim == 4 if shape is None else rows.shape == tuple(shape)
    if not isinstance(rows, np.memmap) or rows.dtype != np.uint8 or not right_shape:
        raise DataError(f"{path} holds {rows.dtype} {rows.shape}. Expected {wanted}.")
    return rows


def load_npy(path: Path, wanted: str, mmap_mode: Any = None) -> np.ndarray[Any, Any]:
    """The array of an ``.npy`` file, without running code that is in it; ``wanted`` says what it should hold."""
    check_file(path, f"an .npy file with {wanted}")
    try:
        array: object = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        message = f"{path} is not a readable .npy file ({error}). Expected {wanted}: fetch or save it again."
        raise DataError(message) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} holds several arrays. Expected {wanted}.")
    return array
