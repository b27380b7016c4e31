"""What estimators of accuracy share: a rating of each batch, its average, and an alarm where it falls."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tta.errors import DataError, check_range
from lightning_tta.evidence.betting import LEAST
from lightning_tta.guard.monitors.base import Monitor, Seen

HALF_LIFE = 128
"""Images after which a rating counts half."""
LOW_ACCURACY = "low_accuracy"


class Fall:
    """AETTA's rule for a reset: the estimate is below ``floor``, or has fallen by more than ``fall``.

    It has fallen where the mean of the last five estimates is lower by more than ``fall`` than that of the five before.
    After an alarm it begins anew.

    Args:
        floor: In [0, 1]; the authors' 0.2, for any number of classes; ``None``: no such alarm.
        fall: In [0, 1]; the authors' 0.02; ``None``: no such alarm.
    """

    LENGTH = 5

    def __init__(self, floor: float | None, fall: float | None) -> None:
        for name, value in (("floor", floor), ("fall", fall)):
            if value is not None:
                check_range(name, value, 0, 1)
        self.floor, self.fall = floor, fall
        self.last: deque[float] = deque(maxlen=2 * self.LENGTH)

    def __call__(self, estimate: float) -> bool:
        """Whether this estimate, which follows the earlier ones, raises the alarm."""
        self.last.append(estimate)
        is_low = self.floor is not None and estimate < self.floor
        if not is_low and self.fall is not None and len(self.last) == self.last.maxlen:
            values = list(self.last)
            earlier, later = values[: self.LENGTH], values[self.LENGTH :]
            is_low = sum(later) / self.LENGTH + self.fall < sum(earlier) / self.LENGTH
        if is_low:
            self.last.clear()
        return is_low


class Estimator(Monitor):
    """Rates each batch and averages: after ``half_life`` images a rating counts half, whatever the batches' sizes.

    A batch whose rating is not known, as what it needs was not there, changes nothing.

    Args:
        half_life: In images, at least 1.
        floor: An estimate below this, in [0, 1], raises ``low_accuracy``; ``None``: none does (:class:`Fall`).
        fall: A fall by more than this, in [0, 1], does; ``None``: none does.
    """

    def __init__(self, *, half_life: int = HALF_LIFE, floor: float | None = None, fall: float | None = None) -> None:
        check_range("half_life", half_life, 1, integer=True)
        self.half_life = half_life
        self.rule = Fall(floor, fall)
        self.weight = self.sum = 0.0
        self.last: float | None = None
        self._alarm = ""

    @abstractmethod
    def rate(self, seen: Seen) -> Tensor | None:
        """Estimated accuracy of the batch, B >= 1, a scalar; ``None``: not known."""

    def see(self, seen: Seen) -> None:
        """Rate the batch; its rating enters the average."""
        self._alarm = ""
        rating = self.rate(seen) if len(seen.logits) else None
        if rating is None:
            return
        value = min(1.0, max(0.0, float(rating)))
        old = 0.5 ** (len(seen.logits) / self.half_life)
        self.weight = old * self.weight + (1 - old)  # below 1 at first: the average is over what was seen alone
        self.sum = old * self.sum + (1 - old) * value
        self.last = value
        if self.rule(self.sum / self.weight):
            self._alarm = LOW_ACCURACY

    def alarm(self) -> str:
        """``low_accuracy``, where the rule says so."""
        return self._alarm

    def estimate(self) -> float | None:
        """The average."""
        return self.sum / self.weight if self.weight else None

    def values(self) -> dict[str, float]:
        """The average, and the rating of the last batch."""
        estimate = self.estimate()
        if estimate is None or self.last is None:
            return {}
        return {f"{self.name}_accuracy": estimate, f"{self.name}_accuracy_of_batch": self.last}

    def forget(self) -> None:
        """Begin anew: what was averaged is of another method."""
        self._forget()

    def begin(self) -> None:
        """Begin anew, but keep what was prepared."""
        self._forget()

    def _forget(self) -> None:
        self.weight = self.sum = 0.0
        self.last = None
        self.rule.last.clear()
        self._alarm = ""

    def state_dict(self) -> dict[str, Any]:
        """The average, and the estimates that the rule compares."""
        return {"weight": self.weight, "sum": self.sum, "last": self.last, "recent": list(self.rule.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self._forget()
        self.weight, self.sum, self.last = state["weight"], state["sum"], state["last"]
        self.rule.last.extend(state["recent"])


def labelled_logits(name: str, batches: Iterable[Seen]) -> tuple[Tensor, Tensor]:
    """Logits (N, K) of the source on held-out source images, and their labels (N,), on the host, of those known.

    Raises:
        DataError: If there are fewer than 10 with a label, or a label is no class of the net.
    """
    logits, labels = [], []
    for seen in batches:
        if seen.labels is None:
            continue
        known = seen.labels.cpu() >= 0
        logits.append(seen.logits.float().cpu()[known])
        labels.append(seen.labels.cpu()[known])
    number = sum(map(len, labels))
    if number < LEAST:
        raise DataError(
            f"The monitor '{name}' needs held-out source images with labels, to see how sure the source is where it is "
            f"right: {LEAST} at least, 1,000 are better; got {number or 'none'}. Prepare it with labelled images that "
            "the net was not trained on, 'label' (B,) in each batch, or use 'aetta', which needs no labels."
        )
    z, y = torch.cat(logits), torch.cat(labels)
    if int(y.max()) >= z.shape[1]:
        raise DataError(
            f"The monitor '{name}' needs labels that are classes of the net, from 0 to {z.shape[1] - 1}; got "
            f"{int(y.max())}. Count them from 0, and give -1 for a label that is not known."
        )
    return z, y
