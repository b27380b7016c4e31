"""A stream that does not wait: what a slow method misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Pace:
    """Batches arrive at a fixed pace; one that arrives while the method is at work is not adapted on.

    The method has worked on batch n, which arrived at ``n * interval``, when its cost has passed; the next batch that
    it takes is the first to arrive after that. Source: Alfarra et al., arXiv 2304.04795.

    Args:
        unit: ``passes`` (a forward pass costs 1, a backward pass 2) or ``seconds`` (as measured).
        interval: Time between two batches in that unit, above 0.
    """

    unit: str
    interval: float
    arrived: float = 0.0
    free_at: float = 0.0
    batches: int = 0
    missed: int = 0

    def take(self) -> bool:
        """Whether the method is free for the batch that arrives now."""
        self.arrived = self.batches * self.interval
        self.batches += 1
        free = self.arrived >= self.free_at - 1e-9
        self.missed += not free
        return free

    def work(self, stats: dict[str, float], seconds: float) -> None:
        """Charge the batch that was taken."""
        passes = stats.get("forwards", 0) + 2 * stats.get("backwards", 0)
        self.free_at = self.arrived + (passes if self.unit == "passes" else seconds)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        vars(self).update(state)
