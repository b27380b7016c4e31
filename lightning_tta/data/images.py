"""Labelled 8-bit images in memory, on disk or made on the fly, and the data sets that batch them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from lightning_tta.data.corruptions.corrupt import corrupt
from lightning_tta.data.threads import one_thread

Batch = dict[str, Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Images uint8 (C, H, W) with labels; a leaf implements :meth:`image`, :meth:`images` or both.

    Attributes:
        labels: int64, shape (N,); -1 where the label is not known. Known without reading any image.
    """

    labels: Tensor

    def image(self, position: int) -> Tensor:
        """One image: uint8, shape (C, H, W)."""
        return self.images(torch.tensor([position]))[0]

    def images(self, positions: Tensor) -> Tensor:
        """Several images: uint8, shape (B, C, H, W)."""
        return torch.stack([self.image(position) for position in positions.tolist()])

    def estimated_bytes(self) -> int:
        """Bytes of all images together, if they are as large as the first."""
        return len(self) * self.image(0).nbytes if len(self) else 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.image(position), int(self.labels[position])


class StackedImages(Images):
    """Images in memory: ``pixels`` uint8 (N, C, H, W)."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def images(self, positions: Tensor) -> Tensor:
        """Several images, in one copy."""
        return self.pixels.index_select(0, positions)


class SelectedImages(Images):
    """Some images of a set."""

    def __init__(self, source: Images, positions: Tensor) -> None:
        self.source, self.positions, self.labels = source, positions, source.labels[positions]

    def images(self, positions: Tensor) -> Tensor:
        """Several images."""
        return self.source.images(self.positions[positions])


class CorruptedImages(Images):
    """A set with one corruption, made when asked for.

    ``ids`` (N,) are the images' numbers in the whole set: they seed the corruption, so that an image looks the same in
    any subset.
    """

    def __init__(self, source: Images, ids: Tensor, name: str, severity: int, seed: int, function_set: str) -> None:
        self.source, self.ids, self.labels = source, ids, source.labels
        self.name, self.severity, self.seed, self.function_set = name, severity, seed, function_set

    def estimated_bytes(self) -> int:
        """Those of the clean images."""
        return self.source.estimated_bytes()

    def image(self, position: int) -> Tensor:
        """One image."""
        image, index = self.source.image(position), int(self.ids[position])
        return corrupt(image, self.name, self.severity, seed=self.seed, index=index, function_set=self.function_set)


class JoinedImages(Images):
    """Several sets, one after the other."""

    def __init__(self, sets: Sequence[Images]) -> None:
        self.sets, self.labels = list(sets), torch.cat([images.labels for images in sets])
        self.ends = torch.tensor([len(images) for images in sets]).cumsum(0)

    def images(self, positions: Tensor) -> Tensor:
        """Several images."""
        number = torch.bucketize(positions, self.ends, right=True)
        rows, pixels = list[Tensor](), list[Tensor]()
        for n in sorted(set(number.tolist())):
            rows.append((number == n).nonzero()[:, 0])
            pixels.append(self.sets[n].images(positions[rows[-1]] - int(self.ends[n]) + len(self.sets[n])))
        return pixels[0] if len(pixels) == 1 else torch.cat(pixels)[torch.cat(rows).argsort()]


def to_float(pixels: Tensor) -> Tensor:
    """Pixels uint8 to float32 in [0, 1]."""
    return pixels.float() / 255


class LabelledBatches(Dataset[Batch]):
    """Batches {image (B, C, H, W) float32 in [0, 1], label (B,), index (B,)} of one set.

    ``augment`` is applied to each image uint8 (C, H, W). With the ``domains`` of the images (N,), batches have
    ``domain`` (B,) too.
    """

    def __init__(
        self, images: Images, augment: Callable[[Tensor], Tensor] | None = None, domains: Tensor | None = None
    ) -> None:
        self.source, self.augment, self.domains = images, augment, domains

    def __len__(self) -> int:
        return len(self.source)

    @one_thread()
    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """One batch, already collated."""
        index = torch.tensor(positions)
        pixels = self.source.images(index)
        if self.augment is not None:
            pixels = torch.stack([self.augment(image) for image in pixels])
        batch = {"image": to_float(pixels), "label": self.source.labels[index], "index": index}
        return batch if self.domains is None else {**batch, "domain": self.domains[index]}

    def __getitem__(self, position: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


class StreamBatches(LabelledBatches):
    """Batches {image, label, index, domain} of several domains.

    Position ``p`` of domain ``d`` has the index ``len(domains[0]) + ... + len(domains[d - 1]) + p``.
    """

    def __init__(self, domains: Sequence[Images]) -> None:
        sizes = torch.tensor([len(images) for images in domains])
        super().__init__(JoinedImages(domains), domains=torch.arange(len(sizes)).repeat_interleave(sizes))


class StreamSampler(BatchSampler):
    """Hands out the batches of a stream as they are; the sampler that Lightning offers for prediction is ignored."""

    def __init__(self, batches: list[list[int]], sampler: Iterable[int] = (), drop_last: bool = False) -> None:
        self.batches, self.sampler, self.drop_last = batches, sampler, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def already_collated(batch: Any) -> Any:
    """The ``collate_fn`` of these data sets, whose ``__getitems__`` returns whole batches."""
    return batch
