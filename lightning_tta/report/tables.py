"""The tables of a group of runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lightning_tta.data.base import BLIND
from lightning_tta.report.blocks import Grid, number, percent
from lightning_tta.report.runs import Group, Run
from lightning_tta.report.statistics import Difference, Interval, holm, interval, over_images, over_seeds

PAGE, GAP = 122, 3
"""Characters that the page has room for, and those between two columns."""


def spread_of(values: Sequence[float | None]) -> Interval | None:
    """Mean and interval of those that are known."""
    return interval([value for value in values if value is not None])


def _cell(found: Interval | None, scale: str = "percent") -> str:
    if found is None:
        return "-"
    return percent(found.mean, found.half) if scale == "percent" else number(found.mean, found.half)


def accuracy_of(runs: Sequence[Run], domain: str | None = None) -> Interval | None:
    """Accuracy over seeds, of a domain or of all."""
    return spread_of([run.accuracy(domain) for run in runs])


def difference(group: Group, method: str, domain: str | None = None) -> Difference | None:
    """Accuracy minus the source's under the same protocol: over seeds if there are several, else over images."""
    pairs = [(run, source) for run, source in group.pairs(method) if None not in _both(run, source, domain)]
    if not pairs or method == "source":
        return None
    if len(pairs) > 1:
        return over_seeds([run.accuracy(domain) - source.accuracy(domain) for run, source in pairs])  # type: ignore[operator]
    mine, theirs = (_counted(run, domain) for run in pairs[0])
    if mine and [row[:2] for row in mine] == [row[:2] for row in theirs]:
        found = over_images([int(own[2]) - int(other[2]) for own, other in zip(mine, theirs, strict=True)])
        if found is not None:
            return found
    return over_seeds([pairs[0][0].accuracy(domain) - pairs[0][1].accuracy(domain)])  # type: ignore[operator]


def _both(run: Run, source: Run, domain: str | None) -> tuple[float | None, float | None]:
    return run.accuracy(domain), source.accuracy(domain)


def _counted(run: Run, domain: str | None) -> list[tuple[str, int, bool]]:
    """The images behind an accuracy: those of the domain, or all; of a blind-spot stream those not adapted on."""
    if domain is not None:
        return [row for row in run.hits if row[0] == domain]
    return [row for row in run.hits if not row[0].endswith(BLIND)]


def differences(group: Group) -> dict[str, Difference]:
    """The difference to the source of every method that has one."""
    found = {method: difference(group, method) for method in group.methods}
    return {method: value for method, value in found.items() if value is not None}


def overview(group: Group, found: Mapping[str, Difference]) -> Grid:
    """Accuracy, error, difference to the source (``found``) with its p-value, collapse."""
    corrected = dict(zip(found, holm([d.p for d in found.values()]), strict=True))
    rows = []
    for method, runs in group.methods.items():
        accuracy, gain = accuracy_of(runs), found.get(method)
        error = None if accuracy is None else percent(1 - accuracy.mean, accuracy.half)
        worst = spread_of([_worst_share(run) for run in runs])
        rows.append(
            [
                method,
                str(len(runs)),
                _cell(accuracy),
                error or "-",
                signed(gain),
                "-" if gain is None or gain.p is None else p_value(gain.p),
                "-" if corrected.get(method) is None else p_value(corrected[method]),  # type: ignore[arg-type]
                _cell(worst),
            ]
        )
    header = ["method", "runs", "accuracy %", "error %", "vs source", "p", "p (Holm)", "largest class %"]
    return Grid(header, rows, f"Accuracy and paired difference to the source. {how_paired(found)}", methods=True)


def _worst_share(run: Run) -> float | None:
    shares = [part.get("largest_class_share") for part in run.report.get("domains", {}).values()]
    known = [share for share in shares if share is not None]
    return max(known) if known else None


def signed(found: Difference | None) -> str:
    """A difference in points of accuracy, its interval, and a star where the interval leaves out zero."""
    if found is None:
        return "-"
    half = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:+.1f}{half}{'*' if found.clear else ''}"


