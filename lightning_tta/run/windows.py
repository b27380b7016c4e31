"""What the last batches look like together: the numbers by which a collapse shows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_tta.losses import entropy

Measures = tuple[Tensor, float, float]
"""Of one batch: predicted-class counts (K,), mean entropy as a share of log K, mean L2 norm of the logits."""


def measure(logits: Tensor) -> Measures:
    """Of logits (B, K), B >= 1."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).cpu()
    mean_entropy, norm = torch.stack([entropy(logits).mean(), logits.norm(dim=1).mean()]).tolist()
    return counts, mean_entropy / math.log(logits.shape[1]), norm


def gained(batches: Iterable[Measures], source: Iterable[Measures]) -> float:
    """By how much the share of a class is above the source's, at most."""
    mine, theirs = (torch.stack([counts for counts, _, _ in some]).sum(0) for some in (batches, source))
    return float((mine / mine.sum() - theirs / theirs.sum()).max())


def pool(batches: Iterable[Measures]) -> tuple[float, float, float]:
    """Largest share of all counts together, mean entropy, mean norm."""
    counts, entropies, norms = zip(*batches, strict=True)
    total = torch.stack(counts).sum(0)
    return float(total.max() / total.sum()), sum(entropies) / len(entropies), sum(norms) / len(norms)
