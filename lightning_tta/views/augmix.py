"""Random views of images, made in batches on the images' device: crops, flips and AugMix.

Everything random is drawn per image from a generator of its own, so an image's views depend on its seed alone, not on
the batch it comes in. Pixels are floats in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from lightning_tta.errors import ConfigError, check_choice, check_range

AUGMENTATIONS = ("none", "rrc", "rrc_flip", "crop", "crop_flip", "augmix", "augmix_crop", "augmix_only")
"""none: copies; rrc: random resized crop; crop: crop after padding by 4 (CIFAR); ..._flip: then a random flip;
augmix: rrc_flip, then AugMix (MEMO on ImageNet); augmix_crop: crop_flip, then AugMix (MEMO on CIFAR); augmix_only:
AugMix of the image itself (where a flip changes the class)."""

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
WIDTH, DEPTH, PADDING = 3, 3, 4
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def make_views(images: Tensor, views: int, augment: str, seeds: Sequence[int]) -> Tensor:
    """V views of each image.

    Args:
        images: (S, C, H, W), floats in [0, 1].
        views: V, at least 1.
        augment: One of :data:`AUGMENTATIONS`.
        seeds: One for each image.

    Returns:
        (S, V, C, H, W), floats in [0, 1]; each image's views are laid out in memory as the images are (channels_last).
    """
    check_range("views", views, 1, integer=True)
    check_choice("augment", augment, AUGMENTATIONS)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = images[:, None].expand(-1, views, -1, -1, -1)
    if augment in ("crop", "crop_flip", "augmix_crop"):
        x = _padded_crop(images, views, generators)
    elif augment in ("rrc", "rrc_flip", "augmix"):
        x = _resized_crop(images, views, generators)
    if augment in ("rrc_flip", "crop_flip", "augmix", "augmix_crop"):
        mirrored = _draw(generators, lambda g: torch.rand(views, generator=g) < 0.5, images.device)
        x = torch.where(mirrored[..., None, None, None], x.flip(-1), x)
    if augment.startswith("augmix"):
        x = _augmix(x, generators)
    return _laid_out_as(images, x)


def _laid_out_as(images: Tensor, x: Tensor) -> Tensor:
    """``x`` (..., C, H, W) with the channels last in memory where ``images`` have them there."""
    if images.shape[1] > 1 and images.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    return x.contiguous()


def _draw(
    generators: Sequence[torch.Generator], draw: Callable[[torch.Generator], Tensor], device: torch.device
) -> Tensor:
    """The same draw for each image, stacked: (S, ...)."""
    return torch.stack([draw(generator) for generator in generators]).to(device)


def _crop_boxes(views: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Top, left, height, width of random crops as torchvision draws them: (V, 4)."""
    attempts = 10
    area = height * width * torch.empty(views, attempts).uniform_(*SCALE, generator=generator)
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = torch.empty(views, attempts).uniform_(low, high, generator=generator).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    position = torch.rand(2, views, generator=generator)
    top, left = (position[0] * (height - h + 1)).floor(), (position[1] * (width - w + 1)).floor()
    # None fits: the largest crop in the middle whose ratio is allowed.
    h0, w0 = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    middle = torch.tensor([(height - h0) // 2, (width - w0) // 2, h0, w0], dtype=torch.float)
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], 1), middle)


