"""Answers of a language model in a run: the record of a batch of prompts, its account, and the lines of its file."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tta.evidence.labels import clopper_pearson
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.run.outputs import PredictionWriter
from lightning_tta.run.stream_run import Outputs, StreamRun
from lightning_tta.run.summary import TOTALS, BatchRecord, StreamSummary

SHOWN = 200
"""So many characters of the most frequent answer are in the report."""


def number_of(text: str) -> int:
    """The number that stands for an answer, the same in all runs: 48 bits of a hash of the text."""
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12], 16)


@torch.no_grad()
def token_measures(logits: Tensor, ids: Tensor, generated: Tensor, size: int = 256) -> dict[str, Tensor]:
    """What logits say of the tokens that a net wrote, by prompt.

    Args:
        logits: (B, T, V); those at t are of token t + 1.
        ids: Tokens (B, T).
        generated: Which of them the net wrote, bool (B, T); not the first.
        size: How many rows of logits are looked at at a time.

    Returns:
        ``entropy``, mean over a prompt's tokens in nats; ``norm``, mean L2 norm of the logits; ``confidence``, the
        probability of the whole answer; ``tokens``, how many there are: each (B,), float64, on the CPU. Zeros where a
        prompt has none.
    """
    row, token = generated[:, 1:].nonzero(as_tuple=True)
    sums = torch.zeros(4, len(ids), dtype=torch.float64)
    for rows, tokens in zip(torch.split(row, size), torch.split(token, size), strict=True):
        z = at_least_float32(logits[rows, tokens])
        log_p = torch.log_softmax(z, -1).gather(1, ids[rows, tokens + 1, None])[:, 0]
        values = [entropy(z), torch.linalg.vector_norm(z, dim=-1), log_p, torch.ones_like(log_p)]
        sums.index_add_(1, rows.cpu(), torch.stack(values).double().cpu())
    entropies, norms, log_p, tokens = sums
    there = tokens.clamp_min(1)
    return {
        "entropy": entropies / there,
        "norm": norms / there,
        "confidence": torch.where(tokens > 0, log_p.exp(), 0.0),
        "tokens": tokens,
    }


class AnswerMeasures:
    """What is known of a batch of answers without the right ones, under the names of those of logits.

    Attributes:
        prediction: Numbers (B,) that stand for the answers.
        entropy: Mean over an answer's tokens (B,), in nats.
        confidence: Probability (B,) of an answer.
        norm: Mean L2 norm (B,) of the logits of its tokens.
        counts: How often each answer was given, by number.
    """

    def __init__(self, prediction: Tensor, entropy: Tensor, confidence: Tensor, norm: Tensor) -> None:
        self.prediction, self.entropy, self.confidence, self.norm = prediction, entropy, confidence, norm
        self.counts = _counts(prediction.numpy())

    def means(self) -> dict[str, float]:
        """Scalars of the batch; ``largest_class_share`` is that of the most frequent answer."""
        return {
            "entropy": float(self.entropy.mean()),
            "largest_class_share": max(self.counts.values()) / len(self.prediction),
            "logit_norm": float(self.norm.mean()),
        }


@dataclass
class AnswerRecord(BatchRecord):
    """One batch of prompts with their answers. ``logits`` are (B, 0); an answer is right where a checker said so.

    Its prediction is the number of its text, see :func:`number_of`; of a right answer that of the text that was
    expected, so that two ways to write the same are one answer, and predictions equal labels where they are right. An
    answer that has the expected text, but was checked wrong, has the prediction -1.
    """

    prompts: Sequence[str] = ()
    answers: Sequence[str] = ()
    expected: Sequence[str] = ()  # empty where it is not known
    correct: Sequence[bool | None] = ()  # None where it is not known
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))  # of each answer (B,)
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    confidence: Tensor = field(default_factory=lambda: torch.zeros(0))
    norm: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error:
            return
        known = [right is not None for right in self.correct]
        label = [number_of(text) if there else -1 for text, there in zip(self.expected, known, strict=True)]
        prediction = []
        for text, right, number in zip(self.answers, self.correct, label, strict=True):
            own = number_of(text.strip())
            prediction.append(number if right else -1 if own == number else own)
        self.label = torch.tensor(label, dtype=torch.int64)
        measures = AnswerMeasures(torch.tensor(prediction), self.entropy, self.confidence, self.norm)
        self.measures = measures  # type: ignore[assignment]


class AnswerSummary(StreamSummary):
    """The account of a stream of prompts: as of images, with answers in place of classes."""

    def __init__(self, domain_names: list[str], counted: list[str] | None = None) -> None:
        super().__init__(domain_names, counted)
        self.texts: dict[int, str] = {}
        self.tokens = 0
        self._norm = [0.0] * len(domain_names)

    def domain_number(self, name: str) -> int:
        """As of images."""
        number = super().domain_number(name)
        self._norm += [0.0] * (len(self.domain_names) - len(self._norm))
        return number

    def update(self, batch: BatchRecord) -> None:
        """Take in one batch."""
        super().update(batch)
        if batch.error or not isinstance(batch, AnswerRecord):
            return
        self.tokens += int(batch.tokens.sum())
        self.last["generated_tokens"] = int(batch.tokens.sum())
        for number, text, answer in zip(
            batch.measures.prediction.tolist(),
            batch.answers,
            batch.expected,
            strict=True,
        ):
            self.texts.setdefault(number, (answer if number == number_of(answer) else text.strip())[:SHOWN])
        for number in set(batch.domain.tolist()):
            self._norm[number] += float(batch.norm[batch.domain == number].sum())

    def _calibrate(self, batch: BatchRecord, counted: Tensor | None) -> None:
        known = batch.label >= 0 if counted is None else counted & (batch.label >= 0)
        measures = batch.measures
        self.calibration.add(measures.confidence[known], (measures.prediction == batch.label)[known])

    def _counts(self, batch: BatchRecord, rows: NDArray[np.bool_]) -> Any:
        return _counts(batch.measures.prediction.numpy()[rows])

    def _label_counts(self, batch: BatchRecord) -> Any:
        labels = batch.label.numpy()
        return _counts(labels[labels >= 0])

    def _joined(self, counts: Sequence[Any]) -> Any:
        total: dict[int, int] = {}
        for each in counts:
            for number, count in each.items():
                total[number] = total.get(number, 0) + count
        return total

    def _share(self, counts: Any) -> float:
        return float(max(counts.values()) / sum(counts.values()))

    def _recent_share(self, counts: deque[Any]) -> float | None:
        total = self._joined(counts)
        return self._share(total) if total else None

    def _part(self, numbers: Sequence[int]) -> dict[str, Any]:
        part = super()._part(numbers)
        counts = self._joined([count for number in numbers if (count := self._classes[number]) is not None])
        most = max(counts, key=lambda number: counts[number])
        norm = sum(self._norm[number] for number in numbers) / part["images"]
        return {**part, "logit_norm": norm, "most_frequent_answer": self.texts[most]}

    def result(self, visits: int | None = None) -> dict[str, Any]:
        """The numbers of ``report.json``. ``images`` are prompts, classes are answers."""
        result = super().result(visits)
        present = [number for number, count in enumerate(self._images) if count]
        whole = self._part(present) if present else {}
        names = ("entropy", "largest_class_share", "logit_norm", "most_frequent_answer")
        right, known = sum(self._correct), sum(self._labelled)
        return {
            **result,
            "nll": None,  # nothing says how likely the other answers were
            "brier": None,
            "accuracy_interval": list(clopper_pearson(right, known)) if known else None,
            **{name: whole.get(name) for name in names},
            "prompts": self.images,
            "generated_tokens": self.tokens,
            "seconds_per_token": self.seconds / self.tokens if self.tokens else None,
        }


def _counts(numbers: NDArray[np.int64]) -> dict[int, int]:
    values, counts = np.unique(numbers, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def added(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """The ``stats`` of steps that were made one after the other: counts add up, of the others the mean."""
    names = dict.fromkeys(name for each in stats for name in each)
    values = {name: [each[name] for each in stats if name in each] for name in names}
    return {name: sum(each) if name in TOTALS else sum(each) / len(each) for name, each in values.items()}


class AnswerWriter(PredictionWriter):
    """Appends every batch to ``predictions.csv``: one line per prompt, with the answer as text.

    Beside the columns of images: ``prompt``, ``answer``, ``expected``, and ``correct``, 1 or 0; the last two are empty
    where no answer is known. ``prediction`` and ``label`` are numbers that stand for the texts: equal where the answer
    is right. ``confidence`` is the probability of the answer, ``entropy`` the mean over its tokens.
    """

    names: ClassVar[tuple[str, ...]] = ("prompt", "answer", "expected", "correct")

    def _begin(self, run: StreamRun) -> None: ...

    def texts(self, run: StreamRun, output: Outputs) -> dict[str, list[str]]:
        """The columns of :attr:`names`."""
        batch, none = run.batch, [""] * len(output["index"])
        if not isinstance(batch, AnswerRecord):
            return dict.fromkeys(self.names, none)
        correct = ["" if right is None else str(int(right)) for right in batch.correct]
        columns = {"prompt": batch.prompts, "answer": batch.answers, "expected": batch.expected, "correct": correct}
        return {name: [_writable(text) for text in texts] or none for name, texts in columns.items()}


def _writable(text: str) -> str:
    """Text as a line of a file can hold it; half a pair of UTF-16 is replaced, and so is a zero byte."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
