"""Random numbers that are the same on every device: a hash of a seed, a counter and a position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 2**17  # of numbers, that fit into a CPU's cache


def random_integers(key: Tensor, *shape: int) -> Tensor:
    """Uniform 64-bit integers, int64, on the key's device; no generator and no host are asked.

    Args:
        key: (2,), int64: a seed, and a counter. Another value, other numbers. It may be state.
        *shape: Of the result.
    """
    return _mix(_base(key) + torch.arange(math.prod(shape), device=key.device)).view(shape)


def random_orders(key: Tensor, number: int, length: int) -> Tensor:
    """Permutations of ``range(length)``, (number, length), each row its own."""
    return random_integers(key, number, length).argsort(1)


def random_rows(seed: int, counters: Tensor, length: int) -> Tensor:
    """Uniform 64-bit integers, int64, (N, length): for each of the counters (N,) what its own key would give.

    Args:
        seed: Of all keys.
        counters: int64; each row depends on its own alone, whatever others it comes with.
        length: Of a row.
    """
    base = _mix(_mix(torch.full_like(counters, seed)) + counters)
    return _mix(base[:, None] + torch.arange(length, device=counters.device))


def random_words(key: Tensor, number: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Uniform 32-bit integers, int32, (number,): the halves of :func:`random_integers`, so at half the price.

    Args:
        key: As there.
        number: How many.
        start: Number of the first one, even: a long draw can be made in parts.
        device: Where they are made; by default where the key is. A key on the CPU is no copy to another device, but an
            argument of its kernels.
    """
    base, device = _base(key), key.device if device is None else device
    first, end = start // 2, (start + number + 1) // 2
    size = _CHUNK if device.type == "cpu" else max(1, end - first)
    parts = [_mix(torch.arange(i, min(i + size, end), device=device) + base) for i in range(first, end, size)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(torch.int32)[:number]


def random_flags(
    key: Tensor, number: int, probability: float, *, start: int = 0, device: torch.device | None = None
) -> Tensor:
    """Independent draws, bool, (number,), each true with a probability in [0, 1]; others as of :func:`random_words`."""
    words = random_words(key, number, start=start, device=device)
    largest = round(probability * 2**32) - 2**31 - 1
    return words <= largest if largest >= -(2**31) else torch.zeros_like(words, dtype=torch.bool)


def random_normals(key: Tensor, *shape: int, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Standard normal numbers, float32, within 5.4 of 0. Arguments as of :func:`random_words`."""
    words = random_words(key, math.prod(shape), start=start, device=device)
    largest = 1 - 2**-24
    return words.float().mul_(2**-31).clamp_(-largest, largest).erfinv_().mul_(math.sqrt(2)).view(shape)


def _base(key: Tensor) -> Tensor:
    seed, counter = key
    return _mix(_mix(seed) + counter)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele et al., OOPSLA 2014), in int64 arithmetic, which wraps."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x.bitwise_xor_(_shifted(x, 30)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x.bitwise_xor_(_shifted(x, 27)).mul_(0x94D049BB133111EB - 2**64)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
