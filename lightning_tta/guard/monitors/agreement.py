"""Estimates from who predicts the same: the source net, or the method on another view of the images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_tta.evidence.scores import agreement
from lightning_tta.guard.monitors.base import Seen, Want
from lightning_tta.guard.monitors.estimator import Estimator


class SourceAgreement(Estimator):
    """Share of predictions that are the source's, too.

    Two nets that are as often right, and err independently, agree as often as each is right (Jiang et al., ICLR 2022,
    arXiv 2106.13799). An adapted net and its source are no such pair; but what has collapsed no longer agrees.
    """

    name: ClassVar[str] = "source_agreement"
    wants: ClassVar[frozenset[Want]] = frozenset({"source"})

    def rate(self, seen: Seen) -> Tensor | None:
        """Agreement with the source on the batch."""
        return None if seen.source is None else agreement(seen.logits, seen.source)


class ViewAgreement(Estimator):
    """Share of predictions that the method, as adapted by now, repeats on the mirror image; one pass more a batch.

    Attributes:
        passes: Passes so far, each over as many images as its batch has.
    """

    name: ClassVar[str] = "view_agreement"
    wants: ClassVar[frozenset[Want]] = frozenset({"predict"})
    gathers: ClassVar[bool] = True
    passes = 0

    def rate(self, seen: Seen) -> Tensor | None:
        """Agreement with the mirror images of the batch."""
        if seen.predict is None or seen.images is None:
            return None
        self.passes += 1
        return agreement(seen.logits, seen.predict(seen.images.flip(-1)))
