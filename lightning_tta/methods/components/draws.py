"""Random numbers that are the same on every device: a hash of a seed, a counter and a position."""

from __future__ import annotations

import torch
from torch import Tensor


def random_integers(key: Tensor, *shape: int) -> Tensor:
    """Uniform 64-bit integers, int64, on the key's device; no generator and no host are asked.

    Args:
        key: (2,), int64: a seed, and a counter. Another value, other numbers. It may be state.
        *shape: Of the result.
    """
    seed, counter = key
    positions = torch.arange(torch.Size(shape).numel(), device=key.device).view(shape)
    return _mix(_mix(_mix(seed) + counter) + positions)


def random_orders(key: Tensor, number: int, length: int) -> Tensor:
    """Permutations of ``range(length)``, (number, length), each row its own."""
    return random_integers(key, number, length).argsort(1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele et al., OOPSLA 2014), in int64 arithmetic, which wraps."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return torch.bitwise_and(x >> bits, (1 << (64 - bits)) - 1)
