"""Source data: its splits, and the loaders that a source model is trained and tested with."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.data.augmentations import Augmentation
from lightning_tta.data.images import Batch, Images, LabelledBatches, StreamSampler, already_collated
from lightning_tta.data.samplers import DomainBatches, dealt, shuffled
from lightning_tta.data.storage.cache import CACHE
from lightning_tta.data.streams import permutation
from lightning_tta.errors import check_range

Split = Literal["train", "val", "test"]


class SourceData(LightningDataModule, ABC):
    """What :class:`ShiftedDataModule` knows of the source; a leaf implements the first methods."""

    def __init__(self, train_batch_size: int, num_workers: int, augment: bool) -> None:
        super().__init__()
        check_range("train_batch_size", train_batch_size, 1, integer=True)
        check_range("num_workers", num_workers, 0, integer=True)
        self.train_batch_size, self.num_workers, self.augment = train_batch_size, num_workers, augment

    @abstractmethod
    def clean(self, split: Split) -> Images:
        """The unshifted images of a split."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""

    @abstractmethod
    def digest_content(self) -> Iterable[bytes]:
        """What tells whether two data modules have the same test images; the digest is a hash of it."""

    def cache_key(self) -> str:
        """What tells the images of this data from any others in the cache: by default the class and the digest."""
        return f"{type(self).__name__}|{self.digest()}"

    def augmentation(self) -> Augmentation | None:
        """A random change of one training image uint8 (C, H, W), or ``None``."""
        return None

    def source_domain_of_train(self) -> Tensor | None:
        """The source domain of each training image, int64 (N,), where there are several; else ``None``."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256()
        for piece in self.digest_content():
            content.update(piece)
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of :meth:`digest_content`, for the protocol."""
        return self._digest

    def _split(self, split: Split) -> Images:
        return CACHE.in_memory(self.clean(split), (self.cache_key(), split), f"Reading {split} images")

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset=dataset,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=already_collated,
            **options,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled and, with ``augment``, augmented; a smaller last batch is left out.

        With several source domains, batches have as many images of each, domain after domain, and carry ``domain``.
        """
        images, domains = self._split("train"), self.source_domain_of_train()
        dataset = LabelledBatches(images, self.augmentation() if self.augment else None, domains)
        options: dict[str, Any] = {"persistent_workers": self.num_workers > 0}
        if domains is not None:
            return self._loader(dataset, batch_sampler=DomainBatches(domains, self.train_batch_size), **options)
        size, sampler = self.train_batch_size, shuffled(len(images))
        return self._loader(dataset, batch_size=size, sampler=sampler, drop_last=len(sampler) > size, **options)

    def _clean_loader(self, split: Split) -> DataLoader[Batch]:
        images = self._split(split)
        return self._loader(
            LabelledBatches(images), batch_size=self.train_batch_size, sampler=dealt(range(len(images)))
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Clean validation images."""
        return self._clean_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Clean test images."""
        return self._clean_loader("test")

    def source_batches(self, num_images: int | None = None, batch_size: int = 128, seed: int = 0) -> DataLoader[Batch]:
        """Training images without augmentation, for a method's ``prepare``; can be iterated more than once.

        Args:
            num_images: At most this many, a random choice; by default all.
            batch_size: Samples in a batch.
            seed: Seed of the choice and the order.

        Returns:
            Batches {image, label, index}, the same in each iteration.
        """
        if num_images is not None:
            check_range("num_images", num_images, 1, integer=True)
        check_range("batch_size", batch_size, 1, integer=True)
        images = self._split("train") if num_images is None else self.clean("train")  # a few: read when asked for
        order = torch.from_numpy(permutation(len(images), seed)[:num_images])
        batches = [batch.tolist() for batch in torch.split(order, batch_size)]
        return self._loader(LabelledBatches(images), batch_sampler=StreamSampler(batches))
