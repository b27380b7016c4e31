"""How the batches of a stream come to the method."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_tta.errors import check_choice, check_range
from lightning_tta.run.callbacks import RunCallback


class StreamInput(RunCallback):
    """How batches come to the method. On the command line ``--input.on_bad_batch skip`` and so on.

    Args:
        on_bad_batch: What a batch does that no method or not this net can take (empty, wrong channels or size, 0-255):
            ``raise`` the :class:`~lightning_tta.errors.InputError`, or ``skip`` it: no adaptation, -1 as predictions,
            counted in the report and left out of the accuracy. Images with NaN are no bad batch: see the methods.
        channels_last: Lay images out in memory with their channels last: the same predictions up to rounding;
            convolutions are often faster, but a net that takes ``view`` of its activations refuses.
        source_images: How many training images a method that needs source data sees before the stream.
    """

    def __init__(
        self, on_bad_batch: Literal["raise", "skip"] = "raise", channels_last: bool = False, source_images: int = 2000
    ) -> None:
        check_choice("on_bad_batch", on_bad_batch, ("raise", "skip"))
        check_range("source_images", source_images, 1, integer=True)
        self.skips = on_bad_batch == "skip"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.source_images = source_images

    def identity(self) -> dict[str, Any]:
        """A run in another memory layout, or after other source images, predicts otherwise."""
        return {"source_images": self.source_images, "memory_format": str(self.memory_format)}
