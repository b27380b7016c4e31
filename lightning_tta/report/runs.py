"""Finished runs as the report sees them: told apart, and grouped by what may be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_tta.errors import ConfigError, DataError
from lightning_tta.files import json_digest
from lightning_tta.report.files import (
    Predictions,
    Report,
    find_results,
    read_batches,
    read_choice,
    read_predictions,
    read_result,
)
from lightning_tta.report.statistics import MIN_SEEDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED_FIELDS = ("order_seed", "weights", "weights_digest", "hash")
"""Fields of a protocol in which the seeds of one experiment differ."""
POLLUTION, VISIT = ":pollution", ":visit_"
"""Endings of domains' names: images that count in nothing, and of a recurring stream a visit, with its number."""
SHOWN = 6
"""So many differences between two parts of a report are named."""
_DOTTED_CLASS = re.compile(r"(?:[a-z_]\w*\.)+[A-Z]\w*")


@dataclass(frozen=True)
class Measure:
    """By what runs are judged.

    Attributes:
        key: Its name in a report.
        words: Its name in a table's header.
        unit: What differences are in.
        scale: What a value is multiplied by.
        higher: Whether more is better.
    """

    key: str
    words: str
    unit: str
    scale: float = 100.0
    higher: bool = True

    @property
    def in_percent(self) -> bool:
        """Whether values are shares."""
        return self.scale == 100

    @property
    def digits(self) -> int:
        """Behind the point, where it is shown."""
        return 1 if self.in_percent else 2

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.higher else -1

    @property
    def best(self) -> str:
        """What the best value is called."""
        return "highest" if self.higher else "lowest"

    @property
    def title(self) -> str:
        """Its name at the beginning of a sentence."""
        name = self.words.removesuffix(" %")
        return name[:1].upper() + name[1:]


ACCURACY = Measure("accuracy", "accuracy %", "points of accuracy")
MEAN_IOU = Measure("mean_iou", "mean IoU %", "points of mean IoU")
ERROR = Measure("mean_absolute_error", "mean absolute error", "units of the value", 1.0, False)


@dataclass(frozen=True)
class Kind:
    """What runs of a task are about: by what they are judged, and what its things are called.

    Attributes:
        measure: By what they are judged.
        sample: What the stream is made of, one of it.
        voter: What the share of the most predicted class counts, one of it.
        choice: What is predicted of each.
        largest: That which most get.
        share: The share of the most predicted class, as the header of a column.
        truth: What says which predictions are right, several.
        shift: What shifts a domain.
        uncounted: Which passes are in no count, after a comma; empty where all are counted.
    """

    measure: Measure = ACCURACY
    sample: str = "image"
    voter: str = "image"
    choice: str = "class"
    largest: str = "most predicted class"
    share: str = "largest class %"
    truth: str = "labels"
    shift: str = "corruption"
    uncounted: str = ""

    @property
    def samples(self) -> str:
        """What the stream is made of."""
        return f"{self.sample}s"

    @property
    def paired(self) -> bool:
        """Whether a sample is right or wrong, so that two runs can be compared sample by sample."""
        return self.measure is ACCURACY

    def entry(self, name: str) -> str:
        """What an entry of a protocol is called; reports of all kinds have the names of images."""
        return name.replace("_", " ").replace("image", self.sample).replace("corruption", self.shift)


IMAGES = Kind()
PROMPTS = Kind(
    sample="prompt",
    voter="prompt",
    choice="answer",
    largest="most frequent answer",
    share="most frequent answer %",
    truth="right answers",
    shift="dialect",
    uncounted=", without generation",
)
PIXELS = Kind(MEAN_IOU, voter="pixel", truth="masks")
VALUES = Kind(ERROR, choice="value", truth="targets")