def _resized_crop(images: Tensor, views: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Random crops, resized bilinearly to the images' size: one sampling for all views."""
    count, _, height, width = images.shape
    boxes = _draw(generators, lambda g: _crop_boxes(views, height, width, g), images.device).flatten(0, 1)
    axes = []
    for start, length, size in ((boxes[:, 0], boxes[:, 2], height), (boxes[:, 1], boxes[:, 3], width)):
        steps = (torch.arange(size, device=images.device) + 0.5) / size
        pixel = start[:, None] + (steps * length[:, None] - 0.5).clamp_min(0).minimum(length[:, None] - 1)
        axes.append((2 * pixel + 1) / size - 1)
    y, x = (axis.to(images.dtype) for axis in axes)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    # One image is sampled V times: its views lie one below the other in the grid.
    grid = grid.view(count, views * height, width, 2)
    sampled = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.view(count, -1, views, height, width).transpose(1, 2)


def _padded_crop(images: Tensor, views: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Crops of the images' size out of images with a black border."""
    height, width = images.shape[-2:]
    shift = _draw(generators, lambda g: torch.randint(2 * PADDING + 1, (views, 2), generator=g), images.device)
    rows = shift[..., 0, None] + torch.arange(height, device=images.device)
    columns = shift[..., 1, None] + torch.arange(width, device=images.device)
    number = torch.arange(len(images), device=images.device)[:, None, None, None]
    crops = pad(images, [PADDING] * 4).permute(0, 2, 3, 1)[number, rows[..., :, None], columns[..., None, :]]
    return crops.permute(0, 1, 4, 2, 3)


def _resample(x: Tensor, *matrix: Tensor | float) -> Tensor:
    """Resample x (N, C, H, W) bilinearly; black outside.

    With the matrix (a, b, c, d, e, f), each a number or (N,), the output at (p, q), right and down from the middle, is
    the input at (a p + b q + c, d p + e q + f).
    """
    height, width = x.shape[-2:]
    columns = [torch.as_tensor(value, device=x.device).expand(len(x)) for value in matrix]
    p = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    q = torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2
    points = torch.stack([p.expand(height, -1), q[:, None].expand(-1, width), torch.ones_like(x[0, 0])], -1)
    moved = points.view(1, -1, 3) @ torch.stack(columns, -1).view(-1, 2, 3).to(x.dtype).transpose(1, 2)
    grid = (2 * moved / torch.tensor([width, height], device=x.device, dtype=x.dtype)).view(-1, height, width, 2)
    return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    angle = torch.deg2rad((level * 3).floor() * sign)  # whole degrees, up to 30 at level 10
    return _resample(x, angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0)


def _shear_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    amount = level * 0.03 * sign
    return _resample(x, 1, amount, amount * (x.shape[-2] - 1) / 2, 0, 1, 0)  # PIL shears from the corner


def _shear_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    amount = level * 0.03 * sign
    return _resample(x, 1, 0, 0, amount, 1, amount * (x.shape[-1] - 1) / 2)


def _translate_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _resample(x, 1, 0, (level * x.shape[-1] / 30).floor() * sign, 0, 1, 0)  # whole pixels, a third at level 10


def _translate_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _resample(x, 1, 0, 0, 0, 1, (level * x.shape[-2] / 30).floor() * sign)


def _solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    threshold = (256 - (level * 25.6).floor()) / 255
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 1 - x, x)


def _pixelwise(name: str, *arguments: Any) -> Operation:
    """A function of torchvision, imported when needed, for it takes seconds; it treats each channel on its own."""

    def operation(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional

        channels = x if x.shape[1] == 3 else x.reshape(-1, 1, *x.shape[2:])  # torchvision takes 1 or 3
        changed: Tensor = getattr(functional, name)(channels, *arguments)
        return changed.view_as(x)

    operation.__name__ = name
    return operation


OPERATIONS: tuple[Operation, ...] = (
    _pixelwise("autocontrast"),
    _pixelwise("equalize"),
    _rotate,
    _solarize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _pixelwise("posterize", 4),  # 4 - floor(0.4 level) is 4
)
"""MEMO's list at severity 1; each takes x (N, C, H, W), a level in (0.1, 1) and a sign for each image."""


def _augmix(x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """AugMix (arXiv 1912.02781) with MEMO's operations: three chains of one to three operations, mixed.

    ``m * x + (1 - m) * sum_i w_i chain_i(x)``, w ~ Dirichlet(1, 1, 1), m ~ Beta(1, 1), which is uniform.
    """
    views, device = x.shape[1], x.device

    def chains(g: torch.Generator) -> Tensor:
        """Depth in the first row, then operation, level and sign of each step: (V, 3, 10)."""
        shape = (views, WIDTH, DEPTH)
        depth = torch.randint(1, DEPTH + 1, (views, WIDTH, 1), generator=g)
        operation = torch.randint(len(OPERATIONS), shape, generator=g)
        level = torch.empty(shape).uniform_(0.1, 1, generator=g)
        sign = 2 * torch.randint(2, shape, generator=g) - 1
        return torch.cat([depth, operation, level, sign], -1)

    drawn = _draw(generators, chains, device).flatten(0, 2)
    depth, operation, level, sign = torch.split(drawn, [1, DEPTH, DEPTH, DEPTH], -1)
    chain = x[:, :, None].expand(-1, -1, WIDTH, -1, -1, -1).flatten(0, 2).contiguous()
    for step in range(DEPTH):
        todo = torch.where(step < depth[:, 0], operation[:, step].long(), -1)
        for number, apply in enumerate(OPERATIONS):
            index = (todo == number).nonzero()[:, 0]
            if len(index):
                chain[index] = apply(chain[index], level[index, step].to(x), sign[index, step].to(x))
    weight = _draw(generators, lambda g: torch.empty(views, WIDTH).exponential_(generator=g), device).to(x)
    weight = weight / weight.sum(-1, keepdim=True)
    share = _draw(generators, lambda g: torch.rand(views, generator=g), device).to(x)[..., None, None, None]
    mixed = torch.einsum("svw,svwchd->svchd", weight, chain.view(*x.shape[:2], WIDTH, *x.shape[2:]))
    return share * x + (1 - share) * mixed


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
