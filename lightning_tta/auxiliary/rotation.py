"""By how many quarters of a turn was this image turned? The task of test-time training."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta.auxiliary.base import Auxiliary
from lightning_tta.auxiliary.branch import Branch
from lightning_tta.backbones.split import as_logits
from lightning_tta.draws import random_integers
from lightning_tta.errors import InputError, check_choice, check_range

Turns = Literal["random", "all"]


class Rotation(Auxiliary):
    """The cross-entropy of a branch of four outputs with the number of quarters by which each image was turned.

    Args:
        net: A classifier that ends in a linear layer.
        weight: See :class:`~lightning_tta.auxiliary.base.Auxiliary`; authors 1.
        at: See :class:`~lightning_tta.auxiliary.branch.Branch`; authors: the second of three stages.
        turns: ``random``: each image once; ``all``: each in all four ways.

    Source: Gidaris et al., ICLR 2018, arXiv 1803.07728; as in test-time training, arXiv 1909.13231.
    """

    kind: ClassVar[str] = "rotation"

    def __init__(self, net: nn.Module, weight: float = 1.0, at: float = 0.67, turns: Turns = "random") -> None:
        super().__init__(net, weight)
        check_range("at", at, 0, 1, low_open=True)
        check_choice("turns", turns, ("random", "all"))
        self.turns = turns
        self.branch = Branch(net, at, 4)

    def running(self, net: nn.Module) -> AbstractContextManager[None]:
        """While active, a pass of the net gives the logits of the four turns."""
        return self.branch.running(net)

    def loss(self, net: nn.Module, images: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        """The mean over the turned images."""
        turned, quarters = turn(images, self.turns, key)
        with self.running(net):
            return cross_entropy(as_logits(net(turned)), quarters)


def turn(images: Tensor, turns: Turns, key: Tensor) -> tuple[Tensor, Tensor]:
    """Images turned by 0 to 3 quarters, and these numbers: (B,) of ``random``, (4 * B,) of ``all``, turn by turn.

    Args:
        images: (B, C, H, W), square.
        turns: See :class:`Rotation`.
        key: Of the draw, (2,), int64, on their device.

    Raises:
        InputError: If the images are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise InputError(
            f"Quarter turns need square images; got {height} x {width} pixels. Crop or resize them to squares."
        )
    four = torch.stack([torch.rot90(images, quarter, (-2, -1)) for quarter in range(4)])
    rows = torch.arange(len(images), device=images.device)
    if turns == "all":
        return four.flatten(0, 1), torch.arange(4, device=images.device).repeat_interleave(len(images))
    quarters = random_integers(key, len(images)) & 3
    return four[quarters, rows], quarters