@dataclass(eq=False)
class Run:
    """One run: its label, what tells it from the method's other runs, and its files."""

    method: str  # the label: the method's name, with what tells the run from others of the same method
    seed: str
    report: Report  # content of report.json; the benchmark's row where that is gone
    directory: Path
    as_one: bool = False  # whether it counts as a run of one process, see :func:`_count_as_one_process`

    def __post_init__(self) -> None:
        self.base = str(self.report.get("method", self.method))  # the method's own name

    @property
    def protocol(self) -> Report:
        """The protocol, empty where the report has none."""
        return self.report.get("protocol") or {}

    @property
    def compared(self) -> Report:
        """The protocol that must equal another's; that of one process where the run counts as such."""
        return {**self.protocol, **({"world_size": 1, "mode": "single"} if self.as_one else {})}

    @property
    def net(self) -> str:
        """Name of the net."""
        return str((self.report.get("net") or {}).get("name", "net"))

    @property
    def short_net(self) -> str:
        """The name for headings: of a class with the modules it is in, ``a.b.Net``, the class alone."""
        return self.net.rpartition(".")[2] if _DOTTED_CLASS.fullmatch(self.net) else self.net

    @property
    def hash(self) -> str:
        """Hash of the protocol."""
        return str(self.protocol.get("hash") or self.report.get("protocol_hash") or "unknown")

    @cached_property
    def key(self) -> str:
        """Equal for runs that may be compared: the hash, of one process where the run counts as such."""
        return _digest(self.compared) if self.as_one else self.hash

    @property
    def kind(self) -> Kind:
        """What it is about: prompts, pixels and values by what the report has of them, else images."""
        if "prompts" in self.report:
            return PROMPTS
        return next((each for each in (PIXELS, VALUES) if each.measure.key in self.report), IMAGES)

    @property
    def measure(self) -> Measure:
        """By what it is judged: of pixels mean IoU, of values the mean absolute error, else accuracy."""
        return self.kind.measure

    @property
    def is_source(self) -> bool:
        """Whether the run adapted nothing."""
        return "source" in (self.method, self.base)

    @property
    def domains(self) -> dict[str, Report]:
        """The numbers by domain, but of polluting images."""
        domains = self.report.get("domains") or {}
        return {name: row for name, row in domains.items() if not name.endswith(POLLUTION)}

    @cached_property
    def parts(self) -> dict[str, Report]:
        """The numbers by what a table has a row for: a domain; of a recurring stream a visit, or a domain's visits."""
        visits: dict[str, Report] = self.report.get("visits") or {}
        if not visits:
            return self.domains
        parts, by_domain = dict(visits), dict[str, list[Report]]()
        for name, row in self.domains.items():
            by_domain.setdefault(name.partition(VISIT)[0], []).append(row)
        for name, rows in by_domain.items():
            images = sum(row.get("images") or 0 for row in rows)
            means = {
                key: sum(row[key] * row["images"] for row in rows) / images
                for key in ("accuracy", "entropy", "mean_iou", "mean_absolute_error")
                if images and all(row.get(key) is not None for row in rows)
            }
            share = max((row.get("largest_class_share") or 0 for row in rows), default=0)
            parts[name] = {"accuracy": None, **means, "images": images, "largest_class_share": share}
        return parts

    @property
    def window(self) -> int:
        """Batches over which the recent class share was taken; reports of earlier versions do not say, and took 8."""
        return int(self.report.get("window", 8))

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """The lines of ``batches.jsonl``."""
        return read_batches(self.directory)

    @cached_property
    def choice(self) -> dict[str, Any]:
        """What the chooser has written beside the run; empty where it has not."""
        return read_choice(self.directory)

    @property
    def guard(self) -> Report:
        """The account of the guard; empty where there was none."""
        return self.report.get("guard") or {}

    @property
    def alarms(self) -> list[Report]:
        """The alarms of the guard's monitors; reports of earlier versions do not name the one that they had."""
        events = self.guard.get("events") or []
        return [{"monitor": "collapse", **event} for event in events if isinstance(event, dict)]

    @property
    def estimates(self) -> dict[str, Report]:
        """Estimates of accuracy, by monitor."""
        estimates = self.guard.get("estimates") or {}
        return {name: each for name, each in estimates.items() if isinstance(each, dict)}

    @property
    def unestimated(self) -> list[str]:
        """Sentences: of monitors that estimate accuracy, which have no estimate here, and why."""
        monitors = {name: each for name, each in (self.guard.get("monitors") or {}).items() if each.get("estimates")}
        batches = self.report.get("batches", 0)
        on_probation = self.guard.get("on_probation") or 0
        sentences = []
        for name in monitors.keys() - self.estimates.keys():
            if on_probation and on_probation >= batches:
                why = (
                    f"the source predicted all {batches} batches, on probation, and estimates are of the method's "
                    "answers; a longer stream has some, or a shorter probation"
                )
            elif monitors[name].get("values", {}).get("labels_told") == 0:
                why = "no label became known"
            else:
                why = f"since the method began to answer, or the last reset, it has seen too few {self.kind.samples}"
            sentences.append(f"No estimate of '{name}': {why}.")
        return sorted(sentences)

    @cached_property
    def _predictions(self) -> tuple[Predictions, str]:
        if not self.kind.paired:
            return {}, ""
        return read_predictions(self.directory, self.report)

    @property
    def predictions(self) -> Predictions:
        """The images of ``predictions.csv``; none where they are not those of the report."""
        return self._predictions[0]

    @property
    def predictions_problem(self) -> str:
        """Why the predictions are not used; empty where they are, or where there is no file."""
        return self._predictions[1]

    def hits_in(self, domain: str | None) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Index and whether it was right, 0 or 1, of each image with a label.

        By domain: one, those of a part, or all that make up the accuracy. An image without a prediction is wrong where
        the report counts it among the images (its pixels were not finite), and left out where it does not (its batch
        was refused).
        """
        # reports of earlier versions do not say which domains count
        counted = {n for n, row in self.domains.items() if row.get("counted", not n.endswith(":blind_spots"))}
        hits = {}
        for name, images in self.predictions.items():
            base, mark, visit = name.partition(VISIT)
            wanted = counted if domain is None else {domain}
            if wanted & ({name, base, f"visit_{visit}"} if mark else {name}):
                all_count = self.domains.get(name, {}).get("images") == len(images)
                index, label, guess = images[(images[:, 1] >= 0) & (all_count | (images[:, 2] >= 0))].T
                hits[name] = index, (label == guess).astype(np.int64)
        return hits

    def accuracy(self, domain: str | None = None) -> float | None:
        """Accuracy in [0, 1], of a domain or another part, or of all."""
        value: float | None = (self.report if domain is None else self.parts.get(domain, {})).get("accuracy")
        return value

    def score(self, domain: str | None = None) -> float | None:
        """The value of :attr:`measure`, of a domain or another part, or of all."""
        value: float | None = (self.report if domain is None else self.parts.get(domain, {})).get(self.measure.key)
        return value


@dataclass
class Group:
    """Runs that one table compares: a net on a stream."""

    title: str
    runs: list[Run]
    warnings: list[str] = field(default_factory=list)  # what to know before believing the numbers
    net: str = ""  # as the reader knows them; by default as the first run says
    stream: str = ""

    @cached_property
    def methods(self) -> dict[str, list[Run]]:
        """Runs by label, those of the source first."""
        ordered = sorted(self.runs, key=lambda run: (not run.is_source, run.method != "source"))
        return {label: [run for run in ordered if run.method == label] for label in {r.method: 0 for r in ordered}}

    @property
    def source(self) -> str | None:
        """The label of the source's runs, the first of several."""
        return next((label for label, runs in self.methods.items() if runs[0].is_source), None)

    @property
    def labelled(self) -> bool:
        """Whether any accuracy, or what else runs are judged by, is known."""
        return any(run.score() is not None for run in self.runs)

    @property
    def kind(self) -> Kind:
        """What these runs are about."""
        return self.runs[0].kind

    @property
    def measure(self) -> Measure:
        """By what these runs are judged."""
        return self.kind.measure

    @property
    def domains(self) -> list[str]:
        """All domains, in order."""
        return list(dict.fromkeys(name for run in self.runs for name in run.domains))

    @property
    def parts(self) -> list[str]:
        """What a table by domain has a row for, in order: see :attr:`Run.parts`."""
        return list(dict.fromkeys(name for run in self.runs for name in run.parts))

    @property
    def recurs(self) -> bool:
        """Whether the domains come several times."""
        return any(run.report.get("visits") for run in self.runs)

    @property
    def seeds(self) -> list[str]:
        """All seeds, in order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def pairs(self, method: str, base: str | None = None) -> list[tuple[Run, Run]]:
        """Runs of a method, each with that of ``base`` (by default the source) under the same protocol."""
        base = self.source if base is None else base
        others = {run.key: run for run in self.methods.get(base or "", []) if run.key != "unknown"}
        return [(run, others[run.key]) for run in self.methods[method] if run.key in others and method != base]


@dataclass
class Results:
    """All that a report shows."""

    groups: list[Group] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # a benchmark's cells, and why
    warnings: list[str] = field(default_factory=list)  # what concerns several groups
    singles: list[Run] = field(default_factory=list)  # named one by one, not by a benchmark
    directories: list[Path] = field(default_factory=list)  # of all results
    found: str = ""  # how many runs and benchmarks there are below the folders that were given

    @property
    def methods(self) -> list[str]:
        """The labels of all methods."""
        return list(dict.fromkeys(method for group in self.groups for method in group.methods))


def read(paths: Sequence[Path], *, allow_different: bool = True) -> Results:
    """Read benchmarks and single runs.

    Several paths are there to be compared: different protocols among their runs are refused unless
    ``allow_different``. One folder may hold anything: its runs are shown in parts, a part for each protocol.

    Raises:
        DataError: If a path has no result, or the protocol of runs to compare was changed after it was written.
        ConfigError: If runs that were named side by side have different protocols and ``allow_different`` is false.
    """
    results = Results()
    contents: dict[Path, dict[str, Any]] = {}
    for path in paths:
        found, left_out = find_results(path)
        contents |= {file.resolve(): content for file, content in found.items()}
        results.warnings += left_out
        if len(found) > 1 or left_out:
            benchmarks = sum("rows" in content for content in found.values())
            counts = ((len(found) - benchmarks, "run"), (benchmarks, "benchmark"), (len(left_out), "unreadable file"))
            words = [f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count]
            results.found += f"Below {path}: {', '.join(words)}. "
    for file, content in contents.items():
        results.directories.append(file.parent)
        if "rows" in content:
            _read_benchmark(file.parent, content, results)
        else:
            results.singles.append(Run(str(content.get("method", file.parent.name)), "", content, file.parent))
    _count_as_one_process([*results.singles, *(run for group in results.groups for run in group.runs)])
    if not allow_different and len(paths) > 1:
        _refuse_different(results.singles)
    _group_singles(results)
    for group in results.groups:
        group.warnings += _warnings(group)
    return results


def _count_as_one_process(runs: Sequence[Run]) -> None:
    """Find out which runs of several processes may be compared with runs of one.

    Replicas may: each domain begins at the source, so they write what one process writes, in the same order.
    Synchronised processes equal one only up to rounding, which may tip an image. They may where a run of one process
    with the same method and options has equal predictions.
    """
    for run in runs:
        run.as_one = run.protocol.get("mode") == "replicas"
    for run in [run for run in runs if run.protocol.get("mode") == "synchronised" and run.predictions]:
        run.as_one = True
        run.as_one = any(
            other.protocol.get("mode") == "single"
            and (other.base, other.hash, other.report.get("options")) == (run.base, run.key, run.report.get("options"))
            and _equal(other.predictions, run.predictions)
            for other in runs
        )
        vars(run).pop("key", None)


def _equal(first: Predictions, other: Predictions) -> bool:
    return first.keys() == other.keys() and all(np.array_equal(first[name], other[name]) for name in first)


def _refuse_different(runs: Sequence[Run]) -> None:
    for run in runs if len(runs) > 1 else ():
        if problem := protocol_problem(run):
            raise DataError(f"{run.directory}: {problem}.")
        if lines := differing({"net": runs[0].net, **runs[0].compared}, {"net": run.net, **run.compared}):
            seeds = all(line.split(":")[0] in SEED_FIELDS for line in lines)
            what = "\n  ".join(lines)
            raise ConfigError(
                f"{runs[0].directory} and {run.directory} were measured under different protocols and are not "
                f"comparable:\n  {what}\nRun them under one protocol, or pass --allow_different true to see "
                f"{'means over the seeds' if seeds else 'them side by side'}."
            )


def _read_benchmark(root: Path, content: Report, results: Results) -> None:
    groups: dict[tuple[str, str], list[Run]] = {}
    gone, damaged = 0, []
    for row in content["rows"]:
        directory = root / str(row.get("directory", ""))
        report: Report = {name: value for name, value in row.items() if name != "net"}
        if not (directory / "report.json").is_file():
            gone += 1
        else:
            try:
                report = read_result(directory / "report.json")
            except DataError as error:
                damaged.append(str(error))
        runs = groups.setdefault((str(row["net"]), str(row["stream"])), [])
        runs.append(Run(row["method"], str(row["seed"]), report, directory))
    if not content["rows"]:
        results.warnings.append(f"{root.name}: the benchmark has no finished cell.")
    if gone or damaged:
        what = [f"{gone} of {len(content['rows'])} cells have no report.json beside benchmark.json any more."] * (
            gone > 0
        )
        results.warnings.append(
            f"{root.name}: {' '.join([*what, *damaged])} Their accuracies are those of benchmark.json; curves, "
            "calibration and protocol are missing."
        )
    reasons = {str(entry["cell"]): str(entry["reason"]) for entry in content.get("skipped", [])}
    for (net, stream), runs in groups.items():
        group = Group(f"{net}, {stream}", runs, net=net, stream=stream)
        finished = {(run.method, run.seed) for run in runs}
        for method, seed in product(group.methods, group.seeds):
            if (method, seed) not in finished:
                reasons.setdefault(f"{net}/{stream}/{method}/seed{seed}", "not in benchmark.json, and no reason given")
        results.groups.append(group)
    results.missing += reasons.items()


def _group_singles(results: Results) -> None:
    """Group single runs by what must be equal; a seed stands for an order and the weights that were trained with it."""
    experiments: dict[str, list[Run]] = {}
    for run in results.singles:
        key = {"net": run.net, **{k: v for k, v in run.compared.items() if k not in SEED_FIELDS}}
        experiments.setdefault(json.dumps(key, sort_keys=True), []).append(run)
        run.seed = f"{run.protocol.get('order_seed', 0)} ({str(run.protocol.get('weights_digest'))[:6]})"
    groups: list[Group] = []
    for runs in experiments.values():
        _label(runs)
        title = (
            f"{runs[0].short_net}, {runs[0].protocol.get('data', 'data')}, {runs[0].protocol.get('stream', 'stream')}"
        )
        by_weights: dict[str, list[Run]] = {}
        for run in runs:
            digest = str(run.protocol.get("weights_digest"))[:6]
            by_weights.setdefault(f"weights {run.protocol.get('weights')} ({digest})", []).append(run)
        orders = [{run.protocol.get("order_seed") for run in same} for same in by_weights.values()]
        if sum(map(len, orders)) > len(set().union(*orders)):  # one order with several weights: these are not its seeds
            groups += [Group(f"{title}, {name}", same) for name, same in by_weights.items()]
        else:
            groups.append(Group(title, runs))
            if len(by_weights) > 1:
                each = "; ".join(by_weights)
                groups[-1].warnings.append(
                    f"A seed here is an order of the stream and source weights of its own: {each}."
                )
    for number, group in enumerate(groups, 1):
        group.title = f"Part {number}: {group.title}" if len(groups) > 1 else group.title
        lines = differing(*({"net": each.runs[0].net, **each.runs[0].compared} for each in (groups[0], group)))
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more; see the protocols"] if len(lines) > SHOWN else lines
        if number > 1:
            results.warnings.append(
                f"The runs of parts 1 and {number} have different protocols and are not comparable: {'; '.join(lines)}."
            )
    results.groups += groups


def _label(runs: Sequence[Run]) -> None:
    """Tell runs of one method apart by the settings in which they differ, and equal ones by their directories."""
    for method in {run.base for run in runs}:
        same = [run for run in runs if run.base == method]
        every = [settings(run) for run in same]
        names = dict.fromkeys(name for each in every for name in each)
        unlike = [name for name in names if len({short(each.get(name)) for each in every}) > 1]
        for run, each in zip(same, every, strict=True):
            words = [f"{name}={short(each[name])}" for name in unlike if each.get(name) is not None]
            run.method = f"{method} ({', '.join(words)})" if words else method
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.method, run.seed, run.key), []).append(run)
    for several in alike.values():
        for run, place in zip(several, _endings([run.directory for run in several]), strict=True):
            run.method += f" ({place})" if len(several) > 1 else ""


def settings(run: Run) -> dict[str, Any]:
    """What changes a method's predictions beside the protocol, by name."""
    guard = run.report.get("guard") or {}
    action = (guard.get("settings") or {}).get("action")
    mode, world = run.protocol.get("mode"), run.protocol.get("world_size")
    more = {name: run.report.get(name) for name in ("reset_every", "precision")}
    more |= {"guard": action, "processes": f"{world} {mode}"}
    return {**(run.report.get("options") or {}), **more, **({"processes": None} if mode in (None, "single") else {})}


