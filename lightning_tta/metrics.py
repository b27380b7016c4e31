"""Measures of a stream that need no labels: is the adapted net collapsing?"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_tta.losses import at_least_float32, entropy


class LogitMeasures:
    """What the logits of one batch say without labels; each measure is computed once, when it is first asked for.

    Args:
        logits: (B, K), B >= 1 for the measures of the whole batch.

    Attributes:
        prediction: Classes (B,); -1 where there is none: logits all zero, of an image that was left out, or not finite.
        confidence: Largest probability (B,), in [1/K, 1].
        entropy: (B,) in nats, in [0, log K].
        norm: L2 norms (B,) of the logits.
        counts: How often each class is predicted (K,).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.detach()

    @cached_property
    def prediction(self) -> Tensor:  # noqa: D102
        there_is_one = self.logits.isfinite().all(-1) & (self.logits != 0).any(-1)
        return torch.where(there_is_one, self.logits.argmax(-1), -1)

    @cached_property
    def confidence(self) -> Tensor:  # noqa: D102
        return self.logits.softmax(-1).amax(-1)

    @cached_property
    def entropy(self) -> Tensor:  # noqa: D102
        return entropy(self.logits)

    @cached_property
    def norm(self) -> Tensor:  # noqa: D102
        norms: Tensor = torch.linalg.vector_norm(self.logits, dim=-1)
        return norms

    @cached_property
    def counts(self) -> Tensor:  # noqa: D102
        return class_counts(self.prediction, self.logits.shape[-1])

    def means(self) -> dict[str, Tensor]:
        """Scalars of the batch: ``entropy``, ``largest_class_share`` and ``logit_norm``."""
        return {
            "entropy": self.entropy.mean(),
            "largest_class_share": self.counts.max() / len(self.logits),
            "logit_norm": self.norm.mean(),
        }


def class_counts(predictions: Tensor, classes: int) -> Tensor:
    """How often each class (K,) is predicted; predictions (B,) of -1 are none."""
    if predictions.device.type == "cpu":
        return torch.bincount(predictions + 1, minlength=classes + 1)[1:]
    return compared_counts(predictions, classes)


def compared_counts(predictions: Tensor, classes: int) -> Tensor:
    """:func:`class_counts` without torch's ``bincount``, which off the CPU waits for the largest prediction."""
    return (predictions[:, None] == torch.arange(classes, device=predictions.device)).sum(0)


def collapse_measures(logits: Tensor) -> dict[str, Tensor]:
    """Scalars that move when entropy minimisation collapses, for logits (B, K), B >= 1.

    - ``entropy``: mean entropy in nats, in [0, log K]; near 0 after a collapse.
    - ``largest_class_share``: share of the most predicted class in the batch, in [1/B, 1]; near 1 after a collapse.
    - ``logit_norm``: mean L2 norm of the logits; grows when confidence is inflated.
    - ``centre_dominance``: norm of the mean logit vector over the mean norm, in [0, 1]; near 1 when all samples share
      one direction. (ZeroSiam, arXiv 2509.23183, describes the quantity; this formula is our reading of it.)

    A class-sorted stream has a large class share by itself: compare with the source model on the same stream.
    """
    measures = LogitMeasures(logits)
    means = measures.means()
    dominance = measures.logits.mean(0).norm() / means["logit_norm"].clamp_min(1e-12)
    return {**means, "centre_dominance": dominance}


@dataclass(frozen=True)
class WindowMeasures:
    """Of a window of batches: share of the most predicted class, mean entropy over log K, mean logit norm."""

    largest_class_share: float
    entropy_of_log_k: float
    logit_norm: float


