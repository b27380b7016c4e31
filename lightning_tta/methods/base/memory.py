"""A memory of domains: states of a method, of which the one for the present domain is in use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from lightning_tta.methods.base.state import State


class DomainMemory(ABC):
    """Tells domains apart, and keeps a state of a method for each.

    With every batch :meth:`style`, :meth:`assign`, the method's own step, and :meth:`store`. What it keeps is state of
    the method.
    """

    @abstractmethod
    def prepare(self, method: State, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """See source data, once, before the stream."""

    @abstractmethod
    def style(self, method: State, x: Tensor) -> Tensor:
        """What images (B, C, H, W) look like to the source net, (D,)."""

    @abstractmethod
    def assign(self, method: State, style: Tensor, predict: Callable[[], Tensor]) -> None:
        """Bring the method to the state for this style; ``predict`` gives logits of the batch. Asks the device."""

    @abstractmethod
    def store(self, method: State) -> None:
        """Keep the method's state as that for such batches."""

    @abstractmethod
    def look_again(self) -> None:
        """Somebody else has written to the state."""
