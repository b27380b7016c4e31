"""Methods x streams x nets x seeds: train what is missing, run what is not finished, write one table."""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import json
import logging
import multiprocessing
import os
import pydoc
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text
from torch import nn

from lightning_tta.benchmark.config import Cell, MethodConfig, NetConfig, StreamConfig
from lightning_tta.benchmark.study import Study, StudyConfig, section_digests
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.storage.contents import content_hashes
from lightning_tta.errors import (
    CellsFailedError,
    ConfigError,
    Interrupted,
    LightningTTAError,
    UnsupportedModelError,
    WeightsError,
    check_choice,
    check_range,
)
from lightning_tta.files import environment, is_whole_archive, read_json, write_json
from lightning_tta.launch.lightning import check_configurations, run_lightning
from lightning_tta.methods import create_method, find
from lightning_tta.modules.training import find_checkpoint
from lightning_tta.progress import grid
from lightning_tta.report.studies import sentence, write_study
from lightning_tta.report.terminal import write_benchmark
from lightning_tta.run.directory import REPORT
from lightning_tta.run.interrupts import listening
from lightning_tta.run.options import PARTS, where_moved
from lightning_tta.run.outputs import PREDICTIONS
from lightning_tta.shipped import how_to_copy

ALWAYS = ("accuracy", "domains", "visits", "forwards", "backwards", "ece", "seconds_per_batch")
MEASURES = (*ALWAYS, "mean_iou", "class_iou", "mean_absolute_error", "r2")
"""What a row of ``benchmark.json`` has of a cell's report; reports of earlier versions lack the calibration error."""

PER_IMAGE = "milliseconds_per_image"
"""What a row has beside."""
OF_THE_STREAM = set(inspect.signature(ShiftedDataModule).parameters) - set(
    "domains severity function_set corruption_seed num_images cache_dir".split()
)
"""Options of data that say nothing of their test images."""
Source = tuple[str, int]  # a net that is trained: label, seed


