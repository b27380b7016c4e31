"""Which view is of the same image? Contrastive learning beside the classes, on a projection of the features."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta.auxiliary.base import Auxiliary
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.components.contrast import contrast_views
from lightning_tta.methods.components.projector import make_projector
from lightning_tta.views.strong import strong_views


class Contrastive(Auxiliary):
    """SimCLR's loss of two views of each image, on vectors that a projector makes of the features.

    The projector is Linear, ReLU, Linear. The loss is
    :func:`~lightning_tta.methods.components.contrast.contrast_views` of its outputs, at length 1.

    Args:
        net: A classifier that ends in a linear layer.
        weight: See :class:`~lightning_tta.auxiliary.base.Auxiliary`.
        width: Of the vectors, >= 1; authors 128.
        temperature: > 0; authors 0.5.
        flip: Whether views may be flipped from left to right.

    Source: Chen et al., ICML 2020, arXiv 2002.05709; as in TTT++ (Liu et al., NeurIPS 2021).
    """

    kind: ClassVar[str] = "contrastive"

    def __init__(
        self, net: nn.Module, weight: float = 1.0, width: int = 128, temperature: float = 0.5, flip: bool = True
    ) -> None:
        super().__init__(net, weight)
        check_range("width", width, 1, integer=True)
        check_range("temperature", temperature, 0, low_open=True)
        self.temperature, self.flip = temperature, flip
        split = HeadSplit(net)
        features, like = split.num_features, split.head.weight.detach()
        self.projector = make_projector(features, features, width, seed=0, like=like).requires_grad_(True)
        self.width = width

    def contrast(self, projections: Tensor) -> Tensor:
        """The loss of each image, (B,), of projections (2 * B, width): first views, then second ones."""
        vectors = normalize(at_least_float32(projections), dim=1)
        return contrast_views(vectors.view(2, -1, vectors.shape[1]), self.temperature)

    def views(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Two views of each image, (2 * B, C, H, W), drawn by two keys."""
        return torch.cat(
            [strong_views(images, key, crop=True, hue=False, blur=False, flip=self.flip) for key in (first, second)]
        )

    def loss(self, net: nn.Module, images: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        """The mean over the images; all views make one batch."""
        split = HeadSplit(net)
        features, _ = split(self.views(images, key, key + 1))
        features = features.clone() if features.is_inference() else features
        return self.contrast(self.projector(features.to(split.head.weight.dtype))).mean()  # it may be of an autocast
