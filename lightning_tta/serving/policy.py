"""Who answers, source or method: decided after each micro-batch that both have predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_tta.errors import check_choice, check_names, check_range
from lightning_tta.serving.labels import Better, Counts

Answering = Literal["source", "method"]
Restore = Literal["", "reset", "rollback"]
STREAM_ALARMS = ("shift", "label_drift", "low_accuracy")
"""Alarms that say that the stream is another, or harder, than before: the source may have fallen as far as the method.
Estimates of both are compared instead."""


@dataclass(frozen=True)
class Evidence:
    """What is known after a micro-batch that both have predicted.

    Attributes:
        batch: Its number.
        images: How many it has.
        answering: Who answers by now.
        source: Estimates of the source's accuracy by now, in [0, 1], by monitor.
        method: The same of the method's, by the same names.
        alarms: Reasons of the alarms that the method's answers to it have raised.
        counts: Of answers whose label is known.
        better: Which of the two these labels show to be better; empty: neither.
    """

    batch: int
    images: int
    answering: Answering
    source: Mapping[str, float] = field(default_factory=dict)
    method: Mapping[str, float] = field(default_factory=dict)
    alarms: Sequence[str] = ()
    counts: Counts = field(default_factory=Counts)
    better: Better = ""


@dataclass(frozen=True)
class Decision:
    """Who answers from now on, what becomes of the method, and why.

    Attributes:
        answering: Who answers the next micro-batch.
        restore: ``reset``: the method returns to the source; ``rollback``: to its last healthy state; empty: neither.
        reason: A few words for the log; empty where nothing changes.

    Raises:
        ConfigError: If ``answering`` or ``restore`` is something else.
    """

    answering: Answering
    restore: Restore = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse what is none."""
        check_choice("answering", self.answering, get_args(Answering))
        check_choice("restore", self.restore, get_args(Restore))


class Policy(ABC):
    """Decides, after every micro-batch that both have predicted. One thread calls it; what it keeps is bounded."""

    @abstractmethod
    def decide(self, evidence: Evidence) -> Decision:
        """Who answers from here on."""

    def state_dict(self) -> dict[str, Any]:
        """All that it keeps, in plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # some keep nothing
        """Counterpart of :meth:`state_dict`."""


MOST_RETURNS = 3
"""Returns to the source that count: patience is at most doubled as often."""


class Patience(Policy):
    """The method answers after ``patience`` micro-batches in a row with evidence for it, until there is an alarm.

    A micro-batch is evidence for the method if each estimate of its accuracy is at least ``margin`` above that of the
    source. The source answers again

    - at once after an alarm; the method is then rolled back, or reset;
    - after ``patience`` micro-batches in a row in which an estimate of the method was below that of the source by more
      than ``leave``; the method is then reset.

    Between the two bounds all stays as it is. Each return to the source, or alarm before, doubles the patience with the
    method, up to eight times; each time that the method has answered eight times ``patience`` micro-batches, it is
    halved again.

    Late labels come before estimates: the method answers as soon as labels show that it is better, and not while they
    show that it is worse.

    Args:
        patience: Micro-batches in a row, at least 1.
        min_images: Images in a row, at least 1, that they must hold together: micro-batches may be small.
        margin: In accuracy, [0, 1].
        leave: In accuracy, [0, 1].
        estimates: Names of the monitors whose estimates count; ``None``: all that give one.
        on_alarm: ``rollback`` or ``reset``.
        ignore: Alarms that are none of the method's health.

    Raises:
        ConfigError: If one is out of range.
    """

    def __init__(
        self,
        patience: int = 16,
        *,
        min_images: int = 256,
        margin: float = 0.02,
        leave: float = 0.0,
        estimates: Sequence[str] | None = None,
        on_alarm: Restore = "rollback",
        ignore: Sequence[str] = STREAM_ALARMS,
    ) -> None:
        check_range("patience", patience, 1, integer=True)
        check_range("min_images", min_images, 1, integer=True)
        check_range("margin", margin, 0, 1)
        check_range("leave", leave, 0, 1)
        check_names("estimates", estimates)
        check_names("ignore", ignore)
        check_choice("on_alarm", on_alarm, get_args(Restore)[1:])
        self.patience, self.min_images, self.margin, self.leave = patience, min_images, margin, leave
        self.estimates = None if estimates is None else tuple(estimates)
        self.on_alarm, self.ignore = on_alarm, tuple(ignore or ())
        self._begin()
        self.returns = 0  # as many doublings of the patience

    def _begin(self) -> None:
        self.batches = self.images = 0  # in a row, with evidence against who answers
        self.answered = 0  # micro-batches in a row without alarm by the method

    def decide(self, evidence: Evidence) -> Decision:
        """See the class."""
        alarms = [alarm for alarm in evidence.alarms if alarm not in self.ignore]
        if alarms:
            return self._go_back(self.on_alarm, f"alarm {', '.join(alarms)}")
        differences = self._differences(evidence)
        if evidence.answering == "source":
            return self._stay_or_move(evidence, differences)
        if evidence.better == "source":
            return self._go_back("reset", f"labels: {_said(evidence.counts)}")
        self.answered += 1
        if self.answered % (8 * self.patience) == 0:
            self.returns = max(self.returns - 1, 0)
        worst = min(differences, key=differences.__getitem__, default=None)
        behind = evidence.better != "method" and worst is not None and differences[worst] < -self.leave
        if self._in_a_row(behind, evidence, self.patience):
            assert worst is not None
            return self._go_back("reset", _compared(worst, evidence))
        return Decision("method")

    def _stay_or_move(self, evidence: Evidence, differences: Mapping[str, float]) -> Decision:
        if evidence.better == "method":
            self._begin()
            return Decision("method", reason=f"labels: {_said(evidence.counts)}")
        ahead = evidence.better != "source" and bool(differences) and min(differences.values()) >= self.margin
        if not self._in_a_row(ahead, evidence, self.patience * 2**self.returns):
            return Decision("source")
        self._begin()
        return Decision("method", reason=_compared(min(differences, key=differences.__getitem__), evidence))

    def _differences(self, evidence: Evidence) -> dict[str, float]:
        names = evidence.method.keys() & evidence.source.keys()
        if self.estimates is not None:
            names = names & set(self.estimates) if names >= set(self.estimates) else set()
        return {name: evidence.method[name] - evidence.source[name] for name in sorted(names)}

    def _in_a_row(self, holds: bool, evidence: Evidence, wanted: int) -> bool:
        self.batches, self.images = (self.batches + 1, self.images + evidence.images) if holds else (0, 0)
        return self.batches >= wanted and self.images >= self.min_images

    def _go_back(self, restore: Restore, reason: str) -> Decision:
        self._begin()
        self.returns = min(self.returns + 1, MOST_RETURNS)
        return Decision("source", restore, reason)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in ("batches", "images", "answered", "returns")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        for name in self.state_dict():
            setattr(self, name, int(state[name]))
        self.returns = min(self.returns, MOST_RETURNS)  # earlier versions counted on


def _compared(name: str, evidence: Evidence) -> str:
    method, source = evidence.method[name], evidence.source[name]
    return f"{name}: estimated accuracy {method:.3f} of the method, {source:.3f} of the source"


def _said(counts: Counts) -> str:
    return f"of {counts.labels} the method has {counts.method_right} right, the source {counts.source_right}"