class Benchmark:
    """Runs methods x streams x nets x seeds and writes ``benchmark.json``, ``benchmark.md`` and plots.

    A seed stands for everything random: the source training and the order of the stream. Each cell is an ordinary
    predict run in its own directory under ``output``, named by a hash of its configuration: a finished cell is not
    run again, a changed one does not overwrite the old. A method that a net does not support is left out and listed.

    Args:
        output: Directory of the results.
        data: The data module: ``class_path`` and ``init_args``; ``--data.root ROOT`` on the command line adds to the
            ``init_args``.
        nets: Nets by label.
        streams: Streams by label.
        methods: Methods by label: ``class_path``, ``init_args``, ..., see :class:`MethodConfig`.
        seeds: Seeds, each >= 0.
        only: Run only the methods with these labels, ``all`` for every one; by default those not marked ``default:
            false``.
        trainer: Trainer arguments of the predict runs, such as ``{accelerator: cpu}``.
        model: Further arguments of :class:`~lightning_tta.TestTimeAdaptation`, such as ``{reset_every: 1000}``, or of
            :class:`~lightning_tta.LanguageAdaptation` where ``data`` is ``PromptData``; those of a single method, its
            ``model``, take precedence.
        run: Options of the runs' callbacks, such as ``{report: {measure_forgetting: true}, board: {images: 0}}``; those
            of a single method, its ``run``, take precedence.
        jobs: Processes that train and run cells side by side, each with its share of the threads. Small nets gain
            from more processes, not from more threads; timings of cells are comparable within one run only.
        save_every: Each cell saves its state after so many batches; a benchmark that was killed goes on from there.
            ``None``: cells that were not finished start anew.
        images_by_seed: Each seed takes images of its own, where ``data`` has ``num_images``: its ``subset_seed`` is the
            seed. For nets with given weights, which are the same for each seed: else seeds differ by the order alone,
            and an interval over seeds says nothing of other images.
        study: Makes it a study: what varies along an axis, a claim, and questions; also writes ``study.json``,
            ``study.md`` and ``study.png``. See :class:`~lightning_tta.benchmark.study.StudyConfig`.
    """

    def __init__(
        self,
        output: str,
        data: dict[str, Any],
        nets: dict[str, NetConfig],
        streams: dict[str, StreamConfig],
        methods: dict[str, dict[str, Any]],
        seeds: list[int] = [0],  # noqa: B006  # never changed; jsonargparse shows it in --help
        only: list[str] | None = None,
        trainer: dict[str, Any] | None = None,
        jobs: int = 1,
        save_every: int | None = 200,
        model: dict[str, Any] | None = None,
        run: dict[str, dict[str, Any]] | None = None,
        images_by_seed: bool = False,
        study: StudyConfig | None = None,
    ) -> None:
        self.study: Study | None = None
        if study is not None:
            for name in ("measure", "against"):  # a wrong one would show when all cells are finished
                first = getattr(study, name).partition(".")[0]
                check_choice(f"study.{name}", first, (*MEASURES, PER_IMAGE, *([""] if name == "against" else [])))
            self._sections = section_digests(nets, streams, methods, model, run)
            plain = {"nets": _plain(nets), "streams": _plain(streams), "methods": copy.deepcopy(methods)}
            self.study = Study(study, plain)
            nets = {label: NetConfig(**entry) for label, entry in plain["nets"].items()}
            streams = {label: StreamConfig(**entry) for label, entry in plain["streams"].items()}
            methods = plain["methods"]
        self.output = Path(output)
        rest = {name: value for name, value in data.items() if name not in ("class_path", "init_args")}
        self.data, self.data_options = data.get("class_path"), {**data.get("init_args", {}), **rest}  # --data.root ROOT
        prompts = str(self.data).rpartition(".")[2] == "PromptData"
        self.module = "LanguageAdaptation" if prompts else "TestTimeAdaptation"
        self.nets, self.streams, self.seeds = nets, streams, list(seeds)
        self.methods = {label: MethodConfig.from_dict(label, entry) for label, entry in methods.items()}
        self.trainer, self.model, self.run_options = trainer or {}, model or {}, run or {}
        self.jobs, self.save_every, self.images_by_seed = jobs, save_every, images_by_seed
        self._digests: dict[str, str | None] = {}
        self._check(only)
        self.cells = [
            Cell(method, net, stream, seed)
            for net in nets
            for stream in streams
            for method, config in self.methods.items()
            for seed in self.seeds
            if (config.default if only is None else method in only or "all" in only)
            and seed in (streams[stream].seeds or self.seeds)
            and net in (config.nets or nets)
            and net in (streams[stream].nets or nets)
            and stream in (config.streams or streams)
        ]

    def _check(self, only: list[str] | None) -> None:
        """Find what is wrong with the configuration before anything is trained."""
        for name in ("nets", "streams", "methods", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"The benchmark has no {name}; name at least one.")
        if not isinstance(self.data, str):
            raise ConfigError("data must have a class_path, such as DigitsData.")
        check_range("jobs", self.jobs, 1, integer=True)
        check_range("save_every", 1 if self.save_every is None else self.save_every, 1, integer=True)
        for seed in self.seeds:
            check_range("seeds", seed, 0, integer=True)
        if self.images_by_seed and not any(
            "num_images" in options for options in (self.data_options, *(s.data for s in self.streams.values()))
        ):
            raise ConfigError("images_by_seed needs data.init_args.num_images: all images leave no choice.")
        for label, net in self.nets.items():
            self._check_net(label, net)
        _check_labels("only names methods", only, [*self.methods, "all"])
        for label, stream in self.streams.items():
            _check_labels(f"Stream '{label}' names nets", stream.nets, self.nets)
        for label, method in self.methods.items():
            _check_labels(f"Method '{label}' names nets", method.nets, self.nets)
            _check_labels(f"Method '{label}' names streams", method.streams, self.streams)
            _check_options(label, method)
        for label, options in (("", self.run_options), *((f"methods.{k}.", m.run) for k, m in self.methods.items())):
            _check_labels(f"{label}run names parts", options, PARTS)
        for label, options in (("", self.model), *((f"methods.{k}.", m.model) for k, m in self.methods.items())):
            for moved in filter(None, map(where_moved, options)):
                raise ConfigError(f"{label}{moved} Here: under {label}run.")
        usual = Cell(next(iter(self.methods)), next(iter(self.nets)), next(iter(self.streams)), self.seeds[0])
        # not every pair: each parse takes a while
        cells = {f"Method '{label}'": replace(usual, method=label) for label in self.methods}
        cells |= {f"Stream '{label}'": replace(usual, stream=label) for label in self.streams}
        with _quiet():
            checks = check_configurations(self._config(cell, "none") for cell in cells.values())
            for who in cells:
                try:
                    parsed = next(checks)
                except ConfigError as error:
                    raise ConfigError(f"{who}: {error}") from error
        self._data_kind: Any = pydoc.locate(parsed["data"]["class_path"])  # one that a configuration may name

    def _check_net(self, label: str, net: NetConfig) -> None:
        if (net.fit is None) == (net.source_ckpt is None and not net.pretrained and net.net is None):
            raise ConfigError(
                f"Net '{label}' needs either fit=CONFIG, or weights (source_ckpt or pretrained; over prompts also net, "
                "a folder)."
            )
        if net.start is not None and (net.fit is None or net.start not in self.nets or net.start == label):
            raise ConfigError(f"Net '{label}': start={net.start!r} must name another net, for a fit to start from.")
        if net.start is not None and self.nets[net.start].start is not None:
            raise ConfigError(f"Net '{label}' starts from '{net.start}', which must not start from another itself.")
        for path in (net.fit, net.source_ckpt, net.net):
            if path not in (None, "none") and not Path(path or "").exists():
                raise ConfigError(
                    f"Net '{label}': {path} does not exist (seen from {Path.cwd().name}/).{how_to_copy(path or '')}"
                )

    def run(self) -> dict[str, Any]:
        """Train, run, write; returns the content of ``benchmark.json``.

        Raises:
            ConfigError: If another benchmark writes to the same directory.
            CellsFailedError: At the end, if a cell failed.
            LightningTTAError: If a net could not be trained.
            Interrupted: After Ctrl-C or SIGTERM, once the workers have saved what they are at.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.output / "benchmark.lock").acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self.output} is in use by another benchmark. Wait for it, or stop it; to run beside it, choose "
                "another directory (--output)."
            ) from None
        with lock, listening(signal.SIGINT, signal.SIGTERM):
            try:
                return self._run_all()
            except Interrupted as stop:
                done = sum(self._finished(cell) is not None for cell in self.cells)
                kept = f"Stopped. {done} of {len(self.cells)} cells are finished and kept in {self.output}"
                raise Interrupted(stop.number, kept) from None

    def _run_all(self) -> dict[str, Any]:
        if any(self._finished(cell) is None for cell in self.cells):
            self._check_data()
        start = time.perf_counter()
        rows: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        stages = self._training_stages()
        console = Console()
        with grid(console) as progress, self._workers() as run_all:
            task = progress.add_task("source models", total=sum(map(len, stages)))
            for sources in stages:
                for _ in run_all(self._train, sources):
                    progress.advance(task)
            task = progress.add_task("cells", total=len(self.cells))
            outcomes = run_all(self._attempt, self.cells)
            for number, (cell, (row, reason)) in enumerate(zip(self.cells, outcomes, strict=True), 1):
                progress.update(task, advance=1, description=str(cell))
                if not console.is_terminal:
                    print(f"{number}/{len(self.cells)} {cell}: {reason or 'finished'}", file=sys.stderr, flush=True)
                if row is not None:
                    rows.append(row)
                else:
                    skipped.append({"cell": str(cell), "reason": reason})
                    if reason.startswith("failed"):
                        progress.console.print(Text(f"{reason} in {cell}", style="red"))
        result = {
            "rows": rows,
            "methods": {label: asdict(method) for label, method in self.methods.items()},
            "skipped": skipped,
            "environment": environment() | _devices(rows),
            "seconds": time.perf_counter() - start,
        }
        write_benchmark(result, self.output, console)
        if self.study is not None:
            self._write_study(self.study, result, console)
        console.print(f"page: {shlex.join(['lightning-tta', 'report', str(self.output)])}", soft_wrap=True)
        if any(entry["reason"].startswith("failed") for entry in skipped):
            raise CellsFailedError(f"Some cells failed; the others are in {self.output}. Reasons: benchmark.md.")
        return result

    def _check_data(self) -> None:
        """Refuse data that no stream can have, as a folder that does not exist, before nets are trained."""
        problem = None
        for stream in self.streams.values():
            try:
                self._data_kind(**{**self.data_options, "stream": stream.kind, **stream.data})
            except LightningTTAError as error:
                problem = problem or error
            except Exception:
                return  # the cells say it
            else:
                return
        if problem is not None:
            raise problem

    def _write_study(self, study: Study, result: dict[str, Any], console: Console) -> None:
        data = {name: value for name, value in self.data_options.items() if name != "root"}
        found = {
            **study.result(result["rows"], result["skipped"]),
            "sections": self._sections,
            "data": f"{str(self.data).rpartition('.')[2]} {json.dumps(data)}" if data else str(self.data),
            "command": shlex.join(["lightning-tta", *sys.argv[1:]])
            if "benchmark" in sys.argv[1:]
            else "Benchmark.run()",
            "environment": result["environment"],
        }
        write_json(self.output / "study.json", found)
        write_study(found, self.output)
        for answer in found["answers"]:
            console.print(Text(sentence(answer), style="bold"))
        console.print(Text(f"written: {self.output}/study.json, study.md, study.png"), soft_wrap=True)

    @contextmanager
    def _workers(self) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]]:
        """A ``map`` in this process, or over ``jobs`` processes that share its threads."""
        if self.jobs == 1:
            with _quiet():
                try:
                    yield map
                finally:
                    gc.unfreeze()
            return
        threads = max(1, torch.get_num_threads() // self.jobs)
        context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
        with ProcessPoolExecutor(self.jobs, context, _start_worker, (threads,)) as pool:

            def run_all(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
                futures = [pool.submit(_in_worker, work, item) for item in items]
                return (future.result() for future in futures)  # map cancels its own: a broken pool cannot take that

            try:
                yield run_all
            except Interrupted:
                pool.shutdown(wait=False)
                for worker in multiprocessing.active_children():
                    if worker not in others:
                        worker.terminate()  # it saves the state of its cell first
                raise

    def _training_stages(self) -> tuple[list[Source], list[Source]]:
        """What must be trained: first the nets that start from nothing, then those that start from them."""
        wanted = {(cell.net, cell.seed) for cell in self.cells if self.nets[cell.net].fit}
        wanted |= {(start, seed) for net, seed in wanted if (start := self.nets[net].start) and self.nets[start].fit}
        first = {source for source in wanted if self.nets[source[0]].start is None}
        return sorted(first), sorted(wanted - first)

    def _source_directory(self, net: str, seed: int) -> Path:
        """Where a training writes: named by a hash of its configuration, which does not depend on ``output``."""
        config = self.nets[net]
        text = Path(str(config.fit)).read_text()
        if config.options:
            text += json.dumps(config.options, sort_keys=True)
        if config.start is not None:
            start = self._start(config.start, seed)
            text += Path(start).name if self.nets[config.start].fit else start
        return self.output / "sources" / f"{net}-seed{seed}-{digest(text)}"

    def _start(self, net: str, seed: int) -> str:
        return str(self._source_directory(net, seed) if self.nets[net].fit else self.nets[net].source_ckpt)

    def _train(self, source: Source) -> None:
        """Train one net, unless it was."""
        net, seed = source
        config, directory = self.nets[net], self._source_directory(net, seed)
        if self._is_trained(directory):
            return
        shutil.rmtree(directory, ignore_errors=True)  # a training that was cut off
        options = {
            "seed_everything": seed,
            "trainer.logger.init_args.save_dir": str(directory.parent),
            "trainer.logger.init_args.name": directory.name,
            "trainer.logger.init_args.version": "fit",
            "trainer.enable_progress_bar": False,
            **config.options,
        }
        if config.start is not None:
            options["model.source_ckpt"] = self._start(config.start, seed)
        texts = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items()]
        run_lightning(["fit", "--config", str(config.fit), *texts])
        (directory / "done").touch()

    def _is_trained(self, directory: Path) -> bool:
        """Whether a training has ended, and its checkpoint is whole."""
        if not (directory / "done").exists():
            return False
        try:
            return is_whole_archive(find_checkpoint(directory))
        except WeightsError:
            return False

    def _attempt(self, cell: Cell) -> tuple[dict[str, Any] | None, str]:
        """A cell's row, or why there is none; the other cells still run."""
        try:
            return self._run(cell), ""
        except UnsupportedModelError as error:
            return None, f"unsupported: {error}"
        except Exception as error:  # the table says what is missing
            return None, f"failed: {type(error).__name__}: {error}"
        finally:
            gc.collect()  # a run's parts know each other: their tensors, gigabytes of large nets, would stay for long
            gc.freeze()  # what is left is there for good, and need not be looked at after the next cell

    def _config(self, cell: Cell, source_ckpt: str | None) -> dict[str, Any]:
        """What ``lightning-tta predict`` would be given for this cell."""
        net, stream, method = self.nets[cell.net], self.streams[cell.stream], self.methods[cell.method]
        training = ("fit", "options", "start", "source_ckpt", "pretrained")
        model = {
            "method": {"class_path": method.class_path, "init_args": method.init_args},
            "source_ckpt": "pretrained" if net.pretrained else source_ckpt,
            "reset": stream.reset,
            **{k: v for k, v in asdict(net).items() if k not in training and v not in (None, False)},
            **self.model,
            **method.model,
        }
        parts = {name: {**self.run_options.get(name, {}), **method.run.get(name, {})} for name in PARTS}
        data = {**self.data_options, "stream": stream.kind, "order_seed": cell.seed, **stream.data}
        if self.images_by_seed:
            data["subset_seed"] = cell.seed
        return {
            "subcommand": "predict",
            "predict": {
                "seed_everything": cell.seed,
                "trainer": {"devices": 1, "enable_progress_bar": False, **self.trainer},
                "model": {"class_path": f"lightning_tta.{self.module}", "init_args": model},
                "data": {"class_path": self.data, "init_args": data},
                **{name: options for name, options in parts.items() if options},
            },
        }

    def _place(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """The directory of a cell, which a hash of its configuration names, and that configuration."""
        net = self.nets[cell.net]
        trained = find_checkpoint(self._source_directory(cell.net, cell.seed)) if net.fit else None
        config = self._config(cell, str(trained) if trained else net.source_ckpt)
        name = f"{cell.method}-seed{cell.seed}-{digest(json.dumps(config, sort_keys=True))}"
        return self.output / "cells" / cell.net / cell.stream / name, config

    def _finished(self, cell: Cell) -> dict[str, Any] | None:
        """The report of a cell; ``None`` where it is not finished, or its files are damaged: then it is run again."""
        try:
            directory, _ = self._place(cell)
        except WeightsError:  # not trained
            return None
        report = read_json(directory / REPORT)
        return report if report is not None and _is_whole(report, directory) else None

    def _inputs(self, config: dict[str, Any]) -> dict[str, str | None]:
        """Hashes of the weights file and of the test images: files may change while the configuration does not.

        ``None`` where there is none: nets without a file, data that are not there any more.
        """
        weights = Path(str(config["predict"]["model"]["init_args"]["source_ckpt"]))
        given = config["predict"]["data"]["init_args"]
        options = {name: value for name, value in given.items() if name not in OF_THE_STREAM}
        images = json.dumps(options, sort_keys=True)
        if images not in self._digests:
            self._digests[images] = self._data_digest(options)
        file = f"{weights} {weights.stat().st_mtime_ns}" if weights.is_file() else ""
        if file and file not in self._digests:
            self._digests[file] = content_hashes([weights], weights.parent, None)[0]
        return {"weights": self._digests.get(file), "data": self._digests[images]}

    def _data_digest(self, options: dict[str, Any]) -> str | None:
        """The digest of the test images; ``None`` where the data have none, or are not there: a run would say so."""
        try:
            return str(self._data_kind(**options).digest())
        except Exception:
            return None

    def _run(self, cell: Cell) -> dict[str, Any]:
        directory, config = self._place(cell)
        note, inputs = directory.with_name(f"{directory.name}.inputs.json"), self._inputs(config)
        before = read_json(note) or {}  # results of earlier versions have none
        changed = any(before.get(name) not in (None, value) for name, value in inputs.items() if value is not None)
        report = None if changed else self._finished(cell)
        if report is None:
            (directory / REPORT).unlink(missing_ok=True)  # a damaged one, or of other files
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, inputs)
            if changed:
                config["predict"].setdefault("state", {})["resume"] = "restart"
            config["predict"]["trainer"]["logger"] = {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(directory.parent), "name": directory.name, "version": ""},
            }
            config["predict"].setdefault("state", {})["save_every"] = self.save_every
            run_lightning(config)
            report = json.loads((directory / REPORT).read_text())
        return {
            **asdict(cell),
            **{name: report.get(name) for name in MEASURES if name in report or name in ALWAYS},
            PER_IMAGE: _per_image(report),
            "protocol_hash": report["protocol"]["hash"],
            "device": (report.get("environment") or {}).get("device"),
            "directory": str(directory.relative_to(self.output)),
        }


