"""Shifted sets for ImageNet nets: folders of synsets, or of class numbers."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import split_severity
from lightning_tta.data.images import Images, SelectedImages
from lightning_tta.data.sets.folder import FileImages, list_classes, read_image
from lightning_tta.data.source import Split
from lightning_tta.data.storage.remotes import fetch_imagenet, fetch_imagenet_c
from lightning_tta.data.streams import permutation
from lightning_tta.errors import ConfigError, DataError, check_range
from lightning_tta.imagenet_classes import imagenet_synsets


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
    """Images resized to a shorter side (``None``: as they are), then cut to the middle square."""

    def __init__(self, paths: list[Path], labels: Tensor, resize: int | None, size: int) -> None:
        super().__init__(paths, labels, size, like=paths[0])
        self.resize, self.side = resize, size

    def image(self, position: int) -> Tensor:
        """One image."""
        from torchvision.transforms.v2 import functional

        pixels = read_image(self.paths[position], None)
        if self.resize is not None:
            pixels = functional.resize(pixels, [self.resize], antialias=True)
        elif min(pixels.shape[1:]) < self.side:
            raise DataError(
                f"{self.paths[position]} has {pixels.shape[2]}x{pixels.shape[1]} pixels; expected at least "
                f"{self.side}x{self.side}, as ImageNet-C is published. Lower image_size, or fetch the file again."
            )
        cut: Tensor = functional.center_crop(pixels, [self.side, self.side])
        return cut


class ImageNetData(ShiftedDataModule):
    """ImageNet, ImageNet-C, -A, -R, -V2, -Sketch or any set for a net of 1000 classes: ``<folder>/<class>/*``.

    Class folders are synsets or numbers; either way the label is the position among the 1000 logits. With
    ``function_set="published"`` corruptions come from ``<corrupted>/<corruption>/<severity>/<synset>/*.JPEG``, which
    is not resized; the other function sets corrupt the images of ``<source>/val``. See :class:`ShiftedDataModule` for
    the other arguments.

    Args:
        folders: Name of a domain -> its folder.
        source: Folder with ``train`` and ``val``; only for training, clean images and corruptions made here.
        corrupted: Folder of ImageNet-C.
        image_list: File with lines ``<synset>/<file name>``: only these of the images of ``val`` and ImageNet-C, in
            this order (published numbers use all 50,000, or a list of 5,000).
        resize: Images are resized to this shorter side first; not those of ImageNet-C.
        image_size: Then this middle square is cut out; at most ``resize``.
        num_val: Training images held back to validate on, at least 1.
        download: Fetch the archives of ImageNet-C, -A, -R and -V2 that are missing (see
            :mod:`lightning_tta.data.storage.remotes`).
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.

    Raises:
        ConfigError: On a wrong value.
        DataError: If a folder is missing or has other classes.
    """

    def __init__(
        self,
        folders: dict[str, str] | None = None,
        source: str | None = None,
        corrupted: str | None = None,
        image_list: str | None = None,
        resize: int = 256,
        image_size: int = 224,
        num_val: int = 10_000,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        check_range("image_size", image_size, 32, integer=True)
        check_range("resize", resize, image_size, integer=True)
        check_range("num_val", num_val, 1, integer=True)
        if not (folders or source or corrupted):
            raise ConfigError(
                "ImageNetData needs folders, such as {imagenet_a: data/imagenet-a}, or source, or corrupted (a copy of "
                "ImageNet-C, with function_set: published)."
            )
        self.folders = {name: Path(path).expanduser() for name, path in (folders or {}).items()}
        self.source = Path(source).expanduser() if source else None
        self.corrupted = Path(corrupted).expanduser() if corrupted else None
        self.image_list = Path(image_list).expanduser() if image_list else None
        self.resize, self.image_size, self.num_val, self.download = resize, image_size, num_val, download
        super().__init__(**kwargs)
        self.name = "imagenet"
        if self.function_set == "published" and self._corrupted:
            self.name = "imagenet_c"
            if self.corrupted is None:
                raise ConfigError('function_set="published" needs corrupted=FOLDER, a copy of ImageNet-C.')
        if not download:
            self._check_folders()

    def _check_folders(self) -> None:
        wanted = [self.folders[name] for name in self.domain_names if name in self.folders]
        if self.name == "imagenet_c":
            wanted += [self._published_folder(name) for name in self._corrupted]
        elif set(self.domain_names) - set(self.folders) and self.source is not None:
            wanted.append(self.source / "val")
        for folder in wanted:
            if not folder.is_dir():
                state = "is a file" if folder.is_file() else "does not exist"
                raise DataError(f"The folder {folder} {state}. Expected {folder}/<class>/<image files>.")
        if self.image_list is not None and not self.image_list.is_file():
            raise DataError(f"There is no file {self.image_list}. Expected lines <synset>/<file name>.")

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; once per machine."""
        if self.download:
            for name in self.domain_names:
                if name in self.folders:
                    fetch_imagenet(name, self.folders[name])
                elif self.name == "imagenet_c" and not self._published_folder(name).is_dir():
                    assert self.corrupted is not None
                    fetch_imagenet_c(split_severity(name)[0], self.corrupted)
            self._check_folders()

    def _published_folder(self, name: str) -> Path:
        assert self.corrupted is not None
        corruption, severity = split_severity(name)
        return self.corrupted / corruption / str(severity or self.severity)

    @cached_property
    def class_names(self) -> list[str]:
        """The 1000 synsets."""
        return imagenet_synsets()

    def _listed(self, folder: Path) -> tuple[list[Path], Tensor]:
        """The images of a folder, or those of them on the list."""
        paths, labels = list_imagenet(folder)
        if self.image_list is None:
            return paths, labels
        number = {f"{path.parent.name}/{path.name}": position for position, path in enumerate(paths)}
        wanted = [line.strip() for line in self.image_list.read_text().splitlines() if line.strip()]
        wanted = ["/".join(line.split()[0].split("/")[-2:]) for line in wanted]
        missing = [line for line in wanted if line not in number]
        if missing or not wanted:
            raise DataError(
                f"{folder} lacks {len(missing)} of the {len(wanted)} images that {self.image_list} lists, such as "
                f"{missing[0] if missing else 'any at all'}. Expected lines <synset>/<file name>."
            )
        chosen = [number[line] for line in wanted]
        return [paths[position] for position in chosen], labels[chosen]

    def clean(self, split: Split) -> Images:
        """The images of ``<source>/val`` (test) and of ``<source>/train``, some of which are held back (val)."""
        if self.source is None:
            if split == "test" and self.folders:
                return self.natural_domain(next(iter(self.folders)))
            raise DataError(f"There are no {split} images: pass source=FOLDER with train/<class>/* and val/<class>/*.")
        if split == "test":
            return _Cropped(*self._listed(self.source / "val"), self.resize, self.image_size)
        images = _Cropped(*list_imagenet(self.source / "train"), self.resize, self.image_size)
        order = torch.from_numpy(permutation(len(images), 0))
        held_back = min(self.num_val, len(images) - 1)
        return SelectedImages(images, (order[:held_back] if split == "val" else order[held_back:]).sort().values)

    def natural_names(self) -> list[str]:
        """Names of the folders."""
        return list(self.folders)

    def natural_domain(self, name: str) -> Images:
        """The images of a folder."""
        return _Cropped(*list_imagenet(self.folders[name]), self.resize, self.image_size)

    def published(self, corruption: str, severity: int) -> Images:
        """The images of one folder of ImageNet-C."""
        return _Cropped(*self._listed(self._published_folder(f"{corruption}@{severity}")), None, self.image_size)

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256(f"{self.resize}|{self.image_size}".encode())
        files = {name: list_imagenet(self.folders[name])[0] for name in self.domain_names if name in self.folders}
        if self.name == "imagenet_c":
            files |= {name: self._listed(self._published_folder(name))[0] for name in self._corrupted}
        elif self.source is not None and set(self.domain_names) - set(files):
            files["val"] = self._listed(self.source / "val")[0]
        for name, paths in sorted(files.items()):
            for path in paths:
                content.update(f"{name}|{path.parent.name}/{path.name}|{path.stat().st_size}\n".encode())
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """Hash of the names and sizes (in bytes) of the files in use, and of the sizes in pixels."""
        return self._digest

    def memo_key(self) -> str:
        """The digest and the places."""
        return f"{self._digest}|{self.source}|{[str(folder.resolve()) for folder in self.folders.values()]}"

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """A random crop of 35 to 100 % of the (already cut) image, resized, and a horizontal flip."""
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(self.image_size, scale=(0.35, 1.0), antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])  # type: ignore[no-any-return]
