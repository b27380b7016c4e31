"""The tables of the report: rows, columns and the rule for pairing, once for terminal, Markdown and page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lightning_tta.report.files import Report, first_indices
from lightning_tta.report.runs import (
    ERROR,
    IMAGES,
    MEAN_IOU,
    PIXELS,
    PROMPTS,
    VISIT,
    Group,
    Kind,
    Measure,
    Results,
    Run,
    settings,
    short,
)
from lightning_tta.report.statistics import MIN_SEEDS, Estimate, holm, interval, over_samples, over_seeds

COSTS = {
    "ms / sample": "ms per {sample}",
    "passes": "forward + 2 x backward per batch{uncounted}",
    "peak MB": "peak memory, MB",
}


@dataclass(frozen=True)
class Table:
    """Cells as text, with a note that says what the numbers mean; the first ``left`` columns are no numbers.

    ``*`` at a cell's end marks a difference whose interval leaves out zero.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1
    methods: bool = False  # whether the first column names methods
    best: str | None = None  # the row to mark, by its first cell


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
    """Those that are there, and finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def accuracy_of(runs: Sequence[Run], domain: str | None = None) -> Estimate | None:
    """Accuracy, or what else runs are judged by, over seeds, of a domain or of all."""
    return interval(known(run.score(domain) for run in runs))


def score_cell(measure: Measure, estimate: Estimate | None, sign: str = "") -> str:
    """A mean of what runs are judged by, or a difference of it."""
    return cell(estimate, measure.scale, measure.digits, sign)


def difference(group: Group, method: str, domain: str | None = None, base: str | None = None) -> Estimate | None:
    """Accuracy (or what runs are judged by) minus that of ``base`` (by default the source) under the same protocol.

    Over seeds if there are several, else over samples, but where one comes several times. What a sample gives in
    several domains is one draw.
    """
    pairs = [pair for pair in group.pairs(method, base) if None not in [run.score(domain) for run in pair]]
    if len(pairs) == 1 and (not group.recurs or domain in (pairs[0][0].report.get("visits") or {})):
        hits, others = (run.hits_in(domain) for run in pairs[0])
        if hits and hits.keys() == others.keys() and all(np.array_equal(hits[n][0], others[n][0]) for n in hits):
            first = first_indices(pairs[0][0].report, pairs[0][0].predictions)
            draws = [hits[name][0] - first[name] for name in hits if name in first]
            over = over_samples(
                np.concatenate([hits[name][1] - others[name][1] for name in hits]),
                np.concatenate(draws) if len(draws) == len(hits) else None,
            )
            if over is not None:
                return over
    return over_seeds([(run.score(domain) or 0) - (source.score(domain) or 0) for run, source in pairs])


def differences(group: Group) -> dict[str, Estimate]:
    """The difference to the source of every method that has one."""
    return {method: gain for method in group.methods if (gain := difference(group, method)) is not None}


def pairing_note(gains: Iterable[Estimate], kind: Kind = IMAGES) -> str:
    """In words, how the differences were paired and tested."""
    kinds: dict[tuple[str, bool], set[int]] = {}
    for gain in gains:
        kinds.setdefault((gain.over, gain.half is not None), set()).add(gain.count)
    words = []
    if ("seeds", True) in kinds:
        counts = " or ".join(map(str, sorted(kinds["seeds", True])))
        words.append(f"Differences to the source are paired by seed ({counts} pairs), p by Student's t.")
    if ("samples", True) in kinds:
        words.append(
            f"With one seed, differences to the source are paired by {kind.sample}; ± and p take {kind.samples} as "
            "independent, each with all its domains, and say nothing of other seeds."
        )
    if ("seeds", False) in kinds:
        words.append("Differences of one or two pairs are not tested.")
    if not kinds:
        return "No differences: there is no run of source under the same protocol."
    return " ".join([*words, "* the interval leaves out zero; Holm: p corrected for the methods here."])


def ranked(group: Group) -> list[str]:
    """The methods from best to worst by their difference to the source; those without one last, by accuracy."""
    gains, accuracies = differences(group), {method: accuracy_of(runs) for method, runs in group.methods.items()}
    sign = -group.measure.sign

    def place(method: str) -> tuple[bool, float]:
        accuracy = accuracies[method]
        if method in gains or method == group.source:
            return False, sign * gains[method].mean if method in gains else 0.0
        return True, sign * accuracy.mean if accuracy else 0.0

    return sorted(group.methods, key=place) if group.labelled else list(group.methods)


def agreement(group: Group, method: str) -> Estimate | None:
    """Share of samples on which a method predicts what the source predicts."""
    shares = []
    for run, source in group.pairs(method):
        equal = images = 0
        for name in run.predictions.keys() & source.predictions.keys() & run.domains.keys():
            one, other = run.predictions[name], source.predictions[name]
            if np.array_equal(one[:, 0], other[:, 0]):
                equal, images = equal + int((one[:, 2] == other[:, 2]).sum()), images + len(one)
        shares += [equal / images] if images else []
    return interval(shares)


def _by_method(
    title: str, header: Sequence[str], cells: Mapping[str, Sequence[str]], note: str, best: str | None = None
) -> Table:
    return Table(title, ["method", *header], [[m, *row] for m, row in cells.items()], note, methods=True, best=best)


def class_share(runs: Sequence[Run]) -> float | None:
    """Share of the most predicted class in the worst domain, in [0, 1], mean over seeds."""
    worst = known(max(known(d.get("largest_class_share") for d in run.domains.values()), default=None) for run in runs)
    return fmean(worst) if worst else None


def mean_entropy(run: Run, domain: str | None = None) -> float | None:
    """Mean entropy of the predictions in nats, of a domain or over all images."""
    shown = run.domains.values() if domain is None else [run.parts[domain]] if domain in run.parts else []
    parts = [part for part in shown if part.get("entropy") is not None]
    images = sum(part.get("images") or 0 for part in parts)
    return sum(part["entropy"] * (part.get("images") or 0) for part in parts) / images if images else None


def share_note(kind: Kind) -> str:
    """What the share is by which a collapse shows."""
    if kind is PROMPTS:
        return (
            "Most frequent answer: its share of the answers in the worst domain, mean over seeds; near 100 where the "
            "outputs have become one string."
        )
    of = f"share of the {kind.largest}{' among the pixels' * (kind is PIXELS)}"
    return f"Largest class: {of} in the worst domain, mean over seeds; near 100 after a collapse."


def language(group: Group) -> Table | None:
    """Of answers of a language model: interval, entropy of tokens, norm of logits, length, cost of a token."""
    if group.kind is not PROMPTS:
        return None
    cells = {}
    for method, runs in group.methods.items():
        get = [run.report.get for run in runs]
        values = [
            interval(known(one(name) for one in get))
            for name in ("entropy", "largest_class_share", "logit_norm", "seconds_per_token")
        ]
        lengths = interval(known(_ratio(one("generated_tokens"), one("prompts")) for one in get))
        ends = [one("accuracy_interval") for one in get]
        low_high = " ".join("-" if end is None else f"[{100 * end[0]:.1f}, {100 * end[1]:.1f}]" for end in ends[:3])
        cells[method] = [
            low_high + " ..." * (len(ends) > 3),
            cell(values[0], 1, 3),
            cell(values[1]),
            cell(values[2], 1, 2),
            cell(lengths, 1, 1),
            cell(values[3], 1000, 1),
        ]
    note = (
        "Accuracy: interval of Clopper and Pearson, 95 %, of each seed; prompts of an adapted stream are not "
        "independent, which it takes them for. Entropy: of the tokens, mean over answers, in nats. Most frequent "
        "answer: share in the whole stream. Tokens of an answer; ms of a token with its share of the adaptation."
    )
    header = ["accuracy % between", "entropy", PROMPTS.share, "logit norm", "tokens", "ms / token"]
    return _by_method("Answers", header, cells, note)


def dense(group: Group) -> Table | None:
    """Of pixels: accuracy and the IoU of each class; of values: R2. ``None`` of others, and without targets."""
    if not group.labelled or group.measure not in (MEAN_IOU, ERROR):
        return None
    cells: dict[str, list[str]] = {}
    if group.measure is ERROR:
        for method, runs in group.methods.items():
            r2 = interval(known(run.report.get("r2") for run in runs))
            cells[method] = [score_cell(group.measure, accuracy_of(runs)), cell(r2, 1, 3)]
        note = "R2: 1 is exact, 0 is as good as the mean of all targets, below it worse. "
        return _by_method("Values", ["mean absolute error", "R2"], cells, note + spread_note(group))
    names = list(next((run.report["class_names"] for run in group.runs if run.report.get("class_names")), []))
    count = max(len(run.report.get("class_iou") or ()) for run in group.runs)
    names += [f"class {number}" for number in range(len(names), count)]
    for method, runs in group.methods.items():
        values = [run.report.get("class_iou") or [None] * count for run in runs]
        each = [cell(interval(known(row[k] for row in values if k < len(row)))) for k in range(count)]
        pixels = interval(known(run.accuracy() for run in runs))
        cells[method] = [cell(pixels), score_cell(group.measure, accuracy_of(runs)), *each]
    note = (
        "In percent. IoU of each class, from all pixels that count together; mean IoU over the classes that occur. "
        f"Accuracy: share of pixels that are right. {spread_note(group)}"
    )
    return _by_method("Pixels", ["pixel accuracy", "mean IoU", *names[:count]], cells, note)


def overview(group: Group, best: str | None = None) -> Table:
    """Accuracy, difference to the source with its p-value, collapse; the best first.

    Without labels entropy, agreement with the source, and collapse.
    """
    if not group.labelled:
        return _unlabelled(group)
    gains = differences(group)
    corrected = dict(zip(gains, holm([gain.p for gain in gains.values()]), strict=True))
    cells = {}
    for method in ranked(group):
        runs, gain, share = group.methods[method], gains.get(method), class_share(group.methods[method])
        p_values = [p_cell(gain.p if gain else None), p_cell(corrected.get(method))]
        shown = number(None if share is None else 100 * share)
        measure = group.measure
        means = [score_cell(measure, accuracy_of(runs)), score_cell(measure, gain, sign="+")]
        cells[method] = [str(len(runs)), *means, *p_values, *([shown] if measure is not ERROR else [])]
    note = f"{spread_note(group)} {pairing_note(gains.values(), group.kind)} "
    note += "Mean absolute error: lower is better." if group.measure is ERROR else share_note(group.kind)
    header = ["n", group.measure.words, "vs source", "p", "p (Holm)"]
    header += [] if group.measure is ERROR else [group.kind.share]
    return _by_method(group.title, header, cells, note, best)


def _unlabelled(group: Group) -> Table:
    cells = {}
    for method, runs in group.methods.items():
        entropy, share = interval(known(map(mean_entropy, runs))), class_share(runs)
        alike = cell(agreement(group, method))
        cells[method] = [str(len(runs)), cell(entropy, 1, 3), alike, number(None if share is None else 100 * share)]
    note = (
        f"{spread_note(group)} Entropy of the predictions in nats; it falls with adaptation, for right and wrong "
        f"predictions alike. Like source: share of {group.kind.samples} that get the source's prediction. "
        f"{share_note(group.kind)}"
    )
    return _by_method(group.title, ["n", "entropy", "like source %", group.kind.share], cells, note)


def all_groups(results: Results) -> Table | None:
    """Accuracy of every method in every group that has labels, where there are several groups."""
    shown = [group for group in results.groups if group.labelled]
    if not shown or len(results.groups) < 2:
        return None
    cells = {
        m: [score_cell(group.measure, accuracy_of(group.methods.get(m, []))) for group in shown]
        for m in results.methods
    }
    note = (
        "Accuracy %, of pixels mean IoU %, of values the mean absolute error; ± as beside each group's own table. "
        "Columns are not comparable with each other."
    )
    return _by_method("All groups", [group.title for group in shown], cells, note)


def by_domain(group: Group) -> list[Table]:
    """Accuracy, and the difference to the source where there is one; methods in columns unless they are many."""
    domains: list[str | None] = [*group.parts, None]
    by = "visit, and by domain over all visits" if group.recurs else "domain"
    if not group.labelled:
        rows = {
            m: [cell(interval(known(mean_entropy(run, d) for run in runs)), 1, 3) for d in domains]
            for m, runs in group.methods.items()
        }
        return [_crossed(f"Entropy by {by}, nats", domains, rows, spread_note(group))]
    how = group.measure
    columns = {m: [score_cell(how, accuracy_of(runs, d)) for d in domains] for m, runs in group.methods.items()}
    tables = [_crossed(f"{how.words[:1].upper()}{how.words[1:]} by {by}", domains, columns, spread_note(group))]
    gains = {m: [score_cell(how, difference(group, m, d), "+") for d in domains] for m in differences(group)}
    if gains:
        note = (
            "Paired as above; * the interval leaves out zero. Not corrected for the number of domains: about one star "
            "in twenty comes by chance."
        )
        unit = "points" if how.in_percent else how.words
        tables.append(_crossed(f"Difference to the source by {by}, {unit}", domains, gains, note))
    return tables


def _crossed(title: str, domains: Sequence[str | None], columns: Mapping[str, list[str]], note: str) -> Table:
    names = [domain or "all" for domain in domains]
    if len(columns) > len(names):
        return _by_method(title, names, columns, note)
    rows = [list(row) for row in zip(names, *columns.values(), strict=True)]
    return Table(title, ["domain", *columns], rows, note)


def one_run(report: Report) -> Table:
    """A run's account by domain; without labels entropy in place of accuracy."""
    run = Run(str(report.get("method", "")), "", report, Path())
    labelled, how = run.score() is not None, run.measure
    rows = []
    for name in [*run.parts, None]:
        part: Report = report if name is None else run.parts[name]
        share, score = None if name is None else part.get("largest_class_share"), run.score(name)
        shown = number(score and how.scale * score, f".{how.digits}f")
        measures = [shown if labelled else number(mean_entropy(run, name), ".3f")]
        if how is MEAN_IOU and labelled:
            accuracy = run.accuracy(name)
            measures.append(number(accuracy and 100 * accuracy))
        measures.append(
            number(part.get("r2"), ".3f") if how is ERROR else number(None if share is None else 100 * share)
        )
        rows.append([name or "all", str(part.get("images", "-")), *measures])
    stream, reset = run.protocol.get("stream"), run.protocol.get("reset")
    title = f"{run.method}, {stream} stream, reset {reset}, protocol {run.hash}"
    header = [how.words if labelled else "entropy"] + ["pixel accuracy %"] * (how is MEAN_IOU and labelled)
    return Table(title, ["domain", run.kind.samples, *header, "R2" if how is ERROR else run.kind.share], rows)


