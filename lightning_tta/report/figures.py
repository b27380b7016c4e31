"""The figures of a group of runs, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_tta.report.runs import Group
from lightning_tta.report.statistics import Difference
from lightning_tta.report.style import GRID, INK, MUTED, PAPER, Look, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = Mapping[str, Look]


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str]], looks: Looks) -> None:
    """Write names (x, y, name) right of the axes, moved apart where they would overlap, with lines to their points."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # the transforms are right only now
    box = axes.get_window_extent()
    step = 11.5 / 72 * figure.dpi
    points = [(*axes.transData.transform((x, y)), name) for x, y, name in labels]
    points.sort(key=lambda point: point[1])
    heights = _apart([point[1] for point in points], step, box.y0, box.y1)
    for (x, y, name), height in zip(points, heights, strict=True):
        start = axes.transAxes.inverted().transform((x, y))
        end = axes.transAxes.inverted().transform((box.x1 + 0.14 * figure.dpi, height))
        colour = looks[name].in_page
        axes.plot(
            [start[0], end[0]], [start[1], end[1]], transform=axes.transAxes, color=colour, lw=0.5, alpha=0.6,
            clip_on=False, zorder=1, scalex=False, scaley=False,
        )  # fmt: skip
        along = figure.dpi / box.width  # an inch
        axes.plot(
            end[0] + 0.05 * along, end[1], transform=axes.transAxes, color=colour, ls="", marker=looks[name].marker,
            markersize=4.5, clip_on=False, scalex=False, scaley=False,
        )  # fmt: skip
        axes.text(
            end[0] + 0.16 * along, end[1], name, transform=axes.transAxes, va="center", ha="left", fontsize=8, color=INK
        )


def text_width(texts: Iterable[str], size: float) -> float:
    """About how many inches the longest text takes at a font size in points."""
    return 0.64 * size / 72 * max((len(text) for text in texts), default=0)


