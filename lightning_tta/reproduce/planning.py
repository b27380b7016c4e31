"""What of a claim can be run with what is there: data sets, weights, and why the rest cannot."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tta.benchmark.config import NetConfig
from lightning_tta.data import data_modules
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.domain_names import split_severity
from lightning_tta.data.streams import RESET_BY_DOMAIN
from lightning_tta.errors import ConfigError, DataError, check_range, did_you_mean
from lightning_tta.reproduce.claims import EVERY, Part, matches
from lightning_tta.reproduce.needs import SETS, Net, check_places, nets, place_of, published_images
from lightning_tta.shipped import configurations

NOT_THERE = "not there"


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
        missing: Data without which nothing runs: title -> what is missing or damaged.
        absent: Domains that are not there, or damaged: name -> what is wrong. The others can run without them.
        incomplete: Domains of which there are not as many images as were published: name -> how many there are. They
            run, and get no verdict.
        ways: How to get what is missing: title of the data set -> text.
        weights: Nets without weights: label -> how to get them.
        nets: The nets that can run.
    """

    part: Part
    rows: list[tuple[str, str]]
    missing: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    nets: dict[str, NetConfig] = field(default_factory=dict)

    @property
    def runnable(self) -> list[tuple[str, str]]:
        """The rows that can be run."""
        return [] if self.missing else [(net, method) for net, method in self.rows if net in self.nets]

    def why_not(self, net: str, domains: Sequence[str] | None) -> str:
        """Why a figure cannot be compared; empty: it can, or what failed says it."""
        if self.missing:
            return f"{', '.join(self.missing)} {_state(self.missing.values())}"
        lacking = [label for label in (self.weights if net == EVERY else [net]) if label in self.weights]
        if lacking:
            return f"weights of {', '.join(lacking)} missing"
        absent = [name for name in self.absent if domains is None or name in domains]
        if not absent:
            return ""
        return f"{', '.join(absent[:3])}{' and others' * (len(absent) > 3)} {_state(map(self.absent.get, absent))}"

    def why_unjudged(self, domains: Sequence[str] | None) -> str:
        """Why a figure must not be compared with what these files give; empty: it can."""
        short = [f"{name}: {text}" for name, text in self.incomplete.items() if domains is None or name in domains]
        return f"{short[0]}{' and others' * (len(short) > 1)}" if short else ""


def _state(problems: Iterable[str | None]) -> str:
    return "missing" if all(NOT_THERE in str(problem) for problem in problems) else "damaged"


def plan_part(label: str, part: Part, settings: Settings) -> PartPlan:
    """What of a part can be run."""
    rows = [(net, m) for net, m in part.rows() if matches(settings.rows, label, net, m)]
    plan = PartPlan(part, rows)
    _look_for_data(plan, settings)
    for name in dict.fromkeys(net for net, _ in rows):
        _look_for_net(plan, name, settings)
    return plan


def _look_for_data(plan: PartPlan, settings: Settings) -> None:
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
        if settings.download and data.fetched:
            continue
        place = place_of(data.place, settings.root, settings.paths)
        if missing := data.missing(place, [], severity):
            plan.missing[data.title] = _are_not_there(missing)
            plan.ways[data.title] = data.how(bare)
            continue
        absent = {}
        for domain in listed:
            name, own = split_severity(domain)
            if missing := data.missing(place, [name], own or severity):
                absent[domain] = _are_not_there(missing)
        if absent:
            plan.ways[data.title] = data.how([split_severity(name)[0] for name in absent])
        _set_aside(plan, data.title, absent, one_by_one)
    if not plan.missing and not settings.download:
        _look_into_data(plan, settings, one_by_one)


def _set_aside(plan: PartPlan, title: str, absent: Mapping[str, str], one_by_one: bool) -> None:
    """Leave domains out, or all of the part where the others mean nothing without them."""
    listed = (plan.part.data.get("init_args") or {}).get("domains") or []
    if absent and (not one_by_one or len({*absent, *plan.absent} & {*listed}) == len(listed)):
        names = f"{', '.join(list(absent)[:3])}{', ...' * (len(absent) > 3)}"
        plan.missing[f"{title} ({names})"] = next(iter(absent.values()))
    else:
        plan.absent |= absent


def _look_into_data(plan: PartPlan, settings: Settings, one_by_one: bool) -> None:
    """Open what is there, as the runs will: damaged files are found before hours of runs, and images are counted."""
    part, title = plan.part, SETS[plan.part.needs[0]].title
    kind = data_modules()[part.data["class_path"]]
    options = fill(part.data.get("init_args") or {}, settings)
    known = {*inspect.signature(kind).parameters, "domains", "severity"}
    looks: dict[str, dict[str, Any]] = {}  # streams that differ in their order alone have the same images
    for stream in part.streams.values():
        changed = {name: value for name, value in fill(stream.get("data") or {}, settings).items() if name in known}
        looks[str(changed)] = {**options, **changed}
    for each in looks.values():
        domains = [name for name in each.get("domains") or [""] if name not in plan.absent]
        damaged: dict[str, str] = {}
        for domain in domains:
            try:
                data = kind(**{**each, "domains": [domain]} if domain else each)
                counts = {name: _count(data, name) for name in data.domain_names}
            except DataError as error:
                damaged[domain] = str(error)
                continue
            for name, count in counts.items():
                published = published_images(part.needs, name)
                if count is not None and published is not None and count != published:
                    plan.incomplete[name] = f"{count:,} images; the figures are of {published:,}"
        if "" in damaged:
            plan.missing[title] = damaged[""]
        else:
            _set_aside(plan, title, damaged, one_by_one)


def _count(data: ShiftedDataModule, domain: str) -> int | None:
    """How many images a domain has, the first of which is read; ``None``: it is made here.

    Raises:
        DataError: If its files are damaged, or not in their layout.
    """
    if domain in data.natural_names():
        images = data.natural_domain(domain)
    elif domain in data.published_names:
        name, severity = split_severity(domain)
        images = data.published(name, severity or data.severity)
    else:
        return None
    if len(images):
        images[0]
    return len(images)


def _look_for_net(plan: PartPlan, label: str, settings: Settings) -> None:
    entry, other = plan.part.nets[label], settings.net
    if isinstance(entry, Mapping):  # trained here
        starts = [entry["start"]] if entry.get("start") else []
        for name in (*starts, label):
            plan.nets[name] = _trained(plan.part.nets[name], settings)
        return
    known: Net = nets()[entry]
    if other is not None:
        plan.nets[label] = NetConfig(source_ckpt="none", backbone=other, num_classes=known.num_classes)
        return
    try:
        weights = known.weights(entry, settings.root, settings.weights, settings.download)
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


def _trained(entry: Mapping[str, Any], settings: Settings) -> NetConfig:
    options = fill(entry.get("options") or {}, settings)
    if settings.net is not None and not entry.get("start"):
        options |= {"model.backbone": settings.net, "model.pretrained": False}
    options |= {"data.num_workers": settings.workers}
    options |= {f"trainer.{name}": value for name, value in settings.trainer.items()}
    return NetConfig(
        fit=str(configurations() / entry["fit"]),
        options={**options, **settings.training},
        start=entry.get("start"),
    )


def fill(value: Any, settings: Settings) -> Any:
    """The value with places of data sets in place of ``$PLACE``."""
    if isinstance(value, Mapping):
        return {key: fill(item, settings) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, settings) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        return str(place_of(value[1:], settings.root, settings.paths))
    return value


def _are_not_there(missing: Sequence[str]) -> str:
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} {NOT_THERE}."