def calibration(group: Group) -> Table | None:
    """ECE, NLL and Brier's score; ``None`` where no report has them."""
    cells = {}
    for method, runs in group.methods.items():
        ece, nll, brier = (interval(known(run.report.get(key) for run in runs)) for key in ("ece", "nll", "brier"))
        cells[method] = [cell(ece), cell(nll, 1, 3), cell(brier, 1, 3)]
    note = (
        "Expected calibration error (15 bins of confidence), negative log-likelihood in nats, Brier's score (0 to 2); "
        f"lower is better. {spread_note(group)}"
    )
    measured = any(text != "-" for row in cells.values() for text in row)
    return _by_method("Calibration", ["ECE %", "NLL", "Brier"], cells, note) if measured else None


def reliability(runs: Sequence[Run]) -> list[list[float]] | None:
    """The bins of all runs added up: rows (samples, sum of confidences, right ones)."""
    all_bins = [run.report["reliability"] for run in runs if run.report.get("reliability")]
    return [[sum(v) for v in zip(*rows, strict=True)] for rows in zip(*all_bins, strict=True)] if all_bins else None


def costs(runs: Sequence[Run]) -> dict[str, float]:
    """Means over runs of what the reports know: passes a batch, ms a batch and a sample, peak memory in MB."""
    each = []
    for run in runs:
        get = run.report.get
        images = get("images") or sum(domain.get("images", 0) for domain in run.domains.values())
        each.append(
            {
                "forward": _ratio(get("forwards"), get("batches")),
                "backward": _ratio(get("backwards"), get("batches")),
                "ms / batch": _ratio(get("seconds_per_batch"), 0.001),
                "ms / sample": _ratio(get("seconds"), images / 1000),
                "peak MB": get("peak_memory_mb"),
            }
        )
    values = {name: known(costs[name] for costs in each) for name in each[0]}
    means = {name: fmean(several) for name, several in values.items() if several}
    if "forward" in means and "backward" in means:
        means["passes"] = means["forward"] + 2 * means["backward"]
    return means


