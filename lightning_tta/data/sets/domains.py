"""Several domains of the same classes, one of them left out: ``<root>/<domain>/<class>/*``."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import CLEAN, SETS
from lightning_tta.data.images import Images, SelectedImages
from lightning_tta.data.sets.folder import FileImages, list_classes, list_images
from lightning_tta.data.source import Split
from lightning_tta.data.streams import permutation
from lightning_tta.errors import ConfigError, DataError, check_range


def _plain(name: str) -> str:
    """A domain's name without what differs between copies of a data set: "Real World", "Real_World", "real-world"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def read_list(path: Path, root: Path) -> tuple[list[Path], Tensor]:
    """Image files and labels (N,) from lines ``<path below root> <label>``.

    Raises:
        DataError: If the file is missing or empty, or a line is something else.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}. Expected lines <path of an image below {root}> <label>.")
    paths, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdecimal():
                raise DataError(f"{path}, line {number}: {line!r}. Expected <path of an image> <label>, from 0.")
            paths.append(root / name)
            labels.append(int(label))
    if not paths:
        raise DataError(f"{path} is empty. Expected lines <path of an image below {root}> <label>.")
    return paths, torch.tensor(labels)


def read_class_names(lists: dict[Path, tuple[list[Path], Tensor]]) -> list[str]:
    """Name of each label: the folder of its images where that is one and the same, else the number."""
    found: dict[int, set[str]] = {}
    for paths, labels in lists.values():
        for path, label in zip(paths, labels.tolist(), strict=True):
            found.setdefault(label, set()).add(path.parent.name)
    names = [min(found[label]) if len(found.get(label, ())) == 1 else str(label) for label in range(max(found) + 1)]
    return names if len(set(names)) == len(names) else [str(label) for label in range(len(names))]


class DomainFolderData(ShiftedDataModule):
    """Leave one domain out: train on some domains of ``<root>/<domain>/<class>/*``, adapt on the others.

    For PACS, Office-Home, VLCS, TerraIncognita and their like. Training batches have as many images of each source
    domain, domain after domain. The stream takes all images of the targets. Where the source is tested, it is on its
    validation images. Names are compared without case, spaces and signs. See :class:`ShiftedDataModule` for the other
    arguments.

    Args:
        root: The folder of the domains; a folder ``kfold`` in it (PACS) is entered.
        target: The domain that is left out, or several.
        sources: The domains to train on; by default all others.
        image_size: Images are resized to this shorter side and cut to the middle square.
        val_share: Share of each class of each source domain to validate on, between 0 and 1.
        lists: Domain -> text file with lines ``<path below root> <label>`` instead of folders (DomainNet-126, VisDA).
            A relative path of a list is below ``root``.
        **kwargs: Stream, batch sizes: the arguments of :class:`ShiftedDataModule`.

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
        if not self.root.is_dir():
            raise DataError(f"There is no folder {self.root}. Expected {self.root}/<domain>/<class>/<image files>.")
        self.lists = {name: self.root / Path(path).expanduser() for name, path in (lists or {}).items()}
        found = list(self.lists) or list_classes(self.root)  # the folders below
        self.targets = [self._find(name, found) for name in ([target] if isinstance(target, str) else target)]
        rest = [name for name in found if name not in self.targets]
        self.sources = rest if sources is None else [self._find(name, found) for name in sources]
        used = [*self.sources, *self.targets]
        if len(set(used)) < len(used) or not self.sources or not self.targets:
            raise ConfigError(
                f"sources {self.sources} and targets {self.targets} must be different domains, at least one each, "
                "none twice."
            )
        super().__init__(**kwargs)
        self.name = f"domains:{self.root.resolve().name}"

    def _find(self, name: str, found: list[str]) -> str:
        same = [name] if name in found else [other for other in found if _plain(other) == _plain(name)]
        if len(same) != 1:
            problem = f"no domain {name!r}" if not same else f"several domains like {name!r}: {', '.join(same)}"
            raise DataError(f"{self.root} has {problem}. Name one of: {', '.join(found)}.")
        taken = {CLEAN, "none", "reported", "held_out"}.union(*(set(s.REPORTED + s.HELD_OUT) for s in SETS.values()))
        if same[0] in taken:
            raise ConfigError(f"The domain {same[0]!r} has the name of a corruption. Rename its folder.")
        return same[0]

    @cached_property
    def class_names(self) -> list[str]:
        """Sorted names of all class folders of the sources; with lists, the folders of the images of each label."""
        if self.lists:
            return read_class_names({self.lists[name]: self._list(name) for name in self.sources})
        return sorted({name for domain in self.sources for name in list_classes(self.root / domain)})

    @cached_property
    def _read(self) -> dict[str, tuple[list[Path], Tensor]]:
        return {}

    def _list(self, domain: str) -> tuple[list[Path], Tensor]:
        """Files and labels of a domain."""
        if domain not in self._read:
            if self.lists:
                self._read[domain] = read_list(self.lists[domain], self.root)
            else:
                self._read[domain] = list_images(self.root / domain, self.class_names)
        paths, labels = self._read[domain]
        if self.lists and domain not in self.sources and int(labels.max()) >= len(self.class_names):
            raise DataError(
                f"{self.lists[domain]} has labels up to {int(labels.max())}, but the sources have "
                f"{len(self.class_names)} classes, from 0."
            )
        return paths, labels

    def _files(self, domains: list[str]) -> tuple[FileImages, Tensor]:
        """Images of some domains, one after the other, and which domain each is of."""
        listed = [self._list(domain) for domain in domains]
        paths = [path for found, _ in listed for path in found]
        number = torch.cat([torch.full((len(labels),), i) for i, (_, labels) in enumerate(listed)])
        return FileImages(paths, torch.cat([labels for _, labels in listed]), self.image_size, like=paths[0]), number

    @cached_property
    def _parts(self) -> tuple[FileImages, Tensor, Tensor]:
        """The sources' images, the domain of each, and which are for validation."""
        images, domain = self._files(self.sources)
        held_back = torch.zeros(len(images), dtype=torch.bool)
        for number, label in torch.unique(torch.stack([domain, images.labels]), dim=1).T.tolist():
            members = ((domain == number) & (images.labels == label)).nonzero()[:, 0]
            order = torch.from_numpy(permutation(len(members), number, label))
            count = min(len(members) - 1, max(1, round(self.val_share * len(members))))
            held_back[members[order[:count]]] = True
        return images, domain, held_back

    def clean(self, split: Split) -> Images:
        """The sources' images; ``test`` is the validation part."""
        images, _, held_back = self._parts
        return SelectedImages(images, (held_back != (split == "train")).nonzero()[:, 0])

    def source_domain_of_train(self) -> Tensor | None:
        """The position in ``sources`` of each training image, where there are several sources."""
        _, domain, held_back = self._parts
        return domain[~held_back] if len(self.sources) > 1 else None

    def natural_names(self) -> list[str]:
        """Names of the targets."""
        return list(self.targets)

    def natural_domain(self, name: str) -> Images:
        """All images of a target."""
        return self._files([name])[0]

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256(f"{self.image_size}|{self.class_names}|{self.sources}|{self.val_share}".encode())
        for domain in (*self.sources, *self.targets):
            for path in self._list(domain)[0]:
                if not path.is_file():
                    raise DataError(f"{self.lists[domain]} lists {path}, which does not exist.")
                content.update(f"{domain}|{path.parent.name}/{path.name}|{path.stat().st_size}\n".encode())
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """Hash of the names and sizes (in bytes) of the files of all domains in use, and of the split."""
        return self._digest

    def memo_key(self) -> str:
        """The digest and the place."""
        return f"{self._digest}|{self.root.resolve()}"

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """A random crop of 70 to 100 % of the area, resized, and a horizontal flip."""
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(self.image_size, scale=(0.7, 1.0), antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])  # type: ignore[no-any-return]
