"""How a net's weights and images lie in memory: where channels last are quicker."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta.backbones.norms import norm_layers


def wanted_layout(model: nn.Module, device: torch.device, precision: str | None) -> torch.memory_format | None:
    """The layout to convert a net and its images to; ``None``: leave them as they are.

    Channels last, on CUDA in ``bf16`` and ``tf32``, for a convolutional net: one whose layers with weights are for the
    most part two-dimensional convolutions, and whose norm layers are BatchNorm. Tensor cores read that layout; without
    it each convolution converts its input and output. In float32 the other layout is quicker, and torch's GroupNorm on
    CUDA converts to it, so that every layer would convert.

    Args:
        model: The net.
        device: Where it is.
        precision: In which it computes: ``exact``, ``tf32``, ``bf16``, or ``None`` if that is not known.
    """
    if device.type != "cuda" or precision not in ("bf16", "tf32"):
        return None
    modules = list(model.modules())
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    others = [m for m in modules if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv3d, nn.MultiheadAttention))]
    if len(convolutions) < 2 or len(convolutions) <= len(others):
        return None
    return torch.channels_last if all(isinstance(m, _BatchNorm) for m in norm_layers(model).values()) else None
