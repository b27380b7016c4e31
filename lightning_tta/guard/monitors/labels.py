"""A few labels that come late: the accuracy of what was answered, with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError, InputError, check_range
from lightning_tta.evidence.labels import Interval, LateLabels
from lightning_tta.guard.monitors.base import Monitor, Seen
from lightning_tta.guard.monitors.estimator import LOW_ACCURACY


class LabelsMonitor(Monitor):
    """Accuracy from labels that come late: :class:`~lightning_tta.evidence.labels.LateLabels` on a stream.

    ::

        monitor.tell(index, labels)   # whenever some become known, by the stream's index

    After a reset or a return to a snapshot the answers are another method's: labels of earlier answers are unknown from
    then on. With ``floor`` it raises ``low_accuracy`` once, when the whole interval lies below: with the interval
    ``anytime`` a false alarm has the probability ``1 - level`` at most, however often it is looked at.

    Args:
        waiting: Predictions that wait for labels, at least 1.
        window: Only the latest so many labels count; ``None``: all since the last reset.
        interval: ``anytime`` or ``clopper_pearson``; by default ``anytime`` without a window.
        level: That the interval holds, in [0.5, 0.9999].
        floor: In [0, 1]; ``None``: no alarm.

    Raises:
        ConfigError: If an option is out of range.
    """

    name: ClassVar[str] = "labels"

    def __init__(
        self,
        *,
        waiting: int = 100_000,
        window: int | None = None,
        interval: Interval | None = None,
        level: float = 0.95,
        floor: float | None = None,
    ) -> None:
        if floor is not None:
            check_range("floor", floor, 0, 1)
        self.floor = floor
        self.late = LateLabels(waiting=waiting, window=window, interval=interval, level=level)
        self.classes: int | None = None
        self._was_raised = False
        self._alarm = ""

    def see(self, seen: Seen) -> None:
        """Keep what was answered, by the samples' indices.

        Raises:
            ConfigError: If the stream does not say them.
        """
        if seen.index is None:
            raise ConfigError(
                "The monitor 'labels' needs to know which sample is which. Give the index of each with the images, as "
                "watch(images, index=...), or use a data module of this package, whose batches have one."
            )
        self.classes = seen.logits.shape[-1]
        self.late.see(seen.index, seen.logits)
        self._alarm = ""
        if self.floor is not None and not self._was_raised and self.late.estimate()[2] < self.floor:
            self._was_raised, self._alarm = True, LOW_ACCURACY

    def tell(self, index: Sequence[int | str] | Tensor, labels: Sequence[int] | Tensor) -> int:
        """Labels (B,) of samples that were answered before; returns how many count.

        Raises:
            InputError: If they are no labels, one for each index, or no classes of the net.
        """
        highest = max(torch.as_tensor(labels).flatten().tolist(), default=0)
        if self.classes is not None and highest >= self.classes:
            raise InputError(
                f"Labels must be classes of the net, from 0 to {self.classes - 1}; got {highest}. Count them from 0, "
                "and give -1 for a label that is not known."
            )
        return self.late.tell(index, labels)

    def alarm(self) -> str:
        """``low_accuracy``, when the whole interval lies below ``floor``: at the next batch after the labels came."""
        return self._alarm

    def estimate(self) -> float | None:
        """Share of labelled answers that were right."""
        return self.late.right / self.late.number if self.late.number else None

    def values(self) -> dict[str, float]:
        """Accuracy with the ends of its interval, and counts."""
        accuracy, low, high = self.late.estimate()
        values = {"labels_low": low, "labels_high": high}
        values |= {"labels_told": float(self.late.number), "labels_unknown": float(self.late.unknown)}
        return {"labels_accuracy": accuracy, **values} if self.late.number else values

    def forget(self) -> None:
        """Begin anew: labels of earlier answers say nothing of this method."""
        self.late.begin()
        self._was_raised, self._alarm = False, ""

    def begin(self) -> None:
        """Begin anew."""
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """Waiting predictions and counts."""
        return {"late": self.late.state_dict(), "was_raised": self._was_raised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.begin()
        self.late.load_state_dict(state["late"])
        self._was_raised = state["was_raised"]
