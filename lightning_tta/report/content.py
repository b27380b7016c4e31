"""What stands in a report, section by section."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_tta.report import tables
from lightning_tta.report.blocks import Block, Grid, Note, Pictures, Section
from lightning_tta.report.curves import caption, stream_figures
from lightning_tta.report.figures import (
    collapse_figure,
    differences_figure,
    pareto_figure,
    reliability_figure,
)
from lightning_tta.report.runs import Group, Material
from lightning_tta.report.style import Look, drawing, to_svg
from lightning_tta.run.summary import WINDOW

EARLIER = "reports of this version have it; these are of an earlier one, or lack labels"
COSTS = {"ms": "ms per image", "passes": "forward + 2 x backward passes per batch", "memory": "peak memory, MB"}


def sections(material: Material, looks: Mapping[str, Look]) -> list[Section]:
    """All sections, figures drawn."""
    made = [Section("Before you read", 2, [Note(text, warning=True) for text in material.warnings])]
    if material.missing:
        rows = [[cell, reason] for cell, reason in material.missing]
        made[0].blocks.append(Note(f"Cells without a result: {len(rows)}; see the end.", warning=True))
    if not made[0].blocks:
        made.clear()
    if len(material.groups) > 1:
        made.append(Section("All comparisons", 2, list(tables.all_groups(material.groups, material.methods))))
    with drawing():
        for place, group in enumerate(material.groups):
            made += _group(group, looks, f"g{place}")
    if material.missing:
        caption = "Cells without a result: unsupported by the net, or failed."
        made.append(Section("Missing cells", 2, [Grid(["cell", "reason"], rows, caption, left=2)]))
    made.append(Section("Versions and hardware", 2, [_environment(material)]))
    return made


def _group(group: Group, looks: Mapping[str, Look], name: str) -> list[Section]:
    head = Section(group.title, 2, [Note(text, warning=True) for text in group.warnings])
    found = tables.differences(group)
    head.blocks.append(tables.overview(group, found))
    if found:
        caption = (
            "Differences to the source with their 95 % intervals; filled markers: the interval leaves out zero. "
            "The table says what was paired."
        )
        head.blocks.append(
            Pictures([("differences to source", differences_figure(found, looks, f"{name}-d"))], caption)
        )
    made = [head]
    if len(group.domains) > 1:
        made.append(Section("By domain", 3, list(tables.by_domain(group, found))))
    made.append(Section("Along the stream", 3, _stream(group, looks, name)))
    made.append(Section("Calibration", 3, _calibration(group, looks, name)))
    made.append(Section("Cost", 3, _cost(group, looks, name)))
    forgetting = tables.forgetting(group)
    made.append(
        Section(
            "Forgetting",
            3,
            [forgetting or Note("Not measured. Set --report.measure_forgetting true to have it.")],
        )
    )
    events = _guard(group)
    if events is not None:
        made.append(Section("Guard events", 3, [events]))
    made.append(Section("Protocol", 3, _protocol(group)))
    return made


def _stream(group: Group, looks: Mapping[str, Look], name: str) -> list[Block]:
    figures = stream_figures(group, looks)
    collapse = collapse_figure(group, looks, f"{name}-c")
    if not figures or collapse is None:
        return [Note("No curves: there is no batches.jsonl beside these reports.", warning=True)]
    blocks: list[Block] = []
    without = [m for m, runs in group.methods.items() if not all(run.batches for run in runs)]
    if without:
        blocks.append(Note(f"Without batches.jsonl in some runs: {', '.join(without)}.", warning=True))
    blocks.append(
        Pictures(
            [("share of the most predicted class over time", collapse)],
            f"Share of the most predicted class over the last {WINDOW} batches, from none (0) to solid (1), mean "
            "over seeds. A row that grows stronger than the "
            "labels' own has collapsed onto few classes.",
            wide=True,
        )
    )
    blocks.append(
        Pictures(
            [
                (f"accuracy and largest class share along the stream: {what}", to_svg(figure, f"{name}-s{number}"))
                for number, (what, figure) in enumerate(figures)
            ],
            caption(group),
            wide=len(figures) == 1,
        )
    )
    return blocks


def _calibration(group: Group, looks: Mapping[str, Look], name: str) -> list[Block]:
    grid = tables.calibration(group)
    if grid is None:
        return [Note(f"No calibration: {EARLIER}.")]
    blocks: list[Block] = [grid]
    items = []
    for place, (method, runs) in enumerate(group.methods.items()):
        bins = tables.reliability(runs)
        if bins is not None:
            items.append(
                (f"reliability of {method}", reliability_figure(bins, method, looks[method], f"{name}-r{place}"))
            )
    if items:
        caption = (
            "Reliability: accuracy by confidence, all seeds together; vertical lines are the gap to the mean "
            "confidence of the bin, below is where the images are. On the diagonal confidence is honest; below it, "
            "too high."
        )
        blocks.append(Pictures(items, caption))
    else:
        blocks.append(Note(f"No reliability diagrams: {EARLIER}."))
    return blocks


def _cost(group: Group, looks: Mapping[str, Look], name: str) -> list[Block]:
    blocks: list[Block] = [tables.cost(group)]
    items = []
    for which, label in COSTS.items():
        points = {}
        for method, runs in group.methods.items():
            accuracy = tables.accuracy_of(runs)
            if which == "passes":
                forward, backward = tables.cost_of(runs, "forwards"), tables.cost_of(runs, "backwards")
                spent = None if forward is None or backward is None else forward + 2 * backward
            else:
                spent = tables.cost_of(runs, which)
            if accuracy is not None and spent is not None:
                points[method] = (spent, 100 * accuracy.mean)
        if len(points) > 1:
            items.append((f"accuracy against {label}", pareto_figure(points, label, looks, f"{name}-p-{which}")))
    if items:
        caption = "Accuracy against cost. Dashed: the methods that no other beats in both."
        blocks.append(Pictures(items, caption))
    return blocks


def _guard(group: Group) -> Grid | None:
    """Events of the guard, where a report has any; ``None`` where no run had a guard."""
    if all(run.report.get("guard") is None for run in group.runs):
        return None
    rows = []
    for run in group.runs:
        for event in (run.report.get("guard") or {}).get("events", []):
            rest = {k: v for k, v in event.items() if k not in ("batch", "reason", "action")}
            cells = [str(event.get(key, "-")) for key in ("batch", "reason", "action")]
            rows.append([run.method, run.seed, *cells, _measures(rest) or "-"])
    header = ["method", "seed", "batch", "reason", "action", "more"]
    caption = f"{len(rows)} events of the guard." if rows else "The guard watched and had nothing to do."
    for run in group.runs:
        guard = run.report.get("guard") or {}
        if guard.get("on_probation"):
            caption += (
                f" {run.method}, seed {run.seed}: the source predicted {guard['on_probation']} batches on probation."
            )
        if guard.get("forwards"):
            caption += f" {guard['forwards']} forward passes more, for the source as measure."
    return Grid(header, rows, caption, left=6, methods=True)


def _measures(values: Mapping[str, Any]) -> str:
    """``name value, name value``; of a mapping in it, ``name (...)``."""
    said = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            said.append(f"{name} ({_measures(value)})")
        elif value is not None:
            said.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(said).replace("_", " ")


def _protocol(group: Group) -> list[Block]:
    protocols = [run.protocol for run in group.runs if run.protocol]
    rows = []
    for key in dict.fromkeys(key for protocol in protocols for key in protocol if key != "hash"):
        values = list(dict.fromkeys(_said(protocol.get(key)) for protocol in protocols))
        if values != ["-"]:
            rows.append([key.replace("_", " "), "; ".join(values)])
    hashes: dict[str, list[str]] = {}
    for run in group.runs:
        hashes.setdefault(run.seed, [])
        if run.hash not in hashes[run.seed]:
            hashes[run.seed].append(run.hash)
    rows += [[f"hash, seed {seed}", ", ".join(found)] for seed, found in hashes.items()]
    nets = {json.dumps({k: v for k, v in (run.report.get("net") or {}).items() if k != "digest"}) for run in group.runs}
    rows += [["net", _said(json.loads(net))] for net in sorted(nets - {"{}"})]
    precisions = dict.fromkeys(str(run.report["precision"]) for run in group.runs if "precision" in run.report)
    rows += [["precision", ", ".join(precisions)]] if precisions else []
    caption = "What must be equal before two results may be compared; several values: what differs between the runs."
    return [Grid(["", ""], rows, caption, left=2)]


def _said(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        same = len({json.dumps(v) for v in value}) == 1 and len(value) > 3
        return f"{len(value)} x {_said(value[0])}" if same else ", ".join(_said(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _environment(material: Material) -> Block:
    runs = [run for group in material.groups for run in group.runs]
    found = [run.report["environment"] for run in runs if run.report.get("environment")]
    rows = []
    for key in dict.fromkeys(key for environment in found for key in environment):
        counts = Counter(str(environment.get(key, "-")) for environment in found)
        values = [value if len(counts) == 1 else f"{value} ({count} runs)" for value, count in counts.items()]
        rows.append([key, "; ".join(values)])
    if not rows:
        return Note("The reports do not say.", warning=True)
    return Grid(["", ""], rows, f"As the {len(found)} runs say.", left=2)
