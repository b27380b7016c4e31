"""Labels that come late, by the id of an answer: who was right, and whether that can be chance."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tta.errors import InputError, check_range

_BETS = [number / 20 for number in range(1, 20)]
Better = Literal["method", "source", ""]


@dataclass
class Counts:
    """Of answers whose label is known.

    Attributes:
        labels: How many: pairs of a prediction of the source and one of the method as it is now.
        source_right: Of these, where the source was right.
        method_right: Where the method was.
        only_source: Where the source alone was.
        only_method: Where the method alone was.
        answers: How many labels of answers that went out, whoever gave them.
        answers_right: Of these, how many answers were right.
    """

    labels: int = 0
    source_right: int = 0
    method_right: int = 0
    only_source: int = 0
    only_method: int = 0
    answers: int = 0
    answers_right: int = 0

    def better(self, alpha: float) -> Better:
        """Which of the two the labels show to be better, at level ``alpha`` in (0, 0.5]; empty: neither."""
        bound = -math.log(alpha)
        if log_wealth(self.only_method, self.only_source) >= bound:
            return "method"
        return "source" if log_wealth(self.only_source, self.only_method) >= bound else ""


def log_wealth(wins: int, losses: int) -> float:
    """Log of what bets on one of two have become: the mean over bets b of (1 + b)^wins (1 - b)^losses, from 1.

    If the one wins no more often than the other, whatever has come before, this is a supermartingale: it ever reaches
    1 / alpha with probability alpha at most (Ville's inequality). So it may be looked at after every label.

    Args:
        wins: How often the one alone was right.
        losses: How often the other alone was.
    """
    logs = [wins * math.log1p(bet) + losses * math.log1p(-bet) for bet in _BETS]
    highest = max(logs)
    return highest + math.log(sum(math.exp(log - highest) for log in logs) / len(logs))


class PairedLabels:
    """Keeps what was predicted until its label comes, in bounded memory; safe to be called from many threads.

    Args:
        keep: Answers that wait for their label, at most; the oldest go first.
        alpha: Chance, at most, in (0, 0.5], that the method is ever called better while it is not; so of the source.
    """

    def __init__(self, keep: int = 10_000, alpha: float = 0.05) -> None:
        check_range("keep_answers", keep, 1, integer=True)
        check_range("alpha", alpha, 0, 0.5, low_open=True)
        self.keep, self.alpha = keep, alpha
        self.counts = Counts()
        self.classes = 0  # of the answers; 0: not known yet
        self._waiting: dict[str, list[int]] = {}  # id -> prediction that went out, source's, method's (-1: none yet)
        self._early: dict[str, int] = {}  # labels that came before the method had predicted
        self._lock = threading.Lock()

    def answer(self, ids: Sequence[str], predictions: Sequence[int], classes: int = 0) -> None:
        """Keep what goes out: predictions of so many classes."""
        with self._lock:
            self.classes = classes
            for id, prediction in zip(ids, predictions, strict=True):
                self._waiting[id] = [prediction, -1, -1]
            while len(self._waiting) > self.keep:
                gone = next(iter(self._waiting))
                del self._waiting[gone]
                self._early.pop(gone, None)

    def predict(self, ids: Sequence[str], source: Sequence[int], method: Sequence[int]) -> None:
        """Note what both have predicted."""
        with self._lock:
            for id, one, other in zip(ids, source, method, strict=True):
                if id in self._waiting:
                    self._waiting[id][1:] = [one, other]
                    if id in self._early:
                        self._count(self._waiting.pop(id), self._early.pop(id))

    def checked(self, ids: Sequence[str], labels: Tensor | Iterable[int]) -> list[int]:
        """Labels as plain numbers.

        Raises:
            InputError: If there are not as many labels as ids, or one is no class number.
        """
        numbers: Any = labels
        if hasattr(labels, "tolist"):  # of torch and NumPy
            numbers = labels.tolist()
        several = all(isinstance(each, Iterable) and not isinstance(each, str) for each in (ids, numbers))
        numbers = [n.item() if hasattr(n, "item") else n for n in numbers] if several else [numbers]
        number_of_ids = len(list(ids)) if several else 1
        wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < 0]
        wrong = wrong or [n for n in numbers if self.classes and n >= self.classes]
        if not several or number_of_ids != len(numbers) or wrong or not all(isinstance(id, str) for id in ids):
            most = f"to {self.classes - 1}" if self.classes else "on"
            raise InputError(
                f"A list of ids, as answers have them, and a label for each, a whole number from 0 {most}: got "
                f"{number_of_ids} ids and {len(numbers)} labels, such as {(wrong or numbers)[:3]}."
            )
        checked: list[int] = numbers
        return checked

    def tell(self, ids: Sequence[str], labels: Tensor | Iterable[int]) -> int:
        """Take labels; returns of how many an answer is known. A label counts once.

        Raises:
            InputError: As :meth:`checked`.
        """
        numbers = self.checked(ids, labels)
        known = 0
        with self._lock:
            for id, label in zip(ids, numbers, strict=True):
                entry = self._waiting.get(id)
                if entry is None or id in self._early:
                    continue
                known += 1
                self.counts.answers += 1
                self.counts.answers_right += entry[0] == label
                if entry[2] < 0:
                    self._early[id] = label
                else:
                    self._count(self._waiting.pop(id), label)
        return known

    def _count(self, entry: list[int], label: int) -> None:
        _, one, other = entry
        source, method = one == label, other == label
        self.counts.labels += 1
        self.counts.source_right += source
        self.counts.method_right += method
        self.counts.only_source += source and not method
        self.counts.only_method += method and not source

    def known(self) -> Counts:
        """The counts of this moment, as a copy."""
        with self._lock:
            return copy.copy(self.counts)

    @property
    def better(self) -> Better:
        """Which of the two the labels show to be better, at level ``alpha``; empty: neither."""
        return self.known().better(self.alpha)

    def forget(self) -> None:
        """The method is another from here on: its earlier predictions say nothing of it."""
        with self._lock:
            for entry in self._waiting.values():
                entry[1:] = [-1, -1]
            self.counts = Counts(answers=self.counts.answers, answers_right=self.counts.answers_right)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain values and tensors."""
        with self._lock:
            predictions = torch.tensor(list(self._waiting.values()), dtype=torch.int32).reshape(-1, 3)
            return {
                "counts": asdict(self.counts),
                "ids": list(self._waiting),
                "waiting": predictions,
                "early": dict(self._early),
                "classes": self.classes,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        with self._lock:
            self.counts = Counts(**state["counts"])
            self._waiting = dict(zip(state["ids"], state["waiting"].tolist(), strict=True))
            self._early = dict(state["early"])
            self.classes = int(state.get("classes", 0))
