"""Turned handwritten digits, whose angle is the value to predict: regression without a download."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lightning_tta.data.base import Split
from lightning_tta.data.corruptions.corrupt import MIN_SIZE
from lightning_tta.data.dense.base import DenseData, TargetImages
from lightning_tta.data.sets.digits import DigitsData
from lightning_tta.errors import check_range

_SPLITS = {"train": 0, "val": 1, "test": 2}


class DigitAnglesData(DenseData):
    """The digits of :class:`~lightning_tta.DigitsData`, each turned by an angle in degrees: the value to predict.

    Angles are uniform within ``max_angle`` either way, and drawn by the split and the image's number; each training
    digit comes four times. The 8 x 8 pixels that the digits are made of turn with them: a net reads the angle off both,
    and is exact to a degree on clean images.

    Args:
        image_size: Side of the images in pixels, at least 32.
        max_angle: Largest angle in degrees, above 0, up to 90.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`DenseData`.
    """

    name = "digit angles"
    task = "regression"

    def __init__(self, image_size: int = 32, max_angle: float = 45.0, **kwargs: object) -> None:
        check_range("image_size", image_size, MIN_SIZE, integer=True)
        check_range("max_angle", max_angle, 0, 90, low_open=True)
        self.image_size, self.max_angle = image_size, float(max_angle)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def clean(self, split: Split) -> TargetImages:
        """The turned digits of a split."""
        return TargetImages(*_turned(split, self.image_size, self.max_angle))

    def digest_content(self) -> Iterator[bytes]:
        """The turned test digits and their angles."""
        for tensor in _turned("test", self.image_size, self.max_angle):
            yield tensor.numpy().tobytes()


@lru_cache(maxsize=6)
def _turned(split: Split, size: int, max_angle: float) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (N, 3, size, size) and angles float32 (N, 1)."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    images = DigitsData(image_size=size, cache_dir="none").clean(split)
    pixels = images.images(torch.arange(len(images))).repeat(4 if split == "train" else 1, 1, 1, 1)
    angles = np.random.default_rng([_SPLITS[split], len(pixels)]).uniform(-max_angle, max_angle, len(pixels))
    turned = [
        functional.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
        for image, angle in zip(pixels, angles.tolist(), strict=True)
    ]
    return torch.stack(turned), torch.from_numpy(angles).float()[:, None]
