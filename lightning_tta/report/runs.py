"""Finished runs as the report sees them: read with tolerance, for files are old, missing or unlike."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_tta.data.protocol import Protocol
from lightning_tta.errors import ConfigError, DataError

SEED_FIELDS = ("order_seed", "weights", "weights_digest", "hash")
"""Fields of a protocol in which the seeds of one experiment differ."""


@dataclass
class Run:
    """One run: its label, its place in the comparison, and its files.

    Attributes:
        method: Label of the method.
        seed: What tells it from the method's other runs.
        report: Content of ``report.json``; the benchmark's row where that is gone.
        directory: Where its files are.
    """

    method: str
    seed: str
    report: Mapping[str, Any]
    directory: Path

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The protocol, empty where the report has none."""
        found: Mapping[str, Any] = self.report.get("protocol") or {}
        return found

    @property
    def hash(self) -> str:
        """Hash of the protocol."""
        return str(self.protocol.get("hash") or self.report.get("protocol_hash") or "unknown")

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """The lines of ``batches.jsonl``; none where it is missing. A last line cut off is left out."""
        path = self.directory / "batches.jsonl"
        lines: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    @cached_property
    def hits(self) -> list[tuple[str, int, bool]]:
        """Domain, index and whether it was right, of each labelled image, sorted; none without predictions."""
        path = self.directory / "predictions.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if int(r["label"]) >= 0]
        return sorted((r["domain"], int(r["index"]), r["label"] == r["prediction"]) for r in rows)

    def accuracy(self, domain: str | None = None) -> float | None:
        """Accuracy in [0, 1], of a domain or of all."""
        part = self.report if domain is None else self.report.get("domains", {}).get(domain, {})
        value: float | None = part.get("accuracy")
        return value


@dataclass
class Group:
    """Runs that one table compares: a net on a stream.

    Attributes:
        title: Heading.
        runs: The runs.
        warnings: What a reader must know before believing the numbers.
    """

    title: str
    runs: list[Run]
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def methods(self) -> dict[str, list[Run]]:
        """Runs by method, the source first."""
        found: dict[str, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.method != "source"):
            found.setdefault(run.method, []).append(run)
        return found

    @property
    def domains(self) -> list[str]:
        """All domains, in order."""
        return list(dict.fromkeys(name for run in self.runs for name in run.report.get("domains", {})))

    @property
    def seeds(self) -> list[str]:
        """All seeds, in order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def pairs(self, method: str) -> list[tuple[Run, Run]]:
        """Runs of a method, each with the source's run under the same protocol."""
        source = {run.hash: run for run in self.methods.get("source", []) if run.hash != "unknown"}
        return [(run, source[run.hash]) for run in self.methods.get(method, []) if run.hash in source]


@dataclass
class Material:
    """All that a report shows.

    Attributes:
        groups: What is compared.
        missing: Cells without a result, with the reason.
        warnings: What concerns several groups.
        title: Heading of the page.
    """

    groups: list[Group]
    missing: list[tuple[str, str]]
    warnings: list[str]
    title: str

    @property
    def methods(self) -> list[str]:
        """The labels of all methods."""
        return list(dict.fromkeys(method for group in self.groups for method in group.methods))


def result_file(run: Path) -> Path:
    """The file with a run's or a benchmark's result.

    Raises:
        DataError: If there is none, or the file holds something else.
    """
    for path in (run, run / "report.json", run / "benchmark.json"):
        if path.is_file():
            try:
                content = json.loads(path.read_bytes())
            except ValueError as error:
                raise DataError(f"{path} cannot be read as JSON ({error}). Run once more, or leave it out.") from error
            if not isinstance(content, dict) or not {"rows", "protocol"} & set(content):
                raise DataError(f"{path} is no report of a run or benchmark. Give a finished run's directory.")
            return path
    raise DataError(
        f"{run} has no report.json or benchmark.json. Give a finished run's directory; a run that was cut off has its "
        "predictions.csv, but no report."
    )


def read(paths: Sequence[Path]) -> Material:
    """Read benchmarks and single runs."""
    material = Material([], [], [], "Test-time adaptation")
    singles: list[tuple[Path, dict[str, Any]]] = []
    for path in dict.fromkeys(result_file(path).resolve() for path in paths):
        content = json.loads(path.read_text())
        if "rows" in content:
            _read_benchmark(path.parent, content, material)
        else:
            singles.append((path.parent, content))
    _read_singles(singles, material)
    for group in material.groups:
        _check(group)
    return material


