"""Test streams: the order in which samples reach a method.

A stream is a pure function of the labels of each domain, a kind, a batch size and a seed. It gives the same positions
on every machine: orders are made by sorting raw PCG64 words, the one part of NumPy's random numbers that never changes.

To add a kind, write a function from (labels of each domain, seed, Dirichlet concentration) to segments of positions
and enter it in ``KINDS``.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lightning_tta.errors import ConfigError, check_choice, check_range

StreamKind = Literal["iid", "continual", "gradual", "mixed", "label_shift", "correlated", "blind_spot", "ordered"]
ResetPolicy = Literal["never", "domain", "batch"]

Positions = npt.NDArray[np.int64]
Segments = list[Positions]


def permutation(count: int, *key: int) -> Positions:
    """A random order of ``range(count)`` that depends on nothing but ``key`` (whole numbers, each at least 0)."""
    words = np.random.PCG64(list(key)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _offsets(labels: Sequence[Positions]) -> list[int]:
    return [0, *np.cumsum([len(domain) for domain in labels]).tolist()]


def _by_domain(labels: Sequence[Positions], seed: int, dirichlet: float | None) -> Segments:
    """Each domain shuffled, one after the other."""
    starts = _offsets(labels)
    return [starts[d] + permutation(len(domain), seed, d) for d, domain in enumerate(labels)]


def _by_class(labels: Sequence[Positions], seed: int, dirichlet: float | None) -> Segments:
    """Each domain correlated in its labels: see :func:`_correlated`; sorted by class without a concentration."""
    starts, segments = _offsets(labels), []
    for d, domain in enumerate(labels):
        if dirichlet is not None:
            segments.append(starts[d] + _correlated(domain, dirichlet, seed, d))
            continue
        shuffled = permutation(len(domain), seed, d)
        classes, members = np.unique(domain[shuffled], return_inverse=True)
        rank_of_class = permutation(len(classes), seed, d, 1)
        segments.append(starts[d] + shuffled[np.argsort(rank_of_class[members], kind="stable")])
    return segments


def _correlated(labels: Positions, concentration: float, *key: int) -> Positions:
    """An order in which labels are correlated in time, as in LAME, NOTE and RoTTA.

    Time has as many slots as there are classes (at most 100). The samples of each class are dealt to the slots in
    shares drawn from a Dirichlet distribution; in a slot, the classes follow each other in random order.
    """
    order = permutation(len(labels), *key)
    classes = np.unique(labels)
    slots = min(len(classes), _MAX_SLOTS)
    chunks: list[list[Positions]] = [[] for _ in range(slots)]
    for number, label in enumerate(classes):
        members = order[labels[order] == label]
        ends = np.round(np.cumsum(_dirichlet(concentration, slots, *key, 2, number)) * len(members)).astype(np.int64)
        for slot, chunk in enumerate(np.split(members, ends[:-1])):
            chunks[slot].append(chunk)
    turns = [permutation(len(classes), *key, 3, slot) for slot in range(slots)]
    return np.concatenate([chunks[slot][number] for slot in range(slots) for number in turns[slot]])


def _dirichlet(concentration: float, slots: int, *key: int) -> npt.NDArray[np.float64]:
    """Shares of a symmetric Dirichlet distribution; the legacy generator, whose numbers are frozen for good."""
    seed = np.random.PCG64(list(key)).random_raw(1) % 2**32
    shares = np.random.RandomState(seed.astype(np.uint32)).dirichlet([concentration] * slots)
    return shares if np.isfinite(shares).all() else np.eye(slots)[int(seed[0]) % slots]  # all underflowed


def _mixed(labels: Sequence[Positions], seed: int, dirichlet: float | None) -> Segments:
    """All samples of all domains in one random order."""
    return [permutation(_offsets(labels)[-1], seed)]


def _as_listed(labels: Sequence[Positions], seed: int, dirichlet: float | None) -> Segments:
    """Each domain in its own order, one after the other."""
    starts = _offsets(labels)
    return [starts[d] + np.arange(len(domain), dtype=np.int64) for d, domain in enumerate(labels)]


KINDS: dict[str, Callable[[Sequence[Positions], int, float | None], Segments]] = {
    "iid": _by_domain,
    "continual": _by_domain,  # the same order as iid: only the default reset differs
    "gradual": _by_domain,  # the data module names the domains: each severity up, then down
    "mixed": _mixed,
    "label_shift": _by_class,
    "correlated": _by_class,
    "blind_spot": _by_domain,  # the data module puts a domain's blind spots before the domain
    "ordered": _as_listed,
}
STREAM_KINDS: tuple[str, ...] = get_args(StreamKind)
MEANING = {
    "iid": "each domain shuffled, one after the other",
    "continual": "the same",
    "gradual": "each corruption at severities 1 to 5 and back",
    "mixed": "all domains shuffled together",
    "label_shift": "each domain sorted by class, or with dirichlet correlated in its labels",
    "correlated": "labels correlated (Dirichlet 0.1), domains one after the other",
    "blind_spot": "what the source gets wrong in a domain, then all of it without adapting",
    "ordered": "each domain as it is listed (images by name, frames by time), one after the other",
}
LABEL_KINDS = ("label_shift", "correlated")
NEED_LABELS = (*LABEL_KINDS, "blind_spot")
RESET_BY_DOMAIN = ("iid", "label_shift", "blind_spot")
PRACTICAL_CONCENTRATION = 0.1  # RoTTA's "practical" setting, arXiv 2303.13899
_MAX_SLOTS = 100


def default_reset(kind: str) -> ResetPolicy:
    """When a method starts anew by default: ``domain`` for ``iid``, ``label_shift``, ``blind_spot``, else ``never``."""
    check_choice("stream", kind, STREAM_KINDS)
    return "domain" if kind in RESET_BY_DOMAIN else "never"


def needs_labels(kind: str) -> str:
    """The message where a kind orders images by labels that they do not have."""
    others = ", ".join(other for other in STREAM_KINDS if other not in NEED_LABELS)
    return f"stream={kind!r} orders images by their labels, and these have none. Choose one of {others}."


def concentration_of(kind: str, dirichlet: float | None) -> float | None:
    """The concentration a kind runs with: as given, RoTTA's 0.1 for ``correlated``, ``None`` where it has none.

    Raises:
        ConfigError: If it is out of range, or given for a kind whose order does not depend on labels.
    """
    if dirichlet is not None:
        check_range("dirichlet", dirichlet, 0, low_open=True)
        if kind not in LABEL_KINDS:
            raise ConfigError(
                f"dirichlet={dirichlet} orders samples by label, which stream={kind!r} does not. Use it with "
                f"{' or '.join(LABEL_KINDS)}, or leave it out."
            )
    return PRACTICAL_CONCENTRATION if kind == "correlated" and dirichlet is None else dirichlet


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

    def domain_of(self, positions: Sequence[int]) -> Positions:
        """The number of each sample's domain."""
        return np.searchsorted(np.cumsum(self.sizes), positions, side="right")


