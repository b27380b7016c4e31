"""Nets over images with other outputs than one class an image: segmentation, and regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from lightning_tta.backbones.dense import DenseModel, describe_output, image_examples
from lightning_tta.errors import UnsupportedModelError

ENTRIES = ("out", "logits")
"""Of a dict, what are the logits."""


class PixelModel(DenseModel):
    """A segmentation net that returns logits with the classes last.

    The net is any module whose ``forward(images)`` returns logits (B, K, H, W): a tensor, the entry ``out``
    (torchvision's) or ``logits`` of a dict, or the attribute ``logits``.

    Args:
        net: The segmentation net.
    """

    kind = "pixels"

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, H, W, K) of images (B, C, H, W)."""
        returned: Any = self.net(x)
        entry = next((name for name in ENTRIES if isinstance(returned, Mapping) and name in returned), None)
        output = getattr(returned, "logits", returned) if entry is None else returned[entry]
        what = describe_output(returned) if entry is None else f"{describe_output(output)} as {entry!r}"
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] < 2 or len(output) != len(x):
            raise UnsupportedModelError(
                f"A segmentation net must return logits (B, K, H, W) of K >= 2 classes, as a tensor, as the entry "
                f"'out' or 'logits' of a dict, or as the attribute 'logits'; {type(self.net).__name__} returned {what} "
                f"for images {tuple(x.shape)}. Wrap it in a module that does; of one class against the background "
                "return two logits, (0, u)."
            )
        if output.shape[1:3] == x.shape[2:] != output.shape[2:]:
            raise UnsupportedModelError(
                f"{type(self.net).__name__} returned {what} for images {tuple(x.shape)}: are the classes last? A "
                "segmentation net must return logits (B, K, H, W), the classes second. Wrap it in a module that "
                "returns logits.movedim(-1, 1)."
            )
        return output.movedim(1, -1)

    def examples(self, number: int) -> list[Tensor]:
        """Images of several sizes."""
        return list(image_examples(self.net, number, (64, 224, 128, 96, 256, 512)))


class ValueModel(DenseModel):
    """A net for regression: its outputs are values, of no classes.

    Args:
        net: Any module whose ``forward(images)`` returns values (B, D) or (B,).
    """

    kind = "regression"

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, D) of images (B, C, H, W)."""
        output = self.net(x)
        if not isinstance(output, Tensor) or output.ndim not in (1, 2) or len(output) != len(x):
            raise UnsupportedModelError(
                f"A net for regression must return values (B, D) or (B,), as a tensor; {type(self.net).__name__} "
                f"returned {describe_output(output)} for images {tuple(x.shape)}. Wrap it in a module that does."
            )
        return output.view(len(x), -1)

    def examples(self, number: int) -> list[Tensor]:
        """Images of several sizes."""
        return list(image_examples(self.net, number))


class PixelHead(nn.Module):
    """A convolution over single pixels as a linear layer g: features (..., D) -> logits (..., K).

    Args:
        layer: The convolution, whose weights these stay.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no module of its own
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        self.out_features, self.in_features = layer.weight.shape[:2]

    @property
    def weight(self) -> Tensor:
        """(K, D)."""
        weight: Tensor = self.__dict__["layer"].weight
        return weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """(K,)."""
        bias: Tensor | None = self.__dict__["layer"].bias
        return bias

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., K)."""
        return linear(features, self.weight, self.bias)


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, h, w, K) at another size (B, H, W, K), bilinearly, as torchvision's segmentation nets resize them."""
    if tuple(logits.shape[1:3]) == tuple(size):
        return logits
    return interpolate(logits.movedim(-1, 1), size=size, mode="bilinear", align_corners=False).movedim(1, -1)


def is_pixel_head(module: nn.Module) -> bool:
    """Whether a layer takes each pixel by itself, with weights (K, D)."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


@torch.no_grad()
def gives(head_output: Any, logits: Tensor) -> bool:
    """Whether the output (B, K, h, w) of a head, resized, is the net's output (B, H, W, K)."""
    if not isinstance(head_output, Tensor) or head_output.ndim != 4 or head_output.shape[1] != logits.shape[-1]:
        return False
    same = resized(head_output.movedim(1, -1), (logits.shape[1], logits.shape[2]))
    scale = float(logits.abs().max())
    return bool(torch.allclose(same, logits, rtol=1e-3, atol=1e-4 * max(scale, 1e-6)))