def p_value(p: float) -> str:
    """A p-value with two digits that mean something."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def how_paired(found: Mapping[str, Difference]) -> str:
    """In words, how the differences were tested."""
    if not found:
        return "No differences: there is no run of source under the same protocol."
    kinds = {(d.over, d.half is not None) for d in found.values()}
    words = []
    if ("seeds", True) in kinds:
        counts = sorted({d.count for d in found.values() if d.over == "seeds"})
        words.append(
            f"Differences are paired by seed ({' or '.join(map(str, counts))} pairs under equal protocols); interval "
            "and p by the t distribution."
        )
    if ("images", True) in kinds:
        words.append(
            "With one seed, differences are paired by image (predictions.csv); interval and p by the normal "
            "distribution from their standard error, taking images as independent: they say nothing of other seeds."
        )
    if ("seeds", False) in kinds:
        words.append("A difference without interval has one pair of runs and no predictions to pair.")
    return " ".join(
        [*words, "± is half a 95 % interval; * an interval that leaves out zero; Holm: corrected for the methods here."]
    )


def all_groups(groups: Sequence[Group], methods: Sequence[str]) -> list[Grid]:
    """Accuracy of every method in every group."""
    columns = {
        group.title: [_cell(accuracy_of(group.methods[m])) if m in group.methods else "-" for m in methods]
        for group in groups
    }
    caption = "Accuracy %, mean ± half a 95 % interval over seeds. Columns are comparisons of their own; see below."
    return _parts("method", methods, columns, caption, methods=True)


def _parts(
    corner: str, names: Sequence[str], columns: Mapping[str, Sequence[str]], caption: str, *, methods: bool
) -> list[Grid]:
    """A table, or the fewest of about equal numbers of columns where one would be wider than the page."""
    room = PAGE - max(map(len, [corner, *names])) - GAP - 5 * methods  # with a swatch
    wide = [max(map(len, [name, *cells])) + GAP for name, cells in columns.items()]
    size = next(
        size
        for size in (-(-len(wide) // count) for count in range(1, len(wide) + 1))
        if size == 1 or all(sum(wide[start : start + size]) <= room for start in range(0, len(wide), size))
    )
    parts = [list(columns)[start : start + size] for start in range(0, len(columns), size)]
    grids = []
    for place, part in enumerate(parts, 1):
        rows = [[name, *cells] for name, *cells in zip(names, *(columns[key] for key in part), strict=True)]
        said = f"{caption} Part {place} of {len(parts)}." if len(parts) > 1 else caption
        grids.append(Grid([corner, *part], rows, said, methods=methods))
    return grids


def by_domain(group: Group, compared: Iterable[str]) -> list[Grid]:
    """Accuracy, and of the methods ``compared`` the difference to the source; methods in columns unless many."""
    domains: list[str | None] = [*group.domains, None]
    columns = {m: [_cell(accuracy_of(runs, d)) for d in domains] for m, runs in group.methods.items()}
    grids = _crossed(domains, columns, "Accuracy % by domain, mean ± half a 95 % interval over seeds.")
    found = {m: [signed(difference(group, m, d)) for d in domains] for m in compared}
    if found:
        caption = (
            "Difference to the source in points of accuracy, paired as above; * where the interval leaves out zero. "
            "Not corrected for the number of domains: about one star in twenty comes by chance."
        )
        grids += _crossed(domains, found, caption)
    return grids


def _crossed(domains: Sequence[str | None], columns: Mapping[str, Sequence[str]], caption: str) -> list[Grid]:
    names = [domain or "all" for domain in domains]
    if len(columns) > len(names):
        turned = dict(zip(names, map(list, zip(*columns.values(), strict=True)), strict=True))
        return _parts("method", list(columns), turned, caption, methods=True)
    return _parts("domain", names, columns, caption, methods=False)


def calibration(group: Group) -> Grid | None:
    """ECE, NLL and Brier's score; ``None`` where no report has them."""
    rows = []
    for method, runs in group.methods.items():
        found = {key: spread_of([run.report.get(key) for run in runs]) for key in ("ece", "nll", "brier")}
        rows.append([method, _cell(found["ece"]), _cell(found["nll"], "number"), _cell(found["brier"], "number")])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return None
    caption = (
        "Expected calibration error (15 bins of confidence), negative log-likelihood in nats, Brier's score (0 to 2); "
        "lower is better. Mean ± half a 95 % interval over seeds."
    )
    return Grid(["method", "ECE %", "NLL", "Brier"], rows, caption, methods=True)


