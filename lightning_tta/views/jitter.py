"""The mild random views that teachers see: colours, small shifts, blur, flip, noise; one draw for a whole batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_tta.draws import random_normals, random_words
from lightning_tta.losses import at_least_float32

BRIGHTNESS, CONTRAST, SATURATION, HUE, GAMMA = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3)
DEGREES, SHIFT, SCALE = (-15.0, 15.0), (-1 / 8, 1 / 8), (0.9, 1.1)
BLUR, FLIP, NOISE = (0.001, 0.5), 0.5, 0.005
"""The ranges of CoTTA's authors. SHIFT is a share of the image: theirs is 1/16 of an image padded to twice its size."""


Padding = Literal["edge", "reflect"]
_DRAWN = 16  # numbers of a view before those of its noise


def jitter(
    images: Tensor,
    key: Tensor,
    *,
    padding: Padding = "edge",
    blur: bool = True,
    noise: bool = True,
    geometry: bool = True,
) -> Tensor:
    """One random view of each image of a batch; all share the same draw, except of the noise.

    Brightness, contrast, saturation, hue and gamma in random order (images of 1 or 3 channels, others keep theirs);
    rotation, shift by whole pixels and scaling of the image with its border repeated; Gaussian blur (5 x 5); horizontal
    flip; Gaussian noise; clipped to [0, 1] before and after. What is left out leaves the other draws as they are.

    Args:
        images: (B, C, H, W), floats in [0, 1].
        key: Of the draw, (2,), int64, on the CPU: a seed and a counter. The draw is the same on every device.
        padding: What is around the image: its border repeated (``edge``), or the image mirrored (``reflect``).
        blur: Whether with the blur.
        noise: Whether with the noise.
        geometry: Whether with rotation, shift, scaling and flip: what moves pixels.
    """
    with torch.autocast(images.device.type, enabled=False):  # affine of half precision grids rounds pixels to 0 or 1
        return _view(at_least_float32(images).clamp(0, 1), key, padding, blur, noise, geometry).to(images.dtype)


def _view(x: Tensor, key: Tensor, padding: Padding, blur: bool, noise: bool, geometry: bool) -> Tensor:
    from torchvision.transforms.v2 import functional as F  # takes seconds: imported when needed

    numbers = iter((random_words(key, _DRAWN).double() * 2**-32 + 0.5).tolist())  # in [0, 1)

    def draw(bounds: tuple[float, float]) -> float:
        low, high = bounds
        return low + (high - low) * float(next(numbers))

    height, width = x.shape[-2:]
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue, F.adjust_gamma)
    factors = [draw(bounds) for bounds in (BRIGHTNESS, CONTRAST, SATURATION, HUE, GAMMA)]
    places = [next(numbers) for _ in adjust]
    for index in sorted(range(len(adjust)), key=places.__getitem__):
        if x.shape[1] in (1, 3):
            x = adjust[index](x, factors[index]).clamp(0, 1)  # a hue may end below 0 by a rounding error
    angle, scale = draw(DEGREES), draw(SCALE)
    shift = [round(width * draw(SHIFT)), round(height * draw(SHIFT))]
    x = F.pad(x, [width // 2, height // 2], padding_mode=padding)
    if geometry:
        x = F.affine(x, angle, shift, scale, [0.0, 0.0], interpolation=F.InterpolationMode.BILINEAR)
    margins = [min(2, height // 2), min(2, width // 2)]  # what the blur sees around the image, and no more
    x = F.center_crop(x, [height + 2 * margins[0], width + 2 * margins[1]])
    sigma = draw(BLUR)
    x = F.center_crop(F.gaussian_blur(x, [5, 5], [sigma]) if blur else x, [height, width])
    if draw((0, 1)) < FLIP and geometry:
        x = x.flip(-1)
    if noise:
        x = x + NOISE * random_normals(key, *x.shape, start=_DRAWN, device=x.device)
    return x.clamp(0, 1)
