"""Random crops and flips, each image its own, drawn where the images are: nothing is asked of the host."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_tta.draws import random_integers

PADDING = 4
Crops = Literal["none", "crop", "crop_flip"]
CROPS: tuple[Crops, ...] = ("none", "crop", "crop_flip")
"""none: the image itself; crop: an equally large part of it, with a border of 4 black pixels; crop_flip: then a flip
from left to right, or not."""


def crop_images(images: Tensor, kind: Crops, key: Tensor) -> Tensor:
    """One view of each image, in its size.

    Args:
        images: (B, C, H, W).
        kind: One of :data:`CROPS`.
        key: Of the draw, (2,), int64, on their device.
    """
    if kind == "none":
        return images
    batch, _, height, width = images.shape
    top, left, flip = (random_integers(key, 3, batch) >> 16) & 0xFFFF
    rows = torch.arange(height, device=images.device) + (top % (2 * PADDING + 1))[:, None]
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    if kind == "crop_flip":
        columns = torch.where((flip % 2 == 1)[:, None], width - 1 - columns, columns)
    columns = columns + (left % (2 * PADDING + 1))[:, None]
    number = torch.arange(batch, device=images.device)[:, None, None]
    padded = pad(images, (PADDING,) * 4).movedim(1, -1)
    return padded[number, rows[:, :, None], columns[:, None]].movedim(-1, 1)
