"""The monitor of label drift: whether the labels that are predicted are distributed as on the source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch

from lightning_tta.errors import DataError, NotPreparedError, check_choice, check_range
from lightning_tta.evidence.drift import LabelDriftTest
from lightning_tta.guard.monitors.base import Seen, Want
from lightning_tta.guard.monitors.betting import BettingMonitor
from lightning_tta.metrics import LogitMeasures


class Drift(BettingMonitor[LabelDriftTest]):
    """Alarms, as ``label_drift``, when predicted labels are no longer distributed as on held-out source images.

    :class:`~lightning_tta.evidence.drift.LabelDriftTest` has the test. With the source's predictions, the default, the
    probability that there is ever an alarm on a stream that is like the held-out images is at most ``alpha``. There is
    one alarm in a stream; the log wealth goes on. It does not tell a change of the labels from one of the images that
    makes the source prefer some classes.

    An alarm on a stream that is sorted by class, or otherwise not shuffled, is right: what is predicted there depends
    on what came before. It says that methods which take batches for samples of all classes are in danger.

    Args:
        of: ``source``: the source's predictions, one more forward pass a batch, unless another monitor wants it, too;
            ``answers``: those that were answered. Without a further pass; but a method that changes what is predicted,
            for the better or by a collapse, raises the alarm as well, so that the bound is not one for it.
        alpha: Probability of a false alarm, in (0, 0.5].
        seed: Of the draws that tell equal ranks apart.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: ClassVar[str] = "drift"
    kind = LabelDriftTest
    reason = "label_drift"

    def __init__(self, of: Literal["source", "answers"] = "source", alpha: float = 0.05, seed: int = 0) -> None:
        check_choice("of", of, ("source", "answers"))
        check_range("alpha", alpha, 0, 0.5, low_open=True)
        check_range("seed", seed, 0, 2**62, integer=True)
        self.of, self.alpha, self.seed = of, alpha, seed
        self.wants: frozenset[Want] = frozenset({"source"} if of == "source" else ())  # type: ignore[misc]
        super().__init__()

    def prepare(self, batches: Iterable[Seen]) -> None:
        """Count the source's predictions on held-out source images.

        Raises:
            DataError: If there are fewer than 10.
        """
        labels, classes = [], 0
        for seen in batches:
            labels.append(LogitMeasures(seen.logits).prediction.cpu())
            classes = seen.logits.shape[-1]
        if not labels:
            raise DataError("The monitor 'drift' needs held-out source images, 1,000 or more; there was no batch.")
        self.test = LabelDriftTest(torch.cat(labels), classes, self.alpha, self.seed)
        self.begin()

    def see(self, seen: Seen) -> None:
        """Take in a batch.

        Raises:
            NotPreparedError: If it has not seen the source.
        """
        logits = seen.source if self.of == "source" else seen.logits
        if self.test is None or logits is None:
            raise NotPreparedError(
                "The monitor 'drift' compares with held-out source images: call prepare(...) with the source's logits "
                "of 1,000 of them before the stream, and the source's logits of each batch. Or use of='answers'."
            )
        self.bet(self.test, LogitMeasures(logits).prediction)

    def values(self) -> dict[str, float]:
        """``drift_log_wealth``."""
        return {} if self.test is None else {"drift_log_wealth": self.test.log_wealth}
