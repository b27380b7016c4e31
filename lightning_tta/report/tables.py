"""The tables of the report: rows, columns and the rule for pairing, once for terminal, Markdown and page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_tta.report.runs import Group, Report, Results, Run
from lightning_tta.report.statistics import MIN_SEEDS, Estimate, holm, interval, over_images, over_seeds

COSTS = {"ms / image": "ms per image", "passes": "forward + 2 x backward per batch", "peak MB": "peak memory, MB"}


@dataclass(frozen=True)
class Table:
    """A table: the first ``left`` columns are text, the others numbers.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: Cells as text; ``*`` at a cell's end marks a difference whose interval leaves out zero.
        note: What the numbers mean, to stand beside the table.
        left: How many columns hold text.
        methods: Whether the first column names methods.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1
    methods: bool = False


# Cells -----------------------------------------------------------------------------------------------------------


def cell(estimate: Estimate | None, scale: float = 100, digits: int = 1, sign: str = "") -> str:
    """A mean and how sure it is, as :func:`spread_note` says; an interval of a share must lie within 0 to 1."""
    if estimate is None:
        return "-"
    mean, low, high, half = estimate.mean, estimate.low, estimate.high, estimate.half
    beyond = scale == 100 and half is not None and not (sign or 0 <= mean - half <= mean + half <= 1)
    text = f"{scale * mean:{sign}.{digits}f}"
    if half is not None and not beyond:
        text += f" ± {scale * half:.{digits}f}"
    elif estimate.count > 1:
        text += f" [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"
    return text + "*" * estimate.clear


def gain_cell(difference: Estimate | None) -> str:
    """A difference in points of accuracy."""
    return cell(difference, sign="+")


def p_cell(p: float | None) -> str:
    """A p-value with two digits that mean something."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def number(value: float | None, form: str = ".1f") -> str:
    """A number, ``-`` where there is none."""
    return "-" if value is None else f"{value:{form}}"


def spread_note(group: Group) -> str:
    """What stands beside the means of a group's table; ``±`` is the same in all of them."""
    seeds = max(len(runs) for runs in group.methods.values())
    if seeds >= MIN_SEEDS:
        return (
            f"Mean over n = {seeds} seeds ± half its 95 % confidence interval (Student's t); [lowest, highest] where "
            "that would go beyond 0 to 100."
        )
    return "Mean over n = 2 seeds [lowest, highest]." if seeds == 2 else "One seed."


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in values if value is not None]


# Accuracy and differences ----------------------------------------------------------------------------------------


def accuracy_of(runs: Sequence[Run], domain: str | None = None) -> Estimate | None:
    """Accuracy over seeds, of a domain or of all."""
    return interval(known(run.accuracy(domain) for run in runs))


def difference(group: Group, method: str, domain: str | None = None) -> Estimate | None:
    """Accuracy minus the source's under the same protocol: over seeds if there are several, else over images."""
    pairs, gains = [], []
    for run, source in group.pairs(method):
        mine, base = run.accuracy(domain), source.accuracy(domain)
        if mine is not None and base is not None:
            pairs.append((run, source))
            gains.append(mine - base)
    if len(pairs) == 1:
        hits, base_hits = (run.hits_in(domain) for run in pairs[0])
        if hits and [hit[:2] for hit in hits] == [hit[:2] for hit in base_hits]:
            over = over_images([int(hit[2]) - int(other[2]) for hit, other in zip(hits, base_hits, strict=True)])
            if over is not None:
                return over
    return over_seeds(gains) if gains else None


def differences(group: Group) -> dict[str, Estimate]:
    """The difference to the source of every method that has one."""
    found = {method: difference(group, method) for method in group.methods}
    return {method: value for method, value in found.items() if value is not None}


