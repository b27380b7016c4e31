"""Test streams: the order in which samples reach a method.

A stream is a pure function of the labels of each domain, a kind, a batch size and a seed. It gives the same positions
on every machine: orders are made by sorting raw PCG64 words, the one part of NumPy's random numbers that never changes.

To add a kind, write a function from (labels of each domain, seed) to segments of positions and enter it in ``KINDS``.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lightning_tta.errors import check_choice, check_range

StreamKind = Literal["iid", "continual", "label_shift", "mixed"]
ResetPolicy = Literal["never", "domain", "batch"]

Positions = npt.NDArray[np.int64]
Segments = list[Positions]


def permutation(count: int, *key: int) -> Positions:
    """A random order of ``range(count)`` that depends on nothing but ``key`` (whole numbers, each at least 0)."""
    words = np.random.PCG64(list(key)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _offsets(labels: Sequence[Positions]) -> list[int]:
    return [0, *np.cumsum([len(domain) for domain in labels]).tolist()]


def _by_domain(labels: Sequence[Positions], seed: int) -> Segments:
    """Each domain shuffled, one after the other."""
    starts = _offsets(labels)
    return [starts[d] + permutation(len(domain), seed, d) for d, domain in enumerate(labels)]


def _by_class(labels: Sequence[Positions], seed: int) -> Segments:
    """Each domain sorted by class: the classes in a random order, samples shuffled inside a class."""
    starts, segments = _offsets(labels), []
    for d, domain in enumerate(labels):
        shuffled = permutation(len(domain), seed, d)
        classes, members = np.unique(domain[shuffled], return_inverse=True)
        rank_of_class = permutation(len(classes), seed, d, 1)
        segments.append(starts[d] + shuffled[np.argsort(rank_of_class[members], kind="stable")])
    return segments


def _mixed(labels: Sequence[Positions], seed: int) -> Segments:
    """All samples of all domains in one random order."""
    return [permutation(_offsets(labels)[-1], seed)]


KINDS: dict[str, Callable[[Sequence[Positions], int], Segments]] = {
    "iid": _by_domain,
    "continual": _by_domain,  # the same order as iid: only the default reset differs
    "label_shift": _by_class,
    "mixed": _mixed,
}
STREAM_KINDS: tuple[str, ...] = get_args(StreamKind)


def default_reset(kind: str) -> ResetPolicy:
    """When a method starts anew by default: ``domain`` for ``iid`` and ``label_shift``, else ``never``."""
    check_choice("stream", kind, STREAM_KINDS)
    return "domain" if kind in ("iid", "label_shift") else "never"


@dataclass(frozen=True)
class Stream:
    """Batches of sample positions.

    Attributes:
        kind: The stream's kind.
        sizes: Number of samples in each domain. Position ``p`` of domain ``d`` is ``sum(sizes[:d]) + p``.
        batches: Positions of each batch, in order. Every sample occurs exactly once.
    """

    kind: str
    sizes: tuple[int, ...]
    batches: list[list[int]]

    @property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the batches."""
        return hashlib.sha256(repr(self.batches).encode()).hexdigest()[:12]


def build_stream(labels: Sequence[Any], *, kind: str = "iid", batch_size: int = 64, seed: int = 0) -> Stream:
    """Order the samples of several domains into a stream.

    Args:
        labels: For each domain its labels: a tensor, array or sequence of integers, shape (N_d,).
        kind: ``iid`` (each domain shuffled, one after the other), ``continual`` (the same order, by default never
            reset), ``label_shift`` (each domain sorted by class) or ``mixed`` (all domains shuffled together).
        batch_size: Samples in a batch, at least 1. A domain's last batch may be smaller; only ``mixed`` has batches
            with several domains.
        seed: Seed of the order, at least 0.

    Raises:
        ConfigError: On an unknown kind, or a batch size or seed out of range.
    """
    check_choice("stream", kind, STREAM_KINDS)
    check_range("batch_size", batch_size, 1, integer=True)
    check_range("order_seed", seed, 0, integer=True)
    arrays = [torch.as_tensor(domain).numpy().astype(np.int64) for domain in labels]
    batches: list[list[int]] = []
    for segment in KINDS[kind](arrays, seed):
        batches += [segment[start : start + batch_size].tolist() for start in range(0, len(segment), batch_size)]
    return Stream(kind, tuple(len(domain) for domain in arrays), batches)
