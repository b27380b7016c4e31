"""Finished runs as the report sees them: read with tolerance, for files are old, missing or unlike."""

from __future__ import annotations

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from lightning_tta.errors import ConfigError, DataError
from lightning_tta.files import json_digest
from lightning_tta.report.statistics import MIN_SEEDS

SEED_FIELDS = ("order_seed", "weights", "weights_digest", "hash")
"""Fields of a protocol in which the seeds of one experiment differ."""
Report = Mapping[str, Any]


@dataclass(eq=False)
class Run:
    """One run: its label, what tells it from the method's other runs, and its files."""

    method: str
    seed: str
    report: Report  # content of report.json; the benchmark's row where that is gone
    directory: Path

    @property
    def protocol(self) -> Report:
        """The protocol, empty where the report has none."""
        return self.report.get("protocol") or {}

    @property
    def net(self) -> str:
        """Name of the net."""
        return str((self.report.get("net") or {}).get("name", "net"))

    @property
    def hash(self) -> str:
        """Hash of the protocol."""
        return str(self.protocol.get("hash") or self.report.get("protocol_hash") or "unknown")

    @property
    def domains(self) -> dict[str, Report]:
        """The numbers by domain."""
        return self.report.get("domains") or {}

    @property
    def window(self) -> int:
        """Batches over which the recent class share was taken; reports of earlier versions do not say, and took 8."""
        return int(self.report.get("window", 8))

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """The lines of ``batches.jsonl``; none where it is missing. A last line cut off is left out."""
        path = self.directory / "batches.jsonl"
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in path.read_text().splitlines():
                lines.append(json.loads(line))
        return lines

    @cached_property
    def hits(self) -> list[tuple[str, int, bool]]:
        """Domain, index and whether it was right, of each labelled image, sorted; none without predictions."""
        path = self.directory / "predictions.csv"
        rows = csv.DictReader(path.read_text().splitlines()) if path.is_file() else ()
        return sorted(
            (r["domain"], int(r["index"]), r["label"] == r["prediction"]) for r in rows if int(r["label"]) >= 0
        )

    def hits_in(self, domain: str | None) -> list[tuple[str, int, bool]]:
        """The hits of a domain, or of all domains that make up the accuracy."""
        # reports of earlier versions do not say which domains count
        counted = {n for n, row in self.domains.items() if row.get("counted", not n.endswith(":blind_spots"))}
        return [hit for hit in self.hits if (hit[0] == domain if domain else hit[0] in counted)]

    def accuracy(self, domain: str | None = None) -> float | None:
        """Accuracy in [0, 1], of a domain or of all."""
        value: float | None = (self.report if domain is None else self.domains.get(domain, {})).get("accuracy")
        return value


@dataclass
class Group:
    """Runs that one table compares: a net on a stream."""

    title: str
    runs: list[Run]
    warnings: list[str] = field(default_factory=list)  # what to know before believing the numbers

    @cached_property
    def methods(self) -> dict[str, list[Run]]:
        """Runs by method, the source first."""
        methods = sorted(dict.fromkeys(run.method for run in self.runs), key=lambda method: method != "source")
        return {method: [run for run in self.runs if run.method == method] for method in methods}

    @property
    def domains(self) -> list[str]:
        """All domains, in order."""
        return list(dict.fromkeys(name for run in self.runs for name in run.domains))

    @property
    def seeds(self) -> list[str]:
        """All seeds, in order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def pairs(self, method: str) -> list[tuple[Run, Run]]:
        """Runs of a method, each with the source's run under the same protocol; none for the source itself."""
        source = {run.hash: run for run in self.methods.get("source", []) if run.hash != "unknown"}
        runs = self.methods[method] if method != "source" else []
        return [(run, source[run.hash]) for run in runs if run.hash in source]


@dataclass
class Results:
    """All that a report shows."""

    groups: list[Group] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # a benchmark's cells, and why
    warnings: list[str] = field(default_factory=list)  # what concerns several groups
    singles: list[Run] = field(default_factory=list)  # named one by one, not by a benchmark

    @property
    def methods(self) -> list[str]:
        """The labels of all methods."""
        return list(dict.fromkeys(method for group in self.groups for method in group.methods))