def pairing_note(gains: Iterable[Estimate]) -> str:
    """In words, how the differences were paired and tested."""
    kinds: dict[tuple[str, bool], set[int]] = {}
    for gain in gains:
        kinds.setdefault((gain.over, gain.half is not None), set()).add(gain.count)
    words = []
    if ("seeds", True) in kinds:
        counts = " or ".join(map(str, sorted(kinds["seeds", True])))
        words.append(f"Differences to the source are paired by seed ({counts} pairs), p by Student's t.")
    if ("images", True) in kinds:
        words.append(
            "With one seed, differences to the source are paired by image; ± and p take images as independent, and "
            "say nothing of other seeds."
        )
    if ("seeds", False) in kinds:
        words.append("Differences of one or two pairs are not tested.")
    if not kinds:
        return "No differences: there is no run of source under the same protocol."
    return " ".join([*words, "* the interval leaves out zero; Holm: p corrected for the methods here."])


def overview(group: Group) -> Table:
    """Accuracy, difference to the source with its p-value, collapse."""
    gains = differences(group)
    corrected = dict(zip(gains, holm([gain.p for gain in gains.values()]), strict=True))
    rows = []
    for method, runs in group.methods.items():
        gain = gains.get(method)
        worst = known(max(known(d.get("largest_class_share") for d in r.domains.values()), default=None) for r in runs)
        p_values = [p_cell(gain.p if gain else None), p_cell(corrected.get(method))]
        share = number(100 * fmean(worst) if worst else None)
        rows.append([method, str(len(runs)), cell(accuracy_of(runs)), gain_cell(gain), *p_values, share])
    header = ["method", "n", "accuracy %", "vs source", "p", "p (Holm)", "largest class %"]
    note = (
        f"{spread_note(group)} {pairing_note(gains.values())} Largest class: share of the most predicted class in the "
        "worst domain, mean over seeds; near 100 after a collapse."
    )
    return Table(group.title, header, rows, note, methods=True)


def all_groups(results: Results) -> Table:
    """Accuracy of every method in every group."""
    rows = [
        [m, *(cell(accuracy_of(group.methods[m])) if m in group.methods else "-" for group in results.groups)]
        for m in results.methods
    ]
    note = "Accuracy %; ± as beside each group's own table below. Columns are not comparable with each other."
    return Table("All groups", ["method", *(group.title for group in results.groups)], rows, note, methods=True)


def by_domain(group: Group) -> list[Table]:
    """Accuracy, and the difference to the source where there is one; methods in columns unless they are many."""
    domains: list[str | None] = [*group.domains, None]
    columns = {m: [cell(accuracy_of(runs, d)) for d in domains] for m, runs in group.methods.items()}
    tables = [_crossed("Accuracy % by domain", domains, columns, spread_note(group))]
    gains = {m: [gain_cell(difference(group, m, d)) for d in domains] for m in differences(group)}
    if gains:
        note = (
            "Paired as above; * the interval leaves out zero. Not corrected for the number of domains: about one star "
            "in twenty comes by chance."
        )
        tables.append(_crossed("Difference to the source by domain, points", domains, gains, note))
    return tables


def _crossed(title: str, domains: Sequence[str | None], columns: Mapping[str, list[str]], note: str) -> Table:
    names = [domain or "all" for domain in domains]
    if len(columns) > len(names):
        return Table(title, ["method", *names], [[m, *cells] for m, cells in columns.items()], note, methods=True)
    rows = [list(row) for row in zip(names, *columns.values(), strict=True)]
    return Table(title, ["domain", *columns], rows, note)


def one_run(report: Report) -> Table:
    """A run's account by domain."""
    percent = [(row["accuracy"], row["largest_class_share"]) for row in report["domains"].values()]
    shares = [[number(None if value is None else 100 * value) for value in pair] for pair in percent]
    rows = [[n, str(row["images"]), *s] for (n, row), s in zip(report["domains"].items(), shares, strict=True)]
    total = report["accuracy"]
    rows.append(["all", str(report["images"]), number(None if total is None else 100 * total), ""])
    protocol = report["protocol"]
    title = f"{report['method']}, {protocol['stream']} stream, reset {protocol['reset']}, protocol {protocol['hash']}"
    return Table(title, ["domain", "images", "accuracy %", "largest class %"], rows)


# Calibration, cost, forgetting -----------------------------------------------------------------------------------


