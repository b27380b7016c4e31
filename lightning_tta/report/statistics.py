"""Means with intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import ndtr, ndtri, stdtr, stdtrit

UPPER = 0.975
"""Upper quantile of the 95 % confidence intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its 95 % confidence interval.

    Attributes:
        mean: Mean of the values.
        half: Half width; ``None`` for a single value, which has no spread.
        count: Number of values.
    """

    mean: float
    half: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference.

    Attributes:
        mean: Mean of the differences.
        half: Half width of the 95 % confidence interval; ``None`` where there is none.
        p: Two-sided p-value of "no difference"; ``None`` where there is none.
        count: Number of pairs.
        over: What was paired: ``seeds`` or ``images``.
    """

    mean: float
    half: float | None
    p: float | None
    count: int
    over: str

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero; differences without any spread are no evidence."""
        return self.half is not None and self.p is not None and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and interval by the t distribution with n - 1 degrees of freedom; ``None`` without values."""
    if not values:
        return None
    count = len(values)
    half = float(stdtrit(count - 1, UPPER)) * stdev(values) / math.sqrt(count) if count > 1 else None
    return Interval(fmean(values), half, count)


def over_seeds(differences: Sequence[float]) -> Difference:
    """The paired t test over seeds; one seed alone has no interval."""
    found = interval(differences)
    assert found is not None
    if found.half is None:
        return Difference(found.mean, None, None, 1, "seeds")
    error = stdev(differences) / math.sqrt(found.count)
    if error <= 1e-12:  # equal but for rounding: no test
        return Difference(found.mean, found.half, None, found.count, "seeds")
    p = 2 * float(stdtr(found.count - 1, -abs(found.mean) / error))
    return Difference(found.mean, found.half, p, found.count, "seeds")


def over_images(differences: Sequence[int]) -> Difference | None:
    """The mean of per-image differences in {-1, 0, 1} with its standard error, by the normal distribution.

    It takes images as independent draws, and speaks of this net and this order of the stream only.
    """
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    squares = sum(d * d for d in differences)
    error = math.sqrt(max(0.0, squares - count * mean**2) / (count - 1) / count)
    p = 2 * float(ndtr(-abs(mean) / error)) if error else None
    return Difference(mean, float(ndtri(UPPER)) * error, p, count, "images")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for their number (Holm 1979); ``None`` stays and does not count."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected
