"""Labels that come late, and of some samples only: an estimate of accuracy with an interval that holds at all times."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_tta.errors import InputError, check_choice, check_range

Index = int | str
Interval = Literal["anytime", "clopper_pearson"]
_TILTS = np.concatenate([sign * np.geomspace(0.02, 6.0, 24) for sign in (-1, 1)])
_HALVINGS = 50


def anytime_interval(right: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean accuracy when ``right`` of ``number`` labelled samples were right; it holds at all times.

    With probability ``level`` all intervals of a stream, one after each label, hold what they are for: the mean over
    the labelled samples of the probability to be right, given what came before. This may change along the stream, as of
    a net that adapts. So the interval may be read after each label, and acted on. It is about 1.6 times as wide as that
    of Clopper and Pearson, which holds for one look that was fixed before, and for one accuracy that never changes.

    With S of t right, and m the mean: ``M = mean_j exp(l_j S) / (1 - m + m e^l_j)^t`` over fixed tilts l_j. As
    ``log(1 - m + m e^l)`` is concave in m, M is no larger than a martingale that starts at 1, whatever the accuracies;
    so M >= 1 / (1 - level) ever happens with probability 1 - level at most. The interval has the m below this.

    Args:
        right: S, from 0 to ``number``.
        number: t, at least 0; of none the interval is (0, 1).
        level: In [0.5, 0.9999].

    Raises:
        ConfigError: If one is out of range.

    Source: Ville's inequality and a mixture of exponential martingales, as in Howard et al., Annals of Statistics 2021,
    arXiv 1810.08240; the mixture over a fixed grid of tilts is ours.
    """
    _check_counts(right, number, level)
    if not number:
        return 0.0, 1.0
    bound = math.log(1 / (1 - level)) + math.log(len(_TILTS))

    def excess(mean: float) -> float:
        """Log of M over its bound: convex in the mean, and below 0 at the share that was right."""
        exponents = _TILTS * right - number * np.log1p(mean * np.expm1(_TILTS))
        largest = exponents.max()
        return float(largest + np.log(np.exp(exponents - largest).sum())) - bound

    share = right / number
    ends = []
    for end in (0.0, 1.0):
        inside, outside = share, end
        if excess(end) < 0:
            inside = end
        else:
            for _ in range(_HALVINGS):
                middle = (inside + outside) / 2
                inside, outside = (middle, outside) if excess(middle) < 0 else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


