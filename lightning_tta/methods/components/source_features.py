"""Features of labelled source images, for methods that compare the stream's features with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.source_images import see_source_images

Covariance = Literal["none", "tied", "class"]


@dataclass
class ClassMoments:
    """Moments of source features by class, float64, on the CPU.

    Attributes:
        counts: Images of each class, (K,).
        means: (K, D); zeros where a class has no image.
        covariance: Of the features about the mean of their class, over the number of images: (1, D, D) of all classes,
            (K, D, D) of each, or ``None``.
    """

    counts: Tensor
    means: Tensor
    covariance: Tensor | None


def class_moments(
    method: TTAMethod,
    batches: Iterable[Mapping[str, Tensor]],
    covariance: Covariance = "none",
    *,
    running: Callable[[], AbstractContextManager[None]] = nullcontext,
    also: Callable[[Tensor, Tensor], None] | None = None,
) -> ClassMoments:
    """Class means of the source's features, and covariances, at the source weights; asks the host.

    Images with features that are not finite do not count. There is a warning if a class has no image.

    Args:
        method: Of it the net is taken, and how it runs.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,).
        covariance: ``none``, ``tied``: one for all classes, ``class``: one for each.
        running: How the net runs meanwhile. By default each image alone, with BatchNorm's source statistics: batches of
            one class must not be normalised with their own.
        also: Gets the images and labels of each batch too.

    Raises:
        DataError: If there is no such image, or a batch has no labels.
    """
    classes, width = method.split.num_classes, method.split.num_features
    groups = {"none": 0, "tied": 1, "class": classes}[covariance]
    with outside_inference_mode():
        counts = torch.zeros(classes, dtype=torch.float64)
        sums = torch.zeros(classes, width, dtype=torch.float64)
        squares = torch.zeros(groups, width, width, dtype=torch.float64)

    @torch.no_grad()
    def see(images: Tensor, labels: Tensor) -> None:
        features, kept = labelled_features(method, images, labels)
        if also is not None:
            also(images, labels)
        features, labels = features.cpu().double(), kept.cpu()
        counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        sums.index_add_(0, labels, features)
        if groups == 1:
            squares.add_(features.T @ features)
        elif groups:
            squares.index_add_(0, labels, features[:, :, None] * features[:, None])

    with method.at_source():
        see_source_images(method, batches, see, classes=classes, running=running)
    check_classes(method, counts)
    means = sums / counts.clamp_min(1)[:, None]
    if not groups:
        return ClassMoments(counts, means, None)
    outer = torch.einsum("k,kd,ke->de", counts, means, means)[None] if groups == 1 else None
    if outer is None:
        outer = counts[:, None, None] * means[:, :, None] * means[:, None]
    number = counts.sum().view(1) if groups == 1 else counts.clamp_min(1)
    return ClassMoments(counts, means, (squares - outer) / number[:, None, None])


def labelled_features(method: TTAMethod, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The features (N, D) of images that are finite, with their labels (N,); asks the host."""
    features = at_least_float32(method.features(images)[0])
    finite = features.isfinite().all(1)
    return (features, labels) if bool(finite.all()) else (features[finite], labels[finite])


def check_classes(method: TTAMethod, counts: Tensor) -> None:
    """Refuse source data without any image; warn of classes without one.

    Args:
        method: For the message.
        counts: Images of each class, (K,).

    Raises:
        DataError: If all are 0.
    """
    if not bool(counts.sum() > 0):
        raise DataError(
            f"'{method.name}' needs features of labelled source images; found no image with finite features. Give "
            "batches {'image': (B, C, H, W) in [0, 1], 'label': (B,)} of the training set."
        )
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        warnings.warn(
            f"'{method.name}': {len(missing)} of the net's {len(counts)} classes have no source image "
            f"({', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}), so that nothing is compared "
            "with them. Give more source images, some of each class.",
            stacklevel=3,
        )
