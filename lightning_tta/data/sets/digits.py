"""Handwritten digits that come with scikit-learn: real images, no download."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_tta.data import augmentations
from lightning_tta.data.base import ShiftedDataModule, Split
from lightning_tta.data.corruptions.corrupt import MIN_SIZE
from lightning_tta.data.images import Images, StackedImages
from lightning_tta.data.splits import shuffled_classes
from lightning_tta.errors import check_range


class DigitsData(ShiftedDataModule):
    """1,797 handwritten digits (scikit-learn, 8x8 pixels) upsampled to 3 x ``image_size`` x ``image_size``.

    The split (1,078 train, 179 val, 540 test) never changes.

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

    def digest_content(self) -> Iterator[bytes]:
        """The original images and labels."""
        yield _load(self.image_size)[2]

    def digest(self) -> str:
        """Hash of the original images and labels, and the size."""
        return f"{super().digest()}-{self.image_size}"

    def augmentation(self) -> augmentations.Augmentation:
        """A small rotation, shift and change of size."""
        return augmentations.move_and_scale()


@cache
def _load(size: int) -> tuple[Tensor, Tensor, bytes]:
    """Pixels uint8 (1797, 3, size, size), labels (1797,), and the original data."""
    from sklearn.datasets import load_digits
    from torchvision.transforms.v2 import functional

    digits = load_digits()
    grey = torch.tensor(digits.images)[:, None]  # 16 grey levels above black: 0 to 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    pixels = functional.resize((grey * 255 / 16).round().to(torch.uint8), [size, size], antialias=True)
    original = grey.to(torch.uint8).numpy().tobytes() + labels.numpy().tobytes()
    return pixels.repeat(1, 3, 1, 1), labels, original


def split_positions(labels: Tensor) -> dict[str, Tensor]:
    """A fixed split of each class: 60 % train, 10 % val, 30 % test. Sorted positions."""
    splits: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for members in shuffled_classes(labels):
        train, val = round(0.6 * len(members)), round(0.1 * len(members))
        for name, chosen in zip(splits, members.tensor_split([train, train + val]), strict=True):
            splits[name].append(chosen)
    return {name: torch.cat(chosen).sort().values for name, chosen in splits.items()}
