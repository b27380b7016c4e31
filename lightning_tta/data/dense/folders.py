"""Segmentation of a user's own images: folders of images and of masks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lightning_tta.data.base import Split
from lightning_tta.data.dense.base import DenseData
from lightning_tta.data.dense.scenes import IMAGES, MASKS, SceneImages, list_scenes
from lightning_tta.data.images import Images
from lightning_tta.data.reading import MAX_PIXELS
from lightning_tta.data.splits import select, validation_count
from lightning_tta.data.storage.contents import content_lines
from lightning_tta.errors import ConfigError, DataError, check_choice, check_names, check_range


class SegmentationFolderData(DenseData):
    """Images and masks in folders: ``<root>/test/images/*`` and ``<root>/test/masks/*`` with the same stems.

    A mask is a PNG with a class for each pixel as a number, grey of 8 or 16 bits or with a palette. Where a folder has
    no ``masks`` the run predicts without figures. To train, ``<root>/train`` and perhaps ``<root>/val`` are the same.
    The stream takes the targets, else the test images as they are; corruptions are made where ``domains`` names them.

    Args:
        root: Folder with ``test`` and, for training, ``train`` and perhaps ``val``; or, to test only, the folder of
            ``images`` and ``masks`` itself.
        classes: Names of the classes in the order of their numbers, or how many there are.
        ignore_index: Value of pixels that do not count; ``null``: all do.
        image_size: Height and width that images and masks are resized to. By default images are taken as they are,
            and must all be of one size. Figures are of the resized masks.
        target_roots: Further domains: name of the domain -> folder with ``images`` and perhaps ``masks``. They become
            the default domains.
        val_share: Share of the training images to validate on where there is no ``<root>/val``, between 0 and 1.
        channels: 3 for RGB, 1 for grey; files of the other kind are converted.
        max_pixels: Images with more pixels than this are refused before they are decoded.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`DenseData`.

    Raises:
        ConfigError: On a wrong value.
        DataError: When a folder is missing; an image has no mask beside others that have, or a mask no image; when it
            is read, if a mask is of another size than its image, or has a value that is no class.
    """

    task = "pixels"
    own_images = True
    reads_ahead = False

    def __init__(
        self,
        root: str,
        classes: list[str] | int,
        ignore_index: int | None = 255,
        image_size: list[int] | None = None,
        target_roots: dict[str, str] | None = None,
        val_share: float = 0.1,
        channels: Literal[1, 3] = 3,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        self.root = Path(root).expanduser()
        self.target_roots = {name: Path(path).expanduser() for name, path in (target_roots or {}).items()}
        if isinstance(classes, int):
            check_range("classes", classes, 2, integer=True)
            self._classes = [str(number) for number in range(classes)]
        else:
            check_names("classes", classes)
            if len(classes) < 2:
                raise ConfigError(f"classes must name two or more; got {classes!r}.")
            self._classes = list(classes)
        if image_size is not None:
            if not isinstance(image_size, (list, tuple)) or len(image_size) != 2:
                raise ConfigError(f"image_size must be [height, width], such as [512, 1024]; got {image_size!r}.")
            for side in image_size:
                check_range("image_size", side, 1, integer=True)
        check_range("val_share", val_share, 0, 0.9, low_open=True)
        check_choice("channels", channels, (1, 3))
        check_range("max_pixels", max_pixels, 1, integer=True)
        self.image_size = None if image_size is None else (image_size[0], image_size[1])
        self.ignore_index, self.val_share, self.channels, self.max_pixels = (
            ignore_index,
            val_share,
            channels,
            max_pixels,
        )
        super().__init__(**kwargs)
        if not self.root.is_dir():
            raise DataError(f"The folder {self.root} does not exist. Expected {self.root}/test/{IMAGES}/<image files>.")
        self.test_folder = self.root if (self.root / IMAGES).is_dir() else self.root / "test"
        self.name = f"folder:{self.root.resolve().name}"
        for name in sorted(set(self.target_roots) & set(self.domain_names)):
            list_scenes(self.target_roots[name])  # refuses what does not go together
        if not self.target_roots and self.test_folder.is_dir():
            list_scenes(self.test_folder)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, or their numbers."""
        return list(self._classes)

    def _scenes(self, folder: Path, *, masks_needed: bool = False) -> SceneImages:
        images, masks = list_scenes(folder, masks_needed=masks_needed)
        how = (self.image_size, self.num_classes, self.ignore_index, folder / IMAGES, self.channels, self.max_pixels)
        return SceneImages(images, masks, *how)

    def clean(self, split: Split) -> Images:
        """The images of a split."""
        if split == "test":
            return self._scenes(self.test_folder)
        has_val = (self.root / "val").is_dir()
        if split == "val" and has_val:
            return self._scenes(self.root / "val", masks_needed=True)
        images = self._scenes(self.root / "train", masks_needed=True)
        if has_val:
            return images
        validation = validation_count(len(images), max(1, round(self.val_share * len(images))))
        return select(images, validation == (split == "val"))

    def natural_names(self) -> list[str]:
        """Names of the target folders."""
        return list(self.target_roots)

    def natural_domain(self, name: str) -> Images:
        """The images of a target folder."""
        return self._scenes(self.target_roots[name])

    def digest_content(self) -> Iterator[bytes]:
        """Size, classes, and names and contents of the test files, masks included, and those of the targets in use."""
        yield os.fsencode(f"{self.image_size}|{self._classes}|{self.ignore_index}|{self.channels}")
        folders = {"test": self.test_folder} if self.test_folder.is_dir() else {}
        folders |= {name: self.target_roots[name] for name in sorted(self.target_roots) if name in self.domain_names}
        for name, folder in folders.items():
            images, masks = list_scenes(folder)
            for paths, kind in ((images, IMAGES), (masks or [], MASKS)):
                yield from content_lines(f"{name}/{kind}", paths, folder, self.cache)

    def cache_key(self) -> str:
        """The digest and the place."""
        return f"{self.digest()}|{[str(folder.resolve()) for folder in (self.root, *self.target_roots.values())]}"
