"""Ours beside theirs: the difference, the interval of ours, and whether the difference is within the tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from scipy.special import ndtri

from lightning_tta.report.statistics import UPPER, interval

WITHIN, OUTSIDE, NOT_RUN, NO_FIGURE = "within tolerance", "outside", "not run", "no figure"
INCOMPLETE = "not judged"
"""Verdict of a run on other images than the published figure is of: some are missing, or there are more."""
CHANGED = "no reproduction"
"""Verdict of a run with another net or fewer images than the claim's: the numbers are shown, and judged not at all."""

Row = Mapping[str, Any]
"""A row of ``benchmark.json``."""


@dataclass(frozen=True)
class Measured:
    """An error or an accuracy of ours, in percent.

    Attributes:
        value: The mean over domains, of these over seeds, and over nets or streams where a figure is such a mean.
        half: Half width of the 95 % interval.
        over: What the interval speaks of: ``seeds`` or ``images``.
    """

    value: float
    half: float | None
    over: str


@dataclass(frozen=True)
class Comparison:
    """A figure beside ours; all in percent, the difference is ours less theirs."""

    part: str
    net: str
    method: str
    domain: str | None
    measure: str
    theirs: float | None
    spread: float | None
    ours: float | None
    half: float | None
    over: str | None
    difference: float | None
    tolerance: float
    verdict: str
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(rows: Sequence[Row], kind: str, domains: Sequence[str]) -> Measured | None:
    """Ours from the cells of one method: all seeds of one or several nets and streams.

    The mean of each cell is over ``domains``, each counting the same, as tables in the field have it. With at least
    three seeds, which all nets and streams have, the interval is that of Student's t over the means of each seed; else
    it is the normal one over images, which are taken for independent draws: too narrow where the same images come in
    several domains. ``None``: a cell lacks one of the domains.

    Args:
        rows: Rows of a benchmark.
        kind: ``error`` or ``accuracy``.
        domains: Names of domains.
    """
    cells: dict[tuple[str, str], dict[int | None, tuple[float, float]]] = {}  # by seed: value and variance
    for row in rows:
        parts = [row["domains"].get(name) for name in domains]
        if not parts or any(part is None or part.get("accuracy") is None for part in parts):
            return None
        variance = sum(p["accuracy"] * (1 - p["accuracy"]) / max(1, p["images"]) for p in parts) / len(parts) ** 2
        value = fmean(p["accuracy"] for p in parts)
        cells.setdefault((row["net"], row["stream"]), {})[row.get("seed")] = value, variance
    if not cells:
        return None
    seeds, share = [*map(set, cells.values())], fmean(fmean(value for value, _ in by.values()) for by in cells.values())
    estimate = interval([fmean(by[seed][0] for by in cells.values()) for seed in set.intersection(*seeds)])
    if estimate is not None and estimate.half is not None and all(each == seeds[0] for each in seeds):
        half, over = estimate.half, "seeds"
    else:
        variances = [fmean(variance for _, variance in by.values()) for by in cells.values()]
        half, over = float(ndtri(UPPER)) * math.sqrt(sum(variances)) / len(cells), "images"
    return Measured(100 * (1 - share if kind == "error" else share), 100 * half, over)


def judge(
    theirs: float | None,
    ours: float | None,
    tolerance: float,
    *,
    changed: bool = False,
    why: str = "",
    incomplete: str = "",
) -> str:
    """The verdict on a figure.

    Args:
        theirs: The published figure; ``None``: not known.
        ours: ``None``: not run.
        tolerance: In points, 0 or more. Differences up to it are within, but for rounding.
        changed: Whether the run differs from the claim.
        why: Why there is none of ours.
        incomplete: How our images are not theirs, such as ``fog: 8 images; the figures are of 50,000``.
    """
    if ours is None:
        return f"{NOT_RUN}: {why}" if why else NOT_RUN
    if changed:
        return CHANGED
    if theirs is None:
        return NO_FIGURE
    if incomplete:
        return f"{INCOMPLETE}: {incomplete}"
    return WITHIN if abs(ours - theirs) <= tolerance + 1e-9 else OUTSIDE


def reversed_pairs(
    theirs: Mapping[str, float], ours: Mapping[str, float], tolerance: float
) -> tuple[list[tuple[str, str]], int]:
    """Pairs of methods that we find in the opposite order, and how many pairs count.

    A pair counts where both have both numbers, and theirs lie further apart than twice the tolerance.
    """
    pairs = [
        (a, b)
        for a, b in combinations([method for method in theirs if method in ours], 2)
        if abs(theirs[a] - theirs[b]) > 2 * tolerance
    ]
    return [(a, b) for a, b in pairs if (theirs[a] - theirs[b]) * (ours[a] - ours[b]) <= 0], len(pairs)
