"""The predictor of an asymmetric branch: a linear layer between features and head, the identity at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import HeadSplit


def make_predictor(split: HeadSplit, matrix: Tensor | None = None) -> nn.Linear:
    """A frozen square layer without bias over a net's features.

    Args:
        split: Where the net parts into features and head.
        matrix: What it holds, (D, D); ``None``: the identity.
    """
    width, like = split.num_features, split.head.weight
    predictor = nn.Linear(width, width, bias=False, device="meta").to_empty(device=like.device).to(like.dtype)
    with torch.no_grad():
        predictor.weight.copy_(torch.eye(width) if matrix is None else matrix)
    return predictor.requires_grad_(False)
