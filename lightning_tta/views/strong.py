"""The views of contrastive learning: a strong one, and a mirror image; each image has its own, by tensors alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from lightning_tta.draws import random_words
from lightning_tta.losses import at_least_float32

BRIGHTNESS = CONTRAST = SATURATION = (0.6, 1.4)
HUE, SIGMA = (-0.1, 0.1), (0.1, 2.0)
COLORS, GREY, BLUR, FLIP = 0.8, 0.2, 0.5, 0.5
"""The ranges and probabilities of MoCo v2 (arXiv 2003.04297)."""
AREA, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
"""Of a crop, as in SimCLR (arXiv 2002.05709) on CIFAR: its share of the image, and width to height."""
RADIUS = 6  # pixels of the blur to each side, three standard deviations
LUMA = (0.299, 0.587, 0.114)


def flip_some(images: Tensor, key: Tensor) -> Tensor:
    """Images (B, C, H, W), each of them mirrored with probability 1/2; a draw as of :func:`strong_views`."""
    return torch.where(_uniform(key, len(images), 1, images.dtype)[0] < FLIP, images.flip(-1), images)


def strong_views(
    images: Tensor, key: Tensor, *, crop: bool = False, hue: bool = True, blur: bool = True, flip: bool = True
) -> Tensor:
    """One random view of each image: MoCo v2's without its crop, by default.

    With probability 0.8 brightness, contrast, saturation and hue (of images of 3 channels; of others the first two);
    0.2: grey; 0.5: Gaussian blur, mirrored at the border; 0.5: flip. Clipped to [0, 1]. What is left out leaves the
    other draws as they are.

    Args:
        images: (B, C, H, W), floats in [0, 1].
        key: Of the draw, (2,), int64, on the images' device; may be state. The draw is the same on every device.
        crop: Whether a random part of the image is cut out first, and resized.
        hue: Whether with another hue.
        blur: Whether with blur.
        flip: Whether with flips.
    """
    with torch.autocast(images.device.type, enabled=False):
        x = at_least_float32(images).clamp(0, 1)
        drawn = iter(_uniform(key, len(x), 13 if crop else 9, x.dtype).unbind())

        def draw(bounds: tuple[float, float]) -> Tensor:
            return bounds[0] + (bounds[1] - bounds[0]) * next(drawn)

        factors = [draw(bounds) for bounds in (BRIGHTNESS, CONTRAST, SATURATION, HUE)]
        has_colors, is_grey, is_blurred = next(drawn) < COLORS, next(drawn) < GREY, next(drawn) < BLUR
        sigma, is_flipped = draw(SIGMA), next(drawn) < FLIP
        if crop:
            x = _cropped(x, draw(AREA), draw((math.log(RATIO[0]), math.log(RATIO[1]))).exp(), next(drawn), next(drawn))
        colored = (x * factors[0]).clamp(0, 1)
        colored = _mixed(colored, _grey(colored).mean((1, 2, 3), keepdim=True), factors[1])
        if x.shape[1] == 3:
            colored = _mixed(colored, _grey(colored), factors[2])
            colored = _turned(colored, factors[3]) if hue else colored
        x = torch.where(has_colors, colored, x)
        x = torch.where(is_grey, _grey(x).expand_as(x), x)
        x = torch.where(is_blurred, _blurred(x, sigma), x) if blur else x
        return (torch.where(is_flipped, x.flip(-1), x) if flip else x).to(images.dtype)


def _uniform(key: Tensor, images: int, numbers: int, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), (numbers, images, 1, 1, 1)."""
    words = random_words(key, images * numbers).double() * 2**-32 + 0.5
    return words.to(dtype).view(numbers, images, 1, 1, 1)


def _cropped(x: Tensor, area: Tensor, ratio: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """The part of each image of this share and ratio, no larger than the image, in its place; all (B, 1, 1, 1)."""
    width, height = (area * ratio).sqrt().clamp(max=1).flatten(), (area / ratio).sqrt().clamp(max=1).flatten()
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * across.flatten() - 1) * (1 - width), (2 * down.flatten() - 1) * (1 - height)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


def _grey(x: Tensor) -> Tensor:
    """Brightness of each pixel, (B, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return sum((weight * x[:, channel : channel + 1] for channel, weight in enumerate(LUMA)), x.new_zeros(()))


def _mixed(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (other + factor * (x - other)).clamp(0, 1)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Another hue: the angle of HSV, in whole turns."""
    high, chroma = x.amax(1), x.amax(1) - x.amin(1)
    red, green, blue = x.unbind(1)
    scale = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(high == green, 2 + (blue - red) / scale, 4 + (red - green) / scale)
    sixths = torch.where(high == red, (green - blue) / scale, sixths) + 6 * turns[:, 0]
    parts = [torch.remainder(sixths + number, 6) for number in (5, 3, 1)]
    return torch.stack([high - chroma * torch.minimum(part, 4 - part).clamp(0, 1) for part in parts], 1)


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    for dim in (-1, -2):
        radius = min(RADIUS, x.shape[dim] - 1)
        offsets = torch.arange(-radius, radius + 1, device=x.device)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))  # (B, 1, 1, offsets)
        kernel = kernel / kernel.sum(-1, keepdim=True)
        padded = pad(x, [radius, radius, 0, 0] if dim == -1 else [0, 0, radius, radius], mode="reflect")
        parts = (padded.narrow(dim, at, x.shape[dim]) * kernel[..., at : at + 1] for at in range(len(offsets)))
        x = sum(parts, torch.zeros_like(x))
    return x
