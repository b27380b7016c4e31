"""How many samples go through one pass of a net, so that what it keeps for its backward pass fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode

MARGIN = 0.6
"""Share of the free memory that is used: the rest is for gradients, and for what kernels and recorded steps need."""
VALUES_ON_CPU = 2**25
"""Of all samples in a pass on a CPU, whose free memory is not asked: 128 images of 3 x 224 x 224 (a power of two)."""
MAKING = 16
"""Floats for each value of a sample, while random views are made."""


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, with what the process has reserved there and does not use; ``None`` of a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def kept_bytes(run: Callable[[Tensor], Any], samples: Tensor, model: nn.Module) -> int:
    """Bytes that a pass keeps for its backward pass, without the parameters and buffers of the net."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with outside_inference_mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(samples.clone())  # alive until all is counted, and with it what is kept
    del output
    return sum(kept.values())


class Room:
    """Counts how many samples fit: once for each shape and setting, so that equal batches are split equally.

    Attributes:
        free: Free bytes of a device, or ``None`` for a fixed bound: :func:`free_bytes`.
    """

    def __init__(self) -> None:
        self.free = free_bytes
        self._fitting: dict[tuple[Any, ...], int] = {}

    def fitting(self, run: Callable[[Tensor], Any], x: Tensor, model: nn.Module, kind: str) -> int:
        """Number of samples for one pass, at least 1, a power of two: little changes of what is free change nothing.

        Args:
            run: A pass over samples (N, ...), N = 1 or 2. What a second sample adds is what one takes.
            x: A batch like those to come, (B, ...).
            model: The net.
            kind: Of the pass.
        """
        device = x.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (kind, x.shape[1:], x.dtype, device, autocast)
        if key not in self._fitting:
            free = self.free(device)
            if free is None:
                number = VALUES_ON_CPU // x[0].numel()
            else:
                one, two = (kept_bytes(run, x[:1].expand(n, *x.shape[1:]), model) for n in (1, 2))
                number = int(MARGIN * free) // (max(two - one, 0) + MAKING * 4 * x[0].numel())
            self._fitting[key] = 2 ** (max(number, 1).bit_length() - 1)
        return self._fitting[key]
