"""Streams whose domains come again, follow a Markov chain, or are polluted: against references written out here."""

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_tta.data import markov
from lightning_tta.data.streams import build_stream, default_reset, options_of
from lightning_tta.errors import ConfigError

LABELS = [torch.tensor([0, 1, 2] * 5), torch.tensor([2, 0, 1, 1] * 3)]  # 15 and 12 samples
PINNED = {"recurring": "7ff4a39ff278", "markov": "2aaa11b0dc2d", "polluted": "ef4f9646b674"}


def flat(stream):
    return [position for batch in stream.batches for position in batch]


def shuffled(count, *key):
    """A random order of ``range(count)``: raw words of PCG64, sorted."""
    words = np.random.PCG64(list(key)).random_raw(count).tolist()
    return sorted(range(count), key=lambda position: words[position])


def draws(count, *key):
    return [(int(word) >> 11) / 2**53 for word in np.random.PCG64(list(key)).random_raw(count)]


@pytest.mark.parametrize("kind", PINNED)
def test_orders_are_pinned_and_no_sample_comes_twice(kind):
    stream = build_stream(LABELS, kind=kind, batch_size=4, seed=11)
    assert stream.digest == PINNED[kind]
    assert len(set(flat(stream))) == len(flat(stream))
    assert flat(build_stream(LABELS, kind=kind, batch_size=9, seed=11)) == flat(stream)
    assert flat(build_stream(LABELS, kind=kind, batch_size=4, seed=12)) != flat(stream)


# Recurring -----------------------------------------------------------------------------------------------------------


def test_each_visit_shows_the_same_images_in_its_own_order():
    stream = build_stream(LABELS, kind="recurring", batch_size=4, seed=3, visits=3)
    assert stream.sizes == (15, 12) * 3
    expected, start = [], 0
    for number, size in enumerate(stream.sizes):
        expected += [start + position for position in shuffled(size, 3, number)]
        start += size
    assert flat(stream) == expected
    visits = [[position % 27 for position in expected[27 * visit : 27 * visit + 27]] for visit in range(3)]
    assert all(sorted(visit) == list(range(27)) for visit in visits)
    assert visits[0] != visits[1] != visits[2]
    assert [len({*stream.domain_of(batch)}) for batch in stream.batches] == [1] * 21
    assert len(flat(build_stream(LABELS, kind="recurring"))) == 20 * 27


def test_one_visit_is_a_continual_stream():
    one = build_stream(LABELS, kind="recurring", seed=5, visits=1)
    assert one.batches == build_stream(LABELS, kind="continual", seed=5).batches


def test_labels_of_visits_may_be_correlated():
    stream = build_stream(LABELS, kind="recurring", visits=2, dirichlet=0.1, seed=2)
    assert stream.batches == build_stream(LABELS * 2, kind="correlated", seed=2).batches


# Markov --------------------------------------------------------------------------------------------------------------


def unitta(size, correlation, imbalance):
    """UniTTA's matrix as its paper has it: stay factors that fall with the share, the rest to all others alike."""
    ratio = imbalance ** (1 / (size - 1))
    least = 1 - imbalance * (1 - correlation)
    stay = [1 - (1 - least) / ratio ** (size - 1 - i) for i in range(size)]
    return [[stay[i] if i == j else (1 - stay[i]) / (size - 1) for j in range(size)] for i in range(size)]


@pytest.mark.parametrize(
    ("size", "correlation", "imbalance"), [(10, 0.95, 10), (15, 0.85, 5), (4, 0.25, 1), (2, 0.9, 3)]
)
def test_the_matrix_is_that_of_the_paper(size, correlation, imbalance):
    matrix = markov.transition(size, correlation, imbalance)
    np.testing.assert_allclose(matrix, unitta(size, correlation, imbalance), atol=1e-12)
    assert matrix[0, 0] == pytest.approx(correlation)


@pytest.mark.parametrize("size", [1, 2, 10])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("imbalance", [1, 10])
def test_the_shares_are_stationary(size, correlation, imbalance):
    matrix, share = markov.transition(size, correlation, imbalance), markov.shares(size, imbalance)
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(share @ matrix, share, atol=1e-12)
    assert matrix.min() >= 0
    if size > 1:
        assert share[0] / share[-1] == pytest.approx(imbalance)
        np.testing.assert_allclose(np.diff(np.log(share)), -np.log(imbalance) / (size - 1))
        assert np.diag(matrix).mean() >= min(correlation, 0.4)