def _read_benchmark(root: Path, content: Mapping[str, Any], material: Material) -> None:
    groups: dict[tuple[str, str], list[Run]] = {}
    lost = 0
    for row in content["rows"]:
        directory = root / row.get("directory", "")
        path = directory / "report.json"
        lost += not path.is_file()
        report = json.loads(path.read_text()) if path.is_file() else {k: v for k, v in row.items() if k != "net"}
        groups.setdefault((row["net"], row["stream"]), []).append(
            Run(row["method"], str(row["seed"]), report, directory)
        )
    if lost:
        material.warnings.append(
            f"{root.name}: {lost} of {len(content['rows'])} cells have no report.json beside benchmark.json any more. "
            "Their accuracies are those of benchmark.json; curves, calibration and protocol are missing."
        )
    reasons = {entry["cell"]: entry["reason"] for entry in content.get("skipped", [])}
    for (net, stream), runs in groups.items():
        group = Group(f"{net}, {stream}", runs)
        found = {(run.method, run.seed) for run in runs}
        for method in group.methods:
            for seed in group.seeds:
                cell = f"{net}/{stream}/{method}/seed{seed}"
                if (method, seed) not in found:
                    reasons.setdefault(cell, "not in benchmark.json, and no reason given")
        material.groups.append(group)
    material.missing += list(reasons.items())
    if not content["rows"]:
        material.warnings.append(f"{root.name}: the benchmark has no finished cell.")


def _read_singles(singles: Sequence[tuple[Path, dict[str, Any]]], material: Material) -> None:
    groups: dict[str, Group] = {}
    parts: dict[str, dict[str, Any]] = {}
    names = [(content.get("method"), (content.get("protocol") or {}).get("hash")) for _, content in singles]
    for (directory, content), name in zip(singles, names, strict=True):
        protocol = content.get("protocol") or {}
        net = (content.get("net") or {}).get("name", "net")
        part = {"net": net, **{k: v for k, v in protocol.items() if k not in SEED_FIELDS}}
        key = json.dumps(part, sort_keys=True)
        label = str(content.get("method", directory.name))
        if names.count(name) > 1:
            label = f"{label} ({directory.name})"
        title = f"{net}, {protocol.get('data', 'data')}, {protocol.get('stream', 'stream')}"
        seed = f"{protocol.get('order_seed', 0)} ({str(protocol.get('weights_digest'))[:6]})"
        if key not in groups:
            parts[key] = part
            groups[key] = Group(title, [])
        groups[key].runs.append(Run(label, seed, content, directory))
    if len(groups) > 1:
        first, *others = parts.values()
        for number, other in enumerate(others, 2):
            lines = _unlike(first, other)
            material.warnings.append(
                f"The runs of parts 1 and {number} have different protocols and are not comparable: {'; '.join(lines)}."
            )
        for number, group in enumerate(groups.values(), 1):
            group.title = f"Part {number}: {group.title}"
    material.groups += groups.values()


def _unlike(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """One line ``field: a != b`` for each field of two protocols that differs; the hash says no more than these."""
    names = [name for name in dict.fromkeys([*first, *other]) if name != "hash"]
    return [f"{n}: {_short(first.get(n))} != {_short(other.get(n))}" for n in names if first.get(n) != other.get(n)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(group: Group) -> None:
    """Find what makes a group's numbers less than they seem."""
    by_seed: dict[str, dict[str, Run]] = {}
    for run in group.runs:
        by_seed.setdefault(run.seed, {})[run.hash] = run
    for seed, found in by_seed.items():
        if len(found) > 1:
            first, *others = [run.protocol for run in found.values()]
            lines = sorted({line for other in others for line in _unlike(first, other)})
            group.warnings.append(
                f"Seed {seed}: the rows have different protocols and are not comparable ({', '.join(found)})"
                + (f": {'; '.join(lines)}." if lines else ".")
            )
    problems: dict[str, list[str]] = {}
    for run in group.runs:
        if not run.protocol:
            problems.setdefault("no protocol in the report", []).append(run.method)
            continue
        try:
            Protocol.from_dict(run.protocol)
        except (DataError, ConfigError) as error:
            problems.setdefault(str(error), []).append(run.method)
    group.warnings += [f"{', '.join(dict.fromkeys(who))}: {what}" for what, who in problems.items()]
    if any(str(run.protocol.get("weights", "")).endswith("random") for run in group.runs):
        group.warnings.append("The net is randomly initialised: these numbers say nothing of a trained one.")
    if len(group.seeds) == 1:
        group.warnings.append(
            "One seed: there is no spread over seeds, so accuracies have no interval. Differences to the source are "
            "tested over the images of this one run."
        )
    if len(group.seeds) == 2:
        group.warnings.append(
            "Two seeds: with one degree of freedom an interval is 12.7 standard errors to each side, and says little."
        )
    if "source" not in group.methods:
        group.warnings.append("No run of source under this protocol: no differences to it, and no forgetting.")
