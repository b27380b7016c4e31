"""The record of a batch, and the account of a stream: counts per domain, passes, time, what happened to the method."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tta.data.domain_names import POLLUTION, VISIT
from lightning_tta.metrics import Calibration, LogitMeasures, class_counts

WINDOW = 8
"""Batches over which the recent predicted-class share is taken."""
TOTALS = ("forwards", "backwards", "skipped_steps", "nonfinite_images")
"""Entries of a method's ``stats`` that add up along a stream."""
_MEANS = dict.fromkeys(("entropy", "largest_class_share", "logit_norm")).keys()  # in this order


@dataclass
class BatchRecord:
    """One batch of a stream, on the CPU: made once, and read by the account, the files, the curves and the board."""

    logits: Tensor  # (B, K), detached; (B, 0) of a batch that was refused
    index: Tensor  # number (B,) of each image in the stream
    domain: Tensor  # number (B,) of its domain
    label: Tensor  # (B,), -1 where it is not known
    stats: dict[str, float] = field(default_factory=dict)  # of the method, empty where it did not adapt
    seconds: float = 0.0  # time of the method
    adapted: bool = True
    error: str = ""  # why the batch was refused
    images: Tensor | None = None  # (B, C, H, W), on the device, as the method got them
    files: Sequence[str] = ()  # names of the images' files, where they are known
    damaged: Tensor | None = None  # which files could not be read, bool (B,); their logits are zeros
    note: str = ""  # why they could not be

    rows: ClassVar[tuple[str, ...]] = ("logits", "index", "domain", "label")
    """The fields with a row for each image."""

    def __post_init__(self) -> None:
        self.logits = self.logits.detach().cpu()
        self.index, self.domain, self.label = self.index.cpu(), self.domain.cpu(), self.label.cpu()
        self.measures = LogitMeasures(self.logits)  # what the logits say without labels

    def __len__(self) -> int:
        return len(self.index)

    def without_damaged(self) -> BatchRecord:
        """The images that could be read."""
        if self.damaged is None:
            return self
        rows = {name: getattr(self, name)[~self.damaged] for name in self.rows if getattr(self, name) is not None}
        return replace(self, **rows, images=None, files=(), damaged=None)

    def outputs(self) -> dict[str, Tensor]:
        """What a predict step returns: ``logits`` (B, K) and the others (B,).

        Prediction -1 means none: the batch was refused, or pixels of the image, or its logits, are not finite.
        """
        outputs = {"logits": self.logits, "index": self.index, "domain": self.domain, "label": self.label}
        if self.error:
            zeros = torch.zeros(len(self))
            return {**outputs, "prediction": torch.full((len(self),), -1), "confidence": zeros, "entropy": zeros}
        m = self.measures
        outputs |= {"prediction": m.prediction, "confidence": m.confidence, "entropy": m.entropy}
        if self.damaged is not None:
            for name, value in (("prediction", -1), ("confidence", 0), ("entropy", 0)):
                outputs[name] = outputs[name].masked_fill(self.damaged, value)
        return outputs


