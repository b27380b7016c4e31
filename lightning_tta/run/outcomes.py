"""What a run makes of the outputs of a method, by the kind of its task: of images here, pixels and values beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_tta.run.batches import labels_among
from lightning_tta.run.outputs import PredictionWriter
from lightning_tta.run.summary import BatchRecord, StreamSummary


class Outcome:
    """One class an image.

    Attributes:
        account: Makes the account of the stream.
        record: Makes the record of a batch from :meth:`read`, :meth:`truth` and what else is known of the batch.
        writer: Writes ``predictions.csv``.
    """

    account: ClassVar[type[StreamSummary]] = StreamSummary
    record: ClassVar[Callable[..., BatchRecord]] = BatchRecord
    writer: ClassVar[type[PredictionWriter]] = PredictionWriter

    def read(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """What the host is to know of the method's output for images (B, C, H, W): tensors on the device."""
        return {"logits": output}

    def truth(
        self, batch: Mapping[str, Any], output: Tensor, label: Tensor, classes: Sequence[int] | None
    ) -> dict[str, Any]:
        """What is right, as fields of the record.

        Args:
            batch: As it came.
            output: Of the method.
            label: (B,), -1 where it is not known.
            classes: The logits that the net was cut to.

        Raises:
            DataError: If it does not go with the net's output.
        """
        return {"label": labels_among(label, classes)}
