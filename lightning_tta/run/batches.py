"""The record of a batch: made once, and read by the account, the files, the curves and the board."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_tta.errors import InputError
from lightning_tta.metrics import LogitMeasures


@dataclass
class BatchRecord:
    """One batch of a stream, on the CPU.

    Attributes:
        logits: (B, K), detached; (B, 0) of a batch that was refused.
        index: Number (B,) of each image in the stream.
        domain: Number (B,) of its domain.
        label: (B,), -1 where it is not known.
        measures: What the logits say without labels.
        stats: The method's ``stats`` of this batch, empty where it did not adapt.
        seconds: Time of the method.
        adapted: Whether the method adapted on it.
        error: Why it was refused, else empty.
        images: (B, C, H, W), on the device, as the method got them.
    """

    logits: Tensor
    index: Tensor
    domain: Tensor
    label: Tensor
    stats: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    adapted: bool = True
    error: str = ""
    images: Tensor | None = None

    def __post_init__(self) -> None:
        self.logits = self.logits.detach().cpu()
        self.index, self.domain, self.label = self.index.cpu(), self.domain.cpu(), self.label.cpu()
        self.measures = LogitMeasures(self.logits)

    def __len__(self) -> int:
        return len(self.index)

    def outputs(self) -> dict[str, Tensor]:
        """What a predict step returns: ``logits`` (B, K) and the others (B,); prediction -1 where it was refused."""
        refused = bool(self.error)
        zeros = torch.zeros(len(self))
        return {
            "logits": self.logits,
            "prediction": torch.full((len(self),), -1) if refused else self.measures.prediction,
            "confidence": zeros if refused else self.measures.confidence,
            "entropy": zeros if refused else self.measures.entropy,
            "index": self.index,
            "domain": self.domain,
            "label": self.label,
        }


def images_of(batch: Any) -> Tensor:
    """The images of a stream's batch; the method checks their values.

    Raises:
        InputError: If there is no batch (B, C, H, W), B >= 1, of floating-point images under ``image``.
    """
    if not isinstance(batch, dict) or "image" not in batch:
        raise InputError(f"Batches must be dicts with an 'image' (B, C, H, W); got a {type(batch).__name__}.")
    images = batch["image"]
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not images.numel():
        given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Not a batch of images: {given}. Give (B, C, H, W), floating point, in [0, 1], B >= 1.")
    return images


def index_of(batch: dict[str, Tensor], count: int, seen: int) -> Tensor:
    """Numbers (B,) of a batch's images; without any they are counted from ``seen``."""
    return batch.get("index", torch.arange(count) + seen)


def domain_of(batch: dict[str, Tensor], count: int) -> Tensor:
    """Numbers (B,) of the images' domains, 0 by default."""
    return batch.get("domain", torch.zeros(count, dtype=torch.int64))


def refused_batch(batch: Any, error: InputError, seen: int) -> BatchRecord:
    """The record of a batch that cannot be used.

    The number of images is that of ``index``, else of ``image`` where that is a batch, else 0.
    """
    batch = batch if isinstance(batch, dict) else {}
    image = batch.get("image")
    images = len(image) if isinstance(image, Tensor) and image.ndim == 4 else 0
    count = len(batch["index"]) if "index" in batch else images
    domain = domain_of(batch, count)
    domain = domain if len(domain) == count else torch.zeros(count, dtype=torch.int64)
    unknown = torch.full((count,), -1)
    index = index_of(batch, count, seen)
    return BatchRecord(torch.zeros(count, 0), index, domain, unknown, adapted=False, error=str(error))
