"""A user's own images, without labels: folders, lists of files, patterns, videos."""

import csv
import glob
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.data.base import Split
from lightning_tta.data.file_images import VIDEOS, natural_order, walk_images
from lightning_tta.data.images import Batch, Images, JoinedImages, SelectedImages
from lightning_tta.data.reading import endings
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.data.sets.video import VideoFrames
from lightning_tta.data.streams import StreamKind, needs_labels, orders_by_labels
from lightning_tta.errors import ConfigError, DataError, check_choice, check_range

DOMAIN = "images"
"""Name of the one domain of images that have no others."""


class ImageFolderData(FileData):
    """Images without labels, for ``predict``: a folder, a pattern, a list of files, a video.

    By default the images come as they are, in their order, in one domain. There is no accuracy: the report says what
    was predicted. A folder is read with all folders below it, in natural name order (``2.jpg`` before ``10.jpg``). A
    list keeps its order. Frames of a video come by time (needs the extra ``video``).

    Args:
        path: A folder (``photos``), a pattern (``photos/**/*.jpg``), a text file with one path a line (``files.txt``;
            paths below its own folder), a video, an image, or a list of these, one after the other. Or named domains:
            ``{day: photos/day, night: photos/night}``.
        image_size: The shorter side is resized to ``resize``, and the middle square of this side is cut out. By default
            as the preprocessing of the net says, and where it says nothing images are taken as they are, and must all
            be of one size.
        resize: By default ``image_size``, or what the net's preprocessing says with it.
        interpolation: ``bilinear`` or ``bicubic``; by default as the preprocessing of the net says, else ``bilinear``.
        every: Take every so many frames of a video, at least 1.
        class_names: Names of the classes in the order of the logits, or a text file with one a line: for
            ``predictions.csv``.
        labels: A file ``.csv`` with lines ``<file>,<class>``, the file named as in ``predictions.csv``, the class by
            its name or number. Images that it does not name have no label.
        stream: ``ordered``, or another kind: see :class:`ShiftedDataModule`.
        **kwargs: Channels, domains, batch sizes: the arguments of :class:`FileData`.

    Raises:
        ConfigError: On a wrong value, or a stream that needs labels where there are none.
        DataError: If there are no images, or a list or a video cannot be read.
    """

    own_images = True
    reads_ahead = False

    def __init__(
        self,
        path: dict[str, str | list[str]] | list[str] | str,
        image_size: int | None = None,
        resize: int | None = None,
        interpolation: Literal["bilinear", "bicubic"] | None = None,
        every: int = 1,
        class_names: list[str] | str | None = None,
        labels: str | None = None,
        stream: StreamKind = "ordered",
        **kwargs: Any,
    ) -> None:
        check_range("every", every, 1, integer=True)
        check_choice("interpolation", interpolation, (None, "bilinear", "bicubic"))
        for name, value in (("image_size", image_size), ("resize", resize)):
            if value is not None:
                check_range(name, value, 1, integer=True)
        if resize is not None and (image_size is None or resize < image_size):
            raise ConfigError(f"resize={resize} goes with an image_size that is not larger; got {image_size}.")
        if labels is None and orders_by_labels(stream, kwargs.get("dirichlet")):
            raise ConfigError(needs_labels(stream))
        named = path if isinstance(path, Mapping) else {DOMAIN: path}
        if not named or not all(named.values()):
            raise ConfigError(f"path must name a folder, files, or domains with their folders; got {path!r}.")
        self.paths = {str(k): [str(p) for p in ([v] if isinstance(v, (str, Path)) else v)] for k, v in named.items()}
        self.image_size, self.resize, self.interpolation, self.every = image_size, resize, interpolation, every
        self.labels_file = None if labels is None else Path(labels).expanduser()
        self._names, self.has_labels, self._told = class_names, labels is not None, False
        super().__init__(stream=stream, **kwargs)
        self._files = {
            name: [Path(os.path.abspath(path)) for path in find_files(entries)] for name, entries in self.paths.items()
        }
        self.name = f"images:{next(iter(self._roots.values())).resolve().name}"
        if not isinstance(path, Mapping) and len(self.paths[DOMAIN]) == 1:
            _say_of_folders(Path(os.path.abspath(Path(self.paths[DOMAIN][0]).expanduser())), self._files[DOMAIN])

    @cached_property
    def _roots(self) -> dict[str, Path]:
        """For each domain the folder below which its files are named: the one given, or the deepest that has all."""
        roots = {}
        for name, entries in self.paths.items():
            one = Path(os.path.abspath(Path(entries[0]).expanduser()))
            is_folder = len(entries) == 1 and one.is_dir()
            roots[name] = one if is_folder else Path(os.path.commonpath([path.parent for path in self._files[name]]))
        return roots

    @cached_property
    def class_names(self) -> list[str]:
        """The names given; empty without."""
        names = self._read_names()
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"class_names must be different; {', '.join(twice)} is there more than once.")
        return names

    def _read_names(self) -> list[str]:
        if isinstance(self._names, str):
            path = Path(self._names).expanduser()
            try:
                return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"Cannot read {path} ({error}). Expected a text file with one class name a line."
                ) from error
        return list(self._names or [])

    def natural_names(self) -> list[str]:
        """Names of the domains."""
        return list(self.paths)

    def fit_to_net(self, net: Mapping[str, Any]) -> None:
        """Take size, interpolation and channels from the net's preprocessing where they are not set."""
        super().fit_to_net(net)
        size, resize, _ = self._preprocessing
        if self.image_size is None and size is not None and not _is_published(net):
            warnings.warn(
                f"Images are resized to {resize} pixels and cut to {size}, as {net.get('name')} was published. If its "
                "weights here were trained on another size, set --data.image_size.",
                stacklevel=2,
            )

    @property
    def _preprocessing(self) -> tuple[int | None, int | None, str]:
        """Side of the square, shorter side before it is cut, interpolation."""
        interpolation: str = self.interpolation or "bilinear"
        if self.image_size is not None:
            return self.image_size, self.resize or self.image_size, interpolation
        _, *sides = self._net.get("input_size") or (0,)
        if len(sides) != 2 or sides[0] != sides[1]:
            return None, None, interpolation
        known = str(self._net.get("interpolation")) in ("bilinear", "bicubic")
        interpolation = self.interpolation or (str(self._net["interpolation"]) if known else "bilinear")
        return sides[0], round(sides[0] / (self._net.get("crop_pct") or 1.0)), interpolation

    @property
    def resized_to(self) -> int | None:
        """Shorter side of images before the middle is cut out."""
        return self._preprocessing[1]

    def natural_domain(self, name: str) -> Images:
        """The images of a domain."""
        size, resize, interpolation = self._preprocessing
        root, sets, files = self._roots[name], list[Images](), list[Path]()

        def flush() -> None:
            if files:
                listing = (list(files), torch.full((len(files),), -1))
                sets.append(self.file_images(listing, resize, size, root, interpolation=interpolation))
                files.clear()

        for path in self._files[name]:
            if path.suffix.lower() in VIDEOS:
                flush()
                title = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
                sets.append(VideoFrames(path, title, self.every, resize, size, self._channels, interpolation))
            else:
                files.append(path)
        flush()
        images = sets[0] if len(sets) == 1 else JoinedImages(sets)
        if self.labels_file is not None:
            images = SelectedImages(images, torch.arange(len(images)))
            images.labels = self._labels_of(images)
        return images

    def _labels_of(self, images: Images) -> Tensor:
        label_of = read_labels(self.labels_file, self.class_names) if self.labels_file is not None else {}
        files = [images.file(position) for position in range(len(images))]
        labels = torch.tensor([label_of.get(file, -1) for file in files])
        if not bool((labels >= 0).any()):
            raise DataError(
                f"{self.labels_file} names none of the images, such as {images.file(0)}. Expected lines <file>,<class> "
                "with the files named as in predictions.csv."
            )
        unknown = sorted({*label_of} - {*files}) if len(self.paths) == 1 else []  # else of another domain
        if unknown and not self._told:
            self._told = True
            warnings.warn(
                f"{len(unknown)} of {len(label_of)} files in {self.labels_file} are none of the images, such as "
                f"{unknown[0]}; an image is named {files[0]}.",
                stacklevel=4,
            )
        return labels

    def clean(self, split: Split) -> Images:
        """All images, for corruptions; there are none to train on."""
        if split != "test":
            raise DataError(
                f"ImageFolderData has no {split} images. To train, or for a method that must see source data, use "
                "FolderData (--data FolderData --data.root FOLDER with train/<class>/* and test/<class>/*)."
            )
        domains = [self.natural_domain(name) for name in self.paths]
        return domains[0] if len(domains) == 1 else JoinedImages(domains)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Refused without labels."""
        if not self.has_labels:
            raise DataError("These images have no labels, so there is nothing to test. Give --data.labels FILE.csv.")
        missing = sum(int((self.natural_domain(name).labels < 0).sum()) for name in self.paths)
        if missing:
            raise DataError(f"{missing} images are not in {self.labels_file}; test needs a label for each image.")
        return super().test_dataloader()

    def digest_content(self) -> Iterator[bytes]:
        """How images are resized, and order, names and contents of the files, labels included."""
        yield f"{self._preprocessing}|{self.every}{self.kind}".encode()
        for name, paths in self._files.items():
            yield from self.file_lines(name, paths, self._roots[name])
        if self.labels_file is not None:
            for name in self.paths:
                yield self.natural_domain(name).labels.numpy().tobytes()


def find_files(entries: Sequence[str]) -> list[Path]:
    """The files that folders, patterns, lists, images and videos name, in order.

    Raises:
        DataError: If one of them names nothing.
    """
    files = list[Path]()
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(walk_images(path), key=lambda file: natural_order(file.relative_to(path)))
            if not inside:
                raise DataError(
                    f"{path} has no images. It has {_some_of(path)}. Expected {', '.join(_COMMON)} and others."
                )
            files += inside
        elif path.suffix.lower() == ".txt":
            files += read_list(path)
        elif path.is_file() or (len(entries) > 1 and not glob.has_magic(entry)):
            files.append(path)  # of a list, a missing file is a damaged image
        else:
            files += _matches(str(path))
    if not any(path.exists() for path in files):
        raise DataError(f"None of the {len(files)} files exists, such as {files[0]}. Check the paths.")
    return files


_COMMON = (".jpg", ".png", ".webp", ".tif", ".bmp")


def _some_of(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"{len(names)} entries, such as {', '.join(names[:3])}" if names else "nothing in it"


def _matches(pattern: str) -> list[Path]:
    """The image and video files that fit a pattern, in natural name order."""
    if not glob.has_magic(pattern):
        raise DataError(
            f"{pattern} does not exist. Expected a folder, a file, a list (.txt) or a pattern such as *.jpg."
        )
    known = endings() | VIDEOS
    paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    found = [path for path in paths if path.suffix.lower() in known and not path.is_dir()]
    if not found:
        others = f"; {len(paths)} others fit" if paths else ""
        raise DataError(f"No image fits {pattern}{others}. In a shell put the pattern in quotes; ** is any folder.")
    return sorted(found, key=natural_order)


def read_list(path: Path) -> list[Path]:
    """Files named in a text file, one a line, relative to its folder; as all such files UTF-8, also with its mark."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read {path} ({error}). Expected a text file with the path of one image a line."
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"{path} names no files. Expected the path of one image a line.")
    return [path.parent / Path(name).expanduser() for name in names]


