"""Images of the source, for methods that look at them once before the stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_tta.errors import DataError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.task import explained, float_dtype


@torch.no_grad()
def source_images(
    method: TTAMethod, batches: Iterable[Mapping[str, Tensor]], most: int | None = None
) -> Iterator[Tensor]:
    """Usable images of source batches, one batch after another, while the net runs as the method runs it.

    Args:
        method: Of it the net, its device and its dtype are taken.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.
        most: After so many images no batch more is asked for; ``None``: all.

    Yields:
        Images (B, C, H, W), finite, where the net is.

    Raises:
        DataError: If a batch is no such dict.
        InputError: If images are none, or the net refuses them.
    """
    device = next((p.device for p in method.model.parameters()), torch.device("cpu"))
    number = 0
    with method.computing(device), method.running(), method.passes():
        for batch in batches:
            if not isinstance(batch, Mapping) or not isinstance(batch.get("image"), Tensor):
                kind = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
                raise DataError(f"Source batches must be dicts with 'image' (B, C, H, W) in [0, 1]; got {kind}.")
            images = batch["image"].to(device)
            images = images[method.task.usable(images).to(device)]
            images = images if most is None else images[: most - number]
            number += len(images)
            if len(images):
                with explained(method.model, images, has_run=method.has_run):
                    yield images.to(float_dtype(method.model))
            if number == most:
                return
