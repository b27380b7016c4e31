"""Reruns a claim: checks what is there, runs it by the benchmark, writes ours beside theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_tta.benchmark.config import NetConfig, StreamConfig
from lightning_tta.benchmark.runner import Benchmark
from lightning_tta.data.domain_names import split_severity
from lightning_tta.data.streams import RESET_BY_DOMAIN
from lightning_tta.errors import ConfigError, LightningTTAError, check_range, did_you_mean
from lightning_tta.files import environment, read_json, write_json, write_whole
from lightning_tta.reproduce import page
from lightning_tta.reproduce.claims import EVERY, Claim, Part, Published, figures_of, matches
from lightning_tta.reproduce.needs import SETS, Net, check_places, nets, place_of
from lightning_tta.reproduce.verdict import Comparison, Row, judge, measure, reversed_pairs
from lightning_tta.shipped import configurations

JSON, MARKDOWN = "reproduce.json", "reproduce.md"
AT = "@"


@dataclass(frozen=True)
class Settings:
    """How a claim is rerun.

    Attributes:
        root: Folder of the data sets, see :data:`~lightning_tta.reproduce.needs.PLACES`, and of ``weights/``.
        output: Folder of the results; a claim writes to one of its name in it.
        paths: Places of data sets that are not below ``root``.
        weights: Weights files by the net's name in ``nets.yaml``.
        only: Labels of parts to run; none: all.
        rows: Patterns of rows ``PART/NET/METHOD``, or of methods; none: all.
        download: Whether to fetch what is missing and can be fetched.
        net: A net without trained weights in place of each net. Then nothing is reproduced.
        images: So many images of each domain. Then nothing is reproduced.
        training: Options of source trainings that differ. Then nothing is reproduced.
        seeds: How many of the claim's seeds; ``None``: all. The figures are compared all the same.
        trainer: Arguments of the Trainer.
        workers: Processes that read images.
        jobs: Cells that run side by side.
    """

    root: Path = Path("data")
    output: Path = Path("runs/reproduce")
    paths: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    only: list[str] | None = None
    rows: list[str] | None = None
    download: bool = False
    net: str | None = None
    images: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    seeds: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    workers: int = 4
    jobs: int = 1

    def __post_init__(self) -> None:
        check_places(self.paths)
        check_range("workers", self.workers, 0, integer=True)
        for name in ("images", "seeds"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, integer=True)
        for label in self.weights:
            if label not in nets():
                raise ConfigError(f"weights.{label}: there is no such net.{did_you_mean(label, nets())}")

    @property
    def changed(self) -> dict[str, Any]:
        """What differs from the claim; empty: nothing."""
        given = {"net": self.net, "images": self.images, "training": self.training or None}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class PartPlan:
    """What of a part can be run, and why the rest cannot.

    Attributes:
        part: The part.
        rows: Net and method of each row that is wanted.
        missing: Data without which nothing runs: title -> how to get it.
        absent: Domains that are not there: name -> what is missing. The others can run without them.
        weights: Nets without weights: label -> how to get them.
        nets: The nets that can run.
    """

    part: Part
    rows: list[tuple[str, str]]
    missing: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    nets: dict[str, NetConfig] = field(default_factory=dict)

    @property
    def runnable(self) -> list[tuple[str, str]]:
        """The rows that can be run."""
        return [] if self.missing else [(net, method) for net, method in self.rows if net in self.nets]

    def why_not(self, net: str, domains: Sequence[str] | None) -> str:
        """Why a figure cannot be compared; empty: it can, or what failed says it."""
        if self.missing:
            return f"{', '.join(self.missing)} missing"
        lacking = [label for label in (self.weights if net == EVERY else [net]) if label in self.weights]
        if lacking:
            return f"weights of {', '.join(lacking)} missing"
        absent = [name for name in self.absent if domains is None or name in domains]
        return f"{', '.join(absent[:3])}{' and others' * (len(absent) > 3)} missing" if absent else ""


class Reproduction:
    """A claim, and what is there to rerun it.

    Args:
        claim: The claim.
        settings: How.

    Raises:
        ConfigError: If ``only`` or ``rows`` name what the claim does not have.
    """

    def __init__(self, claim: Claim, settings: Settings) -> None:
        self.claim, self.settings = claim, settings
        for label in settings.only or []:
            if label not in claim.parts:
                hint = did_you_mean(label, claim.parts)
                raise ConfigError(f"{claim.name} has no part {label!r}.{hint} Parts: {', '.join(claim.parts)}.")
        self.plans = {
            label: plan
            for label, part in claim.parts.items()
            if not settings.only or label in settings.only
            if (plan := self._plan(label, part)).rows
        }
        if not self.plans:
            shown = [f"{label}/{net}/{m}" for label, part in claim.parts.items() for net, m in part.rows()]
            raise ConfigError(
                f"No row of {claim.name} is like {settings.rows}. Rows: {', '.join(shown[:6])}"
                f"{', ...' * (len(shown) > 6)}."
            )
        self.output = settings.output / claim.name

    def _plan(self, label: str, part: Part) -> PartPlan:
        rows = [(net, m) for net, m in part.rows() if matches(self.settings.rows, label, net, m)]
        plan = PartPlan(part, rows)
        self._look_for_data(plan)
        for name in dict.fromkeys(net for net, _ in rows):
            self._look_for_net(plan, name)
        return plan

    def _look_for_data(self, plan: PartPlan) -> None:
        options = plan.part.data.get("init_args") or {}
        listed = options.get("domains") or []
        bare = [split_severity(name)[0] for name in listed]
        severity = int(options.get("severity", 5))
        one_by_one = all(
            (stream.get("reset") or "auto") == "domain"
            or (stream.get("reset", "auto") == "auto" and stream.get("kind", "iid") in RESET_BY_DOMAIN)
            for stream in plan.part.streams.values()
        )
        for need in plan.part.needs:
            data = SETS[need]
            if self.settings.download and data.fetched:
                continue
            place = place_of(data.place, self.settings.root, self.settings.paths)
            if missing := data.missing(place, [], severity):
                plan.missing[data.title] = f"{', '.join(missing)} {_is_not_there(missing)}. {data.how(bare)}"
                continue
            absent = {}
            for domain in listed:
                name, own = split_severity(domain)
                if missing := data.missing(place, [name], own or severity):
                    absent[domain] = f"{', '.join(missing)} {_is_not_there(missing)}. {data.how([name])}"
            if absent and (not one_by_one or len(absent) == len(listed)):
                plan.missing[f"{data.title} ({', '.join(list(absent)[:3])}{', ...' * (len(absent) > 3)})"] = next(
                    iter(absent.values())
                )
            else:
                plan.absent |= absent

    def _look_for_net(self, plan: PartPlan, label: str) -> None:
        entry, other = plan.part.nets[label], self.settings.net
        if isinstance(entry, Mapping):  # trained here
            starts = [entry["start"]] if entry.get("start") else []
            for name in (*starts, label):
                plan.nets[name] = self._trained(plan.part.nets[name])
            return
        known: Net = nets()[entry]
        if other is not None:
            plan.nets[label] = NetConfig(source_ckpt="none", backbone=other, num_classes=known.num_classes)
            return
        try:
            weights = known.weights(entry, self.settings.root, self.settings.weights, self.settings.download)
        except FileNotFoundError as error:
            plan.weights[label] = f"{known.title}: {error}"
            return
        plan.nets[label] = NetConfig(
            source_ckpt=None if weights == "pretrained" else weights,
            pretrained=weights == "pretrained",
            backbone=known.backbone,
            num_classes=known.num_classes,
            backbone_options=known.options,
        )

    def _trained(self, entry: Mapping[str, Any]) -> NetConfig:
        options = self._filled(entry.get("options") or {})
        if self.settings.net is not None and not entry.get("start"):
            options |= {"model.backbone": self.settings.net, "model.pretrained": False}
        options |= {"data.num_workers": self.settings.workers}
        options |= {f"trainer.{name}": value for name, value in self.settings.trainer.items()}
        return NetConfig(
            fit=str(configurations() / entry["fit"]),
            options={**options, **self.settings.training},
            start=entry.get("start"),
        )

    def _filled(self, value: Any) -> Any:
        """The value with places of data sets in place of ``$PLACE``."""
        if isinstance(value, Mapping):
            return {key: self._filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item) for item in value]
        if isinstance(value, str) and value.startswith("$"):
            return str(place_of(value[1:], self.settings.root, self.settings.paths))
        return value

    def benchmark(self, label: str) -> Benchmark:
        """The benchmark of what can be run of a part."""
        plan, settings = self.plans[label], self.settings
        part, runnable = plan.part, plan.runnable
        options = self._filled(part.data.get("init_args") or {})
        if options.get("domains"):
            options["domains"] = [name for name in options["domains"] if name not in plan.absent]
        options["num_workers"] = settings.workers
        if settings.images is not None:
            options["num_images"] = settings.images
        if settings.download and any(SETS[need].fetched for need in part.needs):
            options["download"] = True
        wanted = {m: [net for net, other in runnable if other == m] for _, m in runnable}
        used = {net for net, _ in runnable}
        streams = {name: self._filled(stream) for name, stream in part.streams.items()}
        if plan.absent:
            for stream in streams.values():
                if domains := (stream.get("data") or {}).get("domains"):
                    stream["data"]["domains"] = [name for name in domains if name not in plan.absent]
        streams = {name: s for name, s in streams.items() if used & set(s.get("nets") or used)}
        for stream in streams.values():
            if stream.get("nets"):
                stream["nets"] = [net for net in stream["nets"] if net in plan.nets]
        return Benchmark(
            output=str(self.output / label),
            data={"class_path": part.data["class_path"], "init_args": options},
            nets=plan.nets,
            streams={name: StreamConfig(**stream) for name, stream in streams.items()},
            methods=_methods(part, wanted),
            seeds=part.seeds[: settings.seeds],
            trainer=settings.trainer,
            jobs=settings.jobs,
            model=part.model,
            run=part.run,
        )

    def run(self, command: str = "") -> dict[str, Any]:
        """Run what is there; ``reproduce.json`` and ``reproduce.md`` are written after each part.

        Returns:
            The content of ``reproduce.json``.

        Raises:
            LightningTTAError: At the end, if a cell failed.
            Interrupted: After Ctrl-C or SIGTERM; the same command goes on.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        results: dict[str, dict[str, Any]] = {}
        for label, plan in self.plans.items():
            results[label] = self._run_part(label) if plan.runnable else {"rows": [], "skipped": []}
            result = self.result(results, command)
            write_json(self.output / JSON, result)
            _write_text(self.output / MARKDOWN, page.to_markdown(result))
        failed = [entry for each in results.values() for entry in each["skipped"] if entry["reason"][:6] == "failed"]
        if failed:
            raise LightningTTAError(
                f"{len(failed)} cells failed; the others are in {self.output}. The first: {failed[0]['cell']}: "
                f"{failed[0]['reason']}"
            )
        return result

    def _run_part(self, label: str) -> dict[str, Any]:
        benchmark = self.benchmark(label)
        try:
            return benchmark.run()
        except ConfigError:  # its folder is in use
            raise
        except LightningTTAError:  # cells failed; which, its file says
            return read_json(benchmark.output / "benchmark.json") or {"rows": [], "skipped": []}

    def result(self, results: Mapping[str, Mapping[str, Any]], command: str = "") -> dict[str, Any]:
        """The content of ``reproduce.json``, from the benchmarks of some parts."""
        claim, parts = self.claim, {}
        for label, plan in self.plans.items():
            known = label in results
            rows = [{**row, "method": row["method"].partition(AT)[0]} for row in results.get(label, {}).get("rows", [])]
            skipped = {entry["cell"]: entry["reason"] for entry in results.get(label, {}).get("skipped", [])}
            comparisons, rankings = compare(label, plan, rows, bool(self.settings.changed), skipped)
            parts[label] = {
                "title": plan.part.title,
                "run": known,
                "comparisons": [comparison.to_dict() for comparison in comparisons],
                "rankings": rankings,
                "missing": {**plan.missing, **plan.weights, **plan.absent},
                "seeds": plan.part.seeds[: self.settings.seeds],
                "unknown": plan.part.unknown,
                "differs": plan.part.differs,
                "stands": [
                    {"stands": p.stands, "kind": p.kind, "tolerance": p.tolerance, "why": p.why}
                    for p in plan.part.published
                ],
                "cells": [
                    {name: row[name] for name in ("net", "method", "stream", "seed", "protocol_hash", "directory")}
                    for row in rows
                ],
                "skipped": [{"cell": cell, "reason": reason} for cell, reason in skipped.items()],
                "seconds": results.get(label, {}).get("seconds"),
                "devices": (results.get(label, {}).get("environment") or {}).get("device"),
            }
        return {
            "name": claim.name,
            "title": claim.title,
            "paper": claim.paper,
            "code": claim.code,
            "notes": claim.notes,
            "reproduction": not self.settings.changed,
            "changed": self.settings.changed,
            "weights": self.settings.weights,
            "parts": parts,
            "command": command,
            "date": datetime.now(UTC).date().isoformat(),
            "environment": environment(),
        }


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def _methods(part: Part, wanted: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Methods of a benchmark; one whose options differ by net has an entry ``METHOD@NET`` for each."""
    entries: dict[str, dict[str, Any]] = {}
    for method, on in wanted.items():
        entry = {**part.methods[method], "default": True}
        by_net = entry.pop("by_net", None)
        if by_net is None:
            entries[method] = {**entry, "nets": on}
        for net in on if by_net is not None else []:
            options = {**entry.get("init_args", {}), **by_net[net]}
            entries[f"{method}{AT}{net}"] = {**entry, "init_args": options, "nets": [net]}
    return entries


def compare(
    label: str, plan: PartPlan, rows: Sequence[Row], changed: bool, skipped: Mapping[str, str]
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Figures of a part beside ours, and the orders of methods that are claimed."""
    part, comparisons, rankings = plan.part, list[Comparison](), list[dict[str, Any]]()
    domains = (part.data.get("init_args") or {}).get("domains")
    for published in part.published:
        entries = [*figures_of(published), *_unknown_figures(published)]
        for net, method, position, theirs, spread in entries:
            wanted = [(n, m) for n, m in plan.rows if m == method and net in (n, EVERY)]
            if not wanted or (net == EVERY and len(wanted) < len([n for n, m in part.rows() if m == method])):
                continue  # rows that were not asked for
            of_domains = [domains[position]] if position is not None and domains else domains
            cells = [
                row
                for row in rows
                if row["method"] == method
                and net in (row["net"], EVERY)
                and row["stream"] in (published.streams or part.streams)
            ]
            why = plan.why_not(net, of_domains)
            named = of_domains or list(dict.fromkeys(name for row in cells for name in row["domains"]))
            ours = None
            if not why and cells:
                ours = (
                    measure(cells, published.measure, named)
                    if of_domains
                    else measure([_one_domain(row) for row in cells], published.measure, ["all"])
                )
            if ours is None and not why:
                reasons = [text for cell, text in skipped.items() if _is_of(cell, net, method)]
                why = reasons[0] if reasons else ""
            tolerance = published.tolerance_of(method)
            value = ours.value if ours else None
            comparisons.append(
                Comparison(
                    part=label,
                    net="mean of the nets" if net == EVERY else net,
                    method=method,
                    domain=None if position is None else named[0],
                    measure=published.measure,
                    theirs=theirs,
                    spread=spread,
                    ours=value,
                    half=ours.half if ours else None,
                    over=ours.over if ours else None,
                    difference=None if value is None or theirs is None else value - theirs,
                    tolerance=tolerance,
                    verdict=judge(theirs, value, tolerance, changed=changed, why=why),
                    reason=why,
                )
            )
        if published.ranking:
            rankings += _rank(label, published, comparisons, changed)
    return comparisons, rankings


def _is_of(cell: str, net: str, method: str) -> bool:
    """Whether a cell ``NET/STREAM/METHOD/seedN`` is of a figure's net and method."""
    of_net, _, of_method, _ = cell.split("/")
    return net in (of_net, EVERY) and of_method.partition(AT)[0] == method


def _one_domain(row: Row) -> dict[str, Any]:
    """A cell whose domains the claim does not name: its images taken together."""
    images = sum(each.get("images") or 0 for each in row["domains"].values())
    return {**row, "domains": {"all": {"accuracy": row["accuracy"], "images": images}}}


def _unknown_figures(published: Published) -> list[tuple[str, str, int | None, Any, float | None]]:
    return [
        (n, m, None, None, None) for n, ms in published.figures.items() for m, figure in ms.items() if figure is None
    ]


def _rank(label: str, published: Published, comparisons: Sequence[Comparison], changed: bool) -> list[dict[str, Any]]:
    """Whether the order of the methods is theirs, on each net."""
    found = []
    for net, methods in published.figures.items():
        of_net = [c for c in comparisons if c.part == label and c.net == net and c.method in methods and not c.domain]
        theirs = {c.method: c.theirs for c in of_net if c.theirs is not None}
        ours = {c.method: c.ours for c in of_net if c.ours is not None}
        tolerance = max(published.tolerance_of(method) for method in methods)
        wrong, pairs = reversed_pairs(theirs, ours, tolerance)
        text = (
            "no reproduction"
            if changed and pairs
            else "not run"
            if not pairs
            else "as theirs"
            if not wrong
            else "other"
        )
        found.append(
            {
                "part": label,
                "net": net,
                "measure": published.measure,
                "theirs": sorted(theirs, key=lambda m: theirs[m]),
                "ours": sorted(ours, key=lambda m: ours[m]),
                "pairs": pairs,
                "reversed": [list(pair) for pair in wrong],
                "verdict": text,
            }
        )
    return found


def _is_not_there(missing: Sequence[str]) -> str:
    return "is not there" if len(missing) == 1 else "are not there"
