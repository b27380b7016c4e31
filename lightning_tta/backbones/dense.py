"""Nets with many predictions for each sample, of tokens or of pixels, as one module from tensor to logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


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
