"""Several domains of the same classes, one of them left out: ``<root>/<domain>/<class>/*``."""

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tta.data import augmentations, splits
from lightning_tta.data.base import Split
from lightning_tta.data.file_images import FileImages, Listing, list_folders, list_images
from lightning_tta.data.images import Images
from lightning_tta.data.sets.image_files import FileData
from lightning_tta.data.storage.paths import check_file, check_folder
from lightning_tta.errors import ConfigError, DataError, check_range


class DomainFolderData(FileData):
    """Leave one domain out: train on some domains of ``<root>/<domain>/<class>/*``, adapt on the others.

    For PACS, Office-Home, VLCS, TerraIncognita and their like. Training batches have as many images of each source
    domain, domain after domain. The stream takes all images of the targets. Where the source is tested, it is on its
    validation images. Names are compared without case, spaces and signs.

    Args:
        root: The folder of the domains; a folder ``kfold`` in it (PACS) is entered.
        target: The domain that is left out, or several.
        sources: The domains to train on; by default all others.
        image_size: Images are resized to this shorter side and cut to the middle square.
        val_share: Share of each class of each source domain to validate on, between 0 and 1.
        lists: Domain -> text file with lines ``<path below root> <label>`` instead of folders (DomainNet-126, VisDA).
            A relative path of a list is below ``root``.
        **kwargs: Channels, stream, batch sizes: the arguments of :class:`FileData`.

    Raises:
        ConfigError: On a wrong value, or a domain that is both source and target.
        DataError: If a folder or a domain is missing.
    """

    def __init__(
        self,
        root: str,
        target: str | list[str],
        sources: list[str] | None = None,
        image_size: int = 224,
        val_share: float = 0.1,
        lists: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.root, self.image_size, self.val_share = Path(root).expanduser(), image_size, val_share
        check_range("image_size", image_size, 1, integer=True)
        check_range("val_share", val_share, 0, 0.9, low_open=True)
        if (self.root / "kfold").is_dir():
            self.root = self.root / "kfold"
        check_folder(self.root, "<domain>/<class>/<image files>")
        self.lists = {name: self.root / Path(path).expanduser() for name, path in (lists or {}).items()}
        domains = list(self.lists) or list_folders(self.root)
        self.targets = [self._find(name, domains) for name in ([target] if isinstance(target, str) else target)]
        rest = [name for name in domains if name not in self.targets]
        self.sources = rest if sources is None else [self._find(name, domains) for name in sources]
        used = [*self.sources, *self.targets]
        if len(set(used)) < len(used) or not self.sources or not self.targets:
            both = f"sources {self.sources} and targets {self.targets}"
            raise ConfigError(f"{both} must be different domains, at least one each, none twice.")
        super().__init__(**kwargs)
        self.name = f"domains:{self.root.resolve().name}"

    def _find(self, name: str, domains: list[str]) -> str:
        """The domain with this name; copies of a data set say "Real World", "Real_World" or "real-world"."""

        def plain(text: str) -> str:
            return "".join(letter for letter in text.lower() if letter.isalnum())

        same = [name] if name in domains else [domain for domain in domains if plain(domain) == plain(name)]
        if len(same) != 1:
            problem = f"no domain {name!r}" if not same else f"several domains like {name!r}: {', '.join(same)}"
            raise DataError(f"{self.root} has {problem}. Name one of: {', '.join(domains)}.")
        return same[0]

    @cached_property
    def class_names(self) -> list[str]:
        """Sorted names of all class folders of the sources; with lists, the folders of the images of each label."""
        if self.lists:
            return name_labels(self._listings[name] for name in self.sources)
        return sorted({name for domain in self.sources for name in list_folders(self.root / domain)})

    @cached_property
    def _listings(self) -> dict[str, Listing]:
        used = [*self.sources, *self.targets]
        if not self.lists:
            label_of = {name: label for label, name in enumerate(self.class_names)}
            return {domain: list_images(self.root / domain, label_of, "classes of the sources") for domain in used}
        listings = {domain: read_list(self.lists[domain], self.root) for domain in used}
        largest = {domain: int(labels.max()) for domain, (_, labels) in listings.items()}
        count = 1 + max(largest[domain] for domain in self.sources)
        for domain in self.targets:
            if largest[domain] >= count:
                path, label = self.lists[domain], largest[domain]
                raise DataError(f"{path} has labels up to {label}, but the sources have {count} classes, from 0.")
        return listings

    def _images(self, domains: list[str]) -> FileImages:
        """The images of some domains, one after the other."""
        paths = [path for domain in domains for path in self._listings[domain][0]]
        labels = torch.cat([self._listings[domain][1] for domain in domains])
        return self.file_images((paths, labels), self.image_size, self.image_size, self.root)

    @cached_property
    def _validation(self) -> list[Tensor]:
        """Which images of each source are for validation."""
        labels = [self._listings[domain][1] for domain in self.sources]
        return [splits.validation_share(values, self.val_share, number) for number, values in enumerate(labels)]

    def clean(self, split: Split) -> Images:
        """The sources' images; ``test`` is the same as ``val``."""
        return splits.select(self._images(self.sources), torch.cat(self._validation) != (split == "train"))

    def source_domain_of_train(self) -> Tensor | None:
        """The position in ``sources`` of each training image, where there are several sources."""
        counts = torch.tensor([int((~mask).sum()) for mask in self._validation])
        return torch.arange(len(counts)).repeat_interleave(counts) if len(counts) > 1 else None

    def natural_names(self) -> list[str]:
        """Names of the targets."""
        return list(self.targets)

    def natural_domain(self, name: str) -> Images:
        """All images of a target."""
        return self._images([name])

    def digest_content(self) -> Iterator[bytes]:
        """The split, and names and contents of the files of all domains in use."""
        yield os.fsencode(f"{self.image_size}|{self.class_names}|{self.sources}|{self.val_share}{self.kind}")
        for domain, (paths, _) in self._listings.items():
            if not any(path.is_file() for path in paths):  # a wrong root; single files may be damaged
                raise DataError(f"{self.lists[domain]} lists {paths[0]} and others, none of which exists.")
            yield from self.file_lines(domain, paths, self.root)

    def cache_key(self) -> str:
        """The digest and the place."""
        return f"{self.digest()}|{self.root.resolve()}"

    def augmentation(self) -> augmentations.Augmentation:
        """A random crop of 70 to 100 % of the area, resized, and a horizontal flip."""
        return augmentations.crop_and_flip(self.image_size, 0.7)


def read_list(path: Path, root: Path) -> Listing:
    """Image files and labels (N,) from lines ``<path below root> <label>``."""
    check_file(path, f"lines <path of an image below {root}> <label>")
    paths, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if line.strip() and not (name and label.isdecimal()):
            raise DataError(f"{path}, line {number}: {line!r}. Expected <path of an image> <label>, from 0.")
        if name:
            paths.append(root / name)
            labels.append(int(label))
    if not paths:
        raise DataError(f"{path} is empty. Expected lines <path of an image below {root}> <label>.")
    return paths, torch.tensor(labels)


def name_labels(listings: Iterable[Listing]) -> list[str]:
    """Name of each label: the folder of its images where that is one and the same, else the number."""
    folders: dict[int, set[str]] = {}
    for paths, labels in listings:
        for path, label in zip(paths, labels.tolist(), strict=True):
            folders.setdefault(label, set()).add(path.parent.name)
    numbers = range(max(folders) + 1)
    names = [min(folders[label]) if len(folders.get(label, ())) == 1 else str(label) for label in numbers]
    return names if len(set(names)) == len(names) else [str(label) for label in numbers]