def reliability(runs: Sequence[Run]) -> list[list[float]] | None:
    """The bins of all runs added up: rows (samples, sum of confidences, right ones)."""
    all_bins = [run.report["reliability"] for run in runs if run.report.get("reliability")]
    if not all_bins:
        return None
    return [[sum(values) for values in zip(*rows, strict=True)] for rows in zip(*all_bins, strict=True)]


def cost_of(runs: Sequence[Run], which: str) -> float | None:
    """Mean over runs: ``ms`` per image or per ``batch``, peak ``memory`` in MB, or a total of the report per batch."""
    values = [_cost(run.report, which) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _cost(report: Any, which: str) -> float | None:
    images = report.get("images") or sum(part.get("images", 0) for part in report.get("domains", {}).values())
    batches, per_batch = report.get("batches"), report.get("seconds_per_batch")
    if which == "memory":
        value: float | None = report.get("peak_memory_mb")
        return value
    if which == "ms":
        seconds = report.get("seconds")
        return 1000 * seconds / images if seconds is not None and images else None
    if which == "batch":
        return None if per_batch is None else 1000 * per_batch
    if report.get(which) is None or not batches:
        return None
    return float(report[which]) / float(batches)


def cost(group: Group) -> Grid:
    """Passes, time and memory."""
    rows = []
    for method, runs in group.methods.items():
        forward, backward = cost_of(runs, "forwards"), cost_of(runs, "backwards")
        memory = cost_of(runs, "memory")
        rows.append(
            [
                method,
                _cell(accuracy_of(runs)),
                "-" if forward is None else f"{forward:.3g}",
                "-" if backward is None else f"{backward:.3g}",
                number(cost_of(runs, "batch"), digits=1),
                number(cost_of(runs, "ms"), digits=2),
                "-" if memory is None else f"{memory:,.0f}",
            ]
        )
    kinds = sorted({str(run.report["peak_memory"]) for run in group.runs if run.report.get("peak_memory")})
    caption = "Cost: forward and backward passes per batch, time by the clock (of the machine below), peak memory" + (
        f" ({', '.join(kinds)})." if kinds else "; memory is not in reports of earlier versions."
    )
    if any(kind.startswith("resident") for kind in kinds):
        caption += " Resident memory holds libraries, data and what earlier runs of the same process left."
    header = ["method", "accuracy %", "forward", "backward", "ms / batch", "ms / image", "peak MB"]
    return Grid(header, rows, caption, methods=True)


def forgetting(group: Group) -> Grid | None:
    """Accuracy on clean source data after the stream; ``None`` where it was not measured."""
    key = "source_accuracy_after"
    if all(run.report.get(key) is None for run in group.runs):
        return None
    rows = []
    for method, runs in group.methods.items():
        lost = [
            run.report[key] - source.report[key]
            for run, source in group.pairs(method)
            if method != "source" and run.report.get(key) is not None and source.report.get(key) is not None
        ]
        after = spread_of([run.report.get(key) for run in runs])
        rows.append([method, _cell(after), signed(over_seeds(lost)) if lost else "-"])
    caption = (
        "Forgetting: accuracy on clean source test images after the stream, predicted without adapting, and its "
        "difference to the source model's, paired by seed. Under a reset policy, what the last domain or batch left."
    )
    return Grid(["method", "source accuracy after %", "vs source"], rows, caption, methods=True)
