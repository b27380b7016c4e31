"""Views that are worse than the image: low frequencies that are missing, and noise; their randomness by a key."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tta.draws import random_flags, random_normals
from lightning_tta.losses import at_least_float32

GREY = 0.5  # what is left of an image without any frequency


def without_frequencies(images: Tensor, key: Tensor, ratio: float, window: float = 0.2) -> Tensor:
    """Images some of whose low frequencies are set to 0, each image and channel its own.

    A frequency (p, q) and its mirror (-p, -q) go together, so the result is real and all phases stay. The mean, which
    is one of them, goes to grey. Values may leave [0, 1].

    Args:
        images: (B, C, H, W), floats in [0, 1].
        key: Of the draw, (2,), int64.
        ratio: Probability with which one is missing, in [0, 1].
        window: Share of each side of the centred spectrum, in (0, 1], in which they may be missing.
    """
    height, width = images.shape[-2:]
    (top, rows), (left, columns) = (_low_frequencies(side, window) for side in (height, width))
    with torch.autocast(images.device.type, enabled=False):
        x = at_least_float32(images)
        number = len(x) * x.shape[1] * rows * columns
        drawn = random_flags(key, number, ratio, device=x.device).view(*x.shape[:2], rows, columns)
        down, right = (torch.arange(size, device=x.device) + low for low, size in ((top, rows), (left, columns)))
        half = (down[:, None] < 0) | ((down[:, None] == 0) & (right <= 0))  # of each pair the one that is drawn
        missing = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        start = top + height // 2, left + width // 2
        missing[..., start[0] : start[0] + rows, start[1] : start[1] + columns] = half & drawn
        missing = torch.fft.ifftshift(missing, dim=(-2, -1))
        missing = missing | missing.flip(-2, -1).roll((1, 1), (-2, -1))
        spectrum = torch.fft.rfft2(x - GREY).masked_fill(missing[..., : width // 2 + 1], 0)
        view: Tensor = torch.fft.irfft2(spectrum, s=(height, width)) + GREY
        return view.to(images.dtype)


def _low_frequencies(side: int, window: float) -> tuple[int, int]:
    """The lowest frequency of the window, and how many there are."""
    size = max(1, int(side * window))
    return (side - size + 1) // 2 - side // 2, size


def noised(images: Tensor, key: Tensor, level: Tensor) -> Tensor:
    """Images mixed with Gaussian noise, ``(1 - level) x + level v``, clipped to [0, 1]; with gradient by ``level``.

    Args:
        images: (B, C, H, W), floats in [0, 1].
        key: Of the draw, (2,), int64; the noise v, of mean and standard deviation 0.5, is one for the whole batch.
        level: (P, Q): a grid of cells over the image, each with its share of noise.
    """
    with torch.autocast(images.device.type, enabled=False):
        x, level = at_least_float32(images), at_least_float32(level)
        down, across = (_cells(side, cells, x) for side, cells in zip(x.shape[-2:], level.shape, strict=True))
        level = (down @ level.to(x) @ across.T).to(x)
        noise = GREY + GREY * random_normals(key, *x.shape[1:], device=x.device).to(x)
        return ((1 - level) * x + level * noise).clamp(0, 1).to(images.dtype)


def _cells(side: int, cells: int, like: Tensor) -> Tensor:
    """Which cell each pixel is in, as rows of 0 and 1: (side, cells). Its product has a gradient without any races."""
    numbers = torch.arange(side, device=like.device) * cells // side
    return (numbers[:, None] == torch.arange(cells, device=like.device)).to(like)
