"""A study: errors along an axis by method, and what its questions come to; from the JSON of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tta.report.figures import MUTED, WIDTH, drawing, looks
from lightning_tta.report.statistics import Estimate, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICTS = {"holds": "holds here", "fails": "does not hold here", "unclear": "unclear"}


def ruling(differences: Sequence[float], margin: float = 0.0) -> tuple[str, Estimate | None]:
    """What differences between two series, one a seed, say of "the first is better by more than ``margin``".

    Args:
        differences: In points of accuracy, of the first less the second.
        margin: In points.

    Returns:
        ``holds`` or ``fails`` where the 95 % interval of the mean (Student's t) lies on one side of the margin, else
        ``unclear``; and the mean with its interval, which needs three seeds.
    """
    estimate = interval(differences)
    if estimate is None or estimate.half is None:
        return "unclear", estimate
    if estimate.mean - estimate.half > margin:
        return "holds", estimate
    return ("fails" if estimate.mean + estimate.half < margin else "unclear"), estimate


def sentence(answer: Mapping[str, Any]) -> str:
    """A question with its answer, in one line."""
    if answer["mean"] is None:
        return f"{answer['say']}: not measured ({answer['missing']})."
    half = "" if answer["half"] is None else f" ± {answer['half']:.1f}"
    over = f" against a margin of {answer['margin']:.1f}" if answer["margin"] else ""
    return (
        f"{answer['say']}: {VERDICTS[answer['verdict']]} ({answer['mean']:+.1f}{half} points of accuracy{over}, "
        f"{answer['seeds']} seeds)."
    )


def study_figure(result: Mapping[str, Any]) -> Figure:
    """Error in percent along the study's axis, a panel for each net and stream, a line for each method.

    A method that does not vary is a level line. Bands reach from the lowest to the highest seed. Without an axis:
    bars.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((s["net"], s["stream"]) for s in result["series"]))
    style = looks(s["method"] for s in result["series"])
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for unused in axes.flat[len(panels) :]:
        unused.set_axis_off()
    for panel, (net, stream) in zip(axes.flat, panels, strict=False):
        mine = [s for s in result["series"] if (s["net"], s["stream"]) == (net, stream)]
        (_draw_lines if result["axis"] else _draw_bars)(panel, mine, style, result)
        panel.set_title(f"{net}, {stream}")
        panel.set_ylabel("error, %")
        panel.grid(axis="y")
    if result["axis"]:
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def _draw_lines(panel: Any, series: Sequence[Mapping[str, Any]], style: Any, result: Mapping[str, Any]) -> None:
    places = {value: number for number, value in enumerate(result["values"])}
    numeric = all(isinstance(value, (int, float)) for value in result["values"])
    for line in series:
        look, points = style[line["method"]], line["points"]
        if line["level"]:
            panel.axhline(100 - points[0]["mean"], color=look.color, linestyle=look.line, lw=1.2, label=line["method"])
            continue
        x = [point["x"] if numeric else places[point["x"]] for point in points]
        panel.plot(x, [100 - p["mean"] for p in points], look.line, marker=look.marker, ms=4, color=look.color)
        panel.lines[-1].set_label(line["method"])
        panel.fill_between(
            x, [100 - p["high"] for p in points], [100 - p["low"] for p in points], color=look.color, alpha=0.12, lw=0
        )
    panel.set_xlabel(result["axis"])
    if numeric and result["scale"] == "log":
        panel.set_xscale("symlog" if min(result["values"]) <= 0 else "log")
    if numeric:
        panel.set_xticks(result["values"], [f"{value:g}" for value in result["values"]])
        panel.minorticks_off()
    else:
        panel.set_xticks(range(len(places)), [str(value) for value in places])
    panel.tick_params(axis="x", labelrotation=45 if len(places) > 6 else 0)


def _draw_bars(panel: Any, series: Sequence[Mapping[str, Any]], style: Any, result: Mapping[str, Any]) -> None:
    for row, line in enumerate(series):
        point = line["points"][0]
        error = 100 - point["mean"]
        spread = [[max(0.0, point["high"] - point["mean"])], [max(0.0, point["mean"] - point["low"])]]
        panel.barh(row, error, xerr=spread, color=style[line["method"]].color, ecolor=MUTED, height=0.7)
        panel.text(0, row, f" {error:.1f}", va="center", color="white", fontsize=8)
    panel.set_yticks(range(len(series)), [line["method"] for line in series])
    panel.invert_yaxis()
    panel.set_xlabel("error, %")
    panel.set_ylabel("")


def study_table(result: Mapping[str, Any]) -> str:
    """Errors in percent, a row for each method, net and stream, in Markdown."""
    values = result["values"] or [""]
    several = len({(s["net"], s["stream"]) for s in result["series"]}) > 1
    header = [
        "method",
        *(["net", "stream"] if several else []),
        *(f"{v:g}" if _is_number(v) else str(v) for v in values),
    ]
    if not result["axis"]:
        header[-1] = "error"
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for line in result["series"]:
        by_x = {point["x"]: point for point in line["points"]}
        cells = []
        for value in values:
            point = line["points"][0] if line["level"] or not result["axis"] else by_x.get(value)
            cells.append("" if point is None else f"{100 - point['mean']:.1f}")
        lines.append(f"| {' | '.join([line['method'], *([line['net'], line['stream']] if several else []), *cells])} |")
    return "\n".join(lines)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
