"""Which images are for training, validation and testing: the same ones on every machine."""

import warnings

import torch
from torch import Tensor

from lightning_tta.data.images import Images, SelectedImages
from lightning_tta.data.streams import permutation
from lightning_tta.errors import ConfigError

_SUBSET_SEED = 20190101  # fixed, so that smaller subsets lie inside larger ones


def subset(size: int, limit: int | None, seed: int = 0) -> Tensor:
    """Positions of at most ``limit`` of ``size`` images: the same ones in each run with this seed, sorted."""
    key = (_SUBSET_SEED, seed) if seed else (_SUBSET_SEED,)
    return torch.from_numpy(permutation(size, *key)[: limit or size]).sort().values


def shuffled_classes(labels: Tensor, *key: int) -> list[Tensor]:
    """Positions of the images of each class, each in a random order that ``key`` decides."""
    classes = []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero()[:, 0]
        classes.append(members[torch.from_numpy(permutation(len(members), *key, label))])
    return classes


def validation_share(labels: Tensor, share: float, *key: int) -> Tensor:
    """Which images are for validation, bool (N,): a share of each class, at least one image, never all.

    Where each class has one image, a share of all images, with a warning: a training without any has no best epoch.
    """
    if 1 < len(torch.unique(labels)) == len(labels):
        warnings.warn(
            f"Each of the {len(labels)} classes has one training image, so those that are held back for validation are "
            "of classes that a training does not see. Give two images or more of each class.",
            stacklevel=2,
        )
        return validation_count(len(labels), max(1, round(share * len(labels))), *key)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for members in shuffled_classes(labels, *key):
        mask[members[: min(len(members) - 1, max(1, round(share * len(members))))]] = True
    return mask


def validation_size(size: int, wanted: int | None, usual: int) -> int:
    """How many of ``size`` training images to hold back; ``None``: ``usual``, at most a tenth, at least one.

    Raises:
        ConfigError: If ``wanted`` leaves none to train on.
    """
    if wanted is None:
        return max(1, min(usual, size // 10))
    if wanted >= size:
        raise ConfigError(
            f"num_val={wanted} holds back all of the {size} training images. Give at most {size - 1}, or leave it out."
        )
    return wanted


def validation_count(size: int, count: int, *key: int) -> Tensor:
    """Which images are for validation, bool (N,): ``count`` of all, never all; ``key`` decides which."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.from_numpy(permutation(size, *(key or (0,)))[: min(count, size - 1)])] = True
    return mask


def select(images: Images, mask: Tensor) -> SelectedImages:
    """The images that a mask, bool (N,), names."""
    return SelectedImages(images, mask.nonzero()[:, 0])