def _endings(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        ends = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(ends)) == len(ends):
            break
    return ends


def _digest(protocol: Report) -> str:
    return json_digest({name: value for name, value in protocol.items() if name != "hash"})


def protocol_problem(run: Run) -> str:
    """Why a run's protocol cannot be relied on; empty where it can."""
    if not run.protocol:
        return "no protocol in the report"
    digest = _digest(run.protocol)
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
    """A value of a protocol or an option in at most 60 characters; of a kind with options: ``ema(momentum=0.02)``."""
    if isinstance(value, dict):
        options = ", ".join(f"{name}={short(each)}" for name, each in value.items() if name != "kind")
        text = f"{value.get('kind', '')}({options})" if options else str(value.get("kind", "{}"))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def repeat_problem(report: Report) -> str:
    """A sentence where the same run may give other last digits next time; empty where it is equal bit for bit."""
    if report.get("repeatable", True):  # older reports do not say
        return ""
    device = (report.get("environment") or {}).get("device") or "this device"
    return (
        f"Not repeatable: the same run on {device} may differ in its last digits, and so in a few predictions. "
        "With --trainer.deterministic true runs are equal bit for bit."
    )


def _warnings(group: Group) -> list[str]:
    """What makes a group's numbers less than they seem."""
    warnings = []
    for seed in group.seeds:
        protocols = {run.key: run for run in group.runs if run.seed == seed}
        if len(protocols) > 1:
            first, *others = (run.compared for run in protocols.values())
            lines = sorted({line for other in others for line in differing(first, other)})
            hashes = ", ".join(run.hash for run in protocols.values())
            warnings.append(
                f"Seed {seed}: the rows have different protocols and are not comparable ({hashes})"
                + (f": {'; '.join(lines)}." if lines else ".")
            )
    problems: dict[str, list[str]] = {}
    for run in group.runs:
        problems.setdefault(protocol_problem(run), []).append(run.method)
        if run.predictions_problem:
            warnings.append(
                f"{run.method}, seed {run.seed}: {run.predictions_problem}. Its {run.kind.samples} are not used; "
                "run it once more."
            )
    warnings += [f"{', '.join(dict.fromkeys(who))}: {what}." for what, who in problems.items() if what]
    warnings += dict.fromkeys(filter(None, (repeat_problem(run.report) for run in group.runs)))
    if any(str(run.protocol.get("weights", "")).endswith("random") for run in group.runs):
        warnings.append("The net is randomly initialised: these numbers say nothing of a trained one.")
    if group.labelled and len(group.seeds) == 1:
        samples = group.kind.samples
        tested = f"are tested over the {samples} of this one run" if group.kind.paired else "are not tested"
        if group.kind.paired and group.recurs:
            tested = (
                f"are tested over the {samples} of one visit, and not over all visits, which show the same {samples}"
            )
        warnings.append(
            "One seed: there is no spread over seeds, so accuracies have no interval. Differences to the source "
            f"{tested}."
        )
    elif group.labelled and len(group.seeds) < MIN_SEEDS:
        warnings.append(
            "Two seeds are too few for an interval over seeds (it would be 12.7 standard errors to each side): the "
            "tables show mean [lowest, highest], and nothing is tested."
        )
    if group.source is None:
        warnings.append("No run of source under this protocol: no differences to it, and no forgetting.")
    elif unpaired := [method for method in group.methods if method != group.source and not group.pairs(method)]:
        warnings.append(f"No run of source under the protocol of {', '.join(unpaired)}: no difference to it.")
    return warnings
