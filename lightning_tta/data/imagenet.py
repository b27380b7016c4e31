"""Shifted sets for ImageNet nets: folders of synsets, or of class numbers."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_tta.backbones.label_spaces import imagenet_synsets
from lightning_tta.data.base import ShiftedDataModule, Split
from lightning_tta.data.folder import FileImages, list_classes, read_image
from lightning_tta.data.images import Images
from lightning_tta.errors import ConfigError, DataError, check_range


def list_imagenet(folder: Path) -> tuple[list[Path], Tensor]:
    """Image files under ``<folder>/<class>/`` and their labels among the 1000 classes.

    A class folder is a synset (``n01440764``) or the class's number (``0`` to ``999``); the label is read from the
    name, never from the order of the folders.

    Raises:
        DataError: If a folder is neither, or there are no images.
    """
    number = {synset: label for label, synset in enumerate(imagenet_synsets())}
    number |= {str(label): label for label in range(1000)}
    names = list_classes(folder)
    unknown = [name for name in names if name not in number]
    if unknown:
        raise DataError(
            f"{folder} has folders that are neither a synset of ImageNet (n01440764) nor a number from 0 to 999: "
            f"{', '.join(unknown[:10])}. Move them elsewhere."
        )
    endings = Image.registered_extensions()
    found = [
        (path, number[name])
        for name in sorted(names, key=lambda name: number[name])
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in endings
    ]
    if not found:
        raise DataError(f"{folder} has class folders without images. Expected {folder}/<class>/<image files>.")
    return [path for path, _ in found], torch.tensor([label for _, label in found])


class _Cropped(FileImages):
    """Images resized to a shorter side, then cut to the middle square."""

    def __init__(self, paths: list[Path], labels: Tensor, resize: int, size: int) -> None:
        super().__init__(paths, labels, size, like=paths[0])
        self.resize, self.side = resize, size

    def image(self, position: int) -> Tensor:
        """One image."""
        from torchvision.transforms.v2 import functional

        pixels = functional.resize(read_image(self.paths[position], None), [self.resize], antialias=True)
        cut: Tensor = functional.center_crop(pixels, [self.side, self.side])
        return cut


class ImageNetData(ShiftedDataModule):
    """ImageNet-A, -R, -V2, -Sketch or any set for a net of 1000 classes: ``<folder>/<class>/*``.

    Class folders are synsets or numbers; either way the label is the position among the 1000 logits. For prediction
    only. See :class:`ShiftedDataModule` for the other arguments.

    Args:
        folders: Name of a domain -> its folder.
        resize: Images are resized to this shorter side first.
        image_size: Then this middle square is cut out; at most ``resize``.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.

    Raises:
        ConfigError: On a wrong value.
        DataError: If a folder is missing or has other classes.
    """

    name = "imagenet"

    def __init__(self, folders: dict[str, str], resize: int = 256, image_size: int = 224, **kwargs: Any) -> None:
        check_range("image_size", image_size, 32, integer=True)
        check_range("resize", resize, image_size, integer=True)
        if not folders:
            raise ConfigError("folders must name at least one set, such as {imagenet_a: data/imagenet-a}.")
        self.folders = {name: Path(path).expanduser() for name, path in folders.items()}
        self.resize, self.image_size = resize, image_size
        super().__init__(**kwargs)
        for folder in self.folders.values():
            if not folder.is_dir():
                raise DataError(f"There is no folder {folder}. Expected {folder}/<class>/<image files>.")

    @cached_property
    def class_names(self) -> list[str]:
        """The 1000 synsets."""
        return imagenet_synsets()

    def clean(self, split: Split) -> Images:
        """The first folder's images; there are none to train on."""
        if split != "test":
            raise DataError("ImageNetData is for prediction: it has no training or validation images.")
        return self.natural_domain(next(iter(self.folders)))

    def natural_names(self) -> list[str]:
        """Names of the folders."""
        return list(self.folders)

    def natural_domain(self, name: str) -> Images:
        """The images of a folder."""
        return _Cropped(*list_imagenet(self.folders[name]), self.resize, self.image_size)

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256(f"{self.resize}|{self.image_size}".encode())
        for name in sorted(set(self.folders) & set(self.domain_names)):
            for path in list_imagenet(self.folders[name])[0]:
                content.update(f"{name}|{path.parent.name}/{path.name}|{path.stat().st_size}\n".encode())
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """Hash of the names and sizes (in bytes) of the files in use, and of the sizes in pixels."""
        return self._digest

    def memo_key(self) -> str:
        """The digest and the places."""
        return f"{self._digest}|{[str(folder.resolve()) for folder in self.folders.values()]}"
