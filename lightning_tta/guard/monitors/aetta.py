"""AETTA: accuracy from how often dropout on the head's inputs changes the prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_tta.evidence.accuracy import AETTA
from lightning_tta.guard.monitors.base import Monitor, Seen, Want
from lightning_tta.guard.monitors.estimator import LOW_ACCURACY, Fall


class AettaMonitor(Monitor):
    """Estimates accuracy as :class:`~lightning_tta.evidence.accuracy.AETTA` does; ``low_accuracy`` where it falls.

    Needs the features of the pass that gave the logits, and no pass of its own. A batch without features changes
    nothing. On class-sorted streams, whose batches hold few classes, it takes every batch for a collapse: see
    docs/results/estimates.md.

    Args:
        floor: An estimate below this raises the alarm, in [0, 1]; the authors' 0.2; ``None``: none does.
        fall: A fall by more than this, from five estimates to the next five, raises it; the authors' 0.02; ``None``:
            none does.
        **options: Of :class:`~lightning_tta.evidence.accuracy.AETTA`: ``passes``, ``rate``, ``exponent``, ``old``,
            ``images``, ``seed``.

    Raises:
        ConfigError: If one is out of range.

    Source: Lee et al., AETTA, CVPR 2024, arXiv 2404.01351. Differs from the authors' code: a reset of the method also
    begins a new average.
    """

    name: ClassVar[str] = "aetta"
    wants: ClassVar[frozenset[Want]] = frozenset({"features"})

    def __init__(
        self,
        *,
        floor: float | None = 0.2,
        fall: float | None = 0.02,
        passes: int = 10,
        rate: float | None = None,
        exponent: float = 3.0,
        old: float = 0.6,
        images: int = 64,
        seed: int = 0,
    ) -> None:
        self.rule = Fall(floor, fall)
        self.aetta = AETTA(passes=passes, rate=rate, exponent=exponent, old=old, images=images, seed=seed)
        self._alarm = ""

    def see(self, seen: Seen) -> None:
        """Take in a batch; batches smaller than ``images`` are added up."""
        self._alarm = ""
        if seen.features is None or seen.head is None:
            return
        if self.aetta.update(seen.features, seen.head, seen.logits):
            assert self.aetta.estimate is not None
            self._alarm = LOW_ACCURACY if self.rule(self.aetta.estimate) else ""

    def alarm(self) -> str:
        """``low_accuracy``, where the estimate is low or has fallen."""
        return self._alarm

    def estimate(self) -> float | None:
        """One minus the averaged error."""
        return self.aetta.estimate

    def values(self) -> dict[str, float]:
        """Estimate, and of the last batch disagreement and entropy in nats."""
        if self.aetta.estimate is None or self.aetta.last is None:
            return {}
        _, disagreement, mean_entropy = self.aetta.last
        return {
            "aetta_accuracy": self.aetta.estimate,
            "aetta_disagreement": disagreement,
            "aetta_entropy": mean_entropy,
        }

    def forget(self) -> None:
        """Begin a new average."""
        self.aetta.begin()
        self.rule.last.clear()
        self._alarm = ""

    def begin(self) -> None:
        """Begin a new average, with the first draws."""
        self.forget()
        self.aetta.batches = 0

    def state_dict(self) -> dict[str, Any]:
        """The average, and the estimates that the rule compares."""
        return {"aetta": self.aetta.state_dict(), "recent": list(self.rule.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.begin()
        self.aetta.load_state_dict(state["aetta"])
        self.rule.last.extend(state["recent"])
