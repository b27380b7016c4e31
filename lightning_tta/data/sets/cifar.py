"""CIFAR-10 and CIFAR-100, their corrupted versions, and CIFAR-10.1."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_tta.data import augmentations, splits
from lightning_tta.data.base import ShiftedDataModule, Split
from lightning_tta.data.corruptions.corrupt import CLEAN
from lightning_tta.data.domain_names import split_severity
from lightning_tta.data.images import Images, StackedImages
from lightning_tta.data.storage.cache import MappedImages, load_npy, open_images
from lightning_tta.data.storage.download import CIFAR_C, alone, fetch_and_unpack
from lightning_tta.data.storage.paths import check_file
from lightning_tta.errors import DataError, check_choice, check_range

Dataset = Literal["cifar10", "cifar100"]

ROWS = 10_000  # of one severity
USUAL_NUM_VAL = 5000
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VERSIONS = {"cifar10_1_v4": 2021, "cifar10_1_v6": 2000}  # CIFAR-10.1, and its number of images


class CIFARData(ShiftedDataModule):
    """CIFAR-10 or CIFAR-100 (torchvision's files), with CIFAR-10-C / CIFAR-100-C and CIFAR-10.1.

    ``function_set="published"`` takes the corrupted images from ``<root>/CIFAR-10-C/<corruption>.npy`` (uint8,
    (50000, 32, 32, 3), severity s in rows (s - 1) * 10000 to s * 10000) and ``labels.npy``; they are mapped into
    memory, never read as a whole. The other function sets corrupt the clean test images. The domains ``cifar10_1_v4``
    and ``cifar10_1_v6`` come from ``<root>/CIFAR-10.1/cifar10.1_v6_data.npy`` and ``_labels.npy``. Only the files of
    the domains in use need be there.

    Args:
        root: Folder of the files: torchvision's ``cifar-10-batches-py`` or ``cifar-100-python``, ``CIFAR-10-C``, ...
        dataset: ``cifar10`` or ``cifar100``.
        download: Fetch what is missing: CIFAR (0.2 GB), CIFAR-C (2.9 GB). CIFAR-10.1 has no published checksum and
            must be fetched by hand.
        num_val: Training images that are held back to validate on, 1 to 40,000. By default 5,000, at most a tenth of
            them.
        domains: The stream's domains; by default the reported corruptions.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.

    Raises:
        ConfigError: On a wrong value.
        DataError: If a file is missing, damaged or not of the expected size.
    """

    has_published = True

    def __init__(
        self,
        root: str = "data",
        dataset: Dataset = "cifar10",
        download: bool = False,
        num_val: int | None = None,
        domains: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("dataset", dataset, ("cifar10", "cifar100"))
        if num_val is not None:
            check_range("num_val", num_val, 1, 40_000, integer=True)
        self.root, self.dataset, self.download, self.num_val = Path(root).expanduser(), dataset, download, num_val
        super().__init__(domains=domains or ["reported"], **kwargs)
        title = dataset.upper().replace("R1", "R-1") + "-C"
        self.folder, self.name = self.root / title, title if self.published_names else dataset
        if not download:
            for path in self._published_files():
                check_file(path, "this file of the data set; to get it: --data.download true")
            for path in self._natural_files(*sorted(set(self.domain_names) & set(VERSIONS))):
                check_file(path, "this file of the data set; to get it: github.com/modestyachts/CIFAR-10.1")

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; once per machine."""
        if self.download and self.published_names:
            fetch_and_unpack(CIFAR_C[self.dataset], self.root, (self.folder / "labels.npy").is_file)
        if self.download and self._needs_clean:
            with alone(self.root, self.dataset) if not self._unpacked.is_dir() else nullcontext():
                self._read(train=False)

    @property
    def _unpacked(self) -> Path:
        return self.root / ("cifar-10-batches-py" if self.dataset == "cifar10" else "cifar-100-python")

    @property
    def _needs_clean(self) -> bool:
        return CLEAN in self.domain_names or bool(self.corrupted_names)

    @property
    def class_names(self) -> list[str]:
        """CIFAR-10's names; the numbers of CIFAR-100's classes."""
        return list(NAMES) if self.dataset == "cifar10" else [str(number) for number in range(100)]

    def _read(self, train: bool) -> StackedImages:
        from torchvision import datasets

        kind = datasets.CIFAR10 if self.dataset == "cifar10" else datasets.CIFAR100
        try:  # torchvision compares checksums before it unpickles anything
            files = kind(str(self.root), train=train, download=self.download)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{self.root} has no complete copy of {self.dataset} ({error}). Expected {self.root}/"
                f"{kind.base_folder}/ as torchvision unpacks it; --data.download true fetches it."
            ) from error
        return StackedImages(torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets))

    @cached_property
    def _train(self) -> StackedImages:
        return self._read(train=True)

    @cached_property
    def _test(self) -> StackedImages:
        return self._read(train=False)

    def clean(self, split: Split) -> Images:
        """The images of a split; ``num_val`` of the training images are the validation images, fixed."""
        if split == "test":
            return self._test
        held_back = splits.validation_size(len(self._train), self.num_val, USUAL_NUM_VAL)
        validation = splits.validation_count(len(self._train), held_back)
        return splits.select(self._train, validation == (split == "val"))

    def _labels(self, path: Path, count: int) -> Tensor:
        """Labels int64 (count,) from an .npy of whole numbers of any width."""
        labels = load_npy(path, f"{count} class numbers")
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{path} holds {labels.dtype} {labels.shape}. Expected {count} class numbers.")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            largest = self.num_classes - 1
            raise DataError(f"{path} has classes {labels.min()} to {labels.max()}; expected 0 to {largest}.")
        return torch.from_numpy(labels.astype(np.int64))

    def _published_files(self) -> list[Path]:
        """The labels, then the corruptions in use."""
        names = sorted({split_severity(name)[0] for name in self.published_names})
        return [self.folder / f"{name}.npy" for name in ["labels", *names]] if names else []

    def published(self, corruption: str, severity: int) -> Images:
        """One severity of one file of CIFAR-C."""
        labels = self._labels(self.folder / "labels.npy", 5 * ROWS)
        first, shape = (severity - 1) * ROWS, (5 * ROWS, 32, 32, 3)
        path = self.folder / f"{corruption}.npy"
        return MappedImages(path, labels[first : first + ROWS], first=first, shape=shape, channels_last=True)

    def _natural_files(self, *names: str) -> list[Path]:
        """The images, then the labels of each of some versions of CIFAR-10.1."""
        versions = [name.rpartition("_")[2] for name in names]
        folder = self.root / "CIFAR-10.1"
        return [folder / f"cifar10.1_{version}_{what}.npy" for version in versions for what in ("data", "labels")]

    def natural_names(self) -> list[str]:
        """The versions of CIFAR-10.1, where asked for."""
        return list(VERSIONS) if self.dataset == "cifar10" else []

    def natural_domain(self, name: str) -> Images:
        """A version of CIFAR-10.1."""
        data, labels = self._natural_files(name)
        count = VERSIONS[name]
        return MappedImages(data, self._labels(labels, count), shape=(count, 32, 32, 3), channels_last=True)

    def digest_content(self) -> Iterator[bytes]:
        """The clean test images, CIFAR-10.1 and some of the rows of CIFAR-C: what is in use."""
        yield self.dataset.encode()
        if self._needs_clean:
            yield self._test.pixels.numpy().tobytes() + self._test.labels.numpy().tobytes()
        natural, published = sorted(set(self.domain_names) & set(VERSIONS)), self._published_files()
        yield from (path.read_bytes() for path in [*self._natural_files(*natural), *published[:1]])
        for path in published[1:]:
            rows = open_images(path, (5 * ROWS, 32, 32, 3))
            yield path.stem.encode() + rows[:: ROWS // 10].tobytes()  # 50 images: a fingerprint

    def cache_key(self) -> str:
        """The digest and how validation images are chosen."""
        return f"{self.dataset}|{self.digest()}|{self.num_val}"

    def augmentation(self) -> augmentations.Augmentation:
        """A random shift by up to four pixels, and a horizontal flip."""
        return augmentations.shift_and_flip(32, 32)