def _ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def cost(group: Group) -> Table:
    """Passes, time and memory."""
    all_costs = {method: costs(runs) for method, runs in group.methods.items()}
    base = all_costs.get(group.source or "", {}).get("ms / batch")
    forms = {
        "forward": ".3g",
        "backward": ".3g",
        "ms / batch": ".1f",
        "x source": ".2f",
        "ms / sample": ".2f",
        "peak MB": ",.0f",
    }
    cells = {}
    for method, means in all_costs.items():
        values = {**means, "x source": _ratio(means.get("ms / batch"), base)}
        cells[method] = [number(values.get(name), form) for name, form in forms.items()]
    kinds = sorted({str(run.report["peak_memory"]) for run in group.runs if run.report.get("peak_memory")})
    how = f" ({', '.join(kinds)})" if kinds else ""
    passes = f"Forward and backward passes a batch{group.kind.uncounted}"
    note = f"{passes}; time by the clock, of all; peak memory{how}."
    if any(kind.startswith("resident") for kind in kinds):
        note += " Resident memory holds libraries, data and what earlier runs of the same process left."
    header = [name.replace("sample", group.kind.sample) for name in forms]
    return _by_method("Cost", header, cells, f"{note} Means over seeds.")


def cost_points(group: Group) -> dict[str, dict[str, tuple[float, float]]]:
    """Cost and accuracy in percent of every method, by kind of cost, where two methods or more have both."""
    labels = {
        key: label.format(sample=group.kind.sample, uncounted=group.kind.uncounted) for key, label in COSTS.items()
    }
    points: dict[str, dict[str, tuple[float, float]]] = {label: {} for label in labels.values()}
    for method, runs in group.methods.items():
        accuracy, means = accuracy_of(runs) if group.measure is not ERROR else None, costs(runs)
        for key in COSTS if accuracy is not None else ():
            if accuracy is not None and key in means:
                points[labels[key]][method] = (means[key], 100 * accuracy.mean)
    return {label: methods for label, methods in points.items() if len(methods) > 1}


