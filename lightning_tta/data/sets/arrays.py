"""Images in arrays: ``.npz`` files with a training and a test part."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_tta.data import augmentations, splits
from lightning_tta.data.base import ShiftedDataModule, Split
from lightning_tta.data.images import Images, SelectedImages, StackedImages
from lightning_tta.data.storage.paths import check_file
from lightning_tta.errors import ConfigError, DataError, check_range

EXPECTED = "a .npz file with x_train, y_train, x_test and y_test; a target needs x_test and y_test"


class ArrayData(ShiftedDataModule):
    """Images in ``.npz`` files: a source with ``x_train, y_train, x_test, y_test``, and targets.

    Images are uint8 (N, H, W) or (N, H, W, 1 or 3), labels whole numbers from 0. Everything becomes RGB of
    ``image_size``. The stream takes the targets' test part, without targets the source's; corruptions are made where
    ``domains`` names them.

    Args:
        source: The source's file.
        targets: Name of a domain -> file with ``x_test`` and ``y_test``. They become the default domains.
        image_size: Side of the images in pixels, at least 32.
        num_train: At most this many training images, as many of each class as possible, the same ones each time.
        val_share: Share of the training images to validate on, between 0 and 1.
        class_names: Names of the classes in the order of the labels; by default ``0``, ``1``, and so on.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.

    Raises:
        ConfigError: On a wrong value.
        DataError: If a file is missing, damaged, or not as described.
    """

    own_images = True

    def __init__(
        self,
        source: str,
        targets: dict[str, str] | None = None,
        image_size: int = 32,
        num_train: int | None = None,
        val_share: float = 0.1,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.source = Path(source).expanduser()
        self.targets = {name: Path(path).expanduser() for name, path in (targets or {}).items()}
        self.image_size, self.num_train, self.val_share = image_size, num_train, val_share
        check_range("image_size", image_size, 32, integer=True)
        check_range("val_share", val_share, 0, 0.9, low_open=True)
        self._names = class_names
        if class_names is not None and len(set(class_names)) < max(2, len(class_names)):
            raise ConfigError(f"class_names must be at least two different names; got {class_names}.")
        if num_train is not None:
            check_range("num_train", num_train, 2, integer=True)
        super().__init__(**kwargs)
        for path in (self.source, *self.targets.values()):
            check_file(path, EXPECTED)
        self.name = f"arrays:{self.source.stem}"

    @cached_property
    def _source_labels(self) -> list[int]:
        return torch.unique(read_labels(self.source, "train")).tolist()  # type: ignore[no-any-return]

    @cached_property
    def class_names(self) -> list[str]:
        """The names given, else ``0`` to the largest label of the source's training part."""
        largest = self._source_labels[-1]
        names = self._names or [str(label) for label in range(largest + 1)]
        if largest >= len(names):
            raise DataError(f"{self.source}: y_train goes up to {largest}, but there are {len(names)} class_names.")
        return list(names)

    def _images(self, path: Path, split: str) -> StackedImages:
        _ = self.class_names  # do they suffice?
        images = _load(path, split, self.image_size, _stamp(path))
        unknown = sorted(set(images.labels.tolist()) - set(self._source_labels))
        if unknown:
            raise DataError(
                f"{path}: y_{split} has classes {unknown[:10]} that the source's y_train does not have; it has "
                f"{self._source_labels[:20]}. Give the labels the source's numbers, or remove these images."
            )
        return images

    def clean(self, split: Split) -> Images:
        """The source's images of a split."""
        if split == "test":
            return self._images(self.source, "test")
        images = self._images(self.source, "train")
        validation = splits.validation_share(images.labels, self.val_share)
        if split == "val":
            return splits.select(images, validation)
        # The first of each class, then the second of each, and so on: any beginning is as balanced as it can be.
        classes = [members[~validation[members]] for members in splits.shuffled_classes(images.labels)]
        turn = torch.cat([torch.arange(len(members)) for members in classes])
        chosen = torch.cat(classes)[turn.argsort(stable=True)][: self.num_train]
        return SelectedImages(images, chosen.sort().values)

    def natural_names(self) -> list[str]:
        """Names of the targets."""
        return list(self.targets)

    def natural_domain(self, name: str) -> Images:
        """The test images of a target."""
        return self._images(self.targets[name], "test")

    def digest_content(self) -> Iterator[bytes]:
        """``image_size``, and the test images and labels of the source and of the targets in use."""
        yield str(self.image_size).encode()
        used = {name: path for name, path in self.targets.items() if name in self.domain_names}
        for name, path in (("source", self.source), *sorted(used.items())):
            yield name.encode()
            for array in ("x_test", "y_test"):
                yield np.ascontiguousarray(read_array(path, array)).tobytes()

    def cache_key(self) -> str:
        """The digest, the place, and how training and validation images are chosen."""
        return f"{self.digest()}|{self.source.resolve()}|{_stamp(self.source)}|{self.num_train}|{self.val_share}"

    def augmentation(self) -> augmentations.Augmentation:
        """A small rotation, shift and change of size."""
        return augmentations.move_and_scale()


