"""A study: a benchmark with an axis, a claim, and questions that its cells answer."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from lightning_tta.errors import ConfigError, check_choice
from lightning_tta.report.studies import ruling

AT = "@"
"""Stands between a label and the value that its copy has."""


@dataclass
class AxisConfig:
    """What varies along the axis of a study.

    Attributes:
        option: Where it is in the file, after the label: ``streams.data.batch_size``, ``methods.init_args.lr``.
        values: Its values: numbers, words; or by the label on the axis.
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
        at: Value on the axis, ``first``, ``last``, or ``mean`` over all.
        margin: By more than so many points of accuracy.
        net: Of this net alone; by default the mean over all.
        stream: Of this stream alone; by default the mean over all.
    """

    say: str
    better: str
    than: str = "source"
    at: Any = "mean"
    margin: float = 0.0
    net: str | None = None
    stream: str | None = None


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
        asks: The questions.
    """

    title: str
    claim: str
    paper: str = ""
    axis: str = ""
    scale: Literal["linear", "log"] = "linear"
    vary: AxisConfig | None = None
    measure: str = "accuracy"
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
        for ask in config.asks:
            self._check(ask, sections)

    def _expand(self, vary: AxisConfig, sections: Mapping[str, dict[str, dict[str, Any]]]) -> None:
        section, _, path = vary.option.partition(".")
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
                entries[new] = _changed(entry, path.split("."), value, vary.factor, label)
                self.names[section][new] = (label, shown)
                renamed.setdefault(label, []).append(new)
        for entry in (each for entries in sections.values() for each in entries.values()):
            if entry.get(section) is not None:  # methods may name streams and nets, streams nets
                entry[section] = [new for old in entry[section] for new in renamed.get(old, [old])]

    def _check(self, ask: AskConfig, sections: Mapping[str, dict[str, dict[str, Any]]]) -> None:
        for name in ("better", "than"):
            check_choice(f"study.asks.{name}", getattr(ask, name), tuple(self.methods))
        for name in ("net", "stream"):
            labels = dict.fromkeys(label for label, _ in self.names[f"{name}s"].values())
            if getattr(ask, name) is not None:
                check_choice(f"study.asks.{name}", getattr(ask, name), tuple(labels))
        if self.values:
            allowed = ("first", "last", "mean", *self.values)
            if ask.at not in allowed:
                raise ConfigError(f"study.asks.at must be one of {', '.join(map(str, allowed))}; got {ask.at!r}.")

    def result(self, rows: Iterable[Mapping[str, Any]], skipped: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
        """Series and answers of the rows of ``benchmark.json``."""
        found: dict[tuple[str, str, str], dict[Any, dict[int, float]]] = {}
        hashes: dict[str, None] = {}
        for row in rows:
            value = _measure(row, self.config.measure)
            if value is None:
                continue
            net, stream, method = (self.names[f"{name}s"][row[name]] for name in ("net", "stream", "method"))
            x = next((v for _, v in (net, stream, method) if v is not None), None)
            points = found.setdefault((net[0], stream[0], method[0]), {})
            points.setdefault(x, {})[row["seed"]] = 100 * value
            hashes[row["protocol_hash"]] = None
        series: list[dict[str, Any]] = []
        for (net_name, stream_name, method_name), points in found.items():
            level = list(points) == [None] and bool(self.values)
            order = [x for x in self.values if x in points] if self.values and not level else list(points)
            series.append(
                {
                    "net": net_name,
                    "stream": stream_name,
                    "method": method_name,
                    "level": level,
                    "points": [
                        {"x": x, "mean": fmean(at.values()), "low": min(at.values()), "high": max(at.values())}
                        for x in order
                        for at in [points[x]]
                    ],
                }
            )
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

    def _answer(
        self, ask: AskConfig, found: Mapping[tuple[str, str, str], Mapping[Any, Mapping[int, float]]]
    ) -> dict[str, Any]:
        """The differences of a question, one a seed."""
        places = [key[:2] for key in found if key[2] == ask.better and (*key[:2], ask.than) in found]
        places = [place for place in places if ask.net in (None, place[0]) and ask.stream in (None, place[1])]
        by_seed: dict[int, list[float]] = {}
        for place in places:
            first, second = found[(*place, ask.better)], found[(*place, ask.than)]
            for x in self._at(ask):
                one, two = first.get(x, first.get(None, {})), second.get(x, second.get(None, {}))
                for seed in one.keys() & two.keys():
                    by_seed.setdefault(seed, []).append(one[seed] - two[seed])
        differences = [fmean(values) for _, values in sorted(by_seed.items())]
        verdict, estimate = ruling(differences, ask.margin)
        return {
            **asdict(ask),
            "verdict": verdict,
            "mean": None if estimate is None else estimate.mean,
            "half": None if estimate is None else estimate.half,
            "seeds": len(differences),
            "missing": "" if differences else f"no cells of both '{ask.better}' and '{ask.than}' at {ask.at}",
        }

    def _at(self, ask: AskConfig) -> list[Any]:
        if not self.values:
            return [None]
        places = {"first": self.values[:1], "last": self.values[-1:], "mean": self.values}
        return places[ask.at] if isinstance(ask.at, str) and ask.at in places else [ask.at]


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
    place[path[-1]] = value
    return changed
