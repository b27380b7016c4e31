"""Image files: listed as torchvision lists them, read, resized and cropped."""

import math
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from lightning_tta.data.images import Images
from lightning_tta.data.reading import MAX_PIXELS, endings, read_image
from lightning_tta.errors import DataError

Listing = tuple[list[Path], Tensor]
"""Files, and their labels int64 (N,)."""
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
FOREIGN = {".arw", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".rw2", ".svg"}
"""Endings of images that PIL cannot read."""


def list_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    if not names:
        raise DataError(
            f"{folder} has no class folders. Expected {folder}/<class>/<image files>."
            + (hint_of_images(folder) if has_images(folder) else "")
        )
    return names


def has_images(folder: Path) -> bool:
    """Whether image files lie in a folder itself."""
    known = endings()
    return folder.is_dir() and any(path.suffix.lower() in known for path in folder.iterdir())


def hint_of_images(folder: Path) -> str:
    """What to do with a folder of images that are not in class folders."""
    return f" For images without labels: --data ImageFolderData --data.path {folder}"


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's: ``.git``, ``._photo.jpg``, ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def walk_images(folder: Path) -> list[Path]:
    """All image files in a folder and below, in torchvision's order: folder after folder, sorted by name.

    Hidden files are left out, and, with a warning, videos and images of a format that PIL does not read. Links are
    followed; a folder that has an image's name and no files counts as an image, which cannot be read.
    """
    known, paths, foreign, seen = endings(), list[Path](), list[Path](), set[str]()
    for root, folders, files in sorted(_walk(folder, seen)):
        if not (files or folders) and Path(root).suffix.lower() in known and Path(root) != folder:
            paths.append(Path(root))
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            if not _is_hidden(name) and ending in known:
                paths.append(Path(root, name))
            elif not _is_hidden(name) and ending in FOREIGN | VIDEOS:
                foreign.append(Path(root, name))
    if foreign:
        warnings.warn(
            f"{len(foreign)} files are left out, as their format cannot be read: {foreign[0]}"
            f"{' and others' if len(foreign) > 1 else ''}. Convert them to JPEG or PNG; of a video, in "
            "ImageFolderData, give the path of the file itself.",
            stacklevel=3,
        )
    return paths


def _walk(folder: Path, seen: set[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` along links, each folder once: a link may lead back."""
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield root, list(folders), files


def list_images(folder: Path, label_of: Mapping[str, int], classes: str) -> Listing:
    """Image files of a folder of class folders, sorted by label and name; ``classes`` says which, for the message."""
    names = list_folders(folder)
    unknown = [name for name in names if name not in label_of]
    if unknown:
        first = ", ".join(unknown[:10])
        raise DataError(f"{folder} has class folders that are not {classes}: {first}. Rename or remove them.")
    paths, labels = list[Path](), list[int]()
    for name in sorted(names, key=label_of.__getitem__):
        inside = walk_images(folder / name)
        paths += inside
        labels += [label_of[name]] * len(inside)
    if not paths:
        raise DataError(f"{folder} has class folders without images. Expected {folder}/<class>/<image files>.")
    return paths, torch.tensor(labels)


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """Sorts names as people do: ``frame2.png`` before ``frame10.png``."""
    pieces = re.split(r"([0-9]+)", path.as_posix())
    return [(0, int(piece)) if piece.isdecimal() and piece.isascii() else (1, piece) for piece in pieces if piece]


class DecodedImages(Images):
    """Images that are decoded when asked for, of which some may be damaged: a leaf implements :meth:`image`.

    ``shape`` is that of each image, (C, H, W).
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""

    def estimated_bytes(self) -> int:
        """Bytes of all images together."""
        return len(self) * math.prod(self.shape) if len(self) else 0

    def try_images(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Several images, and which of them could be read."""
        images = list[Tensor | None]()
        for position in positions.tolist():
            try:
                images.append(self.image(position))
            except DataError:
                images.append(None)
        readable = torch.tensor([image is not None for image in images])
        blank = torch.zeros(self.shape if not bool(readable.all()) else 0, dtype=torch.uint8)
        return torch.stack([blank if image is None else image for image in images]), readable


class FileImages(DecodedImages):
    """Files with labels (N,), read as 8-bit images when asked for, see :func:`~lightning_tta.data.reading.read_image`.

    The shorter side is resized to ``resize``, and the middle square of side ``crop`` is cut out. Without ``crop`` all
    images must be as large as ``like``, by default the first. ``root`` is left out of the files' names.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: Tensor,
        resize: int | None,
        crop: int | None,
        like: Path | None = None,
        *,
        root: Path | None = None,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        interpolation: str = "bilinear",
    ) -> None:
        self.paths, self.labels, self.resize, self.crop, self.like = paths, labels, resize, crop, like or paths[0]
        self.root, self.channels, self.max_pixels, self.interpolation = root, channels, max_pixels, interpolation
        self._warned: set[str] = set()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image; without ``crop`` of ``like``, or the first that can be read."""
        if self.crop is not None:
            return (self.channels, self.crop, self.crop)
        for path in (self.like, *self.paths):
            with suppress(DataError):
                return tuple(self._read(path).shape)
        return tuple(self._read(self.like).shape)

    def _read(self, path: Path) -> Tensor:
        pixels = read_image(path, self.channels, self.max_pixels, self._warned)
        return fit_size(pixels, self.resize, self.crop, path, self.interpolation)

    def image(self, position: int) -> Tensor:
        """One image."""
        pixels = self._read(self.paths[position])
        if tuple(pixels.shape) != self.shape:
            raise DataError(
                f"{self.paths[position]} has {_size(pixels)} pixels (width x height), but {self.like} has "
                f"{self.shape[2]}x{self.shape[1]}. Images of different sizes need image_size."
            )
        return pixels

    def file(self, position: int) -> str:
        """Name of an image's file, below ``root`` where it is there."""
        path = self.paths[position]
        below = self.root is not None and path.is_relative_to(self.root)
        return (path.relative_to(self.root) if below and self.root is not None else path).as_posix()


def fit_size(
    pixels: Tensor, resize: int | None, crop: int | None, name: object, interpolation: str = "bilinear"
) -> Tensor:
    """An image (C, H, W) with its shorter side resized, and the middle square cut out; ``name`` is for the message."""
    if resize is not None:
        pixels = functional.resize(pixels, [resize], interpolation=InterpolationMode(interpolation), antialias=True)
    if crop is None:
        return pixels
    if min(pixels.shape[1:]) < crop:
        raise DataError(
            f"{name} has {_size(pixels)} pixels; expected at least {crop}x{crop}. Lower image_size, or fetch the file "
            "again."
        )
    return functional.center_crop(pixels, [crop, crop])  # type: ignore[no-any-return]


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"