def calibration(group: Group) -> Table | None:
    """ECE, NLL and Brier's score; ``None`` where no report has them."""
    rows = []
    for method, runs in group.methods.items():
        ece, nll, brier = (interval(known(run.report.get(key) for run in runs)) for key in ("ece", "nll", "brier"))
        rows.append([method, cell(ece), cell(nll, 1, 3), cell(brier, 1, 3)])
    if all(text == "-" for row in rows for text in row[1:]):
        return None
    note = (
        "Expected calibration error (15 bins of confidence), negative log-likelihood in nats, Brier's score (0 to 2); "
        f"lower is better. {spread_note(group)}"
    )
    return Table("Calibration", ["method", "ECE %", "NLL", "Brier"], rows, note, methods=True)


def reliability(runs: Sequence[Run]) -> list[list[float]] | None:
    """The bins of all runs added up: rows (samples, sum of confidences, right ones)."""
    all_bins = [run.report["reliability"] for run in runs if run.report.get("reliability")]
    return [[sum(v) for v in zip(*rows, strict=True)] for rows in zip(*all_bins, strict=True)] if all_bins else None


def costs(runs: Sequence[Run]) -> dict[str, float]:
    """Means over runs of what the reports know: passes a batch, ms a batch and an image, peak memory in MB."""
    found: dict[str, list[float]] = {}
    for run in runs:
        report, per_batch = run.report, run.report.get("seconds_per_batch")
        images = report.get("images") or sum(part.get("images", 0) for part in run.domains.values())
        batches, seconds = report.get("batches"), report.get("seconds")
        values = {
            "forward": report["forwards"] / batches if batches and report.get("forwards") is not None else None,
            "backward": report["backwards"] / batches if batches and report.get("backwards") is not None else None,
            "ms / batch": None if per_batch is None else 1000 * per_batch,
            "ms / image": 1000 * seconds / images if images and seconds is not None else None,
            "peak MB": report.get("peak_memory_mb"),
        }
        for name, value in values.items():
            found.setdefault(name, []).extend(known([value]))
    means = {name: fmean(values) for name, values in found.items() if values}
    if "forward" in means and "backward" in means:
        means["passes"] = means["forward"] + 2 * means["backward"]
    return means


def cost(group: Group) -> Table:
    """Passes, time and memory."""
    all_costs = {method: costs(runs) for method, runs in group.methods.items()}
    base = all_costs.get("source", {}).get("ms / batch")
    rows = []
    for method, found in all_costs.items():
        time = found.get("ms / batch")
        rows.append(
            [
                method,
                *(number(found.get(name), ".3g") for name in ("forward", "backward")),
                number(time),
                number(time / base if time is not None and base else None, ".2f"),
                number(found.get("ms / image"), ".2f"),
                number(found.get("peak MB"), ",.0f"),
            ]
        )
    kinds = sorted({str(run.report["peak_memory"]) for run in group.runs if run.report.get("peak_memory")})
    note = "Forward and backward passes a batch, time by the clock, peak memory" + (
        f" ({', '.join(kinds)})." if kinds else "."
    )
    if any(kind.startswith("resident") for kind in kinds):
        note += " Resident memory holds libraries, data and what earlier runs of the same process left."
    header = ["method", "forward", "backward", "ms / batch", "x source", "ms / image", "peak MB"]
    return Table("Cost", header, rows, f"{note} Means over seeds.", methods=True)