def forgetting(group: Group) -> Table | None:
    """Accuracy on clean source data after the stream; ``None`` where it was not measured."""
    cells = {}
    for method, runs in group.methods.items():
        after = interval(known(run.report.get("source_accuracy_after") for run in runs))
        pairs = [[run.report.get("source_accuracy_after") for run in pair] for pair in group.pairs(method)]
        change = over_seeds([after - before for after, before in pairs if after is not None and before is not None])
        cells[method] = [cell(after), cell(change, sign="+")]
    note = (
        "Accuracy on clean source test images after the stream, predicted without adapting, and its difference to the "
        "source model's, paired by seed. Under a reset policy, what the last domain or batch left. "
        + spread_note(group)
    )
    measured = any(text != "-" for text, _ in cells.values())
    return _by_method("Forgetting", ["source accuracy after %", "vs source"], cells, note) if measured else None


def guard(group: Group) -> Table | None:
    """Alarms of the guard's monitors; ``None`` where no run had one."""
    rows, note = [], ""
    guarded = [run for run in group.runs if run.report.get("guard") is not None]
    keys = ("batch", "monitor", "reason", "action")
    for run in guarded:
        for event in run.alarms:
            rest = {k: v for k, v in event.items() if k not in keys and v is not None}
            rows.append([run.method, run.seed, *(str(event.get(key, "-")) for key in keys), said(rest)])
            rows[-1][-1] = rows[-1][-1].replace("_", " ")
        if count := run.guard.get("on_probation"):
            note += f" {run.method}, seed {run.seed}: the source predicted {count} batches on probation."
        if count := run.guard.get("forwards"):
            note += f" {count} forward passes more, for the monitors."
        note += "".join(f" {run.method}, seed {run.seed}: {sentence}" for sentence in run.unestimated)
    note = (f"{len(rows)} events of the guard." if rows else "The guard watched and had nothing to do.") + note
    header = ["method", "seed", *keys, "more"]
    return Table("Guard events", header, rows, note, left=7, methods=True) if guarded else None


