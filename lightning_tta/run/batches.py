"""Batches that cannot be used: what a deployed stream makes of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_tta.errors import InputError
from lightning_tta.losses import entropy
from lightning_tta.methods.base.task import check_shape
from lightning_tta.run.summary import StreamSummary


def images_of(batch: Any) -> Tensor:
    """The images of a stream's batch.

    Raises:
        InputError: If there is no batch (B, C, H, W) under ``image``.
    """
    if not isinstance(batch, dict) or "image" not in batch:
        raise InputError(f"Batches must be dicts with an 'image' (B, C, H, W); got a {type(batch).__name__}.")
    images: Tensor = batch["image"]
    check_shape(images)
    return images


def outputs(logits: Tensor, batch: dict[str, Tensor], seen: int, labels: Tensor | None) -> dict[str, Tensor]:
    """What a predict step returns for a batch with logits (B, K), on the CPU.

    Args:
        logits: (B, K).
        batch: May have ``index`` and ``domain`` (B,).
        seen: How many images came before, for the index where there is none.
        labels: (B,), or ``None`` where they are not known.
    """
    confidence, prediction = logits.softmax(-1).max(-1)
    made = {
        "logits": logits,
        "prediction": prediction,
        "confidence": confidence,
        "entropy": entropy(logits),
        "index": batch.get("index", torch.arange(len(logits)) + seen),
        "domain": batch.get("domain", torch.zeros(len(logits), dtype=torch.int64)),
        "label": torch.full((len(logits),), -1, dtype=torch.int64) if labels is None else labels,
    }
    return {name: value.detach().cpu() for name, value in made.items()}


def skipped(batch: Any, summary: StreamSummary, error: InputError) -> dict[str, Tensor]:
    """What a predict step returns for a batch that was refused: a prediction of -1 for each image; counts it.

    The number of images is that of ``index``, else of ``image`` where that is a batch, else none is known: 0.
    """
    if not summary.skipped_batches:
        warnings.warn(f"A batch is skipped, and so will be others like it (on_bad_batch='skip'): {error}", stacklevel=3)
    given = batch if isinstance(batch, dict) else {}
    image = given.get("image")
    own = len(image) if isinstance(image, Tensor) and image.ndim == 4 else 0
    count = len(given["index"]) if "index" in given else own
    unknown = torch.full((count,), -1, dtype=torch.int64)
    domain = given.get("domain", torch.zeros(count, dtype=torch.int64)).cpu()
    output = {
        "logits": torch.zeros(count, 0),
        "prediction": unknown,
        "confidence": torch.zeros(count),
        "entropy": torch.zeros(count),
        "index": given.get("index", torch.arange(count) + summary.images).cpu(),
        "domain": domain if len(domain) == count else torch.zeros(count, dtype=torch.int64),
        "label": unknown,
    }
    summary.skip(output, str(error))
    return output
