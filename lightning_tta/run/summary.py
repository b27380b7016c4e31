"""The account of a stream: counts per domain, passes, time, and what happened to the method."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tta.metrics import Calibration
from lightning_tta.run.batches import BatchRecord

WINDOW = 8
"""Batches over which the recent predicted-class share is taken."""


class StreamSummary:
    """Adds up what a stream's batches report. Plain numbers: cheap to keep, to save and to merge.

    ``started`` is set from outside, with the first batch that had images: what the resets are counted from.

    Args:
        domain_names: Names by domain number.
        counted: The domains whose images make up the overall accuracy; by default all.
    """

    def __init__(self, domain_names: list[str], counted: list[str] | None = None) -> None:
        self.domain_names = list(domain_names)
        self._counted = [name in (counted or domain_names) for name in domain_names]
        self.batches = self.images = self.resets = self.missed = 0
        self.skipped_batches = self.skipped_images = 0
        self.started = False
        self.seconds = 0.0
        self.last: dict[str, Any] = {}
        self._labelled = [0] * len(domain_names)
        self._correct = [0] * len(domain_names)
        self._images = [0] * len(domain_names)
        self._entropy = [0.0] * len(domain_names)
        self._classes: list[Tensor | None] = [None] * len(domain_names)
        self.calibration = Calibration()
        self._totals: dict[str, float] = {}
        self._recent: deque[Tensor] = deque(maxlen=WINDOW)
        self._recent_labels: deque[Tensor] = deque(maxlen=WINDOW)

    def update(self, batch: BatchRecord) -> None:
        """Take in one batch; one that was refused counts as a batch, its images in no accuracy."""
        self.batches += 1
        if batch.error:
            self._skip(batch)
            return
        domain, label, prediction = batch.domain, batch.label, batch.measures.prediction
        classes = batch.logits.shape[1]
        correct = prediction == label
        counted = torch.tensor(self._counted)[domain]
        self.calibration.update(batch.logits[counted], label[counted])
        for number in sorted(set(domain.tolist())):
            here = domain == number
            self._images[number] += int(here.sum())
            self._labelled[number] += int((label[here] >= 0).sum())
            self._correct[number] += int(correct[here].sum())
            self._entropy[number] += float(batch.measures.entropy[here].sum())
            counts = torch.bincount(prediction[here], minlength=classes)
            before = self._classes[number]
            self._classes[number] = counts if before is None else before + counts
        self.missed += not batch.adapted or bool(batch.stats.get("only_predicted"))
        self.images += len(batch)
        self.seconds += batch.seconds
        for name in ("forwards", "backwards", "skipped_steps", "nonfinite_images"):
            self._totals[name] = self._totals.get(name, 0) + batch.stats.get(name, 0)
        self._recent.append(batch.measures.counts)
        self._recent_labels.append(torch.bincount(label[label >= 0], minlength=classes))
        labelled = int((label >= 0).sum())
        self.last = {
            **self._place(batch),
            "accuracy": int(correct.sum()) / labelled if labelled else None,
            "accuracy_so_far": self.accuracy,
            "recent_class_share": _largest_share(self._recent),
            "recent_label_share": _largest_share(self._recent_labels),
            "seconds": batch.seconds,
            **{name: float(value) for name, value in batch.measures.means().items()},
            **batch.stats,
        }

    def _skip(self, batch: BatchRecord) -> None:
        self.missed += 1
        self.skipped_batches += 1
        self.skipped_images += len(batch)
        self.last = {**self._place(batch), "skipped": batch.error}

    def _place(self, batch: BatchRecord) -> dict[str, Any]:
        """Where in the stream a batch is."""
        names = {self.domain_names[number] for number in batch.domain.tolist()} or set(self.domain_names[:1])
        return {
            "batch": self.batches - 1,
            "domain": names.pop() if len(names) == 1 else "mixed",
            "images": len(batch),
            "images_seen": self.images,
        }

    @classmethod
    def merged(cls, parts: Sequence[StreamSummary], *, together: bool) -> StreamSummary:
        """The account of a stream that several processes shared.

        Args:
            parts: Theirs.
            together: Whether they shared each batch: batches, passes and resets are those of one, seconds those of
                the slowest. Else each had whole domains: all add up, seconds too, and what one process would have
                been reset for, between the domains of two that have started, counts as a reset.
        """
        same: Callable[[Iterable[Any]], Any] = max if together else sum
        total = cls(parts[0].domain_names)
        total._counted = parts[0]._counted
        for name in ("batches", "missed", "resets", "seconds", "skipped_batches", "skipped_images"):
            setattr(total, name, same([getattr(part, name) for part in parts]))
        total.started = any(part.started for part in parts)
        total.resets += 0 if together or not total.started else sum(part.started for part in parts) - 1
        total.images = sum(part.images for part in parts)
        for name in ("_labelled", "_correct", "_images", "_entropy"):
            setattr(total, name, [sum(values) for values in zip(*(getattr(part, name) for part in parts), strict=True)])
        total.calibration.bins = torch.stack([part.calibration.bins for part in parts]).sum(0)
        total.calibration.scores = torch.stack([part.calibration.scores for part in parts]).sum(0)
        for number in range(len(total.domain_names)):
            counts = [count for part in parts if (count := part._classes[number]) is not None]
            total._classes[number] = torch.stack(counts).sum(0) if counts else None
        for name in dict.fromkeys(name for part in parts for name in part._totals):
            values = [part._totals.get(name, 0) for part in parts]
            total._totals[name] = sum(values) if name == "nonfinite_images" else same(values)
        return total

    @property
    def accuracy(self) -> float | None:
        """Share of labelled images predicted right so far, or ``None`` without labels."""
        labelled = sum(n for n, counts in zip(self._labelled, self._counted, strict=True) if counts)
        correct = sum(n for n, counts in zip(self._correct, self._counted, strict=True) if counts)
        return correct / labelled if labelled else None

    def domain_accuracy(self, name: str) -> float | None:
        """The same for one domain."""
        number = self.domain_names.index(name)
        return self._correct[number] / self._labelled[number] if self._labelled[number] else None

    def state_dict(self) -> dict[str, Any]:
        """All of it, in lists, dicts, numbers and tensors."""
        state = {name: list(value) if isinstance(value, deque) else value for name, value in vars(self).items()}
        return {**state, "calibration": [self.calibration.bins, self.calibration.scores]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        rest = dict(state)
        self.calibration.bins, self.calibration.scores = rest.pop("calibration")
        for name, value in rest.items():
            setattr(self, name, deque(value, WINDOW) if isinstance(getattr(self, name), deque) else value)

    def result(self) -> dict[str, Any]:
        """The numbers of ``report.json``."""
        domains = {}
        for number, name in enumerate(self.domain_names):
            images, counts = self._images[number], self._classes[number]
            if images and counts is not None:
                domains[name] = {
                    "accuracy": self.domain_accuracy(name),
                    "images": images,
                    "entropy": self._entropy[number] / images,
                    "largest_class_share": float(counts.max() / counts.sum()),
                    "counted": self._counted[number],
                }
        return {
            "accuracy": self.accuracy,
            "images": self.images,
            "batches": self.batches,
            "domains": domains,
            **self.calibration.result(),
            "forwards": int(self._totals.get("forwards", 0)),
            "backwards": int(self._totals.get("backwards", 0)),
            "skipped_steps": int(self._totals.get("skipped_steps", 0)),
            "nonfinite_images": int(self._totals.get("nonfinite_images", 0)),
            "skipped_batches": self.skipped_batches,
            "skipped_images": self.skipped_images,
            "resets": self.resets,
            "batches_not_adapted_on": self.missed,
            "seconds": self.seconds,
            "seconds_per_batch": self.seconds / self.batches if self.batches else None,
        }


def _largest_share(counts: deque[Tensor]) -> float | None:
    total = torch.stack(list(counts)).sum(0)
    return float(total.max() / total.sum()) if int(total.sum()) else None