def test_without_correlation_each_value_is_drawn_anew():
    np.testing.assert_allclose(markov.transition(5, 0.0, 7), np.tile(markov.shares(5, 7), (5, 1)))


def test_a_long_walk_has_the_shares_and_the_correlation():
    steps = 60_000
    matrix, share = markov.transition(6, 0.9, 4), markov.shares(6, 4)
    values = markov.walk(matrix, share, steps, 1, 2)
    counts = np.bincount(values, minlength=6) / steps
    np.testing.assert_allclose(counts, share, atol=0.015)
    moves = np.zeros((6, 6))
    np.add.at(moves, (values[:-1], values[1:]), 1)
    np.testing.assert_allclose(moves / moves.sum(1, keepdims=True), matrix, atol=0.02)


def walked(matrix, start, steps, *key):
    """The chain step by step: the first value whose cumulative probability is above the draw."""
    values, row = [], start
    for draw in draws(steps, *key):
        totals = [sum(row[: value + 1]) for value in range(len(row) - 1)]
        values.append(sum(draw >= total for total in totals))
        row = matrix[values[-1]]
    return values


def supply_of(labels, classes, seed):
    supply, start = {}, 0
    for d, domain in enumerate(labels):
        order = shuffled(len(domain), seed, d)
        for k in range(classes):
            supply[d, k] = deque(start + p for p in order if int(domain[p]) == k)
        start += len(domain)
    return supply


