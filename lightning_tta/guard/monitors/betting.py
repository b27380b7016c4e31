"""What the monitors that bet have in common: a test of the stream, and one alarm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lightning_tta.evidence.betting import ShiftTest
from lightning_tta.evidence.drift import LabelDriftTest
from lightning_tta.guard.monitors.base import Monitor

Test = TypeVar("Test", ShiftTest, LabelDriftTest)


class BettingMonitor(Monitor, Generic[Test]):
    """Alarms once in a stream, when the wealth of its test reaches 1 / alpha; the log wealth goes on.

    Attributes:
        test: Made by :meth:`prepare`.
        kind: Its class.
        reason: Of the alarm.
        alarms: 0 or 1.
    """

    kind: ClassVar[type[ShiftTest | LabelDriftTest]]
    reason: ClassVar[str]
    needs_source: ClassVar[bool] = True

    def __init__(self) -> None:
        self.test: Test | None = None
        self.alarms = 0
        self._is_new = False

    def bet(self, test: Test, values: Tensor) -> None:
        """Take in what there is to bet on of a batch, (B,)."""
        test.see(values)
        self._is_new = test.alarmed and not self.alarms
        self.alarms += self._is_new

    def alarm(self) -> str:
        """The reason, with the batch at which the wealth reached 1 / alpha."""
        return self.reason if self._is_new else ""

    def begin(self) -> None:
        """A new stream: a wealth of 1."""
        if self.test is not None:
            self.test.restart()
        self.alarms, self._is_new = 0, False

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {"test": None if self.test is None else self.test.state_dict(), "alarms": self.alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.test = None if state["test"] is None else self.kind.from_state(state["test"])  # type: ignore[assignment]
        self.alarms, self._is_new = int(state["alarms"]), False
