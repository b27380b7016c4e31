"""A small U-Net for segmentation, whose last layer is a convolution over single pixels."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tta.errors import check_range


class UNet(nn.Module):
    """Logits (B, K, H, W) of images (B, C, H, W), of any size: encoder and decoder with skips, each block normed.

    ``--model.backbone lightning_tta.backbones.unet.UNet``. After Ronneberger et al. (arXiv 1505.04597), with BatchNorm,
    strided convolutions in the place of pooling, and bilinear upsampling.

    Args:
        num_classes: Number of classes K, at least 2.
        width: Channels of the first block, at least 1; each further one has twice as many.
        depth: How often the resolution is halved, 1 to 5.
        in_chans: Channels of the images C.
        norm: ``batch`` or ``group`` (of 8 channels or fewer each).
    """

    def __init__(
        self, num_classes: int = 2, width: int = 16, depth: int = 3, in_chans: int = 3, norm: str = "batch"
    ) -> None:
        super().__init__()
        check_range("width", width, 1, integer=True)
        check_range("depth", depth, 1, 5, integer=True)
        self.num_classes = num_classes
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = _block(in_chans, width, norm)
        self.down = nn.ModuleList(_block(a, b, norm, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_block(a + b, a, norm) for a, b in reversed(list(pairwise(widths))))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        x = self.stem(images)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = functional.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        logits: Tensor = self.head(x)
        return logits


def _block(inputs: int, outputs: int, norm: str, stride: int = 1) -> nn.Sequential:
    def normed() -> nn.Module:
        return nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(max(1, outputs // 8), outputs)

    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), normed(), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), normed(), nn.ReLU()),
    )
