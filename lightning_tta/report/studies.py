"""A study: errors along an axis by method, and what its questions come to; from the JSON of its runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tta.report.figures import COLORS, LINES, MARKERS, MUTED, WIDTH, Look, drawing, looks
from lightning_tta.report.statistics import Estimate, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICTS = {"holds": "holds here", "fails": "does not hold here", "unclear": "unclear"}
VERDICT_COLORS = {"holds": "#007A59", "fails": "#C24E00", "unclear": "#4A4F57"}
SPREAD = 1e-9
"""Points; an interval below it has no spread but for rounding."""
ROW = 0.42
"""Inches of a question in the figure."""
BANDS = 3
"""More methods than so many get no bands: they would cover each other."""


def ruling(differences: Sequence[float], margin: float = 0.0) -> tuple[str, Estimate | None]:
    """What differences between two series, one a seed, say of "the first is better by more than ``margin``".

    Args:
        differences: In points of accuracy, of the first less the second.
        margin: In points.

    Returns:
        The :func:`verdict` on the 95 % interval of the mean (Student's t), which needs three seeds; and the mean with
        that interval.
    """
    estimate = interval(differences)
    return ("unclear" if estimate is None else verdict(estimate.mean, estimate.half, margin)), estimate


def verdict(mean: float, half: float | None, margin: float = 0.0) -> str:
    """``holds``, ``fails`` or ``unclear``, from a mean and half its interval; all in points.

    Differences without any spread, such as one image in each seed, are no evidence.
    """
    if half is None or half < SPREAD or abs(mean - margin) <= half:
        return "unclear"
    return "holds" if mean > margin else "fails"


def sentence(answer: Mapping[str, Any]) -> str:
    """A question with its answer, in one line."""
    if answer["mean"] is None:
        return f"{answer['say']}: not measured ({answer['missing']})."
    half = "" if answer["half"] is None else f" ± {answer['half']:.1f}"
    equal = "" if answer["half"] is None or answer["half"] >= SPREAD else ", the same in each"
    over = f" against a margin of {answer['margin']:.1f}" if answer["margin"] else ""
    return (
        f"{answer['say']}: {VERDICTS[answer['verdict']]} ({signed(answer['mean'])}{half} points of accuracy{over}, "
        f"{answer['seeds']} seeds{equal})."
    )


def signed(value: float) -> str:
    """A difference to a tenth with its sign: ``+0.0``, never ``-0.0``."""
    return f"{round(value, 1) + 0.0:+.1f}"


def is_number(value: object) -> bool:
    """Whether a value has a place on an axis of numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def axis_place(value: float, scale: str) -> float:
    """Where a value stands on the axis as it is drawn, up to the length of the axis: logarithmic from above 0."""
    return math.log10(value) if scale == "log" and value > 0 else value


def study_figure(result: Mapping[str, Any]) -> Figure:
    """Errors of the methods, and below them what the questions came to.

    Above: error in percent along the study's axis, a panel for each net and stream, a line for each method. A method
    that does not vary is a level line. Bands (of few methods) and whiskers reach from the lowest to the highest seed.
    Values that are no numbers are points without a line; without an axis there are bars. Where a question asks for the
    area under the curve, a panel of bars with the areas stands beside each panel.

    Below: for each question the mean difference in points of accuracy with its 95 % interval, paired by seed.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((s["net"], s["stream"]) for s in result["series"]))
    style = _looks(s["method"] for s in result["series"])
    areas = any(answer.get("at") == "area" for answer in result["answers"])
    columns = 2 if areas else min(2 if result["axis"] else 3, len(panels)) or 1
    rows = len(panels) if areas else -(-len(panels) // columns)
    bars = max((len(_of_panel(result, panel)) for panel in panels), default=1)
    height = 0.6 + max(2.7 if result["axis"] else 0.9 + 0.23 * bars, 1.4) * rows
    answers = [answer for answer in result["answers"] if answer["mean"] is not None]
    below = 0.55 + ROW * len(answers) if answers else 0.0
    figure = Figure(figsize=(WIDTH, height + below), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[height, below]) if answers else (figure, None)
    upper, lower = halves
    alike = not result["axis"] and len({tuple(s["method"] for s in _of_panel(result, panel)) for panel in panels}) == 1
    axes = upper.subplots(rows, columns, squeeze=False, sharex=alike, sharey=alike)
    for unused in axes.flat[len(panels) * (2 if areas else 1) :]:
        unused.set_axis_off()
    for panel, place in zip(axes[:, 0] if areas else axes.flat, panels, strict=False):
        (_draw_lines if result["axis"] else _draw_bars)(panel, _of_panel(result, place), style, result)
        panel.set_title("net {}, stream {}".format(*place).replace("_", " "))
    for panel, place in zip(axes[:, 1], panels, strict=True) if areas else ():
        mine = [{**s, "points": [s["area"]]} for s in _of_panel(result, place) if "area" in s]
        _draw_bars(panel, mine, style, result)
        panel.set_title("mean over the axis")
    if result["axis"]:
        found = [axis.get_legend_handles_labels() for axis in axes.flat]
        entries = {name: handle for handles, names in found for handle, name in zip(handles, names, strict=True)}
        upper.legend(entries.values(), entries, loc="outside lower center", ncols=4)
    for panel in axes.flat if alike else ():
        panel.label_outer()
    if lower is not None:
        _draw_answers(lower.subplots(), answers)
    return figure


def _draw_answers(panel: Any, answers: Sequence[Mapping[str, Any]]) -> None:
    """A row for each question: its words, and below them the difference with its interval."""
    panel.axvline(0, color=MUTED, lw=1)
    for row, answer in enumerate(answers):
        color, half = VERDICT_COLORS[answer["verdict"]], answer["half"] or 0.0
        panel.errorbar(answer["mean"], row, xerr=half, color=color, marker="o", ms=5, capsize=3, lw=1.6)
        if answer["margin"]:
            panel.plot([answer["margin"]] * 2, [row - 0.25, row + 0.25], color=MUTED, lw=1, ls=":")
        words = answer["say"] if answer["claimed"] else f"Asked: {answer['say']}"
        spread = "" if answer["half"] is None else f" ± {answer['half']:.1f}"
        text = panel.annotate(
            f"{words}: {VERDICTS[answer['verdict']]} ({signed(answer['mean'])}{spread})",
            (0, row - 0.48),
            xycoords=("axes fraction", "data"),
            **{"fontsize": 8, "color": color, "va": "center", "ha": "left"},
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    panel.set_ylim(len(answers) - 0.5, -0.8)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.margins(x=0.08)
    panel.grid(axis="x")
    panel.set_xlabel("difference in accuracy, points: mean and 95 % interval, paired by seed")


def _looks(methods: Iterable[str]) -> dict[str, Look]:
    """Few methods, so each gets one of the clear colors; the source is black."""
    others = [method for method in dict.fromkeys(methods) if method != "source"]
    if len(others) > len(COLORS):
        return looks(others)
    chosen = {
        method: Look(COLORS[n], LINES[n % len(LINES)], MARKERS[n % len(MARKERS)]) for n, method in enumerate(others)
    }
    return {"source": Look("#000000", "-", "o"), **chosen}


def _of_panel(result: Mapping[str, Any], panel: tuple[str, str]) -> list[Mapping[str, Any]]:
    return [s for s in result["series"] if (s["net"], s["stream"]) == panel]


def _draw_lines(panel: Any, series: Sequence[Mapping[str, Any]], style: Any, result: Mapping[str, Any]) -> None:
    numeric = all(is_number(value) for value in result["values"])
    against = result.get("against", "")
    moving = [line for line in series if not line["level"]]
    for line in series:
        look, points = style[line["method"]], line["points"]
        place = points[0].get("place")
        if line["level"] and place is None:
            panel.axhline(100 - points[0]["mean"], color=look.color, linestyle=look.line, lw=1.2, label=line["method"])
            continue
        errors = [100 - point["mean"] for point in points]
        low, high = ([100 - point[end] for point in points] for end in ("high", "low"))
        if against:
            x = [point["place"] for point in points]
            for point, place, error in zip(points, x, errors, strict=True):
                text = "" if line["level"] else _shown(point["x"])
                panel.annotate(text, (place, error), (3, 3), textcoords="offset points", fontsize=7, color=look.color)
        elif numeric:
            x = [point["x"] for point in points]
        else:  # side by side, so that whiskers do not hide each other
            shift = 0.5 * ((moving.index(line) + 0.5) / len(moving) - 0.5)
            x = [result["values"].index(point["x"]) + shift for point in points]
        joined = look.line if numeric and not line["level"] else "none"
        panel.plot(x, errors, linestyle=joined, marker=look.marker, ms=4, color=look.color, label=line["method"])
        if numeric and not against:
            if len(moving) <= BANDS:
                panel.fill_between(x, low, high, color=look.color, alpha=0.12, lw=0)
        else:
            panel.vlines(x, low, high, color=look.color, lw=1, alpha=0.5)
    panel.set_ylabel("error, %")
    panel.grid(axis="y")
    if against:
        panel.set_xlabel(against.replace("_", " "))
        panel.set_xscale("log" if result["scale"] == "log" else "linear")
        panel.xaxis.set_major_formatter("{x:g}")
        return
    narrow = panel.get_subplotspec().get_gridspec().ncols > 1
    panel.set_xlabel(textwrap.fill(result["axis"], 46 if narrow else 100))
    if not numeric:
        panel.set_xticks(range(len(result["values"])), [str(value).replace(" ", "\n") for value in result["values"]])
        panel.set_xlim(-0.5, len(result["values"]) - 0.5)
        return
    if result["scale"] == "log":
        above = [value for value in result["values"] if value > 0]
        if len(above) == len(result["values"]):
            panel.set_xscale("log")
        else:
            panel.set_xscale("symlog", linthresh=min(above, default=1.0))
    panel.set_xticks(result["values"], [_shown(value) for value in result["values"]])
    panel.minorticks_off()


def _draw_bars(panel: Any, series: Sequence[Mapping[str, Any]], style: Any, result: Mapping[str, Any]) -> None:
    for row, line in enumerate(series):
        point = line["points"][0]
        error = 100 - point["mean"]
        spread = [[max(0.0, point["high"] - point["mean"])], [max(0.0, point["mean"] - point["low"])]]
        panel.barh(row, error, xerr=spread, color=style[line["method"]].color, ecolor=MUTED, height=0.7)
        panel.text(100 - point["low"], row, f"  {error:.1f}", va="center", fontsize=8)
    panel.margins(x=0.12)
    panel.set_yticks(range(len(series)), [line["method"] for line in series])
    panel.set_ylim(len(series) - 0.5, -0.5)
    panel.set_xlabel("error, %")
    panel.grid(axis="x")


def _shown(value: object) -> str:
    return f"{value:g}" if is_number(value) else str(value)


def study_table(result: Mapping[str, Any]) -> str:
    """Errors in percent, a row for each method, net and stream, in Markdown.

    Where the axis has numbers, the last column is the area under the curve over the axis, divided by its length.
    Where another measure stands on the axis, it comes in brackets.
    """
    values = result["values"] or [""]
    several = len({(s["net"], s["stream"]) for s in result["series"]}) > 1
    areas = any("area" in line for line in result["series"])
    header = ["method", *(["net", "stream"] if several else []), *map(_shown, values), *(["mean"] if areas else [])]
    if not result["axis"]:
        header[-1] = "error"
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for line in result["series"]:
        by_x = {point["x"]: point for point in line["points"]}
        cells = [line["method"], *([line["net"], line["stream"]] if several else [])]
        for value in values:
            point = line["points"][0] if line["level"] or not result["axis"] else by_x.get(value)
            place = "" if point is None or "place" not in point else f" ({point['place']:.3g})"
            cells.append("" if point is None else f"{100 - point['mean']:.1f}{place}")
        if areas:
            cells.append(f"{100 - line['area']['mean']:.1f}" if "area" in line else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def study_text(result: Mapping[str, Any], picture: str | None = None) -> str:
    """The study in Markdown: claim, answers, table, and where the numbers come from."""
    environment = result["environment"]
    answers = "\n".join(f"- {sentence(answer)}" for answer in result["answers"])
    image = "" if picture is None else f"\n![{result['title']}]({picture})\n"
    hashes = ", ".join(result["protocols"])
    missing = "".join(f"\n- not run: {entry}" for entry in result["missing"])
    return f"""## {result["title"]}

{result["claim"]} {result["paper"]}

{answers}
{image}
{study_table(result)}

Error in percent, mean of {result["seeds"]} seeds; {result["data"]}.{missing}

`{result["command"]}`; {environment.get("device", "")}, torch {environment.get("torch", "")}, {result["date"]};
protocols {hashes}.
"""


def write_study(result: Mapping[str, Any], output: Path) -> None:
    """Write ``study.md`` and ``study.png`` beside ``study.json``."""
    if result["series"]:
        with drawing():
            study_figure(result).savefig(output / "study.png", dpi=150)
    picture = "study.png" if result["series"] else None
    (output / "study.md").write_text(study_text(result, picture), encoding="utf-8")
