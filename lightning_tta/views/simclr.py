"""SimCLR's strong random views, each image its own, drawn where the images are: nothing is asked of the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from lightning_tta.draws import random_integers
from lightning_tta.losses import at_least_float32

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
STRENGTH, JITTERED, GRAY = 0.4, 0.8, 0.2
"""Of brightness, contrast and saturation; the share of images that have them, and that become gray."""
_LUMA = (0.299, 0.587, 0.114)


def simclr_view(images: Tensor, key: Tensor, *, flip: bool = True) -> Tensor:
    """A random resized crop, a flip from left to right, and colours, of each image.

    Brightness, contrast and saturation in this order, of images of three channels; those of one channel have the first
    two, others none. Left out of SimCLR's list: hue, and blur, which it leaves out on CIFAR too.

    Args:
        images: (B, C, H, W), floats in [0, 1].
        key: Of the draw, (2,), int64, on their device.
        flip: Whether there are flips.

    Source: Chen et al., ICML 2020, arXiv 2002.05709; ranges as in the code of TTT++.
    """
    with torch.autocast(images.device.type, enabled=False):
        x = at_least_float32(images)
        numbers = ((random_integers(key, 10, len(x)) >> 11).bitwise_and_(2**53 - 1).double() * 2**-53).to(x)
        return _recolored(_cropped(x, numbers[:5], flip), numbers[5:]).clamp(0, 1).to(images.dtype)


def _cropped(x: Tensor, numbers: Tensor, flip: bool) -> Tensor:
    area, ratio, down, across, mirror = numbers
    scale = (SCALE[0] + (SCALE[1] - SCALE[0]) * area).sqrt()
    stretch = (math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio).exp().sqrt()
    width, height = (scale * stretch).clamp(max=1), (scale / stretch).clamp(max=1)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * sign, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * across - 1) * (1 - width), (2 * down - 1) * (1 - height)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


def _recolored(x: Tensor, numbers: Tensor) -> Tensor:
    if x.shape[1] not in (1, 3):
        return x
    factors = 1 + STRENGTH * (2 * numbers[:3] - 1)
    brightness, contrast, saturation = torch.where(numbers[3] < JITTERED, factors, 1.0)[:, :, None, None, None]
    gray = torch.where(numbers[4] < GRAY, 0.0, 1.0)[:, None, None, None]
    x = (x * brightness).clamp(0, 1)
    mean = _luma(x).mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1)
    luma = _luma(x)
    return luma + (x - luma) * (saturation * gray) if x.shape[1] == 3 else x


def _luma(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x
    red, green, blue = (weight * x[:, n : n + 1] for n, weight in enumerate(_LUMA))
    return red + green + blue
