"""Accuracy and predicted-class share along the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_tta.report.figures import (
    Looks,
    boundary_names,
    domain_pieces,
    mark_domains,
    place_labels,
    text_width,
)
from lightning_tta.report.runs import Group, Run
from lightning_tta.report.style import GRID, MUTED
from lightning_tta.run.summary import WINDOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOGETHER = 6
"""Up to so many methods share one figure; more get one each, with the source behind."""
POINTS = 400
WIDTH, PANEL, COLUMNS = 9.2, (3.35, 2.9), 3
"""Inches: width of the figure of several methods, size of one method's; how many of these stand side by side."""


def rolling_accuracy(batches: Sequence[Mapping[str, Any]], window: int = WINDOW) -> list[float | None]:
    """Accuracy in percent over the last ``window`` batches of the same domain, each labelled batch by its images."""
    right, images = [0.0], [0.0]
    for batch in batches:
        known = batch.get("accuracy") is not None
        right.append(batch["accuracy"] * batch["images"] if known else 0.0)
        images.append(batch["images"] if known else 0.0)
    right, images = list(accumulate(right)), list(accumulate(images))
    found: list[float | None] = []
    for _, first, last in domain_pieces(batches):
        for end in range(first + 1, last + 1):
            start = max(first, end - window)
            count = images[end] - images[start]
            found.append(100 * (right[end] - right[start]) / count if count else None)
    return found


Curve = tuple[list[float], list[float], list[float], list[float]]  # images, mean, lowest, highest


def _curve(runs: Sequence[Run], which: str) -> Curve | None:
    """Mean and range over seeds, thinned to some hundred points."""
    curves = []
    for run in runs:
        if which == "accuracy":
            curves.append(rolling_accuracy(run.batches))
        else:
            curves.append([None if b.get(which) is None else 100 * b[which] for b in run.batches])
    length = min((len(curve) for curve in curves), default=0)
    images = [batch["images_seen"] for batch in runs[0].batches[:length]]
    columns = list(zip(images, *(curve[:length] for curve in curves), strict=True))
    step = max(1, -(-len(columns) // POINTS))
    kept = [column for column in columns[::step] if None not in column]
    if not kept:
        return None
    seen = [column[0] for column in kept]
    values = [column[1:] for column in kept]
    return seen, [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _with_batches(group: Group) -> dict[str, list[Run]]:
    found = {method: [run for run in runs if run.batches] for method, runs in group.methods.items()}
    return {method: runs for method, runs in found.items() if runs}


def caption(group: Group) -> str:
    """What the figures of a group show."""
    shown = _with_batches(group)
    many = ""
    if len(shown) > TOGETHER:
        many = " Grey line: source." if "source" in shown else ""
        names = boundary_names(next(iter(shown.values()))[0].batches)
        many += f" The domains, in turn: {', '.join(names)}." if names else ""
    return (
        f"Accuracy over the last {WINDOW} batches of the domain, and share of the most predicted class over the last "
        f"{WINDOW} of all; mean and range over seeds. Grey area: the largest share among the labels. Vertical lines: "
        f"a new domain.{many}"
    )


def stream_figures(group: Group, looks: Looks) -> list[tuple[str, Figure]]:
    """What they show, and the figures: one, or one for each method where they are many; none without batches."""
    from matplotlib.figure import Figure

    shown = _with_batches(group)
    if len(shown) > TOGETHER:
        figures = [(method, Figure(figsize=PANEL)) for method in shown]
        for method, figure in figures:
            _draw(figure, {method: shown[method]}, looks, shown.get("source"), wide=False)
        return figures
    if not shown:
        return []
    right, top = _room(shown)
    figure = Figure(figsize=(WIDTH, 4.45 + top))
    figure.subplots_adjust(
        left=0.64 / WIDTH, right=1 - right / WIDTH, top=4.45 / (4.45 + top), bottom=0.47 / (4.45 + top), hspace=0.12
    )
    _draw(figure, shown, looks, None, wide=True)
    return [(", ".join(shown), figure)]


def stream_picture(group: Group, looks: Looks) -> Figure | None:
    """The same as one picture, with a title: the figures of many methods side by side. ``None`` without batches."""
    from matplotlib.figure import Figure

    shown = _with_batches(group)
    if not shown:
        return None
    if len(shown) <= TOGETHER:
        figure = stream_figures(group, looks)[0][1]
    else:
        rows = -(-len(shown) // COLUMNS)
        figure = Figure(figsize=(COLUMNS * PANEL[0], rows * PANEL[1]))
        parts: Any = figure.subfigures(rows, COLUMNS)
        for part, (method, runs) in zip(parts.flat, shown.items(), strict=False):
            _draw(part, {method: runs}, looks, shown.get("source"), wide=False)
    figure.suptitle(group.title, x=0.02, y=1.01, ha="left", va="bottom", fontweight="bold")
    return figure


def _room(shown: Mapping[str, Sequence[Run]]) -> tuple[float, float]:
    """Inches for names right of the axes and above them."""
    names = boundary_names(next(iter(shown.values()))[0].batches)
    beside = 0.4 + text_width(shown, 8)
    if not names:
        return beside, 0.15
    return max(beside, text_width(names[-1:], 7.5)), 0.15 + 0.57 * text_width(names, 7.5)  # they stand at 35 degrees


def _draw(
    figure: Any, shown: Mapping[str, Sequence[Run]], looks: Looks, behind: Sequence[Run] | None, *, wide: bool
) -> None:
    """Draw into a figure or a part of one: wide with names beside the lines, or small with the one name above."""
    axes = figure.subplots(2, 1, sharex=True)
    if not wide:
        figure.subplots_adjust(left=0.16, right=0.92, top=0.92, bottom=0.15, hspace=0.16)
        axes[1].locator_params(axis="x", nbins=4)
        axes[0].set_title(next(iter(shown)), loc="left", fontweight="bold")
    first = next(iter(shown.values()))[0].batches
    ends: list[list[tuple[float, float, str]]] = [[], []]
    for place, which in enumerate(("accuracy", "recent_class_share")):
        if behind is not None and (curve := _curve(behind, which)) is not None:
            axes[place].plot(curve[0], curve[1], color=MUTED, lw=1, alpha=0.8)
        for turn, (method, runs) in enumerate(shown.items()):
            curve = _curve(runs, which)
            if curve is None:
                continue
            look = looks[method]
            every = max(1, len(curve[0]) // 9)
            axes[place].plot(
                curve[0], curve[1], color=look.in_page, ls=look.line, lw=1.5, marker=look.marker, markersize=4,
                markevery=(every * (turn + 1) // (len(shown) + 1), every),
            )  # fmt: skip
            if len(runs) > 1:
                axes[place].fill_between(curve[0], curve[2], curve[3], color=look.in_page, alpha=0.1, lw=0)
            ends[place].append((curve[0][-1], curve[1][-1], method))
    truth = _curve([next(iter(shown.values()))[0]], "recent_label_share")
    if truth is not None:
        axes[1].fill_between(truth[0], truth[1], color=GRID, alpha=0.7, lw=0, zorder=0)
    if first:
        mark_domains(axes, first, names=wide)
    for place, label in enumerate(("accuracy %", "largest class %")):
        axes[place].set(ylabel=label, ylim=(0, 102), xlim=(0, first[-1]["images_seen"]))
        axes[place].grid(axis="y")  # a vertical line is a new domain
    axes[1].set_xlabel("images seen")
    if wide:
        for place in (0, 1):
            if ends[place]:
                place_labels(axes[place], ends[place], looks)
