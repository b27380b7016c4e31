"""Random changes of one training image uint8 (C, H, W)."""

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

Augmentation = Callable[[Tensor], Tensor]


def move_and_scale() -> Augmentation:
    """A small rotation, shift and change of size."""
    return v2.RandomAffine(degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1))  # type: ignore[no-any-return]


def shift_and_flip(height: int, width: int) -> Augmentation:
    """A random shift by up to an eighth of the side, and a horizontal flip."""
    shift = v2.RandomCrop((height, width), padding=[width // 8, height // 8])
    return v2.Compose([shift, v2.RandomHorizontalFlip()])  # type: ignore[no-any-return]


def crop_and_flip(size: int, smallest: float) -> Augmentation:
    """A random crop of a share ``smallest`` to 1 of the area, resized to ``size``, and a horizontal flip."""
    crop = v2.RandomResizedCrop(size, scale=(smallest, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])  # type: ignore[no-any-return]