def estimates(group: Group) -> Table | None:
    """Accuracy as monitors estimate it, beside the truth where there are labels; ``None`` where none does."""
    rows = [
        [
            *(run.method, run.seed, monitor),
            *(number(None if (v := each.get(key)) is None else 100 * v) for key in ("estimate", "accuracy")),
            number(None if (v := each.get("mean_absolute_error")) is None else 100 * v),
        ]
        for run in group.runs
        for monitor, each in run.estimates.items()
    ]
    windows = ", ".join(dict.fromkeys(str(run.window) for run in group.runs if run.estimates))
    note = (
        f"Means over the {group.kind.samples} of the batches that the method answered and the monitor had an estimate "
        "for; the monitors see no labels, but for 'labels'. Error: mean distance, in points, to the accuracy over the "
        f"last {windows} batches."
    )
    header = ["method", "seed", "monitor", "estimate %", "accuracy %", "error"]
    return Table("Estimated accuracy", header, rows, note, left=3, methods=True) if rows else None


def choices(group: Group) -> list[Table]:
    """What the chooser found, candidate by candidate, where it has written that beside a run."""
    shown = {json.dumps(run.choice, sort_keys=True): run for run in group.runs if run.choice}
    tables = []
    for run in shown.values():
        candidates = run.choice["candidates"]
        scores = [each.get("scores") if isinstance(each.get("scores"), Mapping) else {} for each in candidates]
        names = list(dict.fromkeys(name for each in scores for name in each))
        rows = []
        for each, values in zip(candidates, scores, strict=True):
            known = [v if isinstance(v := values.get(name), (int, float)) else None for name in names]
            rows.append([str(each.get("name", "-")), *(number(value, ".3f") for value in known)])
        best = str(run.choice["choice"])
        title = f"Candidates, {run.method}" if len(shown) > 1 else "Candidates"
        note = "Scores of the chooser, made without the labels of the stream; larger is better."
        tables.append(Table(title, ["candidate", *(name.replace("_", " ") for name in names)], rows, note, best=best))
    return tables


