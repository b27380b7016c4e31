"""Stochastic domain shift synthesis: random scales and shifts of the first convolution's channels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_tta.errors import UnsupportedModelError, check_range


class DomainShiftSynthesis:
    """Makes domains that do not exist: each channel x of the first convolution's output becomes w x + b.

    Independently for every domain and channel, with probability p each: w ~ U(0, 1), else 1; b ~ U(0, 1), else 0.

    Args:
        net: A net with a convolution.
        probability: p, in [0, 1]; the authors take 0.02 to 0.04.

    Raises:
        UnsupportedModelError: If the net has no convolution.

    Source: Meta-TTT, arXiv 2410.01709, and the authors' code.
    """

    def __init__(self, net: nn.Module, probability: float) -> None:
        check_range("probability", probability, 0, 1)
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        first = next((module for module in net.modules() if isinstance(module, convolutions)), None)
        if first is None:
            raise UnsupportedModelError(
                f"{type(net).__name__} has no convolution, after which domain shifts are synthesised. Use "
                "synthesis_probability=0."
            )
        self.convolution = first
        self.probability = probability

    def draw(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scales and shifts (D, C) on the CPU, one row for each key; a row depends on its key alone."""
        rows = []
        for key in keys:
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
            generator = torch.Generator().manual_seed(seed)
            chosen, value = torch.rand(2, 2, self.convolution.out_channels, generator=generator)
            rows.append(torch.where(chosen < self.probability, value, torch.tensor([[1.0], [0.0]])))
        scale, shift = torch.stack(rows).unbind(1)
        return scale, shift

    @contextmanager
    def active(self, scale: Tensor, shift: Tensor) -> Iterator[None]:
        """While active, the net sees D domains, one after the other, with these scales and shifts (D, C)."""

        def change(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
            domains = output.view(len(scale), -1, *output.shape[1:])
            shape = (len(scale), 1, -1) + (1,) * (output.ndim - 2)
            w, b = scale.to(output).view(shape), shift.to(output).view(shape)
            return torch.addcmul(b, domains, w).flatten(0, 1)

        handle = self.convolution.register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()
