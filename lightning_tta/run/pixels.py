"""A class for each pixel in a run: the record of a batch, its account with mean IoU, and its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.metrics import class_counts
from lightning_tta.run.outcomes import Outcome
from lightning_tta.run.outputs import PredictionWriter, printable
from lightning_tta.run.stream_run import Outputs, StreamRun
from lightning_tta.run.summary import BatchRecord, StreamSummary

MASKS = "masks"
"""The folder of the predicted masks in the directory of a run."""
NONE = 255
"""What stands in a predicted mask where there is no prediction; of 8 bits up to 255 classes, else 65535 of 16."""


class PixelMeasures:
    """What is known of a batch of masks without the right ones, under the names of those of logits.

    Attributes:
        prediction: Classes (B, H, W), -1 where there is none.
        entropy: Mean over an image's pixels (B,), in nats.
        confidence: Mean largest probability (B,).
        norm: Mean L2 norm of a pixel's logits (B,).
        counts: How often each class is predicted (K,).
    """

    def __init__(self, prediction: Tensor, entropy: Tensor, confidence: Tensor, norm: Tensor, classes: int) -> None:
        self.prediction, self.entropy, self.confidence, self.norm = prediction, entropy, confidence, norm
        self.classes = classes
        self.counts = class_counts(prediction.flatten().long(), classes)

    def means(self) -> dict[str, Tensor]:
        """Scalars of the batch."""
        share = self.counts.max() / max(1, self.prediction.numel())
        return {"entropy": self.entropy.mean(), "largest_class_share": share, "logit_norm": self.norm.mean()}


@dataclass
class PixelRecord(BatchRecord):
    """One batch of masks. ``logits`` are (B, 0) and labels -1: a class is of a pixel."""

    prediction: Tensor | None = None  # (B, H, W), -1 where there is none
    target: Tensor | None = None  # (B, H, W), below 0 where a pixel does not count; None: there are no masks
    entropy: Tensor | None = None  # (B,), means over pixels
    confidence: Tensor | None = None
    norm: Tensor | None = None
    classes: int = 0

    rows: ClassVar[tuple[str, ...]] = (
        *BatchRecord.rows,
        *("prediction", "target", "entropy", "confidence", "norm"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction is None or self.entropy is None or self.confidence is None or self.norm is None:
            return  # refused
        values = (self.prediction, self.entropy, self.confidence, self.norm, self.classes)
        self.measures = PixelMeasures(*values)  # type: ignore[assignment]
        self.counts = torch.stack([self._counted(row) for row in range(len(self))])

    def _counted(self, row: int) -> Tensor:
        """Pixels of an image by class and prediction (K, K + 1), those without a prediction last; zeros if unknown."""
        assert self.prediction is not None
        k = self.classes
        target = torch.full((1,), -1) if self.target is None else self.target[row].flatten()
        known = target >= 0
        if not bool(known.any()):
            return torch.zeros(k, k + 1, dtype=torch.int64)
        predicted = self.prediction[row].flatten()[known].long()
        predicted = torch.where(predicted < 0, k, predicted)
        matrix = multiclass_confusion_matrix(predicted, target[known], num_classes=k + 1, validate_args=False)
        return matrix[:k].long()

    def outputs(self) -> dict[str, Tensor]:
        """What a predict step returns: masks ``prediction`` int16 (B, H, W), -1 for none, and the others (B,)."""
        outputs = super().outputs()
        if self.prediction is not None and self.damaged is not None:
            outputs["prediction"] = self.prediction.masked_fill(self.damaged[:, None, None], -1)
        return outputs


class PixelSummary(StreamSummary):
    """The account of a stream of masks: ``accuracy`` is of pixels, and the IoU of each class is of all pixels.

    ``IoU_k = n_kk / (sum_j n_kj + sum_j n_jk - n_kk)`` from the confusion matrix n of all pixels that count in a
    domain, or in all; ``mean_iou`` is the mean over the classes that occur among them, as target or prediction. (A mean
    of each image's own IoU is another number.)
    """

    def __init__(self, domain_names: list[str], counted: list[str] | None = None) -> None:
        super().__init__(domain_names, counted)
        self._confusion: list[Tensor | None] = [None] * len(domain_names)
        self._with_mask = [0] * len(domain_names)

    def domain_number(self, name: str) -> int:
        """As of images."""
        number = super().domain_number(name)
        missing = len(self.domain_names) - len(self._confusion)
        self._confusion += [None] * missing
        self._with_mask += [0] * missing
        return number

    def _judged(self, batch: BatchRecord) -> tuple[NDArray[Any], NDArray[Any]]:
        assert isinstance(batch, PixelRecord)
        return batch.counts.sum((1, 2)).numpy(), batch.counts.diagonal(dim1=1, dim2=2).sum(1).numpy()

    def _add(self, batch: BatchRecord) -> dict[str, Any]:
        said = super()._add(batch)
        assert isinstance(batch, PixelRecord)
        for number in set(batch.domain.tolist()):
            counts = batch.counts[batch.domain == number]
            before = self._confusion[number]
            self._confusion[number] = counts.sum(0) if before is None else before + counts.sum(0)
            self._with_mask[number] += int((counts.sum((1, 2)) > 0).sum())
        means = {"mean_iou": mean_iou(batch.counts.sum(0)), "mean_iou_so_far": self.mean_iou}
        return said | {name: value for name, value in means.items() if value is not None}

    @property
    def mean_iou(self) -> float | None:
        """So far, of the domains that count; ``None`` without masks."""
        return mean_iou(self._confusions([n for n, counted in enumerate(self._counted) if counted]))

    def _confusions(self, numbers: Sequence[int]) -> Tensor | None:
        known = [each for number in numbers if (each := self._confusion[number]) is not None]
        return torch.stack(known).sum(0) if known else None

    def _calibrate(self, batch: BatchRecord, counted: Tensor | None) -> None:
        """Not measured: pixels are too many to keep."""

    def _counts(self, batch: BatchRecord, rows: NDArray[np.bool_]) -> Any:
        assert isinstance(batch, PixelRecord)
        prediction = batch.measures.prediction[torch.from_numpy(rows)]
        return class_counts(prediction.flatten().long(), batch.classes)

    def _label_counts(self, batch: BatchRecord) -> Any:
        assert isinstance(batch, PixelRecord)
        return batch.counts.sum((0, 2))

    def _part(self, numbers: Sequence[int]) -> dict[str, Any]:
        part, confusion = super()._part(numbers), self._confusions(numbers)
        return {**part, "mean_iou": mean_iou(confusion), "class_iou": class_iou(confusion)}

    def result(self, visits: int | None = None) -> dict[str, Any]:
        """The numbers of ``report.json``."""
        result, counted = super().result(visits), [n for n, each in enumerate(self._counted) if each]
        confusion = self._confusions(counted)
        return {
            **result,
            "labelled_images": sum(self._with_mask[number] for number in counted),
            "labelled_pixels": sum(self._labelled[number] for number in counted),
            "mean_iou": mean_iou(confusion),
            "class_iou": class_iou(confusion),
        }


def class_iou(confusion: Tensor | None) -> list[float | None] | None:
    """IoU of each class from counts (K, K + 1); ``None`` of a class that does not occur, and of no counts at all."""
    if confusion is None or not int(confusion.sum()):
        return None
    right = confusion.diagonal()
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - right
    return [int(hit) / int(all_) if all_ else None for hit, all_ in zip(right, union, strict=True)]


def mean_iou(confusion: Tensor | None) -> float | None:
    """Mean of :func:`class_iou` over the classes that occur."""
    known = [iou for iou in class_iou(confusion) or () if iou is not None]
    return sum(known) / len(known) if known else None


class MaskWriter(PredictionWriter):
    """Appends every batch to ``predictions.csv``, one line an image, and writes ``masks/<domain>/<stem>.png``.

    A mask has the number of a class for each pixel, grey, 8 bits (16 of more than 255 classes; the largest value where
    there is no prediction), in the size that the net gave. Columns: ``pixels``, how many of the image count, and
    ``right`` of them (0 where there is no mask); means over pixels of ``confidence`` and ``entropy``; ``file``, and
    ``mask`` below the directory of the run.
    """

    columns: ClassVar[tuple[str, ...]] = ("index", "domain", "confidence", "entropy")
    names: ClassVar[tuple[str, ...]] = ("pixels", "right", "file", "mask")

    def _begin(self, run: StreamRun) -> None: ...

    def texts(self, run: StreamRun, output: Outputs) -> dict[str, list[str]]:
        """The columns of :attr:`names`; the masks are written on the way."""
        batch, count = run.batch, len(output["index"])
        if not isinstance(batch, PixelRecord) or batch.prediction is None:
            return {name: [""] * count for name in self.names}
        files, masks = list(batch.files) or [""] * count, []
        wide = batch.classes > NONE
        for row in range(count):
            domain = re.sub(r"[^\w.@+-]+", "_", run.summary.domain_names[int(batch.domain[row])])
            stem = PurePosixPath(files[row]).with_suffix("") if files[row] else Path(f"{int(batch.index[row]):06d}")
            parts = [part for part in stem.parts if part not in ("/", "..")]
            path = Path(MASKS, domain, *parts)
            path = path.with_name(f"{path.name}.png")
            masks.append(path.as_posix())
            pixels = output["prediction"][row].numpy().astype(np.uint16 if wide else np.uint8)  # -1: the largest value
            place = run.directory.path / path
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place)
        return {
            "pixels": [str(value) for value in batch.counts.sum((1, 2)).tolist()],
            "right": [str(value) for value in batch.counts.diagonal(dim1=1, dim2=2).sum(1).tolist()],
            "file": [printable(name) for name in files],
            "mask": [printable(name) for name in masks],
        }


def make_pixel_record(**fields: Any) -> PixelRecord:
    """A record of what :meth:`Pixels.read` gives."""
    return PixelRecord(torch.zeros(len(fields["index"]), 0), **fields)


class Pixels(Outcome):
    """A class for each pixel."""

    account = PixelSummary
    record = staticmethod(make_pixel_record)
    writer = MaskWriter

    @torch.no_grad()
    def read(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Masks int16 (B, H, W) and means over pixels (B,) of logits (B, K, H, W), an image at a time."""
        masks, means = [], []
        for logits in output.detach():
            z = at_least_float32(logits).flatten(1).movedim(0, 1)  # (H W, K)
            there = z.isfinite().all() & (z != 0).any()
            masks.append(torch.where(there, logits.argmax(0), -1).to(torch.int16))
            confidence, norm = z.softmax(-1).amax(-1).mean(), torch.linalg.vector_norm(z, dim=-1).mean()
            means.append(torch.stack([entropy(z).mean(), confidence, norm]))
        names = zip(("entropy", "confidence", "norm"), torch.stack(means).unbind(1), strict=True)
        return {"prediction": torch.stack(masks), **dict(names)}

    def truth(
        self, batch: Mapping[str, Any], output: Tensor, label: Tensor, classes: Sequence[int] | None
    ) -> dict[str, Any]:
        """The masks."""
        known = {"label": torch.full((len(label),), -1), "classes": output.shape[1]}
        target = batch.get("target")
        if target is None:
            return known
        shape, k = (len(label), *output.shape[2:]), output.shape[1]
        whole = isinstance(target, Tensor) and not target.is_floating_point() and target.dtype is not torch.bool
        if not whole or tuple(target.shape) != shape:
            got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"batch['target'] must be masks of whole numbers {shape} (B, H, W), as large as the net's logits "
                f"{tuple(output.shape)}; got {got}. If the net's logits are smaller than its images, wrap it in a "
                "module that resizes: torch.nn.functional.interpolate(logits, images.shape[-2:], mode='bilinear'); "
                "else resize the masks (image_size)."
            )
        target = target.cpu().long()
        if target.numel() and int(target.max()) >= k:
            raise DataError(
                f"A mask has the class {int(target.max())}, but the net has {k} logits (classes 0 to {k - 1}). Give "
                "pixels that do not count a number below 0 (ignore_index of a data module), or take a net with a logit "
                "for each class."
            )
        return {**known, "target": target}
