"""Shifted sets for ImageNet nets: folders of synsets, or of class numbers."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning_tta.data import augmentations, splits
from lightning_tta.data.base import Split
from lightning_tta.data.corruptions.corrupt import CLEAN
from lightning_tta.data.domain_names import split_severity
from lightning_tta.data.file_images import FileImages, Listing, list_images
from lightning_tta.data.images import Images
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.data.storage.download import IMAGENET_C, fetch_and_unpack, fetch_imagenet
from lightning_tta.data.storage.paths import check_file, check_folder
from lightning_tta.errors import ConfigError, DataError, check_choice, check_range
from lightning_tta.imagenet_classes import imagenet_synsets

USUAL_NUM_VAL = 10_000


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
        resize: Images are resized to this shorter side first; not those of ImageNet-C. By default what the published
            weights of a predict run were made for, else 256.
        image_size: Then this middle square is cut out; at most ``resize``. By default the same, else 224.
        interpolation: ``bilinear`` or ``bicubic``. By default the same, else ``bilinear``.
        already_cut: Whether the images are such middle squares already: then they are resized to ``image_size`` where
            they have another size, and nothing is cut off.
        num_val: Training images held back to validate on, at least 1. By default 10,000, at most a tenth of them.
        num_source: For a ``source`` without ``train``: so many images of ``val``, a fixed random choice, take the place
            of the training images (``num_val`` included), for methods that look at the source first. They are no test
            images then.
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
        resize: int | None = None,
        image_size: int | None = None,
        num_val: int | None = None,
        download: bool = False,
        interpolation: Literal["bilinear", "bicubic"] | None = None,
        already_cut: bool = False,
        num_source: int = 0,
        **kwargs: Any,
    ) -> None:
        if image_size is not None:
            check_range("image_size", image_size, 32, integer=True)
        if resize is not None:
            check_range("resize", resize, image_size or 32, integer=True)
        check_choice("interpolation", interpolation, (None, "bilinear", "bicubic"))
        if num_val is not None:
            check_range("num_val", num_val, 1, integer=True)
        check_range("num_source", num_source, 0, integer=True)
        if already_cut and resize is not None:
            raise ConfigError(f"already_cut=True: nothing is cut off, so leave resize={resize} out.")
        if not (folders or source or corrupted):
            raise ConfigError(
                "ImageNetData needs folders, such as {imagenet_a: data/imagenet-a}, or source, or corrupted (a copy of "
                "ImageNet-C, with function_set: published)."
            )
        self.folders = {name: Path(path).expanduser() for name, path in (folders or {}).items()}
        self.source = Path(source).expanduser() if source else None
        self.corrupted = Path(corrupted).expanduser() if corrupted else None
        self.image_list = Path(image_list).expanduser() if image_list else None
        self.resize, self.image_size, self.interpolation = resize, image_size, interpolation
        self.already_cut, self.num_val, self.num_source, self.download = already_cut, num_val, num_source, download
        super().__init__(**kwargs)
        self.name = "imagenet_c" if self.published_names else "imagenet"
        if self.published_names and self.corrupted is None:
            raise ConfigError('function_set="published" needs corrupted=FOLDER, a copy of ImageNet-C.')
        if num_source and (self.source is None or self.published_names):
            raise ConfigError(
                f"num_source={num_source} takes images of source/val: it needs source=FOLDER, and corruptions made "
                'here, not function_set="published".'
            )
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
    def _preprocessing(self) -> tuple[int, int, str]:
        """Shorter side before the middle is cut out, side of the middle, interpolation.

        Raises:
            ConfigError: If ``resize`` is less than what the net wants to have cut out.
        """
        net = self._net if self._net.get("pretrained") else {}  # other weights may be for any size
        sides = list(net.get("input_size") or [])[1:]
        square = sides[0] if len(sides) == 2 and sides[0] == sides[1] else None
        image_size = self.image_size or square or 224
        default = 256 if square is None else round(image_size / (net.get("crop_pct") or 1.0))
        resize = image_size if self.already_cut else self.resize or max(image_size, default)
        if resize < image_size:
            raise ConfigError(
                f"resize={resize} is less than {image_size}, which the net takes. Set image_size as well."
            )
        known = net.get("interpolation") in ("bilinear", "bicubic")
        return resize, image_size, self.interpolation or (str(net["interpolation"]) if known else "bilinear")

    @property
    def resized_to(self) -> int | None:
        """Shorter side of images before the middle is cut out; none where all are cut already."""
        computed = set(self.domain_names) - set(self.published_names)
        return self._preprocessing[0] if computed and not self.already_cut else None

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
        resize, image_size, interpolation = self._preprocessing
        return self.file_images(listing, resize, image_size, root, interpolation=interpolation)

    def clean(self, split: Split) -> Images:
        """The images of ``<source>/val`` (test) and of ``<source>/train``, some of which are held back (val).

        With ``num_source`` both are of ``<source>/val``.
        """
        if self.source is None:
            if split == "test" and self.folders:
                return self.natural_domain(next(iter(self.folders)))
            raise DataError(f"There are no {split} images: pass source=FOLDER with train/<class>/* and val/<class>/*.")
        if split == "test" or self.num_source:
            images: Images = self._images(self._list(self.source / "val"), self.source / "val")
            if not self.num_source:
                return images
            if self.num_source >= len(images):
                raise DataError(
                    f"{self.source / 'val'} has {len(images)} images: num_source={self.num_source} leaves none."
                )
            of_source = splits.validation_count(len(images), self.num_source)
            images = splits.select(images, of_source == (split != "test"))
            if split == "test":
                return images
        elif not (self.source / "train").is_dir():
            raise DataError(
                f"There are no {split} images: {self.source / 'train'} does not exist. A method that looks at source "
                "images first can be given some of val in their place, which are then no test images: set num_source."
            )
        else:
            images = self._images(list_imagenet(self.source / "train"), self.source / "train")
        held_back = splits.validation_size(len(images), self.num_val, USUAL_NUM_VAL)
        return splits.select(images, splits.validation_count(len(images), held_back) == (split == "val"))

    def natural_names(self) -> list[str]:
        """Names of the folders."""
        return list(self.folders)

    def natural_domain(self, name: str) -> Images:
        """The images of a folder."""
        return self._images(list_imagenet(self.folders[name]), self.folders[name])

    def published(self, corruption: str, severity: int) -> Images:
        """The images of one folder of ImageNet-C."""
        folder = self._published_folder(f"{corruption}@{severity}")
        return self.file_images(self._list(folder), None, self._preprocessing[1], folder)

    def digest_content(self) -> Iterator[bytes]:
        """The sizes in pixels, and names and contents of the files in use."""
        resize, image_size, interpolation = self._preprocessing
        rest = f"|{interpolation}" * (interpolation != "bilinear") + f"|{self.num_source} of val" * bool(
            self.num_source
        )
        yield f"{resize}|{image_size}{rest}{self.kind}".encode()
        folders = {"val" if name == CLEAN else name: folder for name, folder in self._folders_in_use().items()}
        for name, folder in sorted(folders.items()):
            listing = list_imagenet(folder) if name in self.folders else self._list(folder)
            yield from self.file_lines(name, listing[0], folder)

    def cache_key(self) -> str:
        """The digest and the places."""
        return f"{self.digest()}|{self.source}|{[str(folder.resolve()) for folder in self.folders.values()]}"

    def augmentation(self) -> augmentations.Augmentation:
        """A random crop of 35 to 100 % of the (already cut) image, resized, and a horizontal flip."""
        return augmentations.crop_and_flip(self._preprocessing[1], 0.35)
