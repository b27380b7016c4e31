"""What records the work of a device, and repeats it on the same addresses: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """What records the work of a device, and repeats it on the same addresses."""

    def reason_against(self, device: torch.device) -> str:
        """Why it cannot record there; empty if it can."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What ``run()`` returns, whose tensors are written anew by each call of the second value."""


class CudaGraphs:
    """Records CUDA graphs, all with one pool of memory: their results must be used before another one is replayed."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None

    def reason_against(self, device: torch.device) -> str:
        """Empty on CUDA, where nobody else is recording."""
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and the batch is on '{device}'"
        return "the caller is recording a CUDA graph" if torch.cuda.is_current_stream_capturing() else ""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record, without running. Other threads, such as those of a data loader, may go on."""
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = run()
        return result, graph.replay
