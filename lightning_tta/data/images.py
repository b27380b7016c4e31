"""Labelled 8-bit images in memory, on disk or made on the fly, and the data sets that batch them."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from lightning_tta.data.corruptions.corrupt import corrupt
from lightning_tta.data.threads import one_thread
from lightning_tta.errors import DataError

Batch = dict[str, Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Images uint8 (C, H, W) with labels; a leaf implements :meth:`image`, :meth:`images` or both.

    Where a net gives more than a class an image, images have targets in the place of labels, see :meth:`targets`.

    Of files, an image may be damaged: :meth:`image` and :meth:`images` raise a :class:`DataError` that names the file,
    :meth:`try_images` marks it.

    Attributes:
        labels: int64, shape (N,); -1 where the label is not known. Known without reading any image.
    """

    labels: Tensor

    @property
    def has_targets(self) -> bool:
        """Whether there are targets."""
        return False

    def targets(self, positions: Tensor) -> Tensor:
        """Targets of several images: masks int64 (B, H, W), below 0 where a pixel does not count; or values (B, D)."""
        raise NotImplementedError

    def file(self, position: int) -> str:
        """Name of an image's file; empty where it has none."""
        return ""

    def try_images(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Several images (B, C, H, W), and which of them could be read, bool (B,); zeros stand for the others."""
        return self.images(positions), torch.ones(len(positions), dtype=torch.bool)

    def problem(self, position: int) -> DataError:
        """Why an image cannot be read."""
        try:
            self.image(position)
        except DataError as error:
            return error
        return DataError(f"{self.file(position) or f'Image {position}'} could not be read before, and can be now.")

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


class KeptImages(Images):
    """Images whose pixels are kept somewhere, of which some could not be read when they were made.

    ``origin`` is what they were made from, and ``readable`` (N,) what could be read of it; ``None``: all.
    """

    origin: Images | None = None
    readable: Tensor | None = None

    @abstractmethod
    def pixels_of(self, positions: Tensor) -> Tensor:
        """Several images, damaged or not."""

    @property
    def has_targets(self) -> bool:
        """Those of the origin."""
        return self.origin is not None and self.origin.has_targets

    def targets(self, positions: Tensor) -> Tensor:
        """Those of the origin."""
        assert self.origin is not None
        return self.origin.targets(positions)

    def images(self, positions: Tensor) -> Tensor:
        """Several images, in one copy."""
        if self.readable is not None and not bool(self.readable[positions].all()):
            raise self.problem(int(positions[~self.readable[positions]][0]))
        return self.pixels_of(positions)

    def try_images(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Several images, and which of them could be read."""
        if self.readable is None:
            return super().try_images(positions)
        return self.pixels_of(positions), self.readable[positions]

    def file(self, position: int) -> str:
        """Name of an image's file."""
        return "" if self.origin is None else self.origin.file(position)

    def problem(self, position: int) -> DataError:
        """Why an image could not be read."""
        return (
            DataError(f"Image {position} could not be read.") if self.origin is None else self.origin.problem(position)
        )


class StackedImages(KeptImages):
    """Images in memory: ``pixels`` uint8 (N, C, H, W)."""

    def __init__(
        self, pixels: Tensor, labels: Tensor, origin: Images | None = None, readable: Tensor | None = None
    ) -> None:
        self.pixels, self.labels, self.origin, self.readable = pixels, labels, origin, readable

    def pixels_of(self, positions: Tensor) -> Tensor:
        """Several images, in one copy."""
        return self.pixels.index_select(0, positions)


class SelectedImages(Images):
    """Some images of a set."""

    def __init__(self, source: Images, positions: Tensor) -> None:
        self.source, self.positions, self.labels = source, positions, source.labels[positions]

    @property
    def has_targets(self) -> bool:
        """As the whole set."""
        return self.source.has_targets

    def targets(self, positions: Tensor) -> Tensor:
        """Targets of several images."""
        return self.source.targets(self.positions[positions])

    def estimated_bytes(self) -> int:
        """Their share of the bytes of the whole set."""
        return len(self) * (self.source.estimated_bytes() // max(1, len(self.source)))

    def images(self, positions: Tensor) -> Tensor:
        """Several images."""
        return self.source.images(self.positions[positions])

    def try_images(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Several images, and which of them could be read."""
        return self.source.try_images(self.positions[positions])

    def file(self, position: int) -> str:
        """Name of an image's file."""
        return self.source.file(int(self.positions.numpy()[position]))  # a tensor's own index takes ten times as long

    def problem(self, position: int) -> DataError:
        """Why an image cannot be read."""
        return self.source.problem(int(self.positions[position]))


class CorruptedImages(Images):
    """A set with one corruption, made when asked for.

    ``ids`` (N,) are the images' numbers in the whole set: they seed the corruption, so that an image looks the same in
    any subset.
    """

    def __init__(self, source: Images, ids: Tensor, name: str, severity: int, seed: int, function_set: str) -> None:
        self.source, self.ids, self.labels = source, ids, source.labels
        self.name, self.severity, self.seed, self.function_set = name, severity, seed, function_set

    @property
    def has_targets(self) -> bool:
        """As the clean images."""
        return self.source.has_targets

    def targets(self, positions: Tensor) -> Tensor:
        """Those of the clean images: a corruption that moves pixels does not go with masks."""
        return self.source.targets(positions)

    def estimated_bytes(self) -> int:
        """Those of the clean images."""
        return self.source.estimated_bytes()

    def image(self, position: int) -> Tensor:
        """One image."""
        return self._corrupt(self.source.image(position), position)

    def _corrupt(self, image: Tensor, position: int) -> Tensor:
        index = int(self.ids[position])
        return corrupt(image, self.name, self.severity, seed=self.seed, index=index, function_set=self.function_set)

    def try_images(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Several images, and which of them could be read."""
        clean, readable = self.source.try_images(positions)
        rows = zip(clean, readable.tolist(), positions.tolist(), strict=True)
        return torch.stack([self._corrupt(image, p) if ok else image for image, ok, p in rows]), readable

    def file(self, position: int) -> str:
        """Name of an image's file."""
        return self.source.file(position)

    def problem(self, position: int) -> DataError:
        """Why an image cannot be read."""
        return self.source.problem(position)


class JoinedImages(Images):
    """Several sets, one after the other."""

    def __init__(self, sets: Sequence[Images]) -> None:
        self.sets, self.labels = list(sets), torch.cat([images.labels for images in sets])
        self._ends = list(accumulate(len(images) for images in sets))
        self.ends = torch.tensor(self._ends)

    @property
    def has_targets(self) -> bool:
        """Whether any set has."""
        return any(images.has_targets for images in self.sets)

    def targets(self, positions: Tensor) -> Tensor:
        """Targets of several images: of sets without, what does not count, of the others' shape; empty of none."""
        number = torch.bucketize(positions, self.ends, right=True)
        there = torch.tensor([images.has_targets for images in self.sets])[number]
        if not bool(there.any()):
            return torch.empty(0)
        known = self._collected(positions[there], lambda images, rows: (images.targets(rows),))[0]
        if bool(there.all()):
            return known
        targets = known.new_full((len(positions), *known.shape[1:]), torch.nan if known.is_floating_point() else -1)
        targets[there] = known
        return targets

    def images(self, positions: Tensor) -> Tensor:
        """Several images."""
        return self._collected(positions, lambda images, rows: (images.images(rows),))[0]

    def try_images(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Several images, and which of them could be read."""
        return self._collected(positions, lambda images, rows: images.try_images(rows))  # type: ignore[return-value]

    def _collected(self, positions: Tensor, read: Callable[[Images, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``read`` gives of each set's positions, in the order of ``positions``."""
        number = torch.bucketize(positions, self.ends, right=True)
        rows, pieces = list[Tensor](), list[tuple[Tensor, ...]]()
        for n in sorted(set(number.tolist())):
            rows.append((number == n).nonzero()[:, 0])
            pieces.append(read(self.sets[n], positions[rows[-1]] - int(self.ends[n]) + len(self.sets[n])))
        if len(pieces) == 1:
            return pieces[0]
        order = torch.cat(rows).argsort()
        return tuple(torch.cat(piece)[order] for piece in zip(*pieces, strict=True))

    def _place(self, position: int) -> tuple[Images, int]:
        number = bisect_right(self._ends, position)
        return self.sets[number], position - self._ends[number] + len(self.sets[number])

    def file(self, position: int) -> str:
        """Name of an image's file."""
        images, place = self._place(position)
        return images.file(place)

    def problem(self, position: int) -> DataError:
        """Why an image cannot be read."""
        images, place = self._place(position)
        return images.problem(place)


def to_float(pixels: Tensor) -> Tensor:
    """Pixels uint8 to float32 in [0, 1]."""
    return pixels.float() / 255


class LabelledBatches(Dataset[Batch]):
    """Batches {image (B, C, H, W) float32 in [0, 1], label (B,), index (B,)} of one set.

    ``augment`` is applied to each image uint8 (C, H, W). With the ``domains`` of the images (N,), batches have
    ``domain`` (B,) too; of images with targets ``target`` in the place of ``label``.
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
        return self._batch(to_float(pixels), index)

    def _batch(self, images: Tensor, index: Tensor) -> Batch:
        batch = {"image": images, "index": index}
        if not self.source.has_targets:
            batch = {"image": images, "label": self.source.labels[index], "index": index}
        elif len(targets := self.source.targets(index)):
            batch["target"] = targets
        return batch if self.domains is None else {**batch, "domain": self.domains[index]}

    def __getitem__(self, position: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


class StreamBatches(LabelledBatches):
    """Batches {image, label, index, domain} of several domains.

    Position ``p`` of domain ``d`` has the index ``len(domains[0]) + ... + len(domains[d - 1]) + p``. With
    ``marks_damaged`` an image that cannot be read is all NaN, and its batch has ``damaged``, bool (B,); else it is an
    error.
    """

    def __init__(self, domains: Sequence[Images], marks_damaged: bool = False) -> None:
        sizes = torch.tensor([len(images) for images in domains])
        super().__init__(JoinedImages(domains), domains=torch.arange(len(sizes)).repeat_interleave(sizes))
        self.marks_damaged = marks_damaged

    @one_thread()
    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """One batch, already collated."""
        index = torch.tensor(positions)
        pixels, readable = self.source.try_images(index)
        if bool(readable.all()):
            return self._batch(to_float(pixels), index)
        if not self.marks_damaged:
            raise self.source.problem(int(index[~readable][0]))
        images = to_float(pixels)
        images[~readable] = torch.nan
        return {**self._batch(images, index), "damaged": ~readable}


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
