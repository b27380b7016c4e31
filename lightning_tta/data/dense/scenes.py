"""Image files with mask files of the same names, read when asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from lightning_tta.data.file_images import DecodedImages, walk_images
from lightning_tta.data.reading import MAX_PIXELS, read_image
from lightning_tta.data.storage.paths import check_folder
from lightning_tta.errors import DataError

IMAGES, MASKS = "images", "masks"
_INDEXED = ("1", "L", "P", "I", "I;16", "I;16B")
"""PIL's modes of files that hold one whole number a pixel; of a palette that is the number of the color."""
_NAMED = 5


def read_mask(path: Path) -> Tensor:
    """The class of each pixel, int64 (H, W), as a grey or palette file has it: numbers, not colors.

    Raises:
        DataError: If the file cannot be read, or has colors.
    """
    try:
        with Image.open(path) as file:
            mode = file.mode
            values = np.array(file) if mode in _INDEXED else None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"Cannot read the mask {path}: {error}. Replace the file.") from error
    if values is None:
        raise DataError(
            f"The mask {path} has pixels of mode {mode}; expected the number of a class for each pixel: a grey PNG of "
            "8 or 16 bits, or one with a palette. Save numbers in the place of colors."
        )
    return torch.from_numpy(values.astype(np.int64))


class SceneImages(DecodedImages):
    """Image files, each with its mask where there are masks.

    Args:
        paths: Of the images.
        masks: Of their masks; ``None``: there are none.
        size: Height and width that images (bilinearly) and masks (nearest pixel) are resized to; ``None``: all must be
            as large as the first.
        classes: Number of classes K.
        ignore_index: The value of a mask's pixels that do not count; ``None``: all do.
        root: Left out of the names of files.
        channels: 3 for RGB, 1 for grey.
        max_pixels: Larger files are refused.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        masks: Sequence[Path] | None,
        size: tuple[int, int] | None,
        classes: int,
        ignore_index: int | None,
        root: Path,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.paths, self.masks, self.size, self.classes = list(paths), masks, size, classes
        self.ignore_index, self.root, self.channels, self.max_pixels = ignore_index, root, channels, max_pixels
        self.labels = torch.full((len(self.paths),), -1)
        self._warned: set[str] = set()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image: ``size``, or that of the first one."""
        return (self.channels, *(self.size or self._read(self.paths[0]).shape[1:]))

    def _read(self, path: Path) -> Tensor:
        return read_image(path, self.channels, self.max_pixels, self._warned)

    def image(self, position: int) -> Tensor:
        """One image."""
        pixels = self._read(self.paths[position])
        if self.size is not None:
            return functional.resize(pixels, list(self.size), antialias=True)  # type: ignore[no-any-return]
        if tuple(pixels.shape) != self.shape:
            raise DataError(
                f"{self.paths[position]} has {_size(pixels)} pixels (width x height), but {self.paths[0]} has "
                f"{self.shape[2]}x{self.shape[1]}. Images of different sizes need image_size."
            )
        return pixels

    @property
    def has_targets(self) -> bool:
        """Whether there are masks."""
        return self.masks is not None

    def targets(self, positions: Tensor) -> Tensor:
        """Masks int64 (B, H, W), -1 where a pixel does not count."""
        return torch.stack([self._mask(position) for position in positions.tolist()])

    def _mask(self, position: int) -> Tensor:
        """One mask.

        Raises:
            DataError: With the file's name, if it is not as large as its image, or has another value than a class.
        """
        assert self.masks is not None
        path, image = self.masks[position], self.paths[position]
        mask = read_mask(path)
        try:
            with Image.open(image) as file:
                sides = file.size
        except OSError as error:
            raise DataError(f"Cannot read the image {image}: {error}. Replace or remove it.") from error
        if (mask.shape[1], mask.shape[0]) not in (sides, sides[::-1]):  # turned by EXIF
            raise DataError(
                f"The mask {path} has {_size(mask)} pixels (width x height), but its image {image} has "
                f"{sides[0]}x{sides[1]}. Make them of one size."
            )
        if self.ignore_index is not None:
            mask = torch.where(mask == self.ignore_index, -1, mask)
        wrong = torch.unique(mask[(mask < -1) | (mask >= self.classes)]).tolist()
        if wrong:
            counts = "" if self.ignore_index is None else f", and {self.ignore_index} (ignore_index) for none"
            raise DataError(
                f"The mask {path} has the value{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong[:_NAMED]))}; with "
                f"{self.classes} classes 0 to {self.classes - 1} are allowed{counts}. Correct the file, or set classes "
                "or ignore_index."
            )
        if self.size is not None:
            mask = functional.resize(mask[None], list(self.size), interpolation=InterpolationMode.NEAREST_EXACT)[0]
        if tuple(mask.shape) != self.shape[1:]:
            raise DataError(f"The mask {path} lies across its image {image}: turn it as the image's EXIF data say.")
        return mask

    def file(self, position: int) -> str:
        """Name of an image's file, below its folder of images where it is there."""
        path = self.paths[position]
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


def list_scenes(folder: Path, *, masks_needed: bool = False) -> tuple[list[Path], list[Path] | None]:
    """The files of ``folder/images``, and those of ``folder/masks`` with the same stems, where that folder is there.

    Raises:
        DataError: If there are no images, two of one stem, an image without a mask, or a mask without an image.
    """
    check_folder(folder / IMAGES, "<image files>")
    images = _by_stem(folder / IMAGES, "image")
    if not images:
        raise DataError(f"{folder / IMAGES} has no images. Expected {folder / IMAGES}/<image files>.")
    if not (folder / MASKS).is_dir():
        if masks_needed:
            check_folder(folder / MASKS, "<masks as PNG, with the stems of the images>")
        return list(images.values()), None
    masks = _by_stem(folder / MASKS, "mask")
    if lonely := [str(path) for stem, path in images.items() if stem not in masks]:
        raise DataError(
            f"{_some(lonely)} without a mask of the same stem in {folder / MASKS}. Add the mask, or remove the image; "
            "to predict without figures remove or rename the folder of masks."
        )
    if lonely := [str(path) for stem, path in masks.items() if stem not in images]:
        raise DataError(f"{_some(lonely)} without an image of the same stem in {folder / IMAGES}. Remove the mask.")
    return list(images.values()), [masks[stem] for stem in images]


def _by_stem(folder: Path, what: str) -> dict[str, Path]:
    """Image files by their place below a folder, without the ending."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        paths = walk_images(folder)
    by_stem: dict[str, Path] = {}
    for path in paths:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in by_stem:
            raise DataError(f"{by_stem[stem]} and {path} have one stem: which is the {what}? Remove or rename one.")
        by_stem[stem] = path
    return by_stem


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more are" if len(names) > _NAMED else " are" if len(names) > 1 else " is"
    return ", ".join(names[:_NAMED]) + more


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"