class Window:
    """The last ``length`` batches of a stream together: the numbers by which a collapse shows."""

    def __init__(self, length: int) -> None:
        self.batches: deque[tuple[Tensor, float, float]] = deque(maxlen=length)

    def add(self, logits: Tensor) -> None:
        """Take in the logits (B, K) of a batch, B >= 1."""
        measures = LogitMeasures(logits)
        means = torch.stack([measures.entropy.mean(), measures.norm.mean()]).double()
        both = torch.cat([means, measures.counts.double()]).cpu()  # one question to the device
        means, counts = both[:2], both[2:]
        entropy, norm = means.tolist()
        self.batches.append((counts.long(), entropy / math.log(logits.shape[-1]), norm))

    @property
    def shares(self) -> Tensor:
        """Share of each class (K,) in all predictions."""
        counts = torch.stack([counts for counts, _, _ in self.batches]).sum(0)
        return counts / counts.sum()

    def measures(self) -> WindowMeasures:
        """Largest share of all predictions, mean entropy, mean norm."""
        _, entropies, norms = zip(*self.batches, strict=True)
        return WindowMeasures(float(self.shares.max()), sum(entropies) / len(entropies), sum(norms) / len(norms))


class Calibration:
    """How far confidence is from accuracy along a stream, in bounded memory: bins, and two proper scores.

    ``ece``: sum over 15 equal bins of confidence, of the share of samples times ``|accuracy - mean confidence|`` (Guo
    et al., arXiv 1706.04599); ``nll``: mean of -log p_y; ``brier``: mean of sum_k (p_k - [k = y])^2.
    """

    BINS = 15

    def __init__(self) -> None:
        self.bins = torch.zeros(3, self.BINS, dtype=torch.float64)  # samples, confidence, right ones
        self.scores = torch.zeros(2, dtype=torch.float64)  # sums of the negative log-likelihood and of Brier's score

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in logits (B, K) with labels (B,); those below 0 are not known and are left out."""
        known = labels >= 0
        if not bool(known.all()):
            logits, labels = logits[known], labels[known]
        if not len(labels):
            return
        log_p = torch.log_softmax(logits.double(), -1)
        p = log_p.exp()
        confidence, prediction = p.max(-1)
        self.add(confidence, prediction == labels)
        label_log_p = log_p.gather(1, labels[:, None])[:, 0]
        brier = (p**2).sum(1) - 2 * label_log_p.exp() + 1
        self.scores += torch.stack([-label_log_p.sum(), brier.sum()])

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Take in how sure predictions were, in [0, 1], float64 (B,), and which of them were right, bool (B,)."""
        bin_of = (confidence * self.BINS).ceil().long().clamp(1, self.BINS) - 1  # bins (0, 1/15], ..., (14/15, 1]
        self.bins.index_add_(1, bin_of, torch.stack([torch.ones_like(confidence), confidence, right.double()]))

    def result(self) -> dict[str, float | list[list[float]] | None]:
        """``ece``, ``nll``, ``brier``, each ``None`` without labels, and ``reliability``: the three rows of bins."""
        count = float(self.bins[0].sum())
        if not count:
            return {"ece": None, "nll": None, "brier": None, "reliability": None}
        gap = (self.bins[1] - self.bins[2]).abs().sum() / count
        nll, brier = (self.scores / count).tolist()
        # Sums in another order (several processes) differ in the last digits, which say nothing.
        rows = [[round(value, 8) for value in row] for row in self.bins.tolist()]
        return {"ece": round(float(gap), 10), "nll": round(nll, 10), "brier": round(brier, 10), "reliability": rows}


@torch.no_grad()
def row_measures(logits: Tensor, rows: Tensor | None, size: int = 256) -> dict[str, Tensor]:
    """:func:`collapse_measures` of logits with several predictions a sample, of those that count.

    Args:
        logits: (B, ..., K).
        rows: Which predictions count (B, ...), bool; ``None``: all.
        size: How many rows are looked at at a time.

    Returns:
        Empty where none counts. ``largest_class_share`` is that of the most predicted class of all rows.
    """
    flat = logits.detach().flatten(0, -2)
    index = torch.arange(len(flat), device=flat.device) if rows is None else rows.flatten().nonzero()[:, 0]
    if not len(index):
        return {}
    parts = [LogitMeasures(at_least_float32(flat[part])) for part in torch.split(index, size)]
    predictions = torch.cat([part.prediction for part in parts])
    classes, counts = torch.unique(predictions, return_counts=True)
    return {
        "entropy": torch.cat([part.entropy for part in parts]).mean(),
        "largest_class_share": torch.where(classes >= 0, counts, 0).max() / len(index),
        "logit_norm": torch.cat([part.norm for part in parts]).mean(),
    }
