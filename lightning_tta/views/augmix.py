"""Random views of images, made in batches on the images' device: crops, flips and AugMix.

Everything random is drawn per image on the CPU, from a seed of the image's own, and carried to the device once: an
image's views depend on its seed alone, not on the batch it comes in, and the device is asked nothing. Pixels are floats
in [0, 1]. Positions, 8-bit pixels and weights are whole numbers of fixed units, so small that float32 holds every sum
of their products exactly: AugMix gives the same bits on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import at_least_float32

AUGMENTATIONS = ("none", "rrc", "rrc_flip", "crop", "crop_flip", "augmix", "augmix_crop", "augmix_only")
"""none: copies; rrc: random resized crop; crop: crop after padding by 4 (CIFAR); ..._flip: then a random flip;
augmix: rrc_flip, then AugMix (MEMO on ImageNet); augmix_crop: crop_flip, then AugMix (MEMO on CIFAR); augmix_only:
AugMix of the image itself (where a flip changes the class)."""

OPERATIONS = (
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "posterize",
)
"""MEMO's list at severity 1."""

WIDTH, DEPTH, PADDING = 3, 3, 4
SCALE, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
PIXEL = 256
"""Units of a position in a pixel: two such fractions and 8-bit pixels have 24 bits in all, as float32 has."""
FINE = 2**16
"""Units of slopes, and of AugMix's weights."""
_PIXELS_AT_ONCE = 2**19  # on a CPU, through one operation: what its caches hold; an accelerator takes all at once


Numbers = npt.NDArray[Any]


