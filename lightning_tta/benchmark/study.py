"""A study: a benchmark with an axis, a claim, and questions that its cells answer."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from lightning_tta.benchmark.config import MethodConfig, NetConfig, StreamConfig
from lightning_tta.errors import ConfigError, check_choice
from lightning_tta.files import json_digest
from lightning_tta.report.studies import axis_place, is_number, ruling

Points = dict[Any, dict[int, float]]
"""From a value on the axis (``None``: of no value) to the points of each seed, differences of accuracies."""
AT = "@"
"""Stands between a label and the value that its copy has."""


@dataclass
class AxisConfig:
    """What varies along the axis of a study.

    Attributes:
        option: Where it is in the file, after the label: ``streams.data.batch_size``, ``methods.init_args.lr``,
            ``nets.options.model.source_weight``.
        values: Its values: numbers, words; or by the label on the axis. Mappings are added to those of the file.
        of: Labels of the streams, methods or nets that vary; by default all.
        factor: Values multiply what the file gives, as learning rates of several methods.
    """

    option: str
    values: list[Any] | dict[str, Any]
    of: list[str] | None = None
    factor: bool = False


@dataclass
class AskConfig:
    """A question: is one method better than another?

    Attributes:
        say: The claim in words.
        better: Label of the method that is claimed to be better.
        than: Label of the other one.
        at: Value on the axis, ``first``, ``last``, ``mean`` over all, or ``area``: the area under the curve over the
            axis as it is drawn, divided by its length.
        margin: By more than so many points of accuracy.
        net: Of this net alone; by default the mean over all.
        stream: Of this stream alone; by default the mean over all.
        than_net: ``than`` is of this net instead; by default of the same.
        than_stream: ``than`` is of this stream instead.
        than_at: ``than`` is at this value instead.
        claimed: Whether a paper claims it; ``false``: a question of this project.
    """

    say: str
    better: str
    than: str = "source"
    at: Any = "mean"
    margin: float = 0.0
    net: str | None = None
    stream: str | None = None
    than_net: str | None = None
    than_stream: str | None = None
    than_at: Any = None
    claimed: bool = True


@dataclass
class StudyConfig:
    """The section ``study`` of a benchmark's file.

    Attributes:
        title: A few words.
        claim: What is claimed, in a sentence.
        paper: Where.
        axis: Its name with the unit; of a study without one, which compares methods, empty.
        scale: Of the axis.
        vary: What varies along it.
        measure: What of a cell's report counts, as a share: ``accuracy``, or ``domains.NAME.accuracy``,
            ``visits.visit1.accuracy``.
        against: What of a cell's report stands on the figure's axis, in place of the value that varies:
            ``milliseconds_per_image``, ``forwards``. The values are then written at the points.
        asks: The questions.
    """

    title: str
    claim: str
    paper: str = ""
    axis: str = ""
    scale: Literal["linear", "log"] = "linear"
    vary: AxisConfig | None = None
    measure: str = "accuracy"
    against: str = ""
    asks: list[AskConfig] = field(default_factory=list)


class Study:
    """The expansion of a benchmark along an axis, and what its rows say.

    Args:
        config: The section ``study``.
        sections: ``nets``, ``streams`` and ``methods`` of the file, as plain dicts; copies along the axis are put in.

    Raises:
        ConfigError: If the section names what is not there.
    """

    def __init__(self, config: StudyConfig, sections: Mapping[str, dict[str, dict[str, Any]]]) -> None:
        self.config = config
        self.methods = list(sections["methods"])
        self.names: dict[str, dict[str, tuple[str, Any]]] = {
            section: {label: (label, None) for label in entries} for section, entries in sections.items()
        }
        self.values: list[Any] = []
        if (config.vary is None) != (not config.axis):
            raise ConfigError(
                "study: vary and axis go together: give both, or, to compare methods as they are, neither."
            )
        if config.vary is not None:
            self._expand(config.vary, sections)
        if config.against and config.vary is None:
            raise ConfigError(f"study.against={config.against!r} needs something that varies: give vary and axis.")
        self.curve = len(self.values) > 1 and all(map(is_number, self.values))
        if config.scale == "log":  # nothing to integrate from 0 on
            self.curve = self.curve and min(self.values) > 0
        for ask in config.asks:
            self._check(ask, sections)

    def _expand(self, vary: AxisConfig, sections: Mapping[str, dict[str, dict[str, Any]]]) -> None:
        section, _, path = vary.option.partition(".")
        fit = path.startswith("options.")  # its options keep their dots
        names = path.split(".", 1) if fit else path.split(".")
        if section not in sections or not path:
            raise ConfigError(
                f"study.vary.option must begin with {', '.join(sections)}, such as streams.data.batch_size; got "
                f"{vary.option!r}."
            )
        if not vary.values:
            raise ConfigError("study.vary.values is empty; give the values along the axis.")
        named = vary.values if isinstance(vary.values, dict) else {str(value): value for value in vary.values}
        self.values = list(vary.values)
        entries = sections[section]
        for label in vary.of or []:
            check_choice("study.vary.of", label, tuple(entries))
        renamed: dict[str, list[str]] = {}
        for label in list(entries):
            if vary.of is not None and label not in vary.of:
                continue
            entry = entries.pop(label)
            del self.names[section][label]
            for (name, value), shown in zip(named.items(), self.values, strict=True):
                new = f"{label}{AT}{name}"
                entries[new] = _changed(entry, names, value, vary.factor, label)
                self.names[section][new] = (label, shown)
                renamed.setdefault(label, []).append(new)
        for entry in (each for entries in sections.values() for each in entries.values()):
            if entry.get(section) is not None:  # methods may name streams and nets, streams nets
                entry[section] = [new for old in entry[section] for new in renamed.get(old, [old])]

    def _check(self, ask: AskConfig, sections: Mapping[str, dict[str, dict[str, Any]]]) -> None:
        for name in ("better", "than"):
            check_choice(f"study.asks.{name}", getattr(ask, name), tuple(self.methods))
        for name in ("net", "stream", "than_net", "than_stream"):
            labels = dict.fromkeys(label for label, _ in self.names[f"{name.removeprefix('than_')}s"].values())
            if getattr(ask, name) is not None:
                check_choice(f"study.asks.{name}", getattr(ask, name), tuple(labels))
        allowed = ("first", "last", "mean", *(("area",) if self.curve else ()), *self.values)
        for name in ("at", "than_at"):
            value = getattr(ask, name)
            if value is not None and value not in (allowed if self.values else ("mean",)):
                raise ConfigError(
                    f"study.asks.{name} must be one of {', '.join(map(str, allowed))}; got {value!r}."
                    if self.values
                    else f"study.asks.{name}={value!r}: nothing varies in this study. Leave it out."
                )

    def result(self, rows: Iterable[Mapping[str, Any]], skipped: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
        """Series and answers of the rows of ``benchmark.json``."""
        found: dict[tuple[str, str, str], Points] = {}
        places: dict[tuple[str, str, str], dict[Any, list[float]]] = {}
        hashes: dict[str, None] = {}
        for row in rows:
            value = _measure(row, self.config.measure)
            if value is None:
                continue
            net, stream, method = (self.names[f"{name}s"][row[name]] for name in ("net", "stream", "method"))
            x = next((v for _, v in (net, stream, method) if v is not None), None)
            key = (net[0], stream[0], method[0])
            found.setdefault(key, {}).setdefault(x, {})[row["seed"]] = 100 * value
            place = _measure(row, self.config.against) if self.config.against else None
            if place is not None:
                places.setdefault(key, {}).setdefault(x, []).append(place)
            hashes[row["protocol_hash"]] = None
        series = [self._series(key, points, places.get(key, {})) for key, points in found.items()]
        series.sort(key=lambda each: self.methods.index(str(each["method"])))
        return {
            **{key: value for key, value in asdict(self.config).items() if key not in ("vary", "asks")},
            "values": self.values,
            "series": series,
            "answers": [self._answer(ask, found) for ask in self.config.asks],
            "protocols": list(hashes),
            "missing": [f"{entry['cell']}: {entry['reason']}" for entry in skipped],
            "seeds": len({seed for points in found.values() for at in points.values() for seed in at}),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }

    def _series(self, key: tuple[str, str, str], points: Points, places: Mapping[Any, list[float]]) -> dict[str, Any]:
        """A line of the figure: a method on a net and a stream."""
        level = list(points) == [None] and bool(self.values)
        order = [x for x in self.values if x in points] if self.values and not level else list(points)
        result: dict[str, Any] = {
            **dict(zip(("net", "stream", "method"), key, strict=True)),
            "level": level,
            "points": [{"x": x, **_spread(points[x].values())} for x in order],
        }
        for point in result["points"]:
            if point["x"] in places:
                point["place"] = fmean(places[point["x"]])
        if self.curve:
            seeds = set.intersection(*({*points.get(x, points.get(None, {}))} for x in self.values))
            areas = [value for seed in seeds if (value := self._value(points, "area", seed)) is not None]
            if areas:
                result["area"] = _spread(areas)
        return result

    def _answer(self, ask: AskConfig, found: Mapping[tuple[str, str, str], Points]) -> dict[str, Any]:
        """The differences of a question, one a seed: means over the same nets and streams in each."""
        by_pair: list[dict[int, float]] = []
        than_at = ask.at if ask.than_at is None else ask.than_at
        for (net, stream, method), first in found.items():
            if method != ask.better or ask.net not in (None, net) or ask.stream not in (None, stream):
                continue
            second = found.get((ask.than_net or net, ask.than_stream or stream, ask.than), {})
            by_seed: dict[int, float] = {}
            for seed in {seed for at in first.values() for seed in at}:
                one, two = self._value(first, ask.at, seed), self._value(second, than_at, seed)
                if one is not None and two is not None:
                    by_seed[seed] = one - two
            if by_seed:
                by_pair.append(by_seed)
        seeds = sorted(set.intersection(*map(set, by_pair))) if by_pair else []
        differences = [fmean(pair[seed] for pair in by_pair) for seed in seeds]
        verdict, estimate = ruling(differences, ask.margin)
        return {
            **asdict(ask),
            "verdict": verdict,
            "mean": None if estimate is None else estimate.mean,
            "half": None if estimate is None else estimate.half,
            "seeds": len(differences),
            "missing": ""
            if differences
            else f"no cells of both '{ask.better}' and '{ask.than}' at {ask.at}"
            if found
            else f"no cell has the measure '{self.config.measure}'",
        }

    def _value(self, points: Points, at: Any, seed: int) -> float | None:
        """A seed's value at a place on the axis; ``None`` where a cell of it is missing."""
        total = 0.0
        for x, weight in self._weights(at).items():
            value = points.get(x, points.get(None, {})).get(seed)
            if value is None:
                return None
            total += weight * value
        return total

    def _weights(self, at: Any) -> dict[Any, float]:
        """What a place on the axis takes of each value; together 1."""
        if not self.values:
            return {None: 1.0}
        if at == "area":
            places = [axis_place(value, self.config.scale) for value in self.values]
            steps = [0.0, *(abs(b - a) for a, b in pairwise(places)), 0.0]
            return {x: (a + b) / 2 / sum(steps) for x, (a, b) in zip(self.values, pairwise(steps), strict=True)}
        if at == "mean":
            return dict.fromkeys(self.values, 1 / len(self.values))
        ends = {"first": self.values[0], "last": self.values[-1]}
        return {ends[at] if isinstance(at, str) and at in ends else at: 1.0}


