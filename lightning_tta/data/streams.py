"""Test streams: the order in which samples reach a method.

A stream is a pure function of the labels of each domain, a kind, a batch size and a seed. It gives the same positions
on every machine: orders are made by sorting raw PCG64 words, the one part of NumPy's random numbers that never changes.

To add a kind, write a function from (labels of each domain, seed, options) to segments of positions and enter it in
``KINDS``; options of its own go into ``OPTIONS``.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lightning_tta.data import markov
from lightning_tta.errors import ConfigError, check_choice, check_range

StreamKind = Literal[
    "iid",
    "continual",
    "gradual",
    "mixed",
    "label_shift",
    "correlated",
    "blind_spot",
    "ordered",
    "recurring",
    "markov",
    "polluted",
]
ResetPolicy = Literal["never", "domain", "batch"]

Positions = npt.NDArray[np.int64]
Segments = list[Positions]
Options = Mapping[str, Any]


def permutation(count: int, *key: int) -> Positions:
    """A random order of ``range(count)`` that depends on nothing but ``key`` (whole numbers, each at least 0)."""
    words = np.random.PCG64(list(key)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _offsets(labels: Sequence[Positions]) -> list[int]:
    return [0, *np.cumsum([len(domain) for domain in labels]).tolist()]


def _by_domain(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """Each domain shuffled, one after the other."""
    starts = _offsets(labels)
    return [starts[d] + permutation(len(domain), seed, d) for d, domain in enumerate(labels)]


def _by_class(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """Each domain correlated in its labels: see :func:`_correlated`; sorted by class without a concentration."""
    starts, segments, dirichlet = _offsets(labels), list[Positions](), options["dirichlet"]
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


def _mixed(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """All samples of all domains in one random order."""
    return [permutation(_offsets(labels)[-1], seed)]


def _as_listed(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """Each domain in its own order, one after the other."""
    starts = _offsets(labels)
    return [starts[d] + np.arange(len(domain), dtype=np.int64) for d, domain in enumerate(labels)]


def _shuffled_or_correlated(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """Each domain shuffled, or with a concentration correlated in its labels, one after the other."""
    order = _by_domain if options["dirichlet"] is None else _by_class
    return order(labels, seed, options)


def _polluted(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """Each domain with its polluting images at random places; these are domains too, after all others."""
    half = len(labels) // 2
    starts, segments = _offsets(labels), list[Positions]()
    for d, real in enumerate(_shuffled_or_correlated(labels[:half], seed, options)):
        other = len(labels[half + d])
        segment = np.empty(len(real) + other, dtype=np.int64)
        places = permutation(len(segment), seed, d, 4)
        is_other = (np.arange(len(segment)) if options["pollution_first"] else places) < other
        segment[~is_other] = real
        segment[is_other] = starts[half + d] + permutation(other, seed, d, 5)
        segments.append(segment)
    return segments


def _markov(labels: Sequence[Positions], seed: int, options: Options) -> Segments:
    """Domain and class move as two Markov chains; the stream ends where they ask for an image that is not there.

    With ``domain_correlation`` 1 there is one domain after the other, each until that happens.
    """
    classes = np.unique(np.concatenate(labels))
    supply = _by_state(labels, classes, seed)
    by_class = markov.transition(len(classes), options["class_correlation"], options["class_imbalance"])
    class_share = markov.shares(len(classes), options["class_imbalance"])
    domain_share = markov.shares(len(labels), options["domain_imbalance"])
    segments = list[Positions]()
    if options["domain_correlation"] == 1:
        for d, row in enumerate(supply):
            counts = [max(1, round(len(members) * domain_share[d] / domain_share[0])) for members in row]
            kept = [members[:count] for members, count in zip(row, counts, strict=True)]
            segments.append(_taken(kept, markov.walk(by_class, class_share, sum(counts) + 1, seed, d, 6)))
        return segments
    steps = _offsets(labels)[-1] + 1
    by_domain = markov.transition(len(labels), options["domain_correlation"], options["domain_imbalance"])
    domain = markov.walk(by_domain, domain_share, steps, seed, 7)
    state = domain * len(classes) + markov.walk(by_class, class_share, steps, seed, 8)
    return [_taken([members for row in supply for members in row], state)]


def _by_state(labels: Sequence[Positions], classes: Positions, seed: int) -> list[list[Positions]]:
    """For each domain and class the positions of its images, shuffled."""
    supply = list[list[Positions]]()
    for d, (start, domain) in enumerate(zip(_offsets(labels)[:-1], labels, strict=True)):
        order = permutation(len(domain), seed, d)
        supply.append([start + order[domain[order] == label] for label in classes])
        missing = [int(label) for label, members in zip(classes, supply[-1], strict=True) if not len(members)]
        if missing:
            raise ConfigError(
                f"A markov stream goes from any domain and class to any other, but the stream's domain {d} has no "
                f"image of class {', '.join(map(str, missing[:10]))}. Raise num_images, leave that domain out, or take "
                "another stream."
            )
    return supply


def _taken(supply: Sequence[Positions], states: Positions) -> Positions:
    """The images that a walk over states takes, in order, up to the first state that has none left."""
    sizes = np.array([len(members) for members in supply])
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(states, kind="stable")
    visits = np.bincount(states, minlength=len(supply))
    turn = np.empty(len(states), dtype=np.int64)  # how often the state was visited before
    turn[order] = np.arange(len(states)) - np.repeat(np.cumsum(visits) - visits, visits)
    end = int(np.argmax(turn >= sizes[states]))  # there are more steps than images
    return np.asarray(np.concatenate(supply)[starts[states[:end]] + turn[:end]])


KINDS: dict[str, Callable[[Sequence[Positions], int, Options], Segments]] = {
    "iid": _by_domain,
    "continual": _by_domain,  # the same order as iid: only the default reset differs
    "gradual": _by_domain,  # the data module names the domains: each severity up, then down
    "mixed": _mixed,
    "label_shift": _by_class,
    "correlated": _by_class,
    "blind_spot": _by_domain,  # the data module puts a domain's blind spots before the domain
    "ordered": _as_listed,
    "recurring": _shuffled_or_correlated,  # of the domains of all visits
    "markov": _markov,
    "polluted": _polluted,
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
    "recurring": "all domains in turn, again and again (visits, 20): the same images in a new order each time",
    "markov": "domain and class as Markov chains, each with a correlation and an imbalance (UniTTA)",
    "polluted": "other images (polluters, half of the stream) mixed into each domain; the real ones are scored (SoTTA)",
}
LABEL_KINDS = ("label_shift", "correlated")
NEED_LABELS = (*LABEL_KINDS, "blind_spot", "markov")
RESET_BY_DOMAIN = ("iid", "label_shift", "blind_spot", "polluted")
PRACTICAL_CONCENTRATION = 0.1  # RoTTA's "practical" setting, arXiv 2303.13899
_MAX_SLOTS = 100
NOISE = ("uniform", "gaussian")
"""Polluting images that are made; any other name is that of a folder."""

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dirichlet": (
        {"label_shift": None, "correlated": PRACTICAL_CONCENTRATION, "recurring": None, "polluted": None},
        {"low": 0, "low_open": True},
    ),
    "visits": ({"recurring": 20}, {"low": 1, "integer": True}),  # PeTTA's number
    "class_correlation": ({"markov": 0.95}, {"low": 0, "high": 0.999999}),  # UniTTA's correlated settings
    "domain_correlation": ({"markov": 0.85}, {"low": 0, "high": 1}),
    "class_imbalance": ({"markov": 1.0}, {"low": 1}),
    "domain_imbalance": ({"markov": 1.0}, {"low": 1}),
    "pollution": ({"polluted": 0.5}, {"low": 0, "high": 0.95, "low_open": True}),  # SoTTA: as many as real ones
    "polluters": ({"polluted": "uniform"}, {}),
    "pollution_first": ({"polluted": None}, {}),
}
"""Options of some kinds: for each kind that has it the default, and the range."""


def default_reset(kind: str) -> ResetPolicy:
    """When a method starts anew by default: at each ``domain`` for :data:`RESET_BY_DOMAIN`, else ``never``."""
    check_choice("stream", kind, STREAM_KINDS)
    return "domain" if kind in RESET_BY_DOMAIN else "never"


def orders_by_labels(kind: str, dirichlet: float | None) -> bool:
    """Whether an order depends on labels."""
    return kind in NEED_LABELS or dirichlet is not None


def needs_labels(kind: str) -> str:
    """The message where a kind orders images by labels that they do not have."""
    others = ", ".join(other for other in STREAM_KINDS if other not in NEED_LABELS)
    return (
        f"stream={kind!r} orders images by their labels{'' if kind in NEED_LABELS else ' with dirichlet'}, and these "
        f"have none. Choose one of {others}{'' if kind in NEED_LABELS else ', without dirichlet'}."
    )


def options_of(kind: str, given: Options) -> dict[str, Any]:
    """All :data:`OPTIONS` as a kind runs with them: as given, else its defaults, ``None`` where it has none.

    Args:
        kind: A kind of stream.
        given: Options by name; ``None`` stands for the default.

    Raises:
        ConfigError: If an option is not known, out of range, or has no meaning for this kind.
    """
    check_choice("stream", kind, STREAM_KINDS)
    for name in given:
        check_choice("option of a stream", name, tuple(OPTIONS))
    options = {}
    for name, (defaults, allowed) in OPTIONS.items():
        value = given.get(name)
        if value is not None and kind not in defaults:
            kinds = " or ".join(filter(None, (", ".join([*defaults][:-1]), [*defaults][-1])))
            raise ConfigError(
                f"{name}={value} has no meaning for stream={kind!r}. Use it with {kinds}, or leave it out."
            )
        if value is not None and allowed:
            check_range(name, value, **allowed)
        options[name] = defaults.get(kind) if value is None else value
    if options["polluters"] == "":
        raise ConfigError(f"polluters is empty. Choose one of {', '.join(NOISE)}, or name a folder of images.")
    return options


def spans_domains(kind: str, options: Options) -> bool:
    """Whether a batch may have images of several domains, which then have no beginning and no end."""
    return kind == "mixed" or (kind == "markov" and options["domain_correlation"] < 1)


def count_polluting(size: int, pollution: float) -> int:
    """How many other images come with ``size`` real ones so that they are a share ``pollution`` of all."""
    return round(size * pollution / (1 - pollution))


def _with_repeats(labels: Sequence[Positions], kind: str, options: Options) -> list[Positions]:
    """The labels of all domains of a stream: those of each visit, or those of polluting images, -1, as well."""
    if kind == "recurring":
        return [*labels] * int(options["visits"])
    if kind == "polluted":
        counts = [count_polluting(len(domain), options["pollution"]) for domain in labels]
        return [*labels, *(np.full(count, -1) for count in counts)]
    return list(labels)


@dataclass(frozen=True)
class Stream:
    """Batches of sample positions.

    Attributes:
        kind: The stream's kind.
        sizes: Number of samples in each domain. Position ``p`` of domain ``d`` is ``sum(sizes[:d]) + p``.
        batches: Positions of each batch, in order. No sample occurs twice, and each occurs but in a ``markov`` stream.
        hosts: For each domain the one whose batches it comes in: itself, or for polluting images the domain that they
            pollute.
        spans_domains: Whether batches may have images of several domains, apart from polluting ones.
    """

    kind: str
    sizes: tuple[int, ...]
    batches: list[list[int]]
    hosts: tuple[int, ...]
    spans_domains: bool = False

    @property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the batches."""
        return hashlib.sha256(repr(self.batches).encode()).hexdigest()[:12]

    def domain_of(self, positions: Sequence[int]) -> Positions:
        """The number of each sample's domain."""
        return np.searchsorted(np.cumsum(self.sizes), positions, side="right")


