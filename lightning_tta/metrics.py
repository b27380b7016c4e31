"""Measures of a stream that need no labels: is the adapted net collapsing?"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tta.losses import entropy


def collapse_measures(logits: Tensor) -> dict[str, Tensor]:
    """Scalars that move when entropy minimisation collapses, for logits (B, K), B >= 1.

    - ``entropy``: mean entropy in nats, in [0, log K]; near 0 after a collapse.
    - ``largest_class_share``: share of the most predicted class in the batch, in [1/B, 1]; near 1 after a collapse.
    - ``logit_norm``: mean L2 norm of the logits; grows when confidence is inflated.
    - ``centre_dominance``: norm of the mean logit vector over the mean norm, in [0, 1]; near 1 when all samples share
      one direction. (ZeroSiam, arXiv 2509.23183, describes the quantity; this formula is our reading of it.)

    A class-sorted stream has a large class share by itself: compare with the source model on the same stream.
    """
    logits = logits.detach()
    norm = logits.norm(dim=-1).mean()
    shares = torch.bincount(logits.argmax(-1), minlength=logits.shape[-1]).max() / len(logits)
    return {
        "entropy": entropy(logits).mean(),
        "largest_class_share": shares,
        "logit_norm": norm,
        "centre_dominance": logits.mean(0).norm() / norm.clamp_min(1e-12),
    }
