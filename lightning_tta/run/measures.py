"""What a run measures beside its stream: errors of the source, what was forgotten of it, peak memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import as_logits
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.images import Images, to_float
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run.batches import labels_among


@torch.no_grad()
def predict_classes(
    predict: Callable[[Tensor], Tensor], images: Images, positions: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Classes (N,) that ``predict``, pixels in [0, 1] -> logits, gives the images at ``positions`` (N,), in batches."""
    chunks = torch.split(positions, batch_size)
    return torch.cat([predict(to_float(images.images(chunk)).to(device)).argmax(1).cpu() for chunk in chunks])


def source_errors(
    model: nn.Module, data: ShiftedDataModule, classes: Sequence[int] | None, device: torch.device
) -> list[Tensor]:
    """Which images of each domain the net, as it is, gets wrong: bool (N_d,)."""
    wrong = []
    for images in data.domain_images:
        positions = torch.arange(len(images))
        predicted = predict_classes(lambda x: as_logits(model(x)), images, positions, data.batch_size, device)
        wrong.append(predicted != labels_among(images.labels, classes))
    return wrong


def source_accuracy(
    method: TTAMethod, data: ShiftedDataModule, classes: Sequence[int] | None, device: torch.device
) -> float | None:
    """Accuracy of ``method.predict`` on clean source test images, in [0, 1]; the method adapts on nothing.

    At most ``num_images`` of them, in batches of the stream's size, in a fixed random order: a method that predicts
    with the statistics of a batch sees batches of all classes. Of a net cut to some classes, images of these.
    """
    images = data.clean("test")
    positions = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    if classes is not None:
        positions = positions[torch.isin(images.labels[positions], torch.tensor(classes))]
    positions = positions[: data.num_images]
    labels = labels_among(images.labels[positions], classes)
    predict = partial(method.predict, statistics="batch")
    right = predict_classes(predict, images, positions, data.batch_size, device) == labels
    known = int((labels >= 0).sum())
    return int(right.sum()) / known if known else None


def peak_memory(device: torch.device) -> dict[str, Any]:
    """``peak_memory_mb`` (of 10^6 bytes), and ``peak_memory``: what was counted.

    On CUDA what torch had allocated in the run; elsewhere what the process had in memory in all its life.
    """
    if device.type == "cuda":
        return {
            "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6,
            "peak_memory": "allocated on the GPU",
        }
    try:
        import resource
    except ImportError:  # Windows
        return {"peak_memory_mb": None, "peak_memory": None}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_mb": peak / 1e6, "peak_memory": "resident, of the process's whole life"}
