"""Handwritten digits that come with scikit-learn: real images, no download."""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import MIN_SIZE
from lightning_tta.data.images import Images, StackedImages
from lightning_tta.data.source import Split
from lightning_tta.data.streams import permutation
from lightning_tta.errors import check_range


@cache
def _load(size: int) -> tuple[Tensor, Tensor, str]:
    """Pixels uint8 (1797, 3, size, size), labels (1797,), and a hash of the original data."""
    from sklearn.datasets import load_digits
    from torchvision.transforms.v2 import functional

    digits = load_digits()
    grey = torch.tensor(digits.images)[:, None]  # 16 grey levels above black: 0 to 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    pixels = functional.resize((grey * 255 / 16).round().to(torch.uint8), [size, size], antialias=True)
    original = grey.to(torch.uint8).numpy().tobytes() + labels.numpy().tobytes()
    return pixels.repeat(1, 3, 1, 1), labels, hashlib.sha256(original).hexdigest()[:12]


def split_positions(labels: Tensor) -> dict[str, Tensor]:
    """A fixed split of each class: 60 % train, 10 % val, 30 % test. Sorted positions."""
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for label in range(10):
        members = (labels == label).nonzero()[:, 0]
        shuffled = members[torch.from_numpy(permutation(len(members), label))]
        train, val = round(0.6 * len(members)), round(0.1 * len(members))
        for name, part in zip(parts, shuffled.tensor_split([train, train + val]), strict=True):
            parts[name].append(part)
    return {name: torch.cat(part).sort().values for name, part in parts.items()}


class DigitsData(ShiftedDataModule):
    """1,797 handwritten digits (scikit-learn, 8x8 pixels) upsampled to 3 x ``image_size`` x ``image_size``.

    The split (1,078 train, 179 val, 540 test) never changes. See :class:`ShiftedDataModule` for the other arguments.

    Args:
        image_size: Side of the images in pixels, at least 32.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.
    """

    name = "digits"

    def __init__(self, image_size: int = 32, **kwargs: Any) -> None:
        check_range("image_size", image_size, MIN_SIZE, integer=True)
        self.image_size = image_size
        super().__init__(**kwargs)

    @property
    def class_names(self) -> list[str]:
        """``0`` to ``9``."""
        return [str(digit) for digit in range(10)]

    def clean(self, split: Split) -> Images:
        """The images of a split."""
        pixels, labels, _ = _load(self.image_size)
        chosen = split_positions(labels)[split]
        return StackedImages(pixels[chosen], labels[chosen])

    def digest(self) -> str:
        """Hash of the original images and labels, and the size."""
        return f"{_load(self.image_size)[2]}-{self.image_size}"

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """A small rotation, shift and change of size."""
        from torchvision.transforms import v2

        return v2.RandomAffine(degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1))  # type: ignore[no-any-return]