def result_files(path: Path) -> dict[Path, dict[str, Any]]:
    """The files with the results of a run, of a benchmark, or of all runs below a directory, with their content.

    Raises:
        DataError: If there is none, or a file holds something else.
    """
    files = [path] if path.is_file() else _files_below(path)
    if not files:
        raise DataError(
            f"{path} has no report.json or benchmark.json, nor has a directory in it. Give a finished run's directory; "
            "a run that was cut off has its predictions.csv, but no report."
        )
    contents = {}
    for file in files:
        try:
            contents[file] = content = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"{file} cannot be read as JSON ({error}). Run once more, or leave it out.") from error
        if not isinstance(content, dict) or not {"rows", "protocol"} & set(content):
            raise DataError(f"{file} is no report of a run or benchmark. Give a finished run's directory.")
    return contents


def _files_below(directory: Path) -> list[Path]:
    """The result in a directory, else those in the directories below."""
    for name in ("report.json", "benchmark.json"):
        if (directory / name).is_file():
            return [directory / name]
    below = sorted(child for child in directory.glob("*") if child.is_dir())
    return [file for child in below for file in _files_below(child)]


def read(paths: Sequence[Path], *, allow_different: bool = True) -> Results:
    """Read benchmarks and single runs.

    Raises:
        DataError: If a path has no result, or the protocol of runs to compare was changed after it was written.
        ConfigError: If single runs have different protocols and ``allow_different`` is false.
    """
    results = Results()
    contents = {file.resolve(): content for path in paths for file, content in result_files(path).items()}
    for file, content in contents.items():
        if "rows" in content:
            _read_benchmark(file.parent, content, results)
        else:
            results.singles.append(Run(str(content.get("method", file.parent.name)), "", content, file.parent))
    if not allow_different:
        _refuse_different(results.singles)
    _group_singles(results)
    for group in results.groups:
        group.warnings += _warnings(group)
    return results


def _refuse_different(runs: Sequence[Run]) -> None:
    for run in runs if len(runs) > 1 else ():
        if problem := protocol_problem(run):
            raise DataError(f"{run.directory}: {problem}")
        if lines := differing(runs[0].protocol, run.protocol):
            seeds = all(line.split(":")[0] in SEED_FIELDS for line in lines)
            what = "\n  ".join(lines)
            raise ConfigError(
                f"{runs[0].directory} and {run.directory} were measured under different protocols and are not "
                f"comparable:\n  {what}\nRun them under one protocol, or pass --allow_different true to see "
                f"{'means over the seeds' if seeds else 'them side by side'}."
            )


def _read_benchmark(root: Path, content: Report, results: Results) -> None:
    groups: dict[tuple[str, str], list[Run]] = {}
    lost = 0
    for row in content["rows"]:
        directory = root / row.get("directory", "")
        path = directory / "report.json"
        lost += not path.is_file()
        report = json.loads(path.read_text()) if path.is_file() else {k: v for k, v in row.items() if k != "net"}
        runs = groups.setdefault((row["net"], row["stream"]), [])
        runs.append(Run(row["method"], str(row["seed"]), report, directory))
    if not content["rows"]:
        results.warnings.append(f"{root.name}: the benchmark has no finished cell.")
    if lost:
        results.warnings.append(
            f"{root.name}: {lost} of {len(content['rows'])} cells have no report.json beside benchmark.json any more. "
            "Their accuracies are those of benchmark.json; curves, calibration and protocol are missing."
        )
    reasons = {entry["cell"]: entry["reason"] for entry in content.get("skipped", [])}
    for (net, stream), runs in groups.items():
        group = Group(f"{net}, {stream}", runs)
        finished = {(run.method, run.seed) for run in runs}
        for method, seed in product(group.methods, group.seeds):
            if (method, seed) not in finished:
                reasons.setdefault(f"{net}/{stream}/{method}/seed{seed}", "not in benchmark.json, and no reason given")
        results.groups.append(group)
    results.missing += reasons.items()