def cost_points(group: Group) -> dict[str, dict[str, tuple[float, float]]]:
    """Cost and accuracy in percent of every method, by kind of cost, where two methods or more have both."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for key, label in COSTS.items():
        for method, runs in group.methods.items():
            accuracy, found = accuracy_of(runs), costs(runs)
            if accuracy is not None and key in found:
                points.setdefault(label, {})[method] = (found[key], 100 * accuracy.mean)
    return {label: found for label, found in points.items() if len(found) > 1}


def forgetting(group: Group) -> Table | None:
    """Accuracy on clean source data after the stream; ``None`` where it was not measured."""
    after = {m: known(run.report.get("source_accuracy_after") for run in runs) for m, runs in group.methods.items()}
    if not any(after.values()):
        return None
    rows = []
    for method, values in after.items():
        both = [[run.report.get("source_accuracy_after") for run in pair] for pair in group.pairs(method)]
        lost = [mine - base for mine, base in both if mine is not None and base is not None]
        rows.append([method, cell(interval(values)), gain_cell(over_seeds(lost) if lost else None)])
    note = (
        "Accuracy on clean source test images after the stream, predicted without adapting, and its difference to the "
        "source model's, paired by seed. Under a reset policy, what the last domain or batch left. "
        + spread_note(group)
    )
    return Table("Forgetting", ["method", "source accuracy after %", "vs source"], rows, note, methods=True)


# Guard, protocol, environment ------------------------------------------------------------------------------------


def guard(group: Group) -> Table | None:
    """Events of the guard; ``None`` where no run had one."""
    rows, note = [], ""
    guarded = [(run, run.report["guard"]) for run in group.runs if run.report.get("guard") is not None]
    for run, found in guarded:
        for event in found.get("events", []):
            rest = {k: v for k, v in event.items() if k not in ("batch", "reason", "action") and v is not None}
            texts = [str(event.get(key, "-")) for key in ("batch", "reason", "action")]
            rows.append([run.method, run.seed, *texts, said(rest).replace("_", " ")])
        if found.get("on_probation"):
            note += (
                f" {run.method}, seed {run.seed}: the source predicted {found['on_probation']} batches on probation."
            )
        if found.get("forwards"):
            note += f" {found['forwards']} forward passes more, for the source as measure."
    note = (f"{len(rows)} events of the guard." if rows else "The guard watched and had nothing to do.") + note
    header = ["method", "seed", "batch", "reason", "action", "more"]
    return Table("Guard events", header, rows, note, left=6, methods=True) if guarded else None


def protocol(group: Group) -> Table:
    """What must be equal before results are compared, hashes, net and precision."""
    protocols = [run.protocol for run in group.runs if run.protocol]
    rows = []
    for key in dict.fromkeys(key for protocol in protocols for key in protocol if key != "hash"):
        values = list(dict.fromkeys(said(protocol.get(key)) for protocol in protocols))
        if values != ["-"]:
            rows.append([key.replace("_", " "), "; ".join(values)])
    hashes = {seed: dict.fromkeys(run.hash for run in group.runs if run.seed == seed) for seed in group.seeds}
    rows += [[f"hash, seed {seed}", ", ".join(several)] for seed, several in hashes.items()]
    nets = [{k: v for k, v in (run.report.get("net") or {}).items() if k != "digest"} for run in group.runs]
    rows += [["net", net] for net in dict.fromkeys(said(net) for net in nets) if net != "-"]
    precisions = dict.fromkeys(str(run.report["precision"]) for run in group.runs if "precision" in run.report)
    rows += [["precision", ", ".join(precisions)]] if precisions else []
    note = "What must be equal before two results may be compared; several values: what differs between the runs."
    return Table("Protocol", ["", ""], rows, note, left=2)


def environment(results: Results) -> Table | None:
    """Versions and hardware, as the runs say; ``None`` where none does."""
    found = [e for group in results.groups for run in group.runs if (e := run.report.get("environment"))]
    rows = []
    for key in dict.fromkeys(key for environment in found for key in environment):
        counts = Counter(str(environment.get(key, "-")) for environment in found)
        rows.append([key, "; ".join(v if len(counts) == 1 else f"{v} ({n} runs)" for v, n in counts.items())])
    return Table("Versions and hardware", ["", ""], rows, f"As the {len(found)} runs say.", left=2) if rows else None


def missing(results: Results) -> Table | None:
    """Cells without a result, and why."""
    note = "Unsupported by the net, or failed."
    return Table("Missing cells", ["cell", "reason"], results.missing, note, left=2) if results.missing else None


def said(value: Any) -> str:
    """A value of JSON in words: ``name value, name (...)``."""
    if value is None or value in ("", {}, []):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} ({said(v)})" if isinstance(v, dict) else f"{k} {said(v)}" for k, v in value.items())
    if isinstance(value, list):
        same = len({json.dumps(v) for v in value}) == 1 and len(value) > 3
        return f"{len(value)} x {said(value[0])}" if same else ", ".join(said(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
