"""Shifted sets for ImageNet nets: folders of synsets, or of class numbers."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_tta.data import augmentations, splits
from lightning_tta.data.base import Split
from lightning_tta.data.corruptions.corrupt import CLEAN
from lightning_tta.data.domain_names import split_severity
from lightning_tta.data.file_images import FileImages, Listing, list_images
from lightning_tta.data.images import Images
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.data.storage.download import IMAGENET_C, fetch_and_unpack, fetch_imagenet
from lightning_tta.data.storage.paths import check_file, check_folder
from lightning_tta.errors import ConfigError, DataError, check_range
from lightning_tta.imagenet_classes import imagenet_synsets


def list_imagenet(folder: Path) -> Listing:
    """Image files under ``<folder>/<class>/``; labels are read from the names, never from the order of the folders."""
    label_of = {name: label for label, synset in enumerate(imagenet_synsets()) for name in (synset, str(label))}
    return list_images(folder, label_of, "synsets of ImageNet (n01440764) or numbers from 0 to 999")


class ImageNetData(FileData):
    """ImageNet, ImageNet-C, -A, -R, -V2, -Sketch or any set for a net of 1000 classes: ``<folder>/<class>/*``.

    Class folders are synsets or numbers; either way the label is the position among the 1000 logits. With
    ``function_set="published"`` corruptions come from ``<corrupted>/<corruption>/<severity>/<synset>/*.JPEG``, which
    is not resized; the other function sets corrupt the images of ``<source>/val``.

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
            :mod:`lightning_tta.data.storage.download`).
        **kwargs: Channels, stream, domains, batch sizes: the arguments of :class:`FileData`.

    Raises:
        ConfigError: On a wrong value.
        DataError: If a folder is missing or has other classes.
    """

    has_published = True

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
        self.name = "imagenet_c" if self.published_names else "imagenet"
        if self.published_names and self.corrupted is None:
            raise ConfigError('function_set="published" needs corrupted=FOLDER, a copy of ImageNet-C.')
        if not download:
            self.prepare_data()

    def _folders_in_use(self) -> dict[str, Path]:
        """The folders that the stream reads, by domain; ``clean`` also stands for corruptions made here."""
        used = {name: self.folders[name] for name in self.domain_names if name in self.folders}
        used |= {name: self._published_folder(name) for name in self.published_names}
        if self.source is not None and set(self.domain_names) - set(used):
            used[CLEAN] = self.source / "val"
        return used

    @property
    def resized_to(self) -> int | None:
        """Shorter side of images before the middle is cut out; none where all are ImageNet-C's own."""
        return self.resize if set(self.domain_names) - set(self.published_names) else None

    def prepare_data(self) -> None:
        """Download what is missing, if asked to, and check that all is there; once per machine."""
        for name, folder in self._folders_in_use().items():
            if self.download and name in self.folders:
                fetch_imagenet(name, folder)
            elif self.download and name in self.published_names:
                fetch_and_unpack(IMAGENET_C[folder.parent.name], folder.parents[1], folder.is_dir)
            check_folder(folder)
        if self.image_list is not None:
            check_file(self.image_list, "lines <synset>/<file name>")

    def _published_folder(self, name: str) -> Path:
        corruption, severity = split_severity(name)
        return (self.corrupted or Path()) / corruption / str(severity or self.severity)

    @cached_property
    def class_names(self) -> list[str]:
        """The 1000 synsets."""
        return imagenet_synsets()

    def _list(self, folder: Path) -> Listing:
        """The images of a folder, or those of them on the list."""
        paths, labels = list_imagenet(folder)
        if self.image_list is None:
            return paths, labels
        number = {f"{path.parent.name}/{path.name}": position for position, path in enumerate(paths)}
        lines = [line.split()[0] for line in self.image_list.read_text().splitlines() if line.strip()]
        names = ["/".join(line.split("/")[-2:]) for line in lines]
        missing = [name for name in names if name not in number]
        if missing or not names:
            raise DataError(
                f"{folder} lacks {len(missing)} of the {len(names)} images that {self.image_list} lists, such as "
                f"{missing[0] if missing else 'any at all'}. Expected lines <synset>/<file name>."
            )
        chosen = [number[name] for name in names]
        return [paths[position] for position in chosen], labels[chosen]

    def _images(self, listing: Listing, root: Path) -> FileImages:
        return self.file_images(listing, self.resize, self.image_size, root)

    def clean(self, split: Split) -> Images:
        """The images of ``<source>/val`` (test) and of ``<source>/train``, some of which are held back (val)."""
        if self.source is None:
            if split == "test" and self.folders:
                return self.natural_domain(next(iter(self.folders)))
            raise DataError(f"There are no {split} images: pass source=FOLDER with train/<class>/* and val/<class>/*.")
        if split == "test":
            return self._images(self._list(self.source / "val"), self.source / "val")
        images = self._images(list_imagenet(self.source / "train"), self.source / "train")
        return splits.select(images, splits.validation_count(len(images), self.num_val) == (split == "val"))

    def natural_names(self) -> list[str]:
        """Names of the folders."""
        return list(self.folders)

    def natural_domain(self, name: str) -> Images:
        """The images of a folder."""
        return self._images(list_imagenet(self.folders[name]), self.folders[name])

    def published(self, corruption: str, severity: int) -> Images:
        """The images of one folder of ImageNet-C."""
        folder = self._published_folder(f"{corruption}@{severity}")
        return self.file_images(self._list(folder), None, self.image_size, folder)

    def digest_content(self) -> Iterator[bytes]:
        """The sizes in pixels, and names and contents of the files in use."""
        yield f"{self.resize}|{self.image_size}{self.kind}".encode()
        folders = {"val" if name == CLEAN else name: folder for name, folder in self._folders_in_use().items()}
        for name, folder in sorted(folders.items()):
            listing = list_imagenet(folder) if name in self.folders else self._list(folder)
            yield from self.file_lines(name, listing[0], folder)

    def cache_key(self) -> str:
        """The digest and the places."""
        return f"{self.digest()}|{self.source}|{[str(folder.resolve()) for folder in self.folders.values()]}"

    def augmentation(self) -> augmentations.Augmentation:
        """A random crop of 35 to 100 % of the (already cut) image, resized, and a horizontal flip."""
        return augmentations.crop_and_flip(self.image_size, 0.35)
