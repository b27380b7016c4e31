"""Views of an image that are no random ones: the image, its middle, its mirror image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

CROP = 0.9
"""Share of each side that the middle has."""


def fixed_views(images: Tensor, number: int) -> Tensor:
    """The first ``number`` of: the images; their middle, 0.9 of each side, resized; their mirror images.

    Args:
        images: (B, C, H, W).
        number: 1, 2 or 3.

    Returns:
        (number, B, C, H, W).
    """
    views = [images]
    if number > 1:
        height, width = (max(1, round(CROP * side)) for side in images.shape[-2:])
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        middle = images[..., top : top + height, left : left + width]
        views.append(interpolate(middle, size=images.shape[-2:], mode="bilinear", align_corners=False))
    if number > 2:
        views.append(images.flip(-1))
    return torch.stack(views)
