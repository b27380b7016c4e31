"""What records the work of a device, and repeats it on the same addresses: CUDA graphs; and who must not miss it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Recorder(Protocol):
    """What records the work of a device, and repeats it on the same addresses."""

    def reason_against(self, device: torch.device) -> str:
        """Why it cannot record there; empty if it can."""

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """What ``run()`` returns, whose tensors are written anew by each call of the second value."""


class CudaGraphs:
    """Records CUDA graphs, all with one pool of memory: their results must be copied before another one is replayed."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None

    def reason_against(self, device: torch.device) -> str:
        """Empty on CUDA, where nobody else is recording."""
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and this one is '{device}'"
        return "the caller is recording a CUDA graph" if torch.cuda.is_current_stream_capturing() else ""

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """Record, without running. Other threads, such as those of a data loader, may go on."""
        with torch.cuda.device(device):
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = run()
        return result, graph.replay


make_recorder: Callable[[], Recorder] = CudaGraphs


Hooks = list[Any]


def hooks_of(modules: Iterable[nn.Module]) -> Hooks:
    """Where modules keep their hooks, to look into again and again."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(module, name) for module in modules for name in names]


def who_looks(hooks: Hooks) -> str:
    """Who looks inside a pass of a net, and would miss one that is replayed; empty if nobody does."""
    if any(hooks) or torch_modules._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "the net has hooks"
    modes = _get_current_dispatch_mode_stack() or _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return "a mode of torch looks at each operation" if modes or torch.is_anomaly_enabled() else ""


def modes(device: str) -> Hashable:
    """What of torch's global settings goes into a recording."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    exact = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return autocast, exact, torch.backends.cuda.matmul.fp32_precision, convolutions.fp32_precision