def build_stream(
    labels: Sequence[Any], *, kind: str = "iid", batch_size: int = 64, seed: int = 0, **options: Any
) -> Stream:
    """Order the samples of several domains into a stream.

    The domains of a ``recurring`` stream are those of the first visit, then those of the second, and so on: a sample
    has a position in each visit. Those of a ``polluted`` stream are the real ones, then the polluting images of each.

    Args:
        labels: For each domain its labels: a tensor, array or sequence of integers, shape (N_d,).
        kind: A key of :data:`MEANING`. For ``gradual`` and ``blind_spot`` the data module makes the domains.
        batch_size: Samples in a batch, at least 1. A domain's last batch may be smaller; only ``mixed`` and ``markov``
            have batches with several domains.
        seed: Seed of the order, at least 0.
        **options: Those of the kind, see :data:`OPTIONS` and :class:`~lightning_tta.data.base.ShiftedDataModule`.

    Raises:
        ConfigError: On an unknown kind, or a batch size, seed or option out of range; for ``markov`` if a domain lacks
            a class.
    """
    known = options_of(kind, options)
    check_range("batch_size", batch_size, 1, integer=True)
    check_range("order_seed", seed, 0, integer=True)
    arrays = [torch.as_tensor(domain).numpy().astype(np.int64) for domain in labels]
    domains = _with_repeats(arrays, kind, known)
    batches: list[list[int]] = []
    for segment in KINDS[kind](domains, seed, known):
        batches += [segment[start : start + batch_size].tolist() for start in range(0, len(segment), batch_size)]
    own = len(arrays) if kind == "polluted" else len(domains)
    hosts = tuple(number % own for number in range(len(domains)))
    return Stream(kind, tuple(map(len, domains)), batches, hosts, spans_domains(kind, known))