def choice_text(choice: Report) -> str:
    """The chooser's verdict in a sentence or two."""
    confidence = choice.get("confidence")
    sure = f" (confidence {100 * confidence:.0f} %)" if isinstance(confidence, (int, float)) else ""
    why = choice.get("why")
    return f"The chooser takes {choice['choice']}{sure}." + (f" {why}" if isinstance(why, str) and why else "")


def protocol(group: Group) -> Table:
    """What must be equal before results are compared, hashes, net and precision."""
    protocols = [_without_visits(run.protocol) for run in group.runs if run.protocol]
    values = {group.kind.entry(key): value for key, value in _merge(protocols).items()}
    for seed in group.seeds:
        values[f"hash, seed {seed}"] = ", ".join(dict.fromkeys(run.hash for run in group.runs if run.seed == seed))
    rows = [[key, value] for key, value in values.items() if value != "-"]
    nets = [{k: v for k, v in (run.report.get("net") or {}).items() if k != "digest"} for run in group.runs]
    rows += [["net", net] for net in dict.fromkeys(map(said, nets)) if net != "-"]
    precisions = dict.fromkeys(str(run.report["precision"]) for run in group.runs if "precision" in run.report)
    rows += [["precision", ", ".join(precisions)]] if precisions else []
    note = "What must be equal before two results may be compared; several values: what differs between the runs."
    return Table("Protocol", ["", ""], rows, note, left=2)


def _without_visits(protocol: Report) -> Report:
    """A protocol in which the domains that come several times are named once."""
    visits = protocol.get("visits")
    if not isinstance(visits, int) or visits < 1:
        return protocol
    domains = [str(name).partition(VISIT)[0] for name in protocol.get("domains", [])]
    return {**protocol, "domains": list(dict.fromkeys(domains))}


def environment(results: Results) -> Table | None:
    """Versions and hardware, as the runs say; ``None`` where none does."""
    environments = [e for group in results.groups for run in group.runs if (e := run.report.get("environment"))]
    rows = list(_merge(environments).items())
    return (
        Table(
            "Versions and hardware",
            ["", ""],
            rows,
            "As the run says." if len(environments) == 1 else f"As the {len(environments)} runs say.",
            left=2,
        )
        if rows
        else None
    )


def _merge(dicts: Sequence[Report]) -> dict[str, str]:
    """For each key but a hash, all values in words; several where the dicts differ."""
    keys = dict.fromkeys(key for each in dicts for key in each if key != "hash")
    return {key: "; ".join(dict.fromkeys(said(each.get(key)) for each in dicts)) for key in keys}


def options(results: Results) -> Table | None:
    """What each method was run with; ``None`` where no run says it."""
    runs = [run for group in results.groups for run in group.runs if "options" in run.report]
    rows = list(dict.fromkeys((run.method, run.base, options_of(run)) for run in runs))
    note = "All that changes predictions beside the protocol."
    return Table("Options", ["label", "method", "options"], rows, note, left=3, methods=True) if rows else None


def options_of(run: Run) -> str:
    """What a run's method was run with, in words; ``-`` for nothing."""
    words = [f"{name}={short(value)}" for name, value in settings(run).items() if value is not None]
    return ", ".join(words) or "-"


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
