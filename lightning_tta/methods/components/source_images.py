"""Images of the source, for methods that look at them once before the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.task import explained, float_dtype


def see_source_images(
    method: TTAMethod,
    batches: Iterable[Mapping[str, Tensor]],
    see: Callable[..., Any],
    *,
    most: int | None = None,
    classes: int | None = None,
    running: Callable[[], AbstractContextManager[None]] | None = None,
) -> None:
    """Show the usable images of source batches to a function, one batch after another; without gradients.

    A function and no iterator, so that what the net refuses is explained, and nothing stays switched on after an error.

    Args:
        method: Of it the net, its device and its dtype are taken.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1], and ``label`` (B,) where ``classes`` is given. Over tokens
            with ``input_ids`` and ``attention_mask`` (B, T).
        see: Gets images (B, C, H, W), finite, where the net is and of its dtype; and their labels (B,), int64, there.
            Over tokens a packed batch.
        most: After so many images no batch more is asked for; ``None``: all.
        classes: Labels are needed, and must be integers below this; ``None``: labels are not used.
        running: How the net runs meanwhile; ``None``: as the method runs it.

    Raises:
        DataError: If a batch is no such dict, or has no such labels.
        InputError: If images are none, or the net refuses them.
    """
    if isinstance(batches, Mapping) or not any(hasattr(batches, name) for name in ("__iter__", "__getitem__")):
        raise DataError(
            f"Source batches must be several, a list or a DataLoader of {method.task.source_batch}; got "
            f"{type(batches).__name__}."
        )
    device = next((p.device for p in method.model.parameters()), torch.device("cpu"))
    number = 0
    with (
        outside_inference_mode(),
        torch.no_grad(),  # behind it, for it turns them on
        method.computing(device),
        (running or method.running)(),
        method.passes(),
    ):
        for batch in batches:
            images = method.task.take_in_source(batch, device)
            usable = method.task.usable(images)
            rows = () if classes is None else (_labels(method, batch, len(images), classes).to(device),)
            columns = [images, *rows] if bool(usable.all()) else [each[usable.to(device)] for each in (images, *rows)]
            images, *labels = columns if most is None else [each[: most - number] for each in columns]
            number += len(images)
            if len(images):
                with explained(method.model, images, has_run=method.has_run):
                    see(method.task.cast(images, float_dtype(method.model)), *labels)
            if number == most:
                return


def _labels(method: TTAMethod, batch: Mapping[str, Any], number: int, classes: int) -> Tensor:
    """The labels (B,) of a batch, int64; refuses what is none."""
    labels = batch.get("label")
    wanted = (
        f"'{method.name}' needs labelled source images: batches of dicts with 'image' (B, C, H, W) and 'label' (B,), "
        f"integers from 0 to {classes - 1}, the net's classes"
    )
    if not isinstance(labels, Tensor):
        found = f"keys {sorted(map(str, batch))}" if labels is None else f"labels as a {type(labels).__name__}"
        raise DataError(f"{wanted}; got {found}. Give them as a tensor, or use a method that needs none ('t3a').")
    if labels.shape != (number,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{wanted}; got labels of shape {tuple(labels.shape)} and {labels.dtype} for {number} images.")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise DataError(f"{wanted}; got labels from {low} to {high}. Give images of the classes that the net knows.")
    return labels.long().clone()  # they may be of inference mode