def read_labels(path: Path, class_names: Sequence[str]) -> dict[str, int]:
    """Labels by file from lines ``<file>,<class>``, the class a name or a number from 0; a first line may be a head."""
    number_of = {name: number for number, name in enumerate(class_names)}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read {path} ({error}). Expected lines <file>,<class>.") from error
    labels = dict[str, int]()
    for line, row in enumerate(rows, 1):
        name, label = (row[0].strip(), row[1].strip()) if len(row) == 2 else ("", "")
        number = number_of.get(label, int(label) if label.isascii() and label.isdecimal() else -1)
        if label in number_of or (number >= 0 and (not class_names or number < len(class_names))):
            if labels.setdefault(name, number) != number:
                raise DataError(f"{path}, line {line}: {name} had another class before: {labels[name]}, now {number}.")
        elif line > 1 or [cell.strip().lower() for cell in row] not in (["file", "class"], ["file", "label"]):
            known = f"one of {', '.join(class_names[:10])}" if class_names else "a number from 0"
            raise DataError(f"{path}, line {line}: {','.join(row)!r}. Expected <file>,<class>, the class {known}.")
    return labels


def _say_of_folders(folder: Path, files: Sequence[Path]) -> None:
    """Warn where sub-folders could be classes."""
    if not folder.is_dir():
        return
    names = {path.relative_to(folder).parts[0] for path in files if len(path.relative_to(folder).parts) > 1}
    if len(names) > 1 and not any(path.parent == folder for path in files):
        shown = ", ".join(sorted(names)[:5])
        warnings.warn(
            f"{folder} has {len(names)} sub-folders ({shown}), which could be classes: here they are not. If they are, "
            f"use --data FolderData --data.root {folder}, which measures accuracy.",
            stacklevel=3,
        )


def _is_published(net: Mapping[str, Any]) -> bool:
    """Whether weights are those that the preprocessing belongs to, or nobody can tell."""
    return bool(net.get("pretrained")) or str(net.get("name", "")).startswith("cifar/") or "name" not in net