class StreamSummary:
    """Adds up what a stream's batches report. Plain numbers: cheap to keep, to save and to merge.

    ``started`` is set from outside, with the first batch that had images: what the resets are counted from.

    Args:
        domain_names: Names by domain number.
        counted: The domains whose images make up the overall accuracy; by default all.
    """

    means: ClassVar[Iterable[str]] = _MEANS
    """What is said of each batch without labels, by the names of the record's measures."""

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
        self._classes: list[Any] = [None] * len(domain_names)
        self.calibration = Calibration()
        self._totals: dict[str, float] = {}
        self._recent: deque[Any] = deque(maxlen=WINDOW)
        self._recent_labels: deque[Any] = deque(maxlen=WINDOW)

    def domain_number(self, name: str) -> int:
        """Number of a domain, a new one where nobody has named it yet: of a loader that says its domains on the way."""
        if name not in self.domain_names:
            self.domain_names.append(name)
            self._counted.append(True)
            for counts, zero in ((self._labelled, 0), (self._correct, 0), (self._images, 0), (self._entropy, 0.0)):
                counts.append(zero)  # type: ignore[arg-type]
            self._classes.append(None)
        return self.domain_names.index(name)

    def update(self, batch: BatchRecord) -> None:
        """Take in one batch; one that was refused counts as a batch, its images in no accuracy."""
        names = {self.domain_names[number].removesuffix(POLLUTION) for number in batch.domain.tolist()}
        names = names or set(self.domain_names[:1])
        self.last = {
            "batch": self.batches,
            "domain": names.pop() if len(names) == 1 else "mixed",
            "images": len(batch),
            "images_seen": self.images,
        }
        self.batches += 1
        if batch.error:
            self.missed += 1
            self.skipped_batches += 1
            self.skipped_images += len(batch)
            self.last["skipped"] = batch.error
            return
        if batch.damaged is not None:
            self.skipped_images += int(batch.damaged.sum())
            self.last["skipped"] = batch.note
            batch = batch.without_damaged()
            self.last["images"] = len(batch)
        self.missed += not batch.adapted or bool(batch.stats.get("only_predicted"))
        self.images += len(batch)
        self.seconds += batch.seconds
        for name in TOTALS:
            self._totals[name] = self._totals.get(name, 0) + batch.stats.get(name, 0)
        said = self._add(batch)
        means = batch.stats if batch.stats.keys() >= set(self.means) else batch.measures.means()
        self.last |= {
            "images_seen": self.images,
            **said,
            "seconds": batch.seconds,
            **{name: float(means[name]) for name in self.means},
            **batch.stats,
        }

    # What another kind of prediction than a class counts in another way

    def _add(self, batch: BatchRecord) -> dict[str, Any]:
        """Take in what was predicted; what the account of the batch says of it."""
        # numpy: on so few numbers a call of torch costs several times as much
        domain = batch.domain.numpy()
        numbers, entropy = sorted(set(domain.tolist())), batch.measures.entropy
        labelled, correct = self._judged(batch)
        whole = all(self._counted[number] for number in numbers)
        self._calibrate(batch, None if whole else torch.tensor(self._counted)[batch.domain])
        for number in numbers:
            here, whole = domain == number, len(numbers) == 1
            self._images[number] += int(np.count_nonzero(here))
            self._labelled[number] += int(labelled[here].sum())
            self._correct[number] += int(correct[here].sum())
            self._entropy[number] += float((entropy if whole else entropy[torch.from_numpy(here)]).sum())
            counts = batch.measures.counts if whole else self._counts(batch, here)
            before = self._classes[number]
            self._classes[number] = counts if before is None else self._joined([before, counts])
        self._recent.append(batch.measures.counts)
        self._recent_labels.append(self._label_counts(batch))
        if 0 < (known := int(np.count_nonzero(labelled))) < len(batch):
            self.last["labelled_images"] = known
        return {
            "accuracy": int(correct.sum()) / int(labelled.sum()) if labelled.any() else None,
            "accuracy_so_far": self.accuracy,
            "recent_class_share": self._recent_share(self._recent),
            "recent_label_share": self._recent_share(self._recent_labels),
        }

    def _judged(self, batch: BatchRecord) -> tuple[NDArray[Any], NDArray[Any]]:
        """How many labels of each image are known, and how many predictions are right, (B,)."""
        label = batch.label.numpy()
        return label >= 0, (label >= 0) & (batch.measures.prediction.numpy() == label)

    def _calibrate(self, batch: BatchRecord, counted: Tensor | None) -> None:
        """Take in how sure the predictions were, of the samples that count, bool (B,), or of all."""
        rows = slice(None) if counted is None else counted
        self.calibration.update(batch.logits[rows], batch.label[rows])

    def _counts(self, batch: BatchRecord, rows: NDArray[np.bool_]) -> Any:
        """How often each class comes among the predictions of some images of a batch, bool (B,)."""
        return class_counts(batch.measures.prediction[torch.from_numpy(rows)], batch.logits.shape[1])

    def _label_counts(self, batch: BatchRecord) -> Any:
        """The same of the labels that are known."""
        labels = batch.label.numpy()
        return torch.from_numpy(np.bincount(labels[labels >= 0], minlength=batch.logits.shape[1]))

    def _joined(self, counts: Sequence[Any]) -> Any:
        """Counts added up."""
        return torch.stack(list(counts)).sum(0)

    def _share(self, counts: Any) -> float:
        """That of the most frequent class."""
        return float(counts.max() / counts.sum().clamp_min(1))

    def _recent_share(self, counts: deque[Any]) -> float | None:
        """The same of some batches; ``None`` where they have nothing."""
        total = np.sum([each.numpy() for each in counts], axis=0)
        number = total.sum()
        return float(np.float32(total.max()) / np.float32(number)) if number else None  # in float32, as torch has it

    @classmethod
    def merged(cls, shards: Sequence[StreamSummary], *, together: bool) -> StreamSummary:
        """The account of a stream from those of the processes that shared it.

        Where they shared each batch (``together``), batches, passes and resets are those of one, seconds those of the
        slowest. Else each had whole domains: all add up, seconds too, and what one process would have been reset for,
        between the domains of two that have started, counts as a reset.
        """
        combine: Callable[[Iterable[Any]], Any] = max if together else sum
        total = cls(shards[0].domain_names)
        total._counted = shards[0]._counted
        for name in ("batches", "missed", "resets", "seconds", "skipped_batches", "skipped_images"):
            setattr(total, name, combine([getattr(shard, name) for shard in shards]))
        started = sum(shard.started for shard in shards)
        total.started = started > 0
        total.resets += 0 if together or not started else started - 1
        total.images = sum(shard.images for shard in shards)
        for name in ("_labelled", "_correct", "_images", "_entropy"):
            setattr(total, name, [sum(values) for values in zip(*(getattr(s, name) for s in shards), strict=True)])
        total.calibration.bins = torch.stack([shard.calibration.bins for shard in shards]).sum(0)
        total.calibration.scores = torch.stack([shard.calibration.scores for shard in shards]).sum(0)
        for number in range(len(total.domain_names)):
            counts = [count for shard in shards if (count := shard._classes[number]) is not None]
            total._classes[number] = torch.stack(counts).sum(0) if counts else None
        for name in TOTALS:
            values = [shard._totals.get(name, 0) for shard in shards]
            total._totals[name] = sum(values) if name == "nonfinite_images" else combine(values)
        return total

    @property
    def accuracy(self) -> float | None:
        """Share of labelled images predicted right so far, or ``None`` without labels."""
        labelled = sum(compress(self._labelled, self._counted))
        return sum(compress(self._correct, self._counted)) / labelled if labelled else None

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

    def _part(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The numbers of some domains together, of which one has images."""
        images, labelled = (sum(each[number] for number in numbers) for each in (self._images, self._labelled))
        counts = self._joined([count for number in numbers if (count := self._classes[number]) is not None])
        return {
            "accuracy": sum(self._correct[number] for number in numbers) / labelled if labelled else None,
            "images": images,
            "entropy": sum(self._entropy[number] for number in numbers) / images,
            "largest_class_share": self._share(counts),
        }

    def result(self, visits: int | None = None) -> dict[str, Any]:
        """The numbers of ``report.json``; of a stream whose domains come so many times also those of each visit."""
        present = [number for number, images in enumerate(self._images) if images]
        names, counted = self.domain_names, self._counted
        report: dict[str, Any] = {}
        if visits:
            each = len(names) // visits
            report["visits"] = {
                f"{VISIT.lstrip(':')}{visit + 1}": self._part(numbers)
                for visit in range(visits)
                if (numbers := [number for number in present if number // each == visit])
            }
        if polluting := [number for number in present if names[number].endswith(POLLUTION)]:
            report["polluting_images"] = sum(self._images[number] for number in polluting)
        return {
            "accuracy": self.accuracy,
            "images": self.images,
            "labelled_images": sum(compress(self._labelled, self._counted)),
            "batches": self.batches,
            "domains": {names[n]: {**self._part([n]), "counted": counted[n]} for n in present},
            **report,
            **self.calibration.result(),
            **{name: int(self._totals.get(name, 0)) for name in TOTALS},
            "skipped_batches": self.skipped_batches,
            "skipped_images": self.skipped_images,
            "resets": self.resets,
            "batches_not_adapted_on": self.missed,
            "seconds": self.seconds,
            "seconds_per_batch": self.seconds / self.batches if self.batches else None,
        }
