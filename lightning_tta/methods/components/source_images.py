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


@torch.no_grad()
def see_source_images(
    method: TTAMethod,
    batches: Iterable[Mapping[str, Tensor]],
    see: Callable[[Tensor], Any],
    *,
    most: int | None = None,
    running: Callable[[], AbstractContextManager[None]] | None = None,
) -> None:
    """Show the usable images of source batches to a function, one batch after another; without gradients.

    A function and no iterator, so that what the net refuses is explained, and nothing stays switched on after an error.

    Args:
        method: Of it the net, its device and its dtype are taken.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.
        see: Gets images (B, C, H, W), finite, where the net is and of its dtype.
        most: After so many images no batch more is asked for; ``None``: all.
        running: How the net runs meanwhile; ``None``: as the method runs it.

    Raises:
        DataError: If a batch is no such dict.
        InputError: If images are none, or the net refuses them.
    """
    device = next((p.device for p in method.model.parameters()), torch.device("cpu"))
    number = 0
    with outside_inference_mode(), method.computing(device), (running or method.running)(), method.passes():
        for batch in batches:
            if not isinstance(batch, Mapping) or not isinstance(batch.get("image"), Tensor):
                kind = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
                raise DataError(f"Source batches must be dicts with 'image' (B, C, H, W) in [0, 1]; got {kind}.")
            images = batch["image"].to(device)
            usable = method.task.usable(images)
            images = images if bool(usable.all()) else images[usable.to(device)]
            images = images if most is None else images[: most - number]
            number += len(images)
            if len(images):
                with explained(method.model, images, has_run=method.has_run):
                    see(images.to(float_dtype(method.model)))
            if number == most:
                return
