"""The figures of a group of runs. Each method looks the same in all figures of a report."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_tta.methods import names
from lightning_tta.report.runs import ACCURACY, ERROR, IMAGES, MEAN_IOU, Group, Kind, Measure, Run
from lightning_tta.report.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Okabe and Ito's first, safe for colour-blind readers, without their yellow, which white paper swallows.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#6A3D9A", "#8C5A3C", "#808000", "#D6207F", "#7CB518", "#4E342E"),
    *("#9575CD", "#C62828", "#F48FB1", "#37474F", "#1A237E", "#00838F"),
    *("#B8860B", "#81C784", "#FF8A65", "#5C6BC0"),
)
SHADES = (0.0, -0.4, 0.45)
"""From the second round of colors on, they are mixed with black (< 0) or white."""
LINES, MARKERS = ("--", "-.", ":", "-"), ("s", "^", "D", "v", "P", "X", "<", ">", "o", "p", "h")
STYLES = len(LINES) * len(MARKERS)
"""So many pairs of line and marker: the numbers of both have no common divisor."""
_SOURCE = next(n for n in range(STYLES) if (LINES[n % len(LINES)], MARKERS[n % len(MARKERS)]) == ("-", "o"))
MUTED, GRID = "#6d737c", "#d9dce1"
WIDTH = 7.2
"""Inches of a wide figure: on a narrow page it shrinks, and must stay readable."""
TOGETHER, COLUMNS = 6, 2
"""Up to so many methods share one figure; more get a panel each, so many side by side, with the source behind."""
ROLLING = ("accuracy", "mean_iou")
"""Curves of means over some batches."""
LETTERS = 15
"""So many letters of a label fit beside a panel."""
POINTS, BOUNDARIES = 400, 60
"""Points of a curve; more changes of domain than so many are no boundaries to draw."""


@dataclass(frozen=True)
class Look:
    """Color, line style and marker of a method, as matplotlib takes them."""

    color: str
    line: str
    marker: str


Looks = Mapping[str, Look]


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """A look for each method of a report, none like another: the source black, the others by name.

    A method of the package has the same look in every report; what else there is, such as a method with an option of
    its own, gets the next one that is free.
    """
    known = [name for name in names() if name != "source"]
    wanted = sorted(set(labels) - {"source"}, key=lambda label: (label not in known, label))
    chosen = {"source": Look("#000000", "-", "o")}
    for label in wanted:
        place = known.index(label) if label in known else len(known)
        while _alike(look := _look(place), chosen.values()):
            place += 1
        chosen[label] = look
    return chosen


def _alike(look: Look, others: Collection[Look]) -> bool:
    """Whether another has the same color, or the same line and marker while there are unused ones."""
    styles = {(other.line, other.marker) for other in others}
    same_style = len(others) < STYLES and (look.line, look.marker) in styles
    return same_style or look.color in {other.color for other in others}


def _look(place: int) -> Look:
    place += place >= _SOURCE  # so that no method of the package must give way to the source
    rounds, number = divmod(place, len(COLORS))
    shade = SHADES[rounds] if rounds < len(SHADES) else -0.65 + 0.9 * ((rounds * 0.618) % 1)
    return Look(_mixed(COLORS[number], shade), LINES[place % len(LINES)], MARKERS[place % len(MARKERS)])


def _mixed(color: str, shade: float) -> str:
    """A color with so much black (shade < 0) or white in it."""
    end = 255 if shade > 0 else 0
    channels = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(c + (end - c) * abs(shade)):02X}" for c in channels)


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib set up for the report; the user's settings come back."""
    import matplotlib

    settings: Any = {
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.edgecolor": MUTED},
        **{"font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left"},
        **{"text.parse_math": False},  # names may hold a dollar sign
        **{"grid.color": GRID, "grid.linewidth": 0.6, "legend.frameon": False, "svg.hashsalt": "lightning_tta"},
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_image(figure: Figure) -> str:
    """The figure as an SVG that stands in the page itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def differences_figure(gains: Mapping[str, Estimate], looks: Looks, measure: Measure = ACCURACY) -> Figure:
    """Mean difference to the source by method, with its interval; filled where that leaves out zero."""
    figure = _figure(5.6, 0.7 + 0.27 * len(gains))
    axes = figure.subplots()
    for row, (method, gain) in enumerate(gains.items()):
        look, half = looks[method], None if gain.half is None else measure.scale * gain.half
        fill = look.color if gain.clear else "white"
        axes.errorbar(
            measure.scale * gain.mean, row, xerr=half, color=look.color, marker=look.marker, capsize=3, mfc=fill
        )
    axes.axvline(0, color=MUTED, lw=1)
    axes.set_yticks(range(len(gains)), list(gains))
    axes.set(ylim=(len(gains) - 0.5, -0.5), xlabel=f"difference to source, {measure.unit}")
    axes.grid(axis="x")
    return figure


def reliability_figure(bins: Sequence[Sequence[float]], title: str, look: Look, kind: Kind = IMAGES) -> Figure:
    """Accuracy by confidence, against the diagonal, over the share of samples in each bin.

    ``bins`` has three rows, with a column for each bin: samples, sum of confidences, right ones.
    """
    figure = _figure(2.3, 2.7)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    width = 1 / len(bins[0])
    filled = [((n + 0.5) * width, *column) for n, column in enumerate(zip(*bins, strict=True)) if column[0]]
    centers, images, confidences, right = np.array(filled).reshape(-1, 4).T
    accuracies = right / images
    axes.bar(centers, accuracies, width * 0.92, color=look.color, alpha=0.35, lw=0)
    axes.vlines(centers, confidences / images, accuracies, color=look.color, lw=1.6)
    axes.plot(centers, accuracies, color=look.color, marker=look.marker, markersize=3.5, ls="")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    below.bar(centers, 100 * images / images.sum(), width * 0.92, color=MUTED, lw=0)
    axes.set(title=title, xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    below.set(xlabel="confidence", ylabel=f"% of\n{kind.samples}")
    axes.grid()
    return figure


def pareto_figure(
    label: str, methods: Mapping[str, tuple[float, float]], looks: Looks, words: str = ACCURACY.words
) -> Figure:
    """Accuracy, or ``words``, against a cost (method -> cost, accuracy), with those that nothing beats in both."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    columns = legend_columns(methods, 3.6)
    figure = _figure(3.6, 2.9 + 0.2 * -(-len(methods) // columns))
    axes, handles = figure.subplots(), []
    axes.step(
        *zip(*(methods[m] for m in front_of(methods)), strict=True), where="post", color=MUTED, lw=1, ls=(0, (4, 2))
    )
    for method, point in methods.items():
        style: Any = {"color": looks[method].color, "marker": looks[method].marker, "mec": "white", "mew": 0.6}
        handles += axes.plot(*point, markersize=7, ls="", **style)
    costs = [cost for cost, _ in methods.values()]
    if min(costs) > 0 and max(costs) > 4 * min(costs):
        axes.set(xscale="log", xlim=(min(costs) / 1.5, max(costs) * 1.5))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 100 * min(costs) else (1,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.set(xlabel=label, ylabel=words)
    axes.grid()
    figure.legend(handles, list(methods), loc="outside lower center", ncols=columns)
    return figure


def legend_columns(names: Iterable[str], width: float) -> int:
    """How many names of methods fit beside each other in so many inches."""
    lengths = [len(name) for name in names]
    return max(1, min(len(lengths), int(width / (0.75 + 0.085 * max(lengths)))))


def front_of(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The methods that no other beats in cost without losing accuracy, by cost."""
    front: list[str] = []
    for method in sorted(points, key=lambda m: (points[m][0], -points[m][1])):
        if not front or points[method][1] > points[front[-1]][1]:
            front.append(method)
    return front


def curves_figure(group: Group, looks: Looks) -> Figure | None:
    """Accuracy and predicted-class share along the stream, mean and range over seeds; ``None`` without batches.

    Without labels, entropy in place of accuracy.
    """
    shown = with_batches(group)
    if not shown:
        return None
    if len(shown) <= TOGETHER:
        figure = _figure(WIDTH, 5.2)
        axes = figure.subplots(2, 1, sharex=True)
        handles = _draw(axes, shown, looks, group)
        if len(shown) > 1:
            figure.legend(handles, list(shown), loc="outside lower center", ncols=legend_columns(shown, WIDTH))
    else:
        rows = -(-len(shown) // COLUMNS)
        figure = _figure(WIDTH, rows * 2.6)
        panels: Any = figure.subfigures(rows, COLUMNS)
        for panel, (method, runs) in zip(panels.flat, shown.items(), strict=False):
            axes = panel.subplots(2, 1, sharex=True)
            _draw(axes, {method: runs}, looks, group, behind=shown.get(group.source or "", ()))
            axes[0].set_title(method)
    figure.suptitle(group.title, x=0.01, ha="left", fontweight="bold")
    return figure


def first_curve(group: Group) -> tuple[str, str, str]:
    """The upper curve along the stream: its name in an account, in words, and on the axis."""
    if group.measure is ERROR:
        name = "mean_absolute_error" if group.labelled else "mean_value"
        return name, name.replace("_", " "), name.replace("_", " ")
    if group.measure is MEAN_IOU and group.labelled:
        return "mean_iou", "mean IoU", "mean IoU %"
    return ("accuracy", "accuracy", "accuracy %") if group.labelled else ("entropy", "entropy", "entropy, nats")


def second_curve(group: Group) -> tuple[str, str, str]:
    """The lower one."""
    if group.measure is ERROR:
        return "value_spread", "spread of the values", "spread"
    return "recent_class_share", f"{group.kind.choice} share", group.kind.share


def curves_caption(group: Group) -> str:
    """What that figure shows."""
    shown = with_batches(group)
    run = next(iter(shown.values()))[0]
    accuracy = (
        f"Accuracy over the last {run.window} batches of the domain" if group.labelled else "Entropy of each batch"
    )
    if group.measure is ERROR:
        first = "Mean absolute error" if group.labelled else "Mean value"
        return (
            f"{first} of each batch, and standard deviation of its values; mean and range over seeds. Vertical lines: "
            "a new domain."
        )
    if group.measure is MEAN_IOU and group.labelled:
        accuracy = f"Mean over the last {run.window} batches of the domain of each one's mean IoU"
    text = (
        f"{accuracy}, and share of the {group.kind.largest} over the last {run.window} of all; mean and range over "
        f"seeds. {f'Grey area: the largest share among the {group.kind.truth}. ' * group.labelled}Vertical lines: a "
        "new domain."
    )
    if any(run.alarms for runs in shown.values() for run in runs):
        text += " Triangles: alarms of the guard; hollow ones changed nothing."
    if len(shown) > TOGETHER:
        text += " Grey line: source." * (group.source in shown)
        text += f" The domains, in turn: {', '.join(name for name, _, _ in domain_spans(run.batches))}."
    return text


def with_batches(group: Group) -> dict[str, list[Run]]:
    """The runs that have a batches.jsonl, by method."""
    methods = {method: [run for run in runs if run.batches] for method, runs in group.methods.items()}
    return {method: runs for method, runs in methods.items() if runs}


def _draw(
    axes: Any, shown: Mapping[str, Sequence[Run]], looks: Looks, group: Group, behind: Sequence[Run] | None = None
) -> list[Any]:
    """Draw the curves of some methods, over those of ``behind``; returns the line of each."""
    first: Run = next(iter(shown.values()))[0]
    lines: list[Any] = []
    upper, lower = first_curve(group), second_curve(group)
    for panel, name in zip(axes, (upper[0], lower[0]), strict=True):
        seen, mean, *_ = _curve(behind or (), name)
        panel.plot(seen, mean, color=MUTED, lw=1, alpha=0.8)
        lines = []
        for turn, (method, runs) in enumerate(shown.items()):
            look, (seen, mean, low, high) = looks[method], _curve(runs, name)
            every = max(1, len(seen) // 9)
            marks = (every * (turn + 1) // (len(shown) + 1), every)
            line = {"color": look.color, "ls": look.line, "marker": look.marker}
            lines += panel.plot(seen, mean, lw=1.5, markersize=4, markevery=marks, **line)
            if len(runs) > 1:
                panel.fill_between(seen, low, high, color=look.color, alpha=0.1, lw=0)
            for run in runs if panel is axes[0] else ():
                _mark_alarms(panel, run, look.color, 0.97 - 0.05 * turn)
        panel.grid(axis="y")  # a vertical line is a new domain
    seen, share, *_ = _curve([first], "recent_label_share" if group.measure is not ERROR else "")
    axes[1].fill_between(seen, share, color=GRID, alpha=0.7, lw=0, zorder=0)
    batches, spans = first.batches, domain_spans(first.batches)
    for name, start, end in spans if len(spans) > 1 else ():
        left, right = batches[start]["images_seen"] - batches[start]["images"], batches[end - 1]["images_seen"]
        for panel in axes if start else ():
            panel.axvline(left, color=GRID, lw=0.9, zorder=0)
        if behind is None:
            style = {"rotation": 35, "fontsize": 7.5, "rotation_mode": "anchor"}
            axes[0].text(0.7 * left + 0.3 * right, 1.02, name, transform=axes[0].get_xaxis_transform(), **style)
    low = {} if upper[0] == "mean_value" else {"ylim": (0, 102 if upper[0] in ROLLING else None)}
    axes[0].set(ylabel=textwrap.fill(upper[2], LETTERS), xlim=(0, batches[-1]["images_seen"]), **low)
    axes[1].set(
        ylabel=textwrap.fill(lower[2], LETTERS),
        ylim=(0, 102 if lower[0].endswith("share") else None),
        xlabel=f"{group.kind.samples} seen",
    )
    return lines


def _mark_alarms(panel: Any, run: Run, color: str, height: float) -> None:
    """Triangles at a share of the panel's height: filled where something was done."""
    for acted in (True, False):
        wanted = [
            alarm.get("batch") for alarm in run.alarms if (alarm.get("action") not in ("inform", "warn")) == acted
        ]
        places = {b["batch"]: b["images_seen"] for b in run.batches if "batch" in b and "images_seen" in b}
        seen = [places[batch] for batch in wanted if batch in places]
        style = {"color": color, "marker": "v", "ls": "", "markersize": 6, "mfc": color if acted else "none"}
        if seen:
            at = panel.get_xaxis_transform()
            (marks,) = panel.plot(seen, [height] * len(seen), transform=at, clip_on=False, zorder=5, **style)
            marks.set_in_layout(False)  # the panel keeps its size


def estimates_figure(group: Group, looks: Looks) -> Figure | None:
    """Accuracy along the stream as monitors estimate it, beside the truth, and alarms; a panel for each method.

    Of the first seed. ``None`` where no run with its batches has estimates.
    """
    shown = {m: [r for r in runs if r.estimates][:1] for m, runs in with_batches(group).items()}
    shown = {method: runs for method, runs in shown.items() if runs}
    if not shown:
        return None
    names = list(dict.fromkeys(name for (run,) in shown.values() for name in run.estimates))
    figure = _figure(WIDTH, 0.8 + 2.2 * len(shown))
    all_axes: Any = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (method, (run,)) in zip(all_axes[:, 0], shown.items(), strict=True):
        answered = [not batch.get("source_answered") for batch in run.batches]
        seen = np.array([batch["images_seen"] for batch in run.batches], dtype=float)
        if run.accuracy() is not None:
            truth = np.array(rolling_mean(run.batches, run.window), dtype=float)
            (handles["accuracy"],) = axes.plot(seen, np.where(answered, truth, np.nan), color="#000000", lw=1.5)
        for place, name in enumerate(names):
            values = np.array([batch.get(f"{name}_accuracy") for batch in run.batches], dtype=float)
            style = {"color": COLORS[place % len(COLORS)], "ls": LINES[place % len(LINES)], "lw": 1.3}
            (handles[name],) = axes.plot(seen, np.where(answered, 100 * values, np.nan), **style)
        for _, start, _ in spans if len(spans := domain_spans(run.batches)) > 1 else ():
            axes.axvline(seen[start] - run.batches[start]["images"], color=GRID, lw=0.9, zorder=0)
        _mark_alarms(axes, run, looks[method].color, 0.95)
        axes.set(ylabel="accuracy %", ylim=(0, 102), xlim=(0, seen[-1]), title=method)
        axes.grid(axis="y")
    all_axes[-1, 0].set_xlabel(f"{group.kind.samples} seen")
    words = [name if name == "accuracy" else f"estimate of {name}" for name in handles]
    columns = legend_columns(words, WIDTH)
    figure.legend(list(handles.values()), words, loc="outside lower center", ncols=columns)
    return figure


def estimates_caption(group: Group) -> str:
    """What that figure shows."""
    window = next((run.window for run in group.runs if run.estimates), 8)
    truth = f"Black: accuracy over the last {window} batches of the domain. " * group.labelled
    return (
        f"{truth}Estimates of the monitors, which see no labels, but for 'labels'; where the source answered on "
        "probation there is no line. Triangles: alarms; hollow ones changed nothing. Vertical lines: a new domain. The "
        "first seed."
    )


def _curve(runs: Sequence[Run], name: str) -> NDArray[np.float64]:
    """Rows: samples seen, mean, lowest and highest over seeds, thinned to some hundred points; empty without values."""
    curves: list[Any] = [
        rolling_mean(run.batches, run.window, name) if name in ROLLING else [b.get(name) for b in run.batches]
        for run in runs
    ]
    length = min(map(len, curves), default=0)
    if not length:
        return np.empty((4, 0))
    values = np.array([curve[:length] for curve in curves], dtype=float) * (100 if name.endswith("share") else 1)
    seen = np.array([batch["images_seen"] for batch in runs[0].batches[:length]])
    rows = np.stack([seen, values.mean(0), values.min(0), values.max(0)])[:, :: max(1, -(-length // POINTS))]
    return rows[:, np.isfinite(rows[1])]


def rolling_mean(batches: Sequence[Mapping[str, Any]], window: int, name: str = "accuracy") -> list[float | None]:
    """A share in percent over the last ``window`` batches of the same domain, each labelled batch by its samples."""
    known = [b.get("labelled_images", b["images"]) if b.get(name) is not None else 0 for b in batches]
    counts = [(b[name] * count if count else 0, count) for b, count in zip(batches, known, strict=True)]
    right, images = np.cumsum([(0, 0), *counts], axis=0).T
    accuracies: list[float | None] = []
    for _, first, last in domain_spans(batches):
        for end in range(first + 1, last + 1):
            start = max(first, end - window)
            count = images[end] - images[start]
            accuracies.append(100 * (right[end] - right[start]) / count if count else None)
    return accuracies


def domain_spans(batches: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Name, first and last batch + 1 of each domain in turn; one span where domains take turns all the time."""
    starts = [k for k, b in enumerate(batches) if k == 0 or b["domain"] != batches[k - 1]["domain"]]
    if len(starts) > BOUNDARIES:
        return [("", 0, len(batches))]
    return [(batches[a]["domain"], a, b) for a, b in zip(starts, [*starts[1:], len(batches)], strict=True)]