def read_array(path: Path, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """One array of a ``.npz`` file, without running code that is in it."""
    check_file(path, EXPECTED)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if name not in arrays:
                raise DataError(f"{path} has no array '{name}'; it has {sorted(arrays)}. Expected {EXPECTED}.")
            _check_head(path, name)
            return arrays[name]  # type: ignore[no-any-return]
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # TypeError: a .npy
        raise DataError(f"{path} is not a readable .npz file ({error}). Fetch or save it again.") from error


def _check_head(path: Path, name: str) -> None:
    """Raise :class:`DataError` where an array's head claims more than is there, or than the memory holds."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        claimed, there = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
    if claimed > there:
        raise DataError(
            f"{path}: '{name}' claims to have {' x '.join(map(str, shape))} values, but there are {there:,} bytes: the "
            "file is damaged. Fetch or save it again."
        )
    if claimed > _memory():
        raise DataError(
            f"{path}: '{name}' needs {claimed / 1e9:,.0f} GB, more than this machine's memory. Save fewer images, or "
            "use image files (FolderData)."
        )


def _memory() -> float:
    """Bytes of memory of this machine; infinity where nobody says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def read_labels(path: Path, split: str) -> Tensor:
    """Labels int64 (N,) of the split ``train`` or ``test`` of a file, N at least 1."""
    labels = read_array(path, f"y_{split}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        form = f"{labels.dtype} {labels.shape}"
        raise DataError(f"{path}: y_{split} must hold one whole number for each image; it is {form}.")
    if labels.min() < 0:
        raise DataError(f"{path}: y_{split} goes down to {labels.min()}. Number the classes from 0.")
    return torch.from_numpy(labels.astype(np.int64))


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when the file is written anew."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


@lru_cache(maxsize=8)
def _load(path: Path, split: str, size: int, stamp: tuple[int, int]) -> StackedImages:
    """The images (N, 3, size, size) of the split ``train`` or ``test`` of a file."""
    images, labels = read_array(path, f"x_{split}"), read_labels(path, split)
    form = f"{images.dtype} {images.shape}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise DataError(f"{path}: x_{split} must be uint8 images (N, H, W) or (N, H, W, 1 or 3); it is {form}.")
    if len(labels) != len(images):
        raise DataError(
            f"{path}: y_{split} has {len(labels)} labels; expected one for each of the {len(images)} images."
        )
    pixels = torch.from_numpy(images).view(len(images), *images.shape[1:3], -1).permute(0, 3, 1, 2)
    resized = [functional.resize(chunk, [size, size], antialias=True) for chunk in torch.split(pixels, 4096)]
    return StackedImages(torch.cat(resized).expand(-1, 3, -1, -1), labels)
