"""Ours beside theirs: the difference, the interval of ours, and whether the difference is within the tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from lightning_tta.files import read_json
from lightning_tta.report.files import first_indices, read_predictions
from lightning_tta.report.statistics import UPPER, interval
from lightning_tta.run.directory import REPORT
from lightning_tta.run.outputs import PREDICTIONS

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
    it is the normal one over images. There an image counts once: what it gives in all domains, nets, streams and seeds
    is one draw, known by its place in a domain (:func:`~lightning_tta.report.files.first_indices`). Where that is not
    known, each prediction is taken for a draw of its own, which is too narrow where the same images come in several
    domains.
    ``None``: a cell lacks one of the domains.

    Args:
        rows: Rows of a benchmark; ``folder`` is the directory of the run, where there is one.
        kind: ``error`` or ``accuracy``.
        domains: Names of domains; ``all``: all of the run, taken together.
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
        variance_of_all = _clustered(rows, domains, {cell: len(by) for cell, by in cells.items()})
        if variance_of_all is None:
            variances = [fmean(variance for _, variance in by.values()) for by in cells.values()]
            variance_of_all = sum(variances) / len(cells) ** 2
        half, over = float(ndtri(UPPER)) * math.sqrt(variance_of_all), "images"
    return Measured(100 * (1 - share if kind == "error" else share), 100 * half, over)


def _clustered(rows: Sequence[Row], domains: Sequence[str], seeds: Mapping[tuple[str, str], int]) -> float | None:
    """The variance of the mean, with an image's predictions in all domains and cells as one draw."""
    total: NDArray[np.float64] = np.zeros(0)
    for row in rows:
        if row.get("folder") is None:
            return None
        file = Path(row["folder"]) / PREDICTIONS
        by_image = _parts_of_images(file, tuple(domains), file.stat().st_mtime_ns) if file.is_file() else None
        if by_image is None:
            return None
        total = np.pad(total, (0, max(0, len(by_image) - len(total))))
        total[: len(by_image)] += by_image / (seeds[row["net"], row["stream"]] * len(seeds))
    return float((total**2).sum())


@lru_cache(maxsize=128)  # of 50,000 images each 50 MB
def _parts_of_images(file: Path, domains: tuple[str, ...], written: int) -> NDArray[np.float64] | None:
    """By the place of an image in a domain: how far it moves the mean accuracy over domains from what it is."""
    images = _predictions(file, written)
    if domains == ("all",) and "all" not in images:
        images = {"all": np.concatenate([*images.values()])} if images else {}
    if any(name not in images for name in domains):
        return None
    moved = np.zeros(1 + max(int(images[name][:, 0].max(initial=-1)) for name in domains))
    for name in domains:
        index, label, guess = images[name][images[name][:, 1] >= 0].T
        right = (label == guess).astype(float)
        np.add.at(moved, index, (right - right.mean()) / max(1, len(right)) / len(domains))
    return moved


@lru_cache(maxsize=2)
def _predictions(file: Path, written: int) -> Mapping[str, NDArray[np.int64]]:
    """By domain place, label and prediction of each image; without what is not that of the report."""
    report = read_json(file.with_name(REPORT)) or {}
    images, _ = read_predictions(file.parent, report)
    return {name: images[name] - np.array([first, 0, 0]) for name, first in first_indices(report, images).items()}


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