class ViewPlan:
    """What views are to be made of some images: all that is random, on the CPU.

    Args:
        views: V, at least 1.
        augment: One of :data:`AUGMENTATIONS`.
        size: Height and width of the images.
        seeds: One for each image.
    """

    def __init__(self, views: int, augment: str, size: Sequence[int], seeds: Sequence[int]) -> None:
        check_range("views", views, 1, integer=True)
        check_choice("augment", augment, AUGMENTATIONS)
        self.views, self.augment, self.size, self.images = views, augment, (size[0], size[1]), len(seeds)
        self.resizes = augment in ("rrc", "rrc_flip", "augmix")
        self.crops = self.resizes or augment in ("crop", "crop_flip", "augmix_crop")
        self.mixes = augment.startswith("augmix")
        flips = augment in ("rrc_flip", "crop_flip", "augmix", "augmix_crop")
        crop, flip, chains = 2 * ATTEMPTS + 2, 1, WIDTH * (1 + 3 * DEPTH)
        columns = [crop * self.crops, flip * flips, chains * self.mixes, (WIDTH + 1) * self.mixes]
        drawn = np.split(_uniform(seeds, views, sum(columns)), np.cumsum(columns)[:-1], axis=1)
        self._tensors: list[Tensor] = []
        if self.crops:
            boxes = crop_boxes(drawn[0], *self.size) if self.resizes else _padded_boxes(drawn[0])
            mirrored = drawn[1] < 0.5 if flips else np.zeros((len(boxes), 1))
            self._add(np.concatenate([boxes, mirrored], 1))
        self._todo: list[str] = []  # operations in order, each on some of the chains
        if self.mixes:
            self._add(_mixing_weights(drawn[3]))
            self._draw_chains(drawn[2].reshape(-1, 1 + 3 * DEPTH))

    def _add(self, numbers: Numbers) -> None:
        self._tensors.append(torch.from_numpy(numbers.astype(np.int64)))

    def _draw_chains(self, drawn: Numbers) -> None:
        """Which chains go through which operation, step by step; numbers (views x WIDTH, 10), uniform."""
        depth, operation, level, sign = np.split(drawn, [1, 1 + DEPTH, 1 + 2 * DEPTH], axis=1)
        operation = (operation * len(OPERATIONS)).astype(np.int64)
        level, sign = 0.1 + 0.9 * level, np.where(sign < 0.5, -1, 1)
        kind = np.where(np.arange(DEPTH) < 1 + np.floor(depth * DEPTH), _KIND[operation], -1)
        number = np.arange(len(drawn)) + np.arange(len(drawn)) // WIDTH + 1  # before a view's chains comes the view
        for step in range(DEPTH):
            for index, name in enumerate(_APPLIED):
                chosen = np.flatnonzero(kind[:, step] == index)
                if len(chosen):
                    self._todo.append(name)
                    self._add(number[chosen])
                    if name == "moved":
                        which = operation[chosen, step]
                        self._add(positions(which, level[chosen, step], sign[chosen, step], *self.size))
                    elif name == "solarize":
                        self._add(solarize_threshold(level[chosen, step]))

    def __call__(self, images: Tensor) -> Tensor:
        """The views (S, V, C, H, W) of images (S, C, H, W), floats in [0, 1], of this number and size."""
        with torch.autocast(images.device.type, enabled=False):  # a grid of half precision would miss pixels
            return _laid_out_as(images, self._made(images).to(images.dtype))

    def _made(self, images: Tensor) -> Tensor:
        plan = iter(_carried(self._tensors, images.device))
        x = images.float().mul(255).round_().clamp_(0, 255) if self.mixes else at_least_float32(images)
        if self.crops:
            x = _cropped(x, next(plan), self.views, self.resizes)
            x = x.round() if self.mixes and self.resizes else x
        else:
            x = x[:, None].expand(-1, self.views, -1, -1, -1)
        if not self.mixes:
            return x
        weights = next(plan).to(x.dtype)[..., None, None, None]  # (S V, WIDTH + 1, 1, 1, 1)
        chains = x[:, :, None].expand(-1, -1, WIDTH + 1, -1, -1, -1).flatten(0, 2).contiguous()
        at_once = max(1, _PIXELS_AT_ONCE // chains[0].numel()) if x.device.type == "cpu" else len(chains)
        for name in self._todo:
            arguments = [torch.split(next(plan), at_once) for _ in range(1 + (name in ("moved", "solarize")))]
            for number, *rest in zip(*arguments, strict=True):
                chains.index_copy_(0, number, _APPLIED[name](chains.index_select(0, number), *rest))
        chains = chains.view(-1, WIDTH + 1, *chains.shape[1:])
        mixed = chains[:, 0] * weights[:, 0]
        for chain, weight in zip(chains.unbind(1)[1:], weights.unbind(1)[1:], strict=True):
            mixed.addcmul_(chain, weight)
        return mixed.mul_(1 / (255 * FINE)).view(x.shape)


def make_views(images: Tensor, views: int, augment: str, seeds: Sequence[int]) -> Tensor:
    """V views of each image.

    Args:
        images: (S, C, H, W), floats in [0, 1]. AugMix rounds them to 8 bits, as between its operations.
        views: V, at least 1.
        augment: One of :data:`AUGMENTATIONS`.
        seeds: One for each image.

    Returns:
        (S, V, C, H, W), floats in [0, 1]; each image's views are laid out in memory as the images are (channels_last).
    """
    return ViewPlan(views, augment, images.shape[-2:], seeds)(images)


def _laid_out_as(images: Tensor, x: Tensor) -> Tensor:
    """``x`` (..., C, H, W) with the channels last in memory where ``images`` have them there."""
    if images.shape[1] > 1 and images.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    return x.contiguous()


def _uniform(seeds: Sequence[int], views: int, columns: int) -> Numbers:
    """Numbers (S V, columns), uniform in [0, 1), those of each image from its seed."""
    generator = torch.Generator()
    drawn = torch.empty(len(seeds), views, columns, dtype=torch.float64)
    for rows, seed in zip(drawn.unbind(), seeds, strict=True):
        rows.uniform_(generator=generator.manual_seed(seed))
    return drawn.flatten(0, 1).numpy()


def _carried(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Tensors of the host on a device, in one copy that the host does not wait for."""
    if device.type == "cpu" or not tensors:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    packed = (packed.pin_memory() if torch.cuda.is_available() else packed).to(device, non_blocking=True)
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


# Crops ---------------------------------------------------------------------------------------------------------------


def crop_boxes(drawn: Numbers, height: int, width: int) -> Numbers:
    """Top, left, height, width of random crops as torchvision draws them, (N, 4); numbers (N, 22), uniform."""
    low, high = (math.log(ratio) for ratio in RATIO)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * drawn[:, :ATTEMPTS])
    root = np.exp((low + (high - low) * drawn[:, ATTEMPTS : 2 * ATTEMPTS]) / 2)
    side = np.sqrt(area)
    h, w = np.rint(side / root), np.rint(side * root)
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = np.arange(len(drawn)), fits.argmax(1)
    h, w = h[first], w[first]
    top, left = np.floor(drawn[:, -2] * (height - h + 1)), np.floor(drawn[:, -1] * (width - w + 1))
    # None fits: the largest crop in the middle whose ratio is allowed.
    h0, w0 = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    middle = np.array([(height - h0) // 2, (width - w0) // 2, h0, w0])
    return np.where(fits[first][:, None], np.stack([top, left, h, w], 1), middle)


def _padded_boxes(drawn: Numbers) -> Numbers:
    """Top and left of crops of the images' size out of images with a black border, (N, 2)."""
    corner: Numbers = np.floor(drawn[:, -2:] * (2 * PADDING + 1)) - PADDING
    return corner


def _cropped(images: Tensor, boxes: Tensor, views: int, resizes: bool) -> Tensor:
    """Crops (S, V, C, H, W), resized bilinearly to the images' size; ``boxes`` (S V, 3 or 5) end in whether to flip."""
    count, channels, height, width = images.shape
    boxes = boxes.view(count, views, -1, 1)
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    column = torch.where(boxes[:, :, -1] > 0, width - 1 - column, column)
    axes = []
    for axis, (place, size) in enumerate(((row, height), (column, width))):
        start, length = boxes[:, :, axis], boxes[:, :, axis + 2] if resizes else None
        if length is None:
            axes.append((start + place) * PIXEL)
        else:  # the middle of a pixel of the view, to the nearest unit; beyond the crop its border is repeated
            units = torch.div((2 * place + 1) * length * PIXEL - (PIXEL - 1) * size, 2 * size, rounding_mode="floor")
            axes.append(start * PIXEL + units.clamp_min(0).minimum((length - 1) * PIXEL))
    sampled = _sample(images, axes[1][:, :, None, :], axes[0][:, :, :, None])
    return sampled.view(count, channels, views, height, width).transpose(1, 2)


def _sample(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """``x`` (N, C, H, W) at positions in units of 1 / PIXEL from the middle of its first pixel; black outside.

    Args:
        x: Floats.
        across: Whole numbers (N, ..., H', W'), in the direction of the width; may be of length 1 where all are equal.
        down: Likewise, in the direction of the height.

    Returns:
        (N, C, ... H', W'), the dimensions between C and W' as one. Of 8-bit pixels, 0 to 255, without rounding.
    """
    sides = [2 ** (side - 1).bit_length() for side in x.shape[:1:-1]]  # powers of two: positions relative to the side
    margins = [side - present for side, present in zip(sides, x.shape[:1:-1], strict=True)]  # are exact
    x = pad(x, [0, margins[0], 0, margins[1]]) if any(margins) else x
    axes = [
        axis.to(x.dtype).mul_(1 / (PIXEL // 2 * side)).add_(1 / side - 1)
        for axis, side in zip((across, down), sides, strict=True)
    ]
    shape = [max(*lengths) for lengths in zip(*(axis.shape for axis in axes), strict=True)]
    grid = torch.stack([axis.expand(shape) for axis in axes], 1).flatten(2, -2).permute(0, 2, 3, 1)
    return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# AugMix's operations, on 8-bit pixels in floats, 0 to 255 ------------------------------------------------------------


def positions(operation: Numbers, level: Numbers, sign: Numbers, height: int, width: int) -> Numbers:
    """Where operations that move pixels take them from, (N, 2, 3), in units of 1 / FINE of a pixel.

    With rows (a, b, c) and (d, e, f) the output at column i and row j is the input at (a i + b j + c, d i + e j + f).

    Args:
        operation: Positions (N,) in :data:`OPERATIONS`.
        level: In (0.1, 1).
        sign: -1 or 1.
        height: Of the images.
        width: Of the images.
    """
    rotates, shears_x, shears_y, moves_x, moves_y = (operation == OPERATIONS.index(name) for name in _MOVES)
    angle = np.deg2rad(np.floor(level * 3) * sign * rotates)  # whole degrees, up to 30 at level 10
    shear = level * 0.03 * sign
    a, b, d, e = np.cos(angle), shears_x * shear - np.sin(angle), np.sin(angle) + shears_y * shear, np.cos(angle)
    p, q = (width - 1) / 2, (height - 1) / 2  # rotation is about the middle; PIL shears from the corner
    c = rotates * (p - a * p - b * q) + moves_x * np.floor(level * width / 30) * sign  # whole pixels, a third at 10
    f = rotates * (q - d * p - e * q) + moves_y * np.floor(level * height / 30) * sign
    found: Numbers = np.rint(np.stack([a, b, c, d, e, f], 1) * FINE).reshape(-1, 2, 3)
    return found


def solarize_threshold(level: Numbers) -> Numbers:
    """From which pixel on it inverts, whole numbers in [231, 254]."""
    threshold: Numbers = 256 - np.floor(level * 25.6)
    return threshold


def _moved(x: Tensor, coefficients: Tensor) -> Tensor:
    """Resampled where :func:`positions` says, (N, 2, 3); black outside."""
    height, width = x.shape[-2:]
    column = torch.arange(width, device=x.device, dtype=torch.int32)
    row = torch.arange(height, device=x.device, dtype=torch.int32)
    by_column, by_row, offset = coefficients.int()[..., None].unbind(2)
    offset = offset + FINE // PIXEL // 2  # to the nearest unit
    units = (by_column * column)[:, :, None, :] + (by_row * row + offset)[:, :, :, None]
    across, down = (units >> (FINE // PIXEL).bit_length() - 1).unbind(1)
    return _sample(x, across, down).round_()


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 255 - x, x)


def _posterize(x: Tensor) -> Tensor:
    return (x / 16).floor_().mul_(16)  # 4 - floor(0.4 level) is 4 bits


def _autocontrast(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x.flatten(2), dim=2)
    flat = high == low
    spread, low = torch.where(flat, 255, high - low)[..., None, None], low.masked_fill_(flat, 0)[..., None, None]
    return ((x - low) * 255).div_(spread).floor_()  # exact: such a quotient does not round up to a whole one


def _equalize(x: Tensor) -> Tensor:
    pixels = x.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=x.device)
    counts.scatter_add_(2, pixels, torch.ones((), dtype=torch.int32, device=x.device).expand_as(pixels))
    step = (pixels.shape[2] - counts.gather(2, pixels.amax(2, keepdim=True))) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp_min(1)
    table = torch.where(step > 0, table.clamp_max(255), torch.arange(256, device=x.device))
    return table.gather(2, pixels).to(x.dtype).view_as(x)


_APPLIED: dict[str, Callable[..., Tensor]] = {
    "moved": _moved,
    "solarize": _solarize,
    "posterize": _posterize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}


_MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_KIND = np.array([list(_APPLIED).index("moved" if name in _MOVES else name) for name in OPERATIONS])


def _mixing_weights(drawn: Numbers) -> Numbers:
    """Weights of the view itself and of its chains (N, 1 + WIDTH), in units of 1 / FINE that sum to 1.

    ``m * x + (1 - m) * sum_i w_i chain_i(x)``, w ~ Dirichlet(1, 1, 1), m ~ Beta(1, 1), which is uniform (AugMix, arXiv
    1912.02781).
    """
    share, chains = drawn[:, :1], -np.log1p(-drawn[:, 1:])
    chains = np.floor(FINE * (1 - share) * chains / chains.sum(1, keepdims=True))
    return np.concatenate([FINE - chains.sum(1, keepdims=True), chains], 1)


def permute_patches(images: Tensor, patches: int, order: Tensor) -> Tensor:
    """Images cut into ``patches`` x ``patches``, put together in another order, each image in its own.

    Sizes that ``patches`` does not divide are made smaller before and larger after (bilinear).

    Args:
        images: (B, C, H, W), at least ``patches`` pixels a side.
        patches: Patches along a side, at least 1.
        order: (B, patches * patches), a permutation for each image: the new i-th patch is the old ``order[i]``-th.

    Raises:
        ConfigError: If an image has fewer pixels than patches along a side.
    """
    batch, channels, *size = images.shape
    height, width = (side // patches for side in size)
    if min(height, width) == 0:
        raise ConfigError(f"patches={patches} does not fit images of {size[0]} x {size[1]} pixels. Use fewer patches.")
    fits = [height * patches, width * patches]
    x = images if fits == size else interpolate(images, fits, mode="bilinear")
    x = x.reshape(batch, channels, patches, height, patches, width).permute(0, 2, 4, 1, 3, 5)
    x = x.flatten(1, 2)[torch.arange(batch, device=images.device)[:, None], order]
    x = (
        x.view(batch, patches, patches, channels, height, width)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(batch, channels, *fits)
    )
    return _laid_out_as(images, x if fits == size else interpolate(x, size, mode="bilinear"))
