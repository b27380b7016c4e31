"""Reruns a claim: runs what is there by the benchmark, and writes ours beside theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_tta.benchmark.config import StreamConfig
from lightning_tta.benchmark.runner import Benchmark
from lightning_tta.errors import CellsFailedError, ConfigError, DataError, LightningTTAError, did_you_mean
from lightning_tta.files import environment, read_json, write_json, write_whole
from lightning_tta.reproduce import page
from lightning_tta.reproduce.claims import AT, Claim, Part, matches
from lightning_tta.reproduce.comparing import compare
from lightning_tta.reproduce.needs import SETS
from lightning_tta.reproduce.planning import Settings, fill, plan_part
from lightning_tta.reproduce.verdict import NOT_RUN

JSON, MARKDOWN = "reproduce.json", "reproduce.md"


class Reproduction:
    """A claim, and what is there to rerun it.

    Args:
        claim: The claim.
        settings: How.

    Raises:
        ConfigError: If an option names what the claim, or what of it was asked for, does not have.
    """

    def __init__(self, claim: Claim, settings: Settings) -> None:
        self.claim, self.settings = claim, settings
        for label in settings.only or []:
            if label not in claim.parts:
                hint = did_you_mean(label, claim.parts)
                raise ConfigError(f"{claim.name} has no part {label!r}.{hint} Parts: {', '.join(claim.parts)}.")
        parts = {label: part for label, part in claim.parts.items() if not settings.only or label in settings.only}
        rows = [(label, net, method) for label, part in parts.items() for net, method in part.rows()]
        for pattern in settings.rows or []:
            if not any(matches([pattern], *row) for row in rows):
                hint = did_you_mean(pattern, {method for _, _, method in rows})
                raise ConfigError(
                    f"No row of {', '.join([claim.name, *(settings.only or [])])} is like {pattern!r}.{hint} Rows: "
                    f"{', '.join(map('/'.join, rows[:6]))}{', ...' * (len(rows) > 6)}."
                )
        rows = [row for row in rows if matches(settings.rows, *row)]
        _check_use(claim, {label: parts[label] for label, _, _ in rows}, {net for _, net, _ in rows}, settings)
        self.plans = {
            label: plan_part(label, parts[label], settings) for label in dict.fromkeys(row[0] for row in rows)
        }
        self.output = settings.output / claim.name

    def benchmark(self, label: str) -> Benchmark:
        """The benchmark of what can be run of a part."""
        plan, settings = self.plans[label], self.settings
        part, runnable = plan.part, plan.runnable
        options = fill(part.data.get("init_args") or {}, settings)
        if options.get("domains"):
            options["domains"] = [name for name in options["domains"] if name not in plan.absent]
        options["num_workers"] = settings.workers
        if settings.images is not None:
            options["num_images"] = settings.images
        if settings.download and any(SETS[need].fetched for need in part.needs):
            options["download"] = True
        wanted = {m: [net for net, other in runnable if other == m] for _, m in runnable}
        used = {net for net, _ in runnable}
        streams = {name: fill(stream, settings) for name, stream in part.streams.items()}
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
            ran = sum(len(each["rows"]) for each in results.values())
            raise LightningTTAError(
                f"{len(failed)} of {len(failed) + ran} cells failed{f'; the others are in {self.output}' * bool(ran)}. "
                f"The first: {failed[0]['cell']}: {failed[0]['reason']}"
            )
        return result

    def _run_part(self, label: str) -> dict[str, Any]:
        benchmark = self.benchmark(label)
        try:
            return benchmark.run()
        except (ConfigError, DataError):  # its folder is in use; data that no cell can have
            raise
        except CellsFailedError:  # which, its file says
            return read_json(benchmark.output / "benchmark.json") or {"rows": [], "skipped": []}
        except LightningTTAError as error:  # a training; the other parts still run
            reason = f"failed: {type(error).__name__}: {error}"
            return {"rows": [], "skipped": [{"cell": str(cell), "reason": reason} for cell in benchmark.cells]}

    def result(self, results: Mapping[str, Mapping[str, Any]], command: str = "") -> dict[str, Any]:
        """The content of ``reproduce.json``, from the benchmarks of some parts."""
        claim, parts = self.claim, {}
        for label, plan in self.plans.items():
            known = label in results
            rows = [
                {**row, "method": row["method"].partition(AT)[0], "folder": self.output / label / row["directory"]}
                for row in results.get(label, {}).get("rows", [])
            ]
            skipped = {entry["cell"]: entry["reason"] for entry in results.get(label, {}).get("skipped", [])}
            comparisons, rankings = compare(label, plan, rows, bool(self.settings.changed), skipped)
            if not known:  # the file is written after each part
                comparisons = [
                    replace(each, verdict=f"{NOT_RUN}: not reached yet") if each.verdict == NOT_RUN else each
                    for each in comparisons
                ]
            parts[label] = {
                "title": plan.part.title,
                "run": known,
                "comparisons": [comparison.to_dict() for comparison in comparisons],
                "rankings": rankings,
                "missing": {**plan.missing, **plan.weights, **plan.absent},
                "ways": plan.ways,
                "incomplete": plan.incomplete,
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


def _check_use(claim: Claim, parts: Mapping[str, Part], used: set[str], settings: Settings) -> None:
    """Refuse what would have no effect on the rows that are asked for: somebody expects one of it."""
    most = max(len(part.seeds) for part in parts.values())
    if settings.seeds is not None and settings.seeds > most:
        raise ConfigError(f"seeds={settings.seeds}: {claim.name} has {most} here. Give fewer, or leave the option out.")
    entries = {label: entry for part in parts.values() for label, entry in part.nets.items() if label in used}
    trained = [label for label, entry in entries.items() if isinstance(entry, Mapping)]
    named = list(dict.fromkeys(entry for label, entry in entries.items() if label not in trained))
    places = list(dict.fromkeys(SETS[need].place for part in parts.values() for need in part.needs))
    for option, given, allowed, what in (
        ("weights", settings.weights, named, "nets with weights"),
        ("paths", settings.paths, places, "data sets"),
    ):
        for label in given:
            if label not in allowed:
                raise ConfigError(
                    f"{option}.{label} is not used by what is to run of {claim.name}. Its {what}: "
                    f"{', '.join(allowed) or 'none'}. Leave the option out, or change --only or --rows."
                )
    if settings.training and not trained:
        raise ConfigError(f"training: no net is trained for what is to run of {claim.name}. Leave the option out.")
    if settings.net is not None and settings.weights:
        raise ConfigError("net and weights exclude each other: the other net has no trained weights. Leave one out.")


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