def geometric(size, imbalance):
    weights = [imbalance ** (-i / (size - 1)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def test_the_stream_is_that_of_two_chains_until_an_image_is_missing():
    labels = [torch.arange(4).repeat(50) for _ in range(3)]
    options = {"class_correlation": 0.9, "domain_correlation": 0.8, "class_imbalance": 3.0, "domain_imbalance": 2.0}
    stream = build_stream(labels, kind="markov", batch_size=7, seed=4, **options)
    domains = walked(unitta(3, 0.8, 2.0), geometric(3, 2.0), 601, 4, 7)
    classes = walked(unitta(4, 0.9, 3.0), geometric(4, 3.0), 601, 4, 8)
    supply, expected = supply_of(labels, 4, 4), []
    for state in zip(domains, classes, strict=True):
        if not supply[state]:
            break
        expected.append(supply[state].popleft())
    assert flat(stream) == expected
    assert 100 < len(expected) < 600
    assert stream.spans_domains
    assert max(len({*stream.domain_of(batch)}) for batch in stream.batches) > 1


def test_a_domain_correlation_of_one_takes_domain_after_domain():
    labels = [torch.arange(4).repeat(50) for _ in range(3)]
    stream = build_stream(
        labels, kind="markov", seed=4, domain_correlation=1, class_correlation=0.5, domain_imbalance=4
    )
    expected = []
    for d, share in enumerate((1, 1 / 2, 1 / 4)):
        supply = {k: deque(list(supply_of(labels, 4, 4)[d, k])[: round(50 * share)]) for k in range(4)}
        for k in walked(unitta(4, 0.5, 1), [0.25] * 4, 4 * round(50 * share) + 1, 4, d, 6):
            if not supply[k]:
                break
            expected.append(supply[k].popleft())
    assert flat(stream) == expected
    assert not stream.spans_domains
    numbers = stream.domain_of(expected).tolist()
    assert numbers == sorted(numbers)
    assert numbers.count(0) > numbers.count(1) > numbers.count(2) > 0


def test_a_stream_has_the_correlation_and_the_imbalance_that_were_asked_for():
    labels = [torch.arange(5).repeat(2000) for _ in range(3)]
    options = {"class_correlation": 0.9, "domain_correlation": 0.1, "class_imbalance": 1.0, "domain_imbalance": 5.0}
    stream = build_stream(labels, kind="markov", seed=0, **options)
    order = flat(stream)
    assert len(order) > 9000
    classes, domains = [p % 5 for p in order], stream.domain_of(order).tolist()
    assert np.mean([a == b for a, b in pairwise(classes)]) == pytest.approx(0.9, abs=0.01)
    assert np.bincount(classes) / len(order) == pytest.approx([0.2] * 5, abs=0.03)
    share = geometric(3, 5.0)  # independent draws: two in a row are equal with the sum of squares
    assert np.mean([a == b for a, b in pairwise(domains)]) == pytest.approx(sum(s * s for s in share), abs=0.02)
    assert np.bincount(domains) / len(order) == pytest.approx(share, abs=0.02)


def test_every_domain_needs_every_class():
    with pytest.raises(ConfigError, match=r"domain 1 has no image of class 1, 3\. Raise num_images"):
        build_stream([torch.arange(4), torch.tensor([0, 2])], kind="markov")


# Polluted ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pollution", "counts"), [(0.5, (15, 12)), (0.25, (5, 4)), (0.9, (135, 108)), (0.01, (0, 0))])
def test_polluting_images_come_at_random_places_of_their_domain(pollution, counts):
    stream = build_stream(LABELS, kind="polluted", batch_size=5, seed=3, pollution=pollution)
    assert stream.sizes == (15, 12, *counts)
    assert stream.hosts == (0, 1, 0, 1)
    assert sorted(flat(stream)) == list(range(27 + sum(counts)))
    real = [position for position in flat(stream) if position < 27]
    assert real == flat(build_stream(LABELS, kind="iid", seed=3))  # in the order without pollution
    hosts = [stream.hosts[d] for d in stream.domain_of(flat(stream))]
    assert hosts == [0] * (15 + counts[0]) + [1] * (12 + counts[1])
    other = [position for position in flat(stream) if position >= 27]
    assert other[: counts[0]] == [27 + p for p in shuffled(counts[0], 3, 0, 5)]


def test_places_of_pollution_are_even_along_the_stream():
    stream = build_stream([torch.zeros(3000)], kind="polluted", batch_size=600, pollution=0.5)
    shares = [np.mean([position >= 3000 for position in batch]) for batch in stream.batches]
    assert shares == pytest.approx([0.5] * 10, abs=0.08)


def test_pollution_may_come_first():
    mixed, first = (build_stream(LABELS, kind="polluted", seed=3, pollution_first=flag) for flag in (None, True))
    assert sorted(flat(first)) == sorted(flat(mixed))
    domains = [first.hosts[d] for d in first.domain_of(flat(first))]
    assert domains == [0] * 30 + [1] * 24
    others = [position >= 27 for position in flat(first)]
    assert others == [True] * 15 + [False] * 15 + [True] * 12 + [False] * 12
    assert [p for p in flat(first) if p < 27] == [p for p in flat(mixed) if p < 27]


def test_real_images_of_a_polluted_stream_may_be_correlated():
    stream = build_stream(LABELS, kind="polluted", seed=3, dirichlet=0.1)
    real = [position for position in flat(stream) if position < 27]
    assert real == flat(build_stream(LABELS, kind="correlated", seed=3))


# Options -------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_papers():
    assert {kind: default_reset(kind) for kind in PINNED} == {
        "recurring": "never",
        "markov": "never",
        "polluted": "domain",
    }
    known = {kind: {n: v for n, v in options_of(kind, {}).items() if v is not None} for kind in ("iid", *PINNED)}
    correlations = {"class_correlation": 0.95, "domain_correlation": 0.85}
    assert known == {
        "iid": {},
        "recurring": {"visits": 20},
        "markov": {**correlations, "class_imbalance": 1.0, "domain_imbalance": 1.0},
        "polluted": {"pollution": 0.5, "polluters": "uniform"},
    }


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("iid", {"visits": 2}, r"visits=2 has no meaning for stream='iid'\. Use it with recurring,"),
        ("recurring", {"visits": 0}, r"visits must be a whole number in \[1"),
        ("recurring", {"visits": 2.5}, "visits must be a whole number"),
        ("recurring", {"pollution": 0.5}, "Use it with polluted,"),
        ("markov", {"dirichlet": 0.1}, "label_shift, correlated, recurring or polluted"),
        ("markov", {"class_correlation": 1}, "class_correlation must be a number in"),
        ("markov", {"domain_correlation": 1.1}, "domain_correlation must be"),
        ("markov", {"class_imbalance": 0.5}, "class_imbalance must be"),
        ("polluted", {"pollution": 0}, "pollution must be a number in"),
        ("polluted", {"pollution": 1.0}, "pollution must be"),
        ("polluted", {"polluters": ""}, "polluters is empty"),
        ("polluted", {"visit": 3}, "option of a stream must be one of"),
    ],
)
def test_wrong_options(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        build_stream(LABELS, kind=kind, **options)