def section_digests(
    nets: Mapping[str, NetConfig],
    streams: Mapping[str, StreamConfig],
    methods: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What tells whether a study's result was made of a file: a digest of each section, whatever the places of weights.

    Of ``data``, the result has the options themselves.
    """
    contents = {
        "nets": {label: {**asdict(net), "source_ckpt": net.source_ckpt is not None} for label, net in nets.items()},
        "streams": {label: asdict(stream) for label, stream in streams.items()},
        "methods": {label: asdict(MethodConfig.from_dict(label, dict(entry))) for label, entry in methods.items()},
        "model": dict(model or {}),
        "run": dict(run or {}),
    }
    return {name: json_digest({"": _numbers(content)}) for name, content in contents.items()}


def _numbers(value: Any) -> Any:
    """The value with each number as a float, also where a reader of YAML has taken ``1e-3`` for text."""
    if isinstance(value, Mapping):
        return {str(key): _numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def _measure(row: Mapping[str, Any], measure: str) -> float | None:
    value: Any = row
    for name in measure.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _changed(entry: dict[str, Any], path: Sequence[str], value: Any, factor: bool, label: str) -> dict[str, Any]:
    """A copy of an entry with another value at a path; its parents are made where they are missing."""
    changed = copy.deepcopy(entry)
    place = changed
    for name in path[:-1]:
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise ConfigError(f"study.vary.option: '{name}' of '{label}' is {place!r}, and has no options.")
    if factor:
        given = place.get(path[-1])
        if not isinstance(given, (int, float)) or not isinstance(value, (int, float)):
            raise ConfigError(
                f"study.vary.factor multiplies {'.'.join(path)}, which '{label}' does not give as a number; it has "
                f"{given!r}. Write it in the file, or leave the label out of study.vary.of."
            )
        value = given * value
    if isinstance(value, dict) and isinstance(place.get(path[-1]), dict):
        value = {**place[path[-1]], **value}
    place[path[-1]] = value
    return changed