def _per_image(report: dict[str, Any]) -> float | None:
    seconds, batches, images = (report.get(name) for name in ("seconds_per_batch", "batches", "images"))
    return 1000 * seconds * batches / images if seconds and batches and images else None


def _plain(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of the file as plain dicts."""
    return {label: asdict(entry) for label, entry in entries.items()}


def _devices(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """What the cells ran on, which need not be what this process runs on; several where cells were finished before."""
    devices = dict.fromkeys(row["device"] for row in rows if row["device"])
    return {"device": "; ".join(devices)} if devices else {}


def _is_whole(report: dict[str, Any], directory: Path) -> bool:
    """Whether a report has what a row is made of, and the predictions beside it, if they are there, a line an image."""
    protocol = report.get("protocol")
    if not isinstance(protocol, dict) or "hash" not in protocol or not isinstance(report.get("domains"), dict):
        return False
    if not all(isinstance(report.get(name), int) for name in ("images", "forwards", "backwards")):
        return False
    predictions = directory / PREDICTIONS
    if not predictions.is_file():  # somebody has made room
        return True
    lines = predictions.read_bytes().count(b"\n") - 1  # the header
    return lines == int(report["images"]) + int(report.get("skipped_images") or 0)


def _check_labels(who: str, names: Iterable[str] | None, allowed: Iterable[str]) -> None:
    if unknown := [name for name in names or [] if name not in allowed]:
        raise ConfigError(f"{who} {unknown}; there are {list(allowed)}.")


def _check_options(label: str, method: MethodConfig) -> None:
    """Refuse wrong options and ranges by building the method on a tiny net."""
    try:
        package, _, name = method.class_path.rpartition(".")
        find(name if not package or package.startswith("lightning_tta.") else method.class_path)
    except ConfigError:
        return  # a user's own class: checked when it is parsed
    probe = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    try:
        create_method(name, probe, **method.init_args)
    except UnsupportedModelError:
        pass  # the probe says nothing about the nets of the benchmark
    except ConfigError as error:
        raise ConfigError(f"Method '{label}': {error}") from error


def digest(text: str) -> str:
    """Eight hex digits that identify a configuration."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


_FOR_GOOD = ExitStack()  # what lasts as long as a worker


def _start_worker(threads: int) -> None:
    """Set up a process of the pool; it ends with its parent: nothing goes on where a benchmark was killed."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for all of a terminal; the first process tells the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _FOR_GOOD.enter_context(_quiet())


def _in_worker(work: Callable[[Any], Any], item: Any) -> Any:
    """Work on one item; a worker that is told to end takes no other."""
    try:
        return work(item)
    except (Interrupted, SystemExit):  # the latter by Lightning, in a fit
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's messages and hints about each of many small runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
