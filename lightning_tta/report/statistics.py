"""Means with intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

if TYPE_CHECKING:
    from numpy.typing import NDArray

UPPER = 0.975
"""Upper quantile of the 95 % confidence intervals."""
MIN_SEEDS = 3
"""Fewer values get no interval: of two, Student's t would make 12.7 standard errors to each side."""
FEW = 25
"""So many samples must differ before the normal distribution gives their p-value."""


@dataclass(frozen=True)
class Estimate:
    """A mean, of values or of paired differences."""

    mean: float
    low: float  # the lowest value
    high: float
    count: int
    half: float | None = None  # half width of the 95 % interval; None where the values are too few for one
    p: float | None = None  # of differences, two-sided, for "no difference"; None where nothing was tested
    over: str = "seeds"  # what the values belong to: seeds or samples

    @property
    def clear(self) -> bool:
        """Whether a tested difference's interval leaves out zero; seeds without any spread are no evidence."""
        return self.half is not None and self.p is not None and abs(self.mean) > self.half and self.p < 2 * (1 - UPPER)


def interval(values: Sequence[float]) -> Estimate | None:
    """Mean and interval by the t distribution with n - 1 degrees of freedom; ``None`` without values."""
    if not values:
        return None
    n = len(values)
    half = float(stdtrit(n - 1, UPPER)) * stdev(values) / math.sqrt(n) if n >= MIN_SEEDS else None
    return Estimate(fmean(values), min(values), max(values), n, half)


def over_seeds(differences: Sequence[float]) -> Estimate | None:
    """The paired t test over seeds; fewer than ``MIN_SEEDS`` are not tested."""
    estimate = interval(differences)
    if estimate is None or estimate.half is None:
        return estimate
    error = stdev(differences) / math.sqrt(estimate.count)
    if error <= 1e-12:  # equal but for rounding: no test
        return estimate
    return replace(estimate, p=2 * float(stdtr(estimate.count - 1, -abs(estimate.mean) / error)))


def over_samples(
    differences: Sequence[int] | NDArray[np.int64], draws: NDArray[np.int64] | None = None
) -> Estimate | None:
    """The mean of differences by sample in {-1, 0, 1} with its standard error, by the normal distribution.

    It takes draws as independent, and speaks of this net and this order of the stream only. Where fewer than ``FEW``
    draws differ, or all in one direction, p is that of the exact sign test (McNemar's).

    Args:
        differences: (N,).
        draws: (N,) what each sample is of: one image under several corruptions is one draw, whose samples need not be
            independent. ``None``: each is a draw of its own.
    """
    values = np.asarray(differences)
    if draws is None:
        draws = np.arange(len(values))
    _, place, sizes = np.unique(draws, return_inverse=True, return_counts=True)
    n, sums = len(sizes), np.bincount(place, values, len(sizes))
    if n < MIN_SEEDS:
        return None
    mean, better, worse = float(values.mean()), int((sums > 0).sum()), int((sums < 0).sum())
    error = math.sqrt(n / (n - 1) * float(((sums - mean * sizes) ** 2).sum())) / len(values)
    if error < 1e-12:  # all alike but for rounding
        error = 0.0
    if not better + worse:
        p = None
    elif better + worse < FEW or not error:
        p = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))
    else:
        p = 2 * float(ndtr(-abs(mean) / error))
    return Estimate(mean, int(values.min()), int(values.max()), n, float(ndtri(UPPER)) * error, p, "samples")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for their number (Holm 1979); ``None`` stays and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return corrected
