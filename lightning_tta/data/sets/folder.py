"""Images in folders of classes: ``<root>/train/<class>/*`` and ``<root>/test/<class>/*``."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import CLEAN, SETS
from lightning_tta.data.images import Images, SelectedImages
from lightning_tta.data.source import Split
from lightning_tta.data.streams import permutation
from lightning_tta.errors import ConfigError, DataError, check_range


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders.

    Raises:
        DataError: When there are none.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders. Expected {folder}/<class>/<image files>.")
    return names


def list_images(folder: Path, class_names: Sequence[str]) -> tuple[list[Path], Tensor]:
    """Image files of a folder of class folders, sorted, and their labels (N,).

    Raises:
        DataError: When a class folder is not one of ``class_names``, or there are no images.
    """
    unknown = sorted(set(list_classes(folder)) - set(class_names))
    if unknown:
        raise DataError(
            f"{folder} has classes that the source does not have: {', '.join(unknown[:10])}. "
            f"The source has: {', '.join(list(class_names)[:20])}. Rename or remove these folders."
        )
    endings = Image.registered_extensions()
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        if (folder / name).is_dir():
            found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in endings)
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise DataError(f"{folder} has class folders without images. Expected {folder}/<class>/<image files>.")
    return paths, torch.tensor(labels, dtype=torch.int64)


def read_image(path: Path, size: int | None) -> Tensor:
    """Decode one image as RGB: uint8, shape (3, H, W).

    Args:
        path: A file that PIL can read.
        size: The shorter side is resized to this, and the middle square is cut out. ``None``: as it is.

    Raises:
        DataError: When the file is missing or damaged.
    """
    try:
        with Image.open(path) as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"Cannot read the image {path}: {error}. Replace or remove the file.") from error
    if size is not None:
        from torchvision.transforms.v2 import functional

        pixels = functional.center_crop(functional.resize(pixels, [size], antialias=True), [size, size])
    return pixels


class FileImages(Images):
    """Images decoded when asked for.

    Args:
        paths: The files.
        labels: Their labels, shape (N,).
        size: See :func:`read_image`. With ``None``, all images must be as large as ``like``.
        like: A file of the expected size.
    """

    def __init__(self, paths: list[Path], labels: Tensor, size: int | None, like: Path) -> None:
        self.paths, self.labels, self.size, self.like = paths, labels, size, like

    @cached_property
    def _expected(self) -> torch.Size:
        return read_image(self.like, self.size).shape

    def image(self, position: int) -> Tensor:
        """One image."""
        pixels = read_image(self.paths[position], self.size)
        if pixels.shape != self._expected:
            wanted, given = (f"{shape[2]}x{shape[1]}" for shape in (self._expected, pixels.shape))
            raise DataError(
                f"{self.paths[position]} has {given} pixels (width x height), but {self.like} has {wanted}. "
                "Images of different sizes need image_size."
            )
        return pixels


class FolderData(ShiftedDataModule):
    """Images in class folders, in any format that PIL reads.

    The classes are the sorted folder names of ``<root>/train`` (of ``<root>/test`` where there is no train). Validation
    images come from ``<root>/val``, else they are a share of each class of the training images. Target folders have
    class folders with the same names; some may be missing. See :class:`ShiftedDataModule` for the other arguments.

    Args:
        root: Folder with ``test`` and, for training, ``train`` and optionally ``val``.
        image_size: The shorter side is resized to this, and the middle square is cut out. By default images are taken
            as they are, and must all be of one size.
        target_roots: Further domains: name of the domain -> folder of class folders. They become the default domains.
        val_share: Share of the training images to validate on where there is no ``<root>/val``, between 0 and 1.
        val_seed: Seed of this choice.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.

    Raises:
        ConfigError: On a wrong value.
        DataError: When a folder is missing.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None = None,
        target_roots: dict[str, str] | None = None,
        val_share: float = 0.1,
        val_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.root, self.image_size = Path(root).expanduser(), image_size
        self.target_roots = {name: Path(path).expanduser() for name, path in (target_roots or {}).items()}
        self.val_share, self.val_seed = val_share, val_seed
        if image_size is not None:
            check_range("image_size", image_size, 1, integer=True)
        check_range("val_share", val_share, 0, 0.9, low_open=True)
        check_range("val_seed", val_seed, 0, integer=True)
        taken = {CLEAN, "none", "reported", "held_out"}.union(*(set(s.REPORTED + s.HELD_OUT) for s in SETS.values()))
        if taken & set(self.target_roots):
            names = ", ".join(sorted(taken & set(self.target_roots)))
            raise ConfigError(f"target_roots: {names} already names a corruption or a group. Choose another name.")
        super().__init__(**kwargs)
        for folder in (self.root / "test", *self.target_roots.values()):
            if not folder.is_dir():
                raise DataError(f"There is no folder {folder}. Expected {folder}/<class>/<image files>.")
        self.name = f"folder:{self.root.resolve().name}"

    @cached_property
    def _class_names(self) -> list[str]:
        train = self.root / "train"
        return list_classes(train if train.is_dir() else self.root / "test")

    @property
    def class_names(self) -> list[str]:
        """Sorted names of the class folders."""
        return self._class_names

    @cached_property
    def _files(self) -> dict[str, tuple[list[Path], Tensor]]:
        folders = {"test": self.root / "test", **{split: self.root / split for split in ("train", "val")}}
        return {split: list_images(folder, self.class_names) for split, folder in folders.items() if folder.is_dir()}

    def _images(self, paths: list[Path], labels: Tensor) -> FileImages:
        return FileImages(paths, labels, self.image_size, like=self._files["test"][0][0])

    def clean(self, split: Split) -> Images:
        """The images of a split.

        Raises:
            DataError: When there is no training folder and the split is ``train`` or ``val``.
        """
        if split in self._files and (split != "train" or "val" in self._files):
            return self._images(*self._files[split])
        if "train" not in self._files:
            raise DataError(f"There is no folder {self.root / 'train'}. Expected {self.root}/train/<class>/<images>.")
        images = self._images(*self._files["train"])
        held_back = torch.zeros(len(images), dtype=torch.bool)
        for label in sorted(set(images.labels.tolist())):
            members = (images.labels == label).nonzero()[:, 0]
            order = torch.from_numpy(permutation(len(members), self.val_seed, label))
            count = min(len(members) - 1, max(1, round(self.val_share * len(members))))
            held_back[members[order[:count]]] = True
        return SelectedImages(images, (held_back == (split == "val")).nonzero()[:, 0])

    def natural_names(self) -> list[str]:
        """Names of the target folders."""
        return list(self.target_roots)

    def natural_domain(self, name: str) -> Images:
        """The images of a target folder."""
        return self._images(*list_images(self.target_roots[name], self.class_names))

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256(f"{self.image_size}|{self.class_names}".encode())
        used = [(name, folder) for name, folder in self.target_roots.items() if name in self.domain_names]
        for name, folder in (("test", self.root / "test"), *sorted(used)):
            for path in list_images(folder, self.class_names)[0]:
                content.update(f"{name}|{path.parent.name}/{path.name}|{path.stat().st_size}\n".encode())
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """Hash of the names and sizes (in bytes) of the test files and those of the targets in use, and image_size."""
        return self._digest

    def memo_key(self) -> str:
        """The digest, the place, and how the validation images are chosen."""
        places = [str(folder.resolve()) for folder in (self.root, *self.target_roots.values())]
        return f"{self._digest}|{places}|{self.val_share}|{self.val_seed}"

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """A random shift by up to an eighth of the side, and a horizontal flip."""
        from torchvision.transforms import v2

        height, width = self.clean("train").image(0).shape[1:]
        shift = v2.RandomCrop((height, width), padding=[width // 8, height // 8])
        return v2.Compose([shift, v2.RandomHorizontalFlip()])  # type: ignore[no-any-return]
