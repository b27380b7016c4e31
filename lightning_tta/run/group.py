"""Processes that decide together: what one finds is known to all, and what stops one stops all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from lightning_tta.errors import LightningTTAError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # processes with smaller domains wait for the others at the end


class ProcessGroup:
    """The processes of a run; alone, a process decides at once. All must make it, and call it, in the same order.

    Args:
        rank: Number of this process.
        world: How many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        # A group of its own, whose members may be late.
        self._group: Any = distributed.new_group(backend="gloo", timeout=_PATIENCE) if world > 1 else None

    def gather(self, mine: T) -> list[T]:
        """What each process has, in order."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, mine, group=self._group)
        return found

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do something on every process; the results of all.

        Raises:
            Exception: On every process, if one has raised it; what is not of this package, as a RuntimeError elsewhere.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        found = self.gather((result, self._told(error)))
        if error is not None:
            raise error
        for _, other in found:
            if other is not None:
                raise other
        return [value for value, _ in found]  # type: ignore[misc]

    def first(self, work: Callable[[], T]) -> T:
        """Do something on the first process; its result, or its error, on all."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _told(self, error: Exception | None) -> Exception | None:
        if error is None or isinstance(error, LightningTTAError):
            return error
        return RuntimeError(f"Process {self.rank} has stopped: {type(error).__name__}: {error}")
