"""Estimates from how sure the predictions are: average confidence, difference of confidences, ATC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_tta.errors import NotPreparedError, check_range
from lightning_tta.evidence import accuracy
from lightning_tta.guard.monitors.base import Seen
from lightning_tta.guard.monitors.estimator import HALF_LIFE, Estimator, labelled_logits


class Confidence(Estimator):
    """AC: the mean of the largest probability.

    A method that lowers entropy raises it, whatever becomes of the accuracy: a collapse looks like success.

    Args:
        temperature: By which the logits are divided, above 0; AETTA's authors compare with 2.
        half_life: As of :class:`~lightning_tta.guard.monitors.estimator.Estimator`, as are the others.
        floor: See there.
        fall: See there.

    Raises:
        ConfigError: If one is out of range.

    Source: Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136.
    """

    name: ClassVar[str] = "confidence"

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        half_life: int = HALF_LIFE,
        floor: float | None = None,
        fall: float | None = None,
    ) -> None:
        super().__init__(half_life=half_life, floor=floor, fall=fall)
        check_range("temperature", temperature, 0, low_open=True)
        self.temperature = temperature

    def rate(self, seen: Seen) -> Tensor:
        """Mean confidence of the batch."""
        return accuracy.average_confidence(seen.logits, self.temperature)


class Calibrated(Estimator):
    """An estimator that needs numbers of the source on held-out images with labels.

    Attributes:
        numbers: Those numbers, by name; empty before :meth:`prepare`.
    """

    needs_source: ClassVar[bool] = True

    def __init__(self, *, half_life: int = HALF_LIFE, floor: float | None = None, fall: float | None = None) -> None:
        super().__init__(half_life=half_life, floor=floor, fall=fall)
        self.numbers: dict[str, float] = {}

    def prepare(self, batches: Iterable[Seen]) -> None:
        """See held-out source images with labels.

        Raises:
            DataError: If none has a label.
        """
        self.numbers = self.measure(*labelled_logits(self.name, batches))

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Numbers of the source's logits (N, K) and the labels (N,), N >= 1."""
        raise NotImplementedError

    def number(self, name: str) -> float:
        """One of the numbers.

        Raises:
            NotPreparedError: If nothing was prepared.
        """
        if not self.numbers:
            raise NotPreparedError(
                f"The monitor '{self.name}' must see held-out source images with labels before the stream: call its "
                "prepare()."
            )
        return self.numbers[name]

    def state_dict(self) -> dict[str, Any]:
        """The average, and the numbers of the source."""
        return {**super().state_dict(), "numbers": dict(self.numbers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.numbers = dict(state["numbers"])


class DifferenceOfConfidences(Calibrated):
    """DoC: the source's accuracy on held-out images, less the fall of the mean confidence since.

    Source: Guillory et al., ICCV 2021, arXiv 2107.03315.
    """

    name: ClassVar[str] = "doc"

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy and mean confidence."""
        right = (logits.argmax(1) == labels).double().mean()
        return {"accuracy": float(right), "confidence": float(accuracy.average_confidence(logits))}

    def rate(self, seen: Seen) -> Tensor:
        """Accuracy less the fall."""
        fall = self.number("confidence") - accuracy.average_confidence(seen.logits)
        return (self.number("accuracy") - fall).clamp(0, 1)


class ATC(Calibrated):
    """Average thresholded confidence: share of predictions surer than as many source ones as the source has right.

    Source: Garg et al., ICLR 2022, arXiv 2201.04234, with the negative entropy as the score.
    """

    name: ClassVar[str] = "atc"

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """The threshold."""
        right = logits.argmax(1) == labels
        return {"threshold": accuracy.atc_threshold(accuracy.negative_entropy(logits), right)}

    def rate(self, seen: Seen) -> Tensor:
        """Share at or above the threshold."""
        scores = accuracy.negative_entropy(seen.logits)
        return accuracy.average_thresholded_confidence(scores, self.number("threshold"))
