"""What is asked of the source: what it gets wrong, what a method must see of it, what a method forgot of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tta.backbones.split import as_logits
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.images import Batch, Images, to_float
from lightning_tta.errors import DataError, NotPreparedError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.progress import with_progress


def labels_among(labels: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Labels (B,) of the whole net as positions in ``classes``, those it was cut to; -1, not known, stays.

    Raises:
        DataError: If a label is not among them.
    """
    if classes is None:
        return labels
    table = torch.full((max(int(labels.max()), *classes) + 2,), -2)
    table[list(classes)] = torch.arange(len(classes))
    table[-1] = -1
    positions = table[labels]
    if bool((positions == -2).any()):
        raise DataError(
            f"An image has the label {int(labels[positions == -2][0])}, which is not among the {len(classes)} classes "
            "that the net was cut to. Choose classes that the data has, or leave model.classes out."
        )
    return positions


@torch.no_grad()
def predict_classes(
    predict: Callable[[Tensor], Tensor], images: Images, positions: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Classes (N,) that ``predict``, pixels in [0, 1] -> logits, gives the images at ``positions`` (N,), in batches."""
    parts = torch.split(positions, batch_size)
    return torch.cat([predict(to_float(images.images(part)).to(device)).argmax(1).cpu() for part in parts])


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
    right = predict_classes(method.predict, images, positions, data.batch_size, device) == labels
    known = int((labels >= 0).sum())
    return int(right.sum()) / known if known else None


def warn_of_size(images: Tensor, preprocessing: Mapping[str, Any], net: Mapping[str, Any]) -> None:
    """Warn where images (B, C, H, W) are not of the size that published weights were trained on.

    A net of another family that was trained here may have been trained on any size: then there is no warning.
    """
    wanted, size = preprocessing.get("input_size"), list(images.shape[1:])
    published = net.get("pretrained") or str(net["name"]).startswith("cifar/")
    if wanted is not None and list(wanted) != size and published:
        warnings.warn(
            f"Images are {size} (C, H, W), the weights' own preprocessing has {list(wanted)} (crop "
            f"{preprocessing.get('crop_pct')}, {preprocessing.get('interpolation')}): accuracy may suffer. Set the "
            "data's image_size unless this is meant.",
            stacklevel=3,
        )


def show_source(method: TTAMethod, data: Any, count: int, device: torch.device) -> None:
    """Show ``count`` training images to a method that needs source data.

    Raises:
        NotPreparedError: If ``data`` has none to show.
    """
    if not isinstance(data, ShiftedDataModule):
        raise NotPreparedError(
            f"{type(method).__name__} must see source data before the stream. Predict with a data module that has "
            "training images, or call method.prepare(source_batches) first."
        )
    batches = data.source_batches(count, batch_size=64)  # EATA's Fisher depends on it
    with torch.inference_mode(False), torch.enable_grad():
        method.prepare(_OnDevice(batches, device))


class _OnDevice(Iterable[Batch]):
    """Batches that come to a device one at a time, with progress; can be iterated more than once."""

    def __init__(self, batches: DataLoader[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        numbers = with_progress(len(self), "Looking at source images")
        for _, batch in zip(numbers, self.batches, strict=True):
            yield {name: value.to(self.device) for name, value in batch.items()}
