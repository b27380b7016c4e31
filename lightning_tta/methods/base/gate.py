"""A gate before a method: it adapts only while the gate is open, and the source answers else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_tta.methods.base.state import State


class Gate(ABC):
    """Sees what the source net says of each batch, and decides whether the method adapts on it.

    While it is closed, the method is at its source. What the gate knows is state of the method.
    """

    @abstractmethod
    def prepare(self, method: State, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """See source data, once, before the stream."""

    @abstractmethod
    def admits(self, method: State, logits: Tensor) -> bool:
        """Whether the method adapts on the batch, whose logits (B, K) of the source these are. Asks the device.

        Where the gate closes, it brings the method back to its source.
        """

    @abstractmethod
    def is_open(self, method: State) -> bool:
        """Whether it is open now."""

    @abstractmethod
    def notes(self, method: State) -> dict[str, Tensor]:
        """Numbers for ``stats``, of the last batch."""

    @abstractmethod
    def look_again(self) -> None:
        """Somebody else has written to the state."""
