"""Numbers of a server in the text that Prometheus reads: exposition format 0.0.4."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_tta.errors import ConfigError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of the answer to a request for the text."""
Kind = Literal["counter", "gauge", "histogram"]
_NAME, _LABEL = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*"), re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_Values = tuple[str, ...]


@dataclass
class _Family:
    """All samples of one name: their kind, help, names of labels; the values by those of the labels."""

    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    values: dict[_Values, float] = field(default_factory=dict)
    buckets: dict[_Values, list[int]] = field(default_factory=dict)  # how often up to each bound, not cumulative


class Metrics:
    """Counters, gauges and histograms, each declared once; safe to write and read from many threads.

    Args:
        prefix: What all names begin with.
    """

    def __init__(self, prefix: str = "lightning_tta_") -> None:
        self.prefix = prefix
        self._families: dict[str, _Family] = {}
        self._lock = threading.Lock()

    def declare(
        self, name: str, kind: Kind, text: str, labels: Sequence[str] = (), bounds: Sequence[float] = ()
    ) -> None:
        """Make a family of samples known.

        Args:
            name: Without the prefix; letters, digits, underscores. That of a counter ends in ``_total``.
            kind: ``counter``, ``gauge`` or ``histogram``.
            text: One line for ``# HELP``.
            labels: Names of labels, which each sample has; without any, the sample is there from the start.
            bounds: Of a histogram, upper bounds of its buckets, ascending; ``+Inf`` is added.

        Raises:
            ConfigError: If the format does not allow a name, or it is there already.
        """
        full = f"{self.prefix}{name}"
        wrong = [label for label in labels if not _LABEL.fullmatch(label) or label.startswith("__") or label == "le"]
        if not _NAME.fullmatch(full) or wrong or (kind == "counter") != name.endswith("_total"):
            raise ConfigError(
                f"Prometheus takes names of letters, digits and underscores, with _total at the end of counters alone; "
                f"got {full!r} ({kind}) with labels {list(labels)}."
            )
        if name in self._families:
            raise ConfigError(f"There is a metric {name!r} already. Declare each once.")
        if list(bounds) != sorted(set(bounds)):
            raise ConfigError(f"The bounds of {name!r} must ascend; got {list(bounds)}.")
        family = _Family(kind, text, tuple(labels), tuple(bounds))
        if not labels:
            family.values[()] = 0.0
            family.buckets[()] = [0] * (len(bounds) + 1)
        self._families[name] = family

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        """Add to a counter or gauge."""
        with self._lock:
            family, key = self._sample(name, labels)
            if family.kind == "counter" and not value >= 0:
                raise ConfigError(f"A counter does not go down: {name} by {value}.")
            family.values[key] = family.values.get(key, 0.0) + value

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            family, key = self._sample(name, labels)
            family.values[key] = float(value)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Count a value in a histogram."""
        with self._lock:
            family, key = self._sample(name, labels)
            buckets = family.buckets.setdefault(key, [0] * (len(family.bounds) + 1))
            buckets[sum(bound < value for bound in family.bounds)] += 1
            family.values[key] = family.values.get(key, 0.0) + value

    def value(self, name: str, /, **labels: str) -> float:
        """A counter or gauge as it is now, or the sum of a histogram; 0 for a sample that is not there yet."""
        with self._lock:
            family, key = self._sample(name, labels)
            return family.values.get(key, 0.0)

    def text(self) -> str:
        """All of them, a family after the other; each line ends with a line feed."""
        with self._lock:
            return "".join(line + "\n" for name, family in self._families.items() for line in self._lines(name, family))

    def _sample(self, name: str, labels: Mapping[str, str]) -> tuple[_Family, _Values]:
        family = self._families[name]
        if labels.keys() != set(family.labels):
            raise ConfigError(f"{name} has the labels {list(family.labels)}; got {list(labels)}.")
        return family, tuple(str(labels[label]) for label in family.labels)

    def _lines(self, name: str, family: _Family) -> list[str]:
        full = self.prefix + name
        text = family.text.replace("\\", r"\\").replace("\n", r"\n")
        lines = [f"# HELP {full} {text}", f"# TYPE {full} {family.kind}"]
        for key, value in family.values.items():
            labels = dict(zip(family.labels, key, strict=True))
            if family.kind != "histogram":
                lines.append(f"{full}{_labels(labels)} {_number(value)}")
                continue
            count = 0
            for bound, number in zip((*family.bounds, math.inf), family.buckets[key], strict=True):
                count += number
                lines.append(f"{full}_bucket{_labels({**labels, 'le': _number(bound)})} {count}")
            lines += [f"{full}_sum{_labels(labels)} {_number(value)}", f"{full}_count{_labels(labels)} {count}"]
        return lines


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    quoted = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in labels.values())
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(labels, quoted, strict=True)) + "}"


def _number(value: float) -> str:
    """As Go's ParseFloat reads it."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
