"""CIFAR-10 and CIFAR-100, their corrupted versions, and CIFAR-10.1."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import CLEAN, split_severity
from lightning_tta.data.images import Images, SelectedImages, StackedImages
from lightning_tta.data.source import Split
from lightning_tta.data.storage.cache import MappedImages, open_array
from lightning_tta.data.storage.download import Remote, fetch, unpack
from lightning_tta.data.streams import permutation
from lightning_tta.errors import DataError, check_choice, check_range

Dataset = Literal["cifar10", "cifar100"]

ROWS = 10_000  # of one severity
REMOTE = {
    "cifar10": Remote(
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1",
        "CIFAR-10-C.tar",
        2_918_471_680,
        "md5:56bf5dcef84df0e2308c6dcbcbbd8499",
    ),
    "cifar100": Remote(
        "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1",
        "CIFAR-100-C.tar",
        2_918_473_216,
        "md5:11f0ed0f1191edbf9fa23466ae6021d3",
    ),
}
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VERSIONS = {"cifar10_1_v4": 2021, "cifar10_1_v6": 2000}  # CIFAR-10.1, and its number of images


class CIFARData(ShiftedDataModule):
    """CIFAR-10 or CIFAR-100 (torchvision's files), with CIFAR-10-C / CIFAR-100-C and CIFAR-10.1.

    ``function_set="published"`` takes the corrupted images from ``<root>/CIFAR-10-C/<corruption>.npy`` (uint8,
    (50000, 32, 32, 3), severity s in rows (s - 1) * 10000 to s * 10000) and ``labels.npy``; they are mapped into
    memory, never read as a whole. The other function sets corrupt the clean test images. The domains ``cifar10_1_v4``
    and ``cifar10_1_v6`` come from ``<root>/CIFAR-10.1/cifar10.1_v6_data.npy`` and ``_labels.npy``. Only the files of
    the domains in use need be there. See :class:`ShiftedDataModule` for the other arguments.

    Args:
        root: Folder of the files: torchvision's ``cifar-10-batches-py`` or ``cifar-100-python``, ``CIFAR-10-C``, ...
        dataset: ``cifar10`` or ``cifar100``.
        download: Fetch what is missing: CIFAR (0.2 GB), CIFAR-C (2.9 GB). CIFAR-10.1 has no published checksum and
            must be fetched by hand.
        num_val: Training images that are held back to validate on, at least 1.
        domains: The stream's domains; by default the reported corruptions.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.

    Raises:
        ConfigError: On a wrong value.
        DataError: If a file is missing, damaged or not of the expected size.
    """

    def __init__(
        self,
        root: str = "data",
        dataset: Dataset = "cifar10",
        download: bool = False,
        num_val: int = 5000,
        domains: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("dataset", dataset, ("cifar10", "cifar100"))
        check_range("num_val", num_val, 1, 40_000, integer=True)
        self.root, self.dataset, self.download, self.num_val = Path(root).expanduser(), dataset, download, num_val
        super().__init__(domains=domains or ["reported"], **kwargs)
        title = dataset.upper().replace("R1", "R-1")
        self.folder, self.name = self.root / f"{title}-C", dataset
        published = self.function_set == "published" and bool(self._corrupted)
        if published:
            self.name = f"{title}-C"
        if not download:
            self._check_files(published)

    def _check_files(self, published: bool) -> None:
        """Name the first missing file before anything runs."""
        wanted = [self.folder / "labels.npy"] if published else []
        if published:
            wanted += [self.folder / f"{split_severity(name)[0]}.npy" for name in self._corrupted]
        wanted += [path for name in self.domain_names if name in VERSIONS for path in self._natural_files(name)]
        for path in wanted:
            if not path.is_file():
                state = "is a folder" if path.is_dir() else "does not exist"
                how = (
                    "get it from github.com/modestyachts/CIFAR-10.1" if "10.1" in path.name else "--data.download true"
                )
                raise DataError(f"{path} {state}. Expected this file of the data set; to get it: {how}.")

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; once per machine."""
        if not self.download:
            return
        if self.function_set == "published" and not (self.folder / "labels.npy").is_file():
            unpack(fetch(REMOTE[self.dataset], self.root), self.root)
        if self._needs_clean():
            self._torchvision(train=False)

    def _needs_clean(self) -> bool:
        return CLEAN in self.domain_names or (self.function_set != "published" and bool(self._corrupted))

    @property
    def class_names(self) -> list[str]:
        """CIFAR-10's names; the numbers of CIFAR-100's classes."""
        return list(NAMES) if self.dataset == "cifar10" else [str(number) for number in range(100)]

    def _torchvision(self, train: bool) -> Any:
        from torchvision import datasets

        kind = datasets.CIFAR10 if self.dataset == "cifar10" else datasets.CIFAR100
        try:  # torchvision compares checksums before it unpickles anything
            return kind(str(self.root), train=train, download=self.download)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{self.root} has no complete copy of {self.dataset} ({error}). Expected {self.root}/"
                f"{kind.base_folder}/ as torchvision unpacks it; --data.download true fetches it."
            ) from error

    @cached_property
    def _loaded(self) -> dict[bool, tuple[Tensor, Tensor]]:
        return {}

    def _stacked(self, train: bool) -> StackedImages:
        if train not in self._loaded:
            found = self._torchvision(train)
            self._loaded[train] = (
                torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(),
                torch.tensor(found.targets),
            )
        return StackedImages(*self._loaded[train])

    def clean(self, split: Split) -> Images:
        """The images of a split; ``num_val`` of the training images are the validation images, fixed."""
        if split == "test":
            return self._stacked(train=False)
        images = self._stacked(train=True)
        order = torch.from_numpy(permutation(len(images), 0))
        chosen = order[: self.num_val] if split == "val" else order[self.num_val :]
        return SelectedImages(images, chosen.sort().values)

    def _labels(self, path: Path, count: int) -> Tensor:
        """Labels int64 (count,) from an .npy of whole numbers of any width."""
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is not a readable .npy file ({error}). Expected {count} class numbers.") from error
        if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
            raise DataError(f"{path} holds {found.dtype} {found.shape}. Expected {count} class numbers.")
        if found.min() < 0 or found.max() >= self.num_classes:
            raise DataError(f"{path} has classes {found.min()} to {found.max()}; expected 0 to {self.num_classes - 1}.")
        return torch.from_numpy(found.astype(np.int64))

    def published(self, corruption: str, severity: int) -> Images:
        """One severity of one file of CIFAR-C."""
        labels = self._labels(self.folder / "labels.npy", 5 * ROWS)
        first = (severity - 1) * ROWS
        path = self.folder / f"{corruption}.npy"
        return MappedImages(
            path, labels[first : first + ROWS], first=first, shape=(5 * ROWS, 32, 32, 3), channels_last=True
        )

    def _natural_files(self, name: str) -> tuple[Path, Path]:
        stem = f"cifar10.1_{name.rpartition('_')[2]}"
        return self.root / "CIFAR-10.1" / f"{stem}_data.npy", self.root / "CIFAR-10.1" / f"{stem}_labels.npy"

    def natural_names(self) -> list[str]:
        """The versions of CIFAR-10.1, where asked for."""
        return list(VERSIONS) if self.dataset == "cifar10" else []

    def natural_domain(self, name: str) -> Images:
        """A version of CIFAR-10.1."""
        data, labels = self._natural_files(name)
        count = VERSIONS[name]
        return MappedImages(data, self._labels(labels, count), shape=(count, 32, 32, 3), channels_last=True)

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256(self.dataset.encode())
        if self._needs_clean():
            images = self._stacked(train=False)
            content.update(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes())
        for name in sorted(set(self.domain_names)):
            if name in VERSIONS:
                content.update(b"".join(path.read_bytes() for path in self._natural_files(name)))
        if self.function_set == "published" and self._corrupted:
            content.update((self.folder / "labels.npy").read_bytes())
            for corruption in sorted({split_severity(name)[0] for name in self._corrupted}):
                rows = open_array(self.folder / f"{corruption}.npy", np.uint8, (5 * ROWS, 32, 32, 3))
                content.update(corruption.encode() + rows[:: ROWS // 10].tobytes())  # 50 images: a fingerprint
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """Hash of the clean test images, of CIFAR-10.1 and of some of the rows of CIFAR-C: of what is in use."""
        return self._digest

    def memo_key(self) -> str:
        """The digest and how validation images are chosen."""
        return f"{self.dataset}|{self._digest}|{self.num_val}"

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """A random crop after padding by 4 pixels, and a horizontal flip."""
        from torchvision.transforms import v2

        return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])  # type: ignore[no-any-return]