def build_stream(
    labels: Sequence[Any], *, kind: str = "iid", batch_size: int = 64, seed: int = 0, dirichlet: float | None = None
) -> Stream:
    """Order the samples of several domains into a stream.

    Args:
        labels: For each domain its labels: a tensor, array or sequence of integers, shape (N_d,).
        kind: A key of :data:`MEANING`. For ``gradual`` and ``blind_spot`` the data module makes the domains.
        batch_size: Samples in a batch, at least 1. A domain's last batch may be smaller; only ``mixed`` has batches
            with several domains.
        seed: Seed of the order, at least 0.
        dirichlet: Concentration of the Dirichlet distribution that deals a class's samples over time, above 0: small
            values are close to sorted, large ones to shuffled. For ``label_shift`` and ``correlated`` only.

    Raises:
        ConfigError: On an unknown kind, or a batch size, seed or concentration out of range.
    """
    check_choice("stream", kind, STREAM_KINDS)
    check_range("batch_size", batch_size, 1, integer=True)
    check_range("order_seed", seed, 0, integer=True)
    arrays = [torch.as_tensor(domain).numpy().astype(np.int64) for domain in labels]
    batches: list[list[int]] = []
    for segment in KINDS[kind](arrays, seed, concentration_of(kind, dirichlet)):
        batches += [segment[start : start + batch_size].tolist() for start in range(0, len(segment), batch_size)]
    return Stream(kind, tuple(len(domain) for domain in arrays), batches)
