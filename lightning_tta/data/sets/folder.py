"""Images in folders of classes: ``<root>/train/<class>/*`` and ``<root>/test/<class>/*``."""

import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_tta.data import augmentations, splits
from lightning_tta.data.base import Split
from lightning_tta.data.file_images import (
    FileImages,
    Listing,
    has_images,
    hint_of_images,
    list_folders,
    list_images,
)
from lightning_tta.data.images import Images
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.data.storage.paths import check_folder
from lightning_tta.errors import DataError, check_range


class FolderData(FileData):
    """Images in class folders, in any format that PIL reads; for images without labels: :class:`ImageFolderData`.

    The classes are the sorted folder names of ``<root>/train`` (of ``<root>/test`` where there is no train). Validation
    images come from ``<root>/val``, else they are a share of each class of the training images. Target folders have
    class folders with the same names; some may be missing. The stream takes the targets, else the test images as they
    are; corruptions are made where ``domains`` names them.

    Args:
        root: Folder with ``test`` and, for training, ``train`` and optionally ``val``; or, to test only, the folder of
            the class folders itself.
        image_size: The shorter side is resized to this, and the middle square is cut out. By default images are taken
            as they are, and must all be of one size.
        target_roots: Further domains: name of the domain -> folder of class folders. They become the default domains.
        val_share: Share of the training images to validate on where there is no ``<root>/val``, between 0 and 1.
        val_seed: Seed of this choice.
        **kwargs: Channels, stream, domains, batch sizes: the arguments of :class:`FileData`.

    Raises:
        ConfigError: On a wrong value.
        DataError: When a folder is missing.
    """

    own_images = True

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
        super().__init__(**kwargs)
        self.test_folder = self.root / "test"
        if not (self.test_folder.is_dir() or (self.root / "train").is_dir()):
            if has_images(self.root):
                raise DataError(
                    f"{self.root} has images, but no class folders. Expected {self.root}/test/<class>/<image files>, "
                    f"or {self.root}/<class>/<image files>.{hint_of_images(self.root)}"
                )
            if self.root.is_dir() and any(entry.is_dir() for entry in self.root.iterdir()):
                self.test_folder = self.root
        for folder in (self.test_folder, *self.target_roots.values()):
            check_folder(folder)
        self.name = f"folder:{self.root.resolve().name}"

    @cached_property
    def class_names(self) -> list[str]:
        """Sorted names of the class folders."""
        train = self.root / "train"
        names = list_folders(train if train.is_dir() else self.test_folder)
        if len(names) == 1:
            warnings.warn(
                f"{self.root} has one class folder only, {names[0]!r}: every accuracy is the share of images that are "
                f"predicted as class 0.{hint_of_images(self.root)}",
                stacklevel=2,
            )
        return names

    def _list(self, folder: Path) -> Listing:
        label_of = {name: label for label, name in enumerate(self.class_names)}
        return list_images(folder, label_of, f"classes of the source ({', '.join(self.class_names[:20])})")

    @cached_property
    def _test(self) -> Listing:
        return self._list(self.test_folder)

    def _images(self, listing: Listing, root: Path | None = None) -> FileImages:
        return self.file_images(listing, self.image_size, self.image_size, root or self.root, like=self._test[0][0])

    def clean(self, split: Split) -> Images:
        """The images of a split."""
        if split == "test":
            return self._images(self._test)
        has_val = (self.root / "val").is_dir()
        if split == "val" and has_val:
            return self._images(self._list(self.root / "val"))
        check_folder(self.root / "train")
        images = self._images(self._list(self.root / "train"))
        if has_val:
            return images
        validation = splits.validation_share(images.labels, self.val_share, self.val_seed)
        return splits.select(images, validation == (split == "val"))

    def natural_names(self) -> list[str]:
        """Names of the target folders."""
        return list(self.target_roots)

    def natural_domain(self, name: str) -> Images:
        """The images of a target folder."""
        return self._images(self._list(self.target_roots[name]), self.target_roots[name])

    def digest_content(self) -> Iterator[bytes]:
        """``image_size``, and names and contents of the test files and those of the targets in use."""
        yield os.fsencode(f"{self.image_size}|{self.class_names}{self.kind}")
        yield from self.file_lines("test", self._test[0], self.test_folder)
        for name in sorted(set(self.target_roots) & set(self.domain_names)):
            yield from self.file_lines(name, self._list(self.target_roots[name])[0], self.target_roots[name])

    def cache_key(self) -> str:
        """The digest, the place, and how the validation images are chosen."""
        folders = [str(folder.resolve()) for folder in (self.root, *self.target_roots.values())]
        return f"{self.digest()}|{folders}|{self.val_share}|{self.val_seed}"

    def augmentation(self) -> augmentations.Augmentation:
        """A random shift by up to an eighth of the side, and a horizontal flip."""
        return augmentations.shift_and_flip(*self.clean("train").image(0).shape[1:])