def _apart(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Positions near ``wanted`` (ascending), at least ``step`` apart and within ``low`` and ``high`` if they fit."""
    clusters: list[tuple[float, int]] = []  # sum of what is wanted, members: they stand about their mean
    for value in wanted:
        clusters.append((value, 1))
        while len(clusters) > 1 and _start(clusters[-1], step) < _end(clusters[-2], step) + step:
            total, count = clusters.pop()
            clusters[-1] = (clusters[-1][0] + total, clusters[-1][1] + count)
    positions = [_start(cluster, step) + k * step for cluster in clusters for k in range(cluster[1])]
    last = len(positions) - 1
    positions = [min(position, high - (last - k) * step) for k, position in enumerate(positions)]
    return [max(position, low + k * step) for k, position in enumerate(positions)]


def _start(cluster: tuple[float, int], step: float) -> float:
    return cluster[0] / cluster[1] - (cluster[1] - 1) * step / 2


def _end(cluster: tuple[float, int], step: float) -> float:
    return cluster[0] / cluster[1] + (cluster[1] - 1) * step / 2


def differences_figure(found: Mapping[str, Difference], looks: Looks, name: str) -> str:
    """Mean difference to the source by method, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 0.6 + 0.27 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, (method, difference) in enumerate(found.items()):
        look = looks[method]
        half = None if difference.half is None else 100 * difference.half
        axes.errorbar(
            100 * difference.mean, place, xerr=half, color=look.in_page, marker=look.marker, markersize=5.5,
            capsize=3, lw=1.4, mfc=look.in_page if difference.clear else PAPER,
        )  # fmt: skip
    axes.axvline(0, color=MUTED, lw=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("difference to source, points of accuracy")
    return to_svg(figure, name)


def reliability_figure(bins: Sequence[Sequence[float]], title: str, look: Look, name: str) -> str:
    """Accuracy by confidence, against the diagonal, over the share of samples in each bin.

    Args:
        bins: Rows (samples, sum of confidences, right ones) by bin.
        title: Title.
        look: The method's look.
        name: Prefix of the ids.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4, 2.8))
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    figure.subplots_adjust(left=0.25, right=0.94, top=0.92, bottom=0.16, hspace=0.14)
    total, width = sum(bins[0]), 1 / len(bins[0])
    filled = [(place, *row) for place, row in enumerate(zip(*bins, strict=True)) if row[0]]
    centres = [(place + 0.5) * width for place, *_ in filled]
    confidences = [confident / count for _, count, confident, _ in filled]
    accuracies = [right / count for _, count, _, right in filled]
    axes.bar(centres, accuracies, width * 0.92, color=look.in_page, alpha=0.35, lw=0)
    axes.vlines(centres, confidences, accuracies, color=look.in_page, lw=1.6)
    axes.plot(centres, accuracies, color=look.in_page, marker=look.marker, markersize=3.5, ls="")
    below.bar(centres, [100 * count / total for _, count, *_ in filled], width * 0.92, color=MUTED, lw=0)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    below.set(xlabel="confidence", ylabel="% of\nimages", ylim=(0, None))
    axes.grid()
    return to_svg(figure, name)


def pareto_figure(points: Mapping[str, tuple[float, float]], label: str, looks: Looks, name: str) -> str:
    """Accuracy against a cost, with the front of those that nothing beats in both."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    height = max(2.9, 0.9 + 0.165 * len(points))
    width = 3.2 + text_width(points, 8)
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.56 / width, right=2.84 / width, bottom=0.5 / height, top=1 - 0.15 / height)
    costs = [cost for cost, _ in points.values()]
    if min(costs) > 0 and max(costs) > 4 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        decades = math.log10(max(costs) / min(costs))
        ticks = [m * 10.0**e for e in range(-5, 8) for m in ((1, 2, 5) if decades < 2 else (1,))]
        axes.set_xticks([t for t in ticks if min(costs) / 1.4 <= t <= max(costs) * 1.4])
        axes.set_xlim(min(costs) / 1.4, max(costs) * 1.4)
    elif min(costs) > max(costs) / 2:
        axes.margins(x=0.12)
    else:
        axes.set_xlim(0, max(costs) * 1.1 or 1)
    front = front_of(points)
    axes.step(
        [points[m][0] for m in front], [points[m][1] for m in front], where="post", color=MUTED, lw=1, ls=(0, (4, 2))
    )
    for method, (cost, accuracy) in points.items():
        look = looks[method]
        axes.plot(
            cost, accuracy, color=look.in_page, marker=look.marker, markersize=7, ls="", mec=PAPER, mew=0.6, zorder=3
        )
    axes.margins(y=0.12)
    axes.set(xlabel=label, ylabel="accuracy %")
    axes.grid()
    place_labels(axes, [(cost, accuracy, method) for method, (cost, accuracy) in points.items()], looks)
    return to_svg(figure, name)


def front_of(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The methods that no other beats in cost without losing accuracy, by cost."""
    front: list[str] = []
    for method in sorted(points, key=lambda m: (points[m][0], -points[m][1])):
        if not front or points[method][1] > points[front[-1]][1]:
            front.append(method)
    return front


def collapse_figure(group: Group, looks: Looks, name: str) -> str | None:
    """Share of the most predicted class over time, a bar a method: dark is collapse. ``None`` without batches."""
    from matplotlib.figure import Figure

    shown = {m: runs for m, runs in group.methods.items() if any(run.batches for run in runs)}
    if not shown:
        return None
    rows: dict[str, list[float | None]] = {}
    first = next(run.batches for run in group.runs if run.batches)
    truth = [batch.get("recent_label_share") for batch in first]
    if all(share is not None for share in truth):
        rows["labels"] = truth
    for method, runs in shown.items():
        curves = [[b.get("recent_class_share") for b in run.batches] for run in runs if run.batches]
        length = min(len(curve) for curve in curves)
        rows[method] = [
            None if None in column else fmean(column)
            for column in zip(*(curve[:length] for curve in curves), strict=True)
        ]
    figure = Figure(figsize=(9.2, 1.1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    seen = first[-1]["images_seen"]
    for place, shares in enumerate(rows.values()):
        for level, pieces in _levels(shares).items():
            axes.broken_barh(
                [(seen * start, seen * width) for start, width in pieces],
                (place - 0.38, 0.76),
                color=INK,
                alpha=level / 10,
                lw=0,
            )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, seen), xlabel="images seen")
    axes.spines["left"].set_visible(False)
    mark_domains([axes], first)
    return to_svg(figure, name)


def _levels(shares: Sequence[float | None]) -> dict[int, list[tuple[float, float]]]:
    """Pieces (start, width) in [0, 1] by darkness 0 to 10; equal neighbours joined, to keep the page small."""
    cells = min(len(shares), 240)
    pieces: dict[int, list[tuple[float, float]]] = {}
    before = -1
    for cell in range(cells):
        part = shares[cell * len(shares) // cells : (cell + 1) * len(shares) // cells]
        known = [share for share in part if share is not None]
        level = round(10 * fmean(known)) if known else 0
        if level == before:
            start, width = pieces[level][-1]
            pieces[level][-1] = (start, width + 1 / cells)
        else:
            pieces.setdefault(level, []).append((cell / cells, 1 / cells))
        before = level
    return pieces


MANY = 60
"""More changes of domain than so many are no boundaries to draw."""


def domain_pieces(batches: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Name, first and last batch + 1 of each domain in turn; one piece where domains take turns all the time."""
    starts = [k for k, b in enumerate(batches) if k == 0 or b["domain"] != batches[k - 1]["domain"]]
    if len(starts) > MANY:
        return [("", 0, len(batches))]
    return [(batches[a]["domain"], a, b) for a, b in zip(starts, [*starts[1:], len(batches)], strict=True)]


def boundary_names(batches: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names to write where domains begin: none where it is one domain, or domains take turns all the time."""
    names = [name for name, _, _ in domain_pieces(batches)]
    return names if len(names) > 1 else []


def mark_domains(all_axes: Sequence[Any], batches: Sequence[Mapping[str, Any]], *, names: bool = True) -> None:
    """Lines where a new domain begins, its name above the first axes."""
    names = names and bool(boundary_names(batches))
    for domain, start, end in domain_pieces(batches):
        left, right = batches[start]["images_seen"] - batches[start]["images"], batches[end - 1]["images_seen"]
        if start:
            for axes in all_axes:
                axes.axvline(left, color=GRID, lw=0.9, zorder=0)
        if names:
            top = all_axes[0]
            top.text(
                0.7 * left + 0.3 * right, 1.02, domain, transform=top.get_xaxis_transform(), rotation=35, fontsize=7.5,
                ha="left", va="bottom", rotation_mode="anchor",
            )  # fmt: skip
