"""Image files in folders of classes: listed, decoded, resized and cropped."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_tta.data.images import Images
from lightning_tta.errors import DataError

Listing = tuple[list[Path], Tensor]
"""Files, and their labels int64 (N,)."""


def list_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders. Expected {folder}/<class>/<image files>.")
    return names


def list_images(folder: Path, label_of: Mapping[str, int], classes: str) -> Listing:
    """Image files of a folder of class folders, sorted by label and name; ``classes`` says which, for the message."""
    names = list_folders(folder)
    unknown = [name for name in names if name not in label_of]
    if unknown:
        first = ", ".join(unknown[:10])
        raise DataError(f"{folder} has class folders that are not {classes}: {first}. Rename or remove them.")
    endings = Image.registered_extensions()
    files = [path for name in sorted(names, key=label_of.__getitem__) for path in sorted((folder / name).iterdir())]
    paths = [path for path in files if path.suffix.lower() in endings]
    if not paths:
        raise DataError(f"{folder} has class folders without images. Expected {folder}/<class>/<image files>.")
    return paths, torch.tensor([label_of[path.parent.name] for path in paths])


class FileImages(Images):
    """Files with labels (N,), decoded as RGB when asked for.

    The shorter side is resized to ``resize``, and the middle square of side ``crop`` is cut out. Without ``crop`` all
    images must be as large as ``like``, by default the first.
    """

    def __init__(
        self, paths: list[Path], labels: Tensor, resize: int | None, crop: int | None, like: Path | None = None
    ) -> None:
        self.paths, self.labels, self.resize, self.crop, self.like = paths, labels, resize, crop, like or paths[0]

    @cached_property
    def _expected(self) -> torch.Size:
        return self._read(self.like).shape

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"Cannot read the image {path}: {error}. Replace or remove the file.") from error
        if self.resize is not None:
            pixels = functional.resize(pixels, [self.resize], antialias=True)
        if self.crop is None:
            return pixels
        if min(pixels.shape[1:]) < self.crop:
            expected = f"expected at least {self.crop}x{self.crop}"
            raise DataError(
                f"{path} has {_size(pixels)} pixels; {expected}. Lower image_size, or fetch the file again."
            )
        return functional.center_crop(pixels, [self.crop, self.crop])  # type: ignore[no-any-return]

    def image(self, position: int) -> Tensor:
        """One image."""
        pixels = self._read(self.paths[position])
        if self.crop is None and pixels.shape != self._expected:
            raise DataError(
                f"{self.paths[position]} has {_size(pixels)} pixels (width x height), but {self.like} has "
                f"{self._expected[2]}x{self._expected[1]}. Images of different sizes need image_size."
            )
        return pixels


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"