def _group_singles(results: Results) -> None:
    """Group single runs by what must be equal; a seed stands for an order and the weights that were trained with it."""
    _label(results.singles)
    experiments: dict[str, list[Run]] = {}
    for run in results.singles:
        key = {"net": run.net, **{k: v for k, v in run.protocol.items() if k not in SEED_FIELDS}}
        experiments.setdefault(json.dumps(key, sort_keys=True), []).append(run)
        run.seed = f"{run.protocol.get('order_seed', 0)} ({str(run.protocol.get('weights_digest'))[:6]})"
    groups: list[Group] = []
    for runs in experiments.values():
        title = f"{runs[0].net}, {runs[0].protocol.get('data', 'data')}, {runs[0].protocol.get('stream', 'stream')}"
        by_weights: dict[str, list[Run]] = {}
        for run in runs:
            by_weights.setdefault(f"{run.protocol.get('weights')} {run.protocol.get('weights_digest')}", []).append(run)
        orders = [{run.protocol.get("order_seed") for run in same} for same in by_weights.values()]
        if sum(map(len, orders)) > len(set().union(*orders)):  # one order with several weights: these are not its seeds
            groups += [Group(f"{title}, {name}", same) for name, same in by_weights.items()]
        else:
            groups.append(Group(title, runs))
    for number, group in enumerate(groups, 1):
        group.title = f"Part {number}: {group.title}" if len(groups) > 1 else group.title
        lines = differing(*({"net": each.runs[0].net, **each.runs[0].protocol} for each in (groups[0], group)))
        if number > 1:
            results.warnings.append(
                f"The runs of parts 1 and {number} have different protocols and are not comparable: {'; '.join(lines)}."
            )
    results.groups += groups


def _label(runs: Sequence[Run]) -> None:
    """Tell runs of one method apart by the options in which they differ, and equal ones by their directories."""
    for method in {run.method for run in runs}:
        same = [run for run in runs if run.method == method]
        options = [run.report.get("options") or {} for run in same]
        names = [n for n in dict.fromkeys(n for o in options for n in o) if len({short(o.get(n)) for o in options}) > 1]
        for run, values in zip(same, options, strict=True):
            if names and values:
                run.method += f" ({', '.join(f'{name} {short(values.get(name))}' for name in names)})"
    counts = Counter((run.method, run.hash) for run in runs)
    for run in [run for run in runs if counts[run.method, run.hash] > 1]:
        run.method += f" ({run.directory.name})"


def protocol_problem(run: Run) -> str:
    """Why a run's protocol cannot be relied on; empty where it can."""
    if not run.protocol:
        return "no protocol in the report"
    digest = json_digest({name: value for name, value in run.protocol.items() if name != "hash"})
    if digest == run.hash:
        return ""
    return (
        f"the protocol was changed after it was written (hash {run.hash!r}, its fields give {digest!r}). Run the "
        "experiment again, or restore the file"
    )


def differing(first: Report, other: Report) -> list[str]:
    """One line ``field: a != b`` for each field of two protocols that differs; the hash says no more than these."""
    names = [name for name in dict.fromkeys([*first, *other]) if name != "hash"]
    return [f"{n}: {short(first.get(n))} != {short(other.get(n))}" for n in names if first.get(n) != other.get(n)]


def short(value: Any) -> str:
    """A value of a protocol or an option in at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _warnings(group: Group) -> list[str]:
    """What makes a group's numbers less than they seem."""
    warnings = []
    for seed in group.seeds:
        protocols = {run.hash: run.protocol for run in group.runs if run.seed == seed}
        if len(protocols) > 1:
            first, *others = protocols.values()
            lines = sorted({line for other in others for line in differing(first, other)})
            warnings.append(
                f"Seed {seed}: the rows have different protocols and are not comparable ({', '.join(protocols)})"
                + (f": {'; '.join(lines)}." if lines else ".")
            )
    problems: dict[str, list[str]] = {}
    for run in group.runs:
        problems.setdefault(protocol_problem(run), []).append(run.method)
    warnings += [f"{', '.join(dict.fromkeys(who))}: {what}." for what, who in problems.items() if what]
    if any(str(run.protocol.get("weights", "")).endswith("random") for run in group.runs):
        warnings.append("The net is randomly initialised: these numbers say nothing of a trained one.")
    if len(group.seeds) == 1:
        warnings.append(
            "One seed: there is no spread over seeds, so accuracies have no interval. Differences to the source are "
            "tested over the images of this one run."
        )
    elif len(group.seeds) < MIN_SEEDS:
        warnings.append(
            "Two seeds are too few for an interval over seeds (it would be 12.7 standard errors to each side): the "
            "tables show mean [lowest, highest], and nothing is tested."
        )
    if "source" not in group.methods:
        warnings.append("No run of source under this protocol: no differences to it, and no forgetting.")
    return warnings