def clopper_pearson(right: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of one accuracy when ``right`` of ``number`` independent samples were right, for one look.

    It holds the accuracy with probability ``level`` at least, if number and time of the look were fixed before.

    Source: Clopper and Pearson, Biometrika 1934.
    """
    from scipy.stats import beta  # takes a second: imported when needed

    _check_counts(right, number, level)
    tail = (1 - level) / 2
    low = 0.0 if right == 0 else float(beta.ppf(tail, right, number - right + 1))
    high = 1.0 if right == number else float(beta.ppf(1 - tail, right + 1, number - right))
    return low, high


def _check_counts(right: int, number: int, level: float) -> None:
    right, number = (int(count) if isinstance(count, np.integer) else count for count in (right, number))
    check_range("number", number, 0, integer=True)
    check_range("right", right, 0, number, integer=True)
    check_range("level", level, 0.5, 0.9999)


def read_names(index: Sequence[Index] | Tensor) -> list[Index]:
    """Names of samples as plain whole numbers or texts.

    Raises:
        InputError: If they are none: a single one, or floats, or lists.
    """
    names = index.tolist() if isinstance(index, (Tensor, np.ndarray)) else index
    if not isinstance(names, (str, bytes)):
        with suppress(TypeError):  # a single one
            plain = [int(name) if isinstance(name, np.integer) else name for name in names]
            if all(isinstance(name, (int, str)) for name in plain):
                return plain
    raise InputError(
        f"index must be a list of whole numbers or texts, one for each sample; got "
        f"{type(index).__name__} {names!r:.60}."
    )


class LateLabels:
    """Accuracy of a stream from labels that come late, in any order, and of some samples only.

    ::

        late = LateLabels()
        late.see(index, predictions)        # with each batch
        late.tell(index, labels)            # whenever some become known
        accuracy, low, high = late.estimate()

    The estimate is the share of labelled samples whose prediction, as it was answered, is the label. It is unbiased for
    the accuracy of the answers if which samples get a label does not depend on whether they were answered rightly; a
    person who only looks at doubtful answers breaks that.

    Memory is bounded: the predictions of the last ``waiting`` samples wait for their labels, and two counts.

    - A label of a sample that was never seen, or so long ago that its prediction was dropped, is left out and counted
      in ``unknown``. If no label has counted, and more are unknown than samples waited at a :meth:`begin`, it warns:
      perhaps indices are written in another way.
    - A second label of a sample is left out and counted in ``repeated``.
    - A sample that is seen again has a new prediction; one that still waited for its label is replaced, and counted in
      ``replaced``.
    - A label or a prediction below 0 is none, and is left out.

    Args:
        waiting: Predictions that wait for labels, at least 1.
        window: Only the latest so many labels count, at least 1; ``None``: all.
        interval: ``anytime`` (:func:`anytime_interval`), which may be read at all times; or ``clopper_pearson``
            (:func:`clopper_pearson`), narrower, for one look. With a window ``clopper_pearson`` is the honest one: the
            last labels are no sum from a beginning, and so not what ``anytime`` is for.
        level: That the interval holds, in [0.5, 0.9999].

    Attributes:
        right: Labelled samples answered rightly.
        number: Labelled samples.
        unknown, repeated, replaced: See above.

    Raises:
        ConfigError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        waiting: int = 100_000,
        window: int | None = None,
        interval: Interval | None = None,
        level: float = 0.95,
    ) -> None:
        check_range("waiting", waiting, 1, integer=True)
        if window is not None:
            check_range("window", window, 1, integer=True)
        if interval is not None:
            check_choice("interval", interval, get_args(Interval))
        check_range("level", level, 0.5, 0.9999)
        self.waiting, self.window, self.level = waiting, window, level
        self.interval: Interval = interval or ("anytime" if window is None else "clopper_pearson")
        self._waiting: OrderedDict[Index, int] = OrderedDict()  # the prediction; -1 once its label came
        self._forgotten = 0  # samples that waited for a label when all was forgotten
        self.begin()

    def begin(self) -> None:
        """Forget all: labels of what was answered before are unknown from here on."""
        self._forgotten += sum(prediction >= 0 for prediction in self._waiting.values())
        self._waiting.clear()
        self._last: deque[bool] = deque(maxlen=self.window or 1)
        self.right = self.number = self.unknown = self.repeated = self.replaced = 0

    def see(self, index: Sequence[Index] | Tensor, predictions: Sequence[int] | Tensor) -> None:
        """Keep what was answered.

        Args:
            index: What the stream calls each sample, of length B.
            predictions: Classes (B,), or logits (B, K); a row of zeros, or one that is not finite, is no prediction.

        Raises:
            InputError: If their lengths differ, or they are no classes.
        """
        if isinstance(predictions, Tensor) and predictions.ndim == 2:
            there_is_one = predictions.isfinite().all(1) & (predictions != 0).any(1)
            predictions = torch.where(there_is_one, predictions.argmax(1), -1)
        for name, prediction in self._pairs(index, predictions, "predictions"):
            if prediction < 0:
                continue
            self.replaced += self._waiting.pop(name, -1) >= 0
            self._waiting[name] = prediction
        while len(self._waiting) > self.waiting:
            self._waiting.popitem(last=False)

    def tell(self, index: Sequence[Index] | Tensor, labels: Sequence[int] | Tensor) -> int:
        """Take in labels (B,) of samples that were seen before; returns how many count.

        Raises:
            InputError: If their lengths differ, or they are no classes.
        """
        counted = told = 0
        for name, label in self._pairs(index, labels, "labels"):
            if label < 0:
                continue
            told += 1
            prediction = self._waiting.get(name)
            if prediction is None:
                self.unknown += 1
            elif prediction < 0:
                self.repeated += 1
            else:
                self._waiting[name] = -1
                counted += 1
                self._count(prediction == label)
        if told and not counted and self.unknown > self._forgotten and not self.number:
            warnings.warn(
                f"None of {told} labels is of a sample that waits for one, and none has been so far: {self.unknown} "
                f"unknown. Give the indices that were seen with the predictions, of the same type (an int is no "
                f"str), and not older than the last {self.waiting} samples (option waiting).",
                stacklevel=2,
            )
        return counted

    def _count(self, is_right: bool) -> None:
        if self.window is not None:
            if len(self._last) == self.window:
                self.right -= self._last[0]
                self.number -= 1
            self._last.append(is_right)
        self.right += is_right
        self.number += 1

    def estimate(self) -> tuple[float, float, float]:
        """Accuracy, and the ends of its interval, in [0, 1]; without a label (nan, 0, 1)."""
        if not self.number:
            return math.nan, 0.0, 1.0
        ends = (anytime_interval if self.interval == "anytime" else clopper_pearson)(
            self.right, self.number, self.level
        )
        return self.right / self.number, *ends

    def state_dict(self) -> dict[str, Any]:
        """All that it knows, in plain values."""
        names = ("right", "number", "unknown", "repeated", "replaced")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state["forgotten"] = self._forgotten
        return {**state, "waiting": list(self._waiting.items()), "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.begin()
        for name in ("right", "number", "unknown", "repeated", "replaced"):
            setattr(self, name, state[name])
        self._forgotten = state.get("forgotten", 0)  # early states have none
        self._waiting.update((name, prediction) for name, prediction in state["waiting"])
        self._last.extend(state["last"])

    @staticmethod
    def _pairs(index: Sequence[Index] | Tensor, values: Sequence[int] | Tensor, what: str) -> list[tuple[Index, int]]:
        names = read_names(index)
        numbers = torch.as_tensor(values)
        if numbers.ndim != 1 or len(numbers) != len(names):
            raise InputError(
                f"index and {what} must be of the same length, one for each sample; got {len(names)} and "
                f"{tuple(numbers.shape)}."
            )
        if len(numbers) and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
            raise InputError(f"{what} must be classes, whole numbers from 0; got {numbers.dtype}.")
        return list(zip(names, numbers.tolist(), strict=True))
