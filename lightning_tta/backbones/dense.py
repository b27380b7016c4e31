"""Nets with many predictions for each sample, of tokens or of pixels, as one module from tensor to logits."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

TRIED = (32, 64, 224, 16, 28, 40, 48, 96, 128, 160, 192, 240, 256, 288, 336, 384, 448, 512, 518)
"""Pixels along a side."""


class DenseModel(nn.Module, ABC):
    """Wraps a net so that one tensor goes in and logits (B, ..., K) come out, the classes last.

    Methods hold this module; what users give and get is the net inside.

    Args:
        net: The user's net.

    Attributes:
        kind: The word for what it takes, as of ``task=``.
        settings: What the task of a method is to know, by name.
    """

    kind: ClassVar[str]

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.net = net
        self.settings = settings

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, ..., K) of one tensor."""

    @abstractmethod
    def examples(self, number: int) -> list[Tensor]:
        """Inputs of so many samples each, any of which will do to see what runs in the net."""


def describe_output(output: object) -> str:
    """What a net has returned, in words, for an error."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with keys {', '.join(map(repr, output)) or 'none'}"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {', '.join(map(describe_output, output)) or 'nothing'}"
    return f"a {type(output).__name__}"


def image_examples(model: nn.Module, number: int, sizes: Sequence[int] = TRIED) -> Iterator[Tensor]:
    """Black images, from the second on with a gradient to white, of the channels that a net's convolutions take.

    Args:
        model: The net.
        number: Images each.
        sizes: Of their sides.
    """
    widths = list(dict.fromkeys(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)))
    channels = [width for width in widths if width in (1, 3)] or widths[:3] or [3]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    for size, channel in itertools.product(sizes, channels):
        images = torch.zeros(number, channel, size, size, dtype=like.dtype, device=like.device)
        images[1:] += torch.linspace(0, 1, size, dtype=like.dtype, device=like.device)
        yield images
