import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_tta.data.streams import KINDS, STREAM_KINDS, _dirichlet, build_stream, default_reset, permutation
from lightning_tta.errors import ConfigError

LABELS = [torch.tensor([0, 1, 2] * 5), torch.tensor([2, 0] * 6), torch.tensor([1] * 4)]  # 15, 12 and 4 samples
DOMAIN_OF = [0] * 15 + [1] * 12 + [2] * 4
CLASS_OF = torch.cat(LABELS).tolist()

# Written down once: a stream must never change, or results can no longer be compared.
PINNED = {
    "iid": "0a4e28ef12ab",
    "continual": "0a4e28ef12ab",
    "label_shift": "86b4fb62a89c",
    "gradual": "0a4e28ef12ab",
    "mixed": "4e286fd223fd",
    "correlated": "9e0576c1747d",
    "blind_spot": "0a4e28ef12ab",
    "ordered": "c81daf2777a0",
}
ONCE = tuple(PINNED)  # each sample once; the others are in test_long_streams.py


def flat(stream):
    return [position for batch in stream.batches for position in batch]


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_sample_once_in_batches_of_the_asked_size(kind, batch_size):
    stream = build_stream(LABELS, kind=kind, batch_size=batch_size, seed=3)
    assert sorted(flat(stream)) == list(range(31))
    assert all(1 <= len(batch) <= batch_size for batch in stream.batches)
    sizes = [31] if kind == "mixed" else [15, 12, 4]
    assert len(stream.batches) == sum(-(-size // batch_size) for size in sizes)
    assert stream.sizes == (15, 12, 4)


@pytest.mark.parametrize("kind", [kind for kind in ONCE if kind != "mixed"])
def test_domains_follow_each_other_and_share_no_batch(kind):
    stream = build_stream(LABELS, kind=kind, batch_size=4, seed=1)
    assert [DOMAIN_OF[p] for p in flat(stream)] == DOMAIN_OF
    assert all(len({DOMAIN_OF[p] for p in batch}) == 1 for batch in stream.batches)


def test_mixed_batches_hold_several_domains():
    stream = build_stream(LABELS, kind="mixed", batch_size=8, seed=1)
    assert all(len({DOMAIN_OF[p] for p in batch}) > 1 for batch in stream.batches[:3])


@pytest.mark.parametrize("kind", ONCE)
def test_the_domain_of_each_position(kind):
    order = flat(build_stream(LABELS, kind=kind, batch_size=4, seed=1))
    assert build_stream(LABELS, kind=kind).domain_of(order).tolist() == [DOMAIN_OF[p] for p in order]
    with_empty = build_stream([LABELS[2], torch.zeros(0, dtype=torch.int64), LABELS[2]], kind="iid")
    assert with_empty.domain_of([3, 4, 7]).tolist() == [0, 2, 2]
    assert with_empty.domain_of([]).tolist() == []


def test_label_shift_gives_each_class_in_one_run_and_shuffles_inside():
    labels = [torch.arange(10).repeat(20)] * 2
    order = flat(build_stream(labels, kind="label_shift", batch_size=7, seed=0))
    runs = []
    for domain in (order[:200], order[200:]):
        classes = [position % 10 for position in domain]
        starts = [c for i, c in enumerate(classes) if i == 0 or classes[i - 1] != c]
        assert sorted(starts) == list(range(10))  # one run each
        assert starts != list(range(10))  # in a random order
        assert domain[:20] != sorted(domain[:20])
        runs.append(starts)
    assert runs[0] != runs[1]  # drawn anew for each domain


def test_iid_is_shuffled_differently_in_each_domain_and_ignores_labels():
    labels = [torch.zeros(50, dtype=torch.int64)] * 2
    order = flat(build_stream(labels, kind="iid", batch_size=5, seed=0))
    first, second = order[:50], [p - 50 for p in order[50:]]
    assert first != sorted(first)
    assert first != second
    other = [torch.arange(50), torch.arange(50)]
    assert flat(build_stream(other, kind="iid", batch_size=5, seed=0)) == order
    assert flat(build_stream(labels, kind="continual", batch_size=5, seed=0)) == order


@pytest.mark.parametrize("kind", ONCE)
def test_seed_decides_the_order_and_batch_size_does_not(kind):
    one, same = (build_stream(LABELS, kind=kind, batch_size=4, seed=5) for _ in range(2))
    assert one == same
    assert flat(build_stream(LABELS, kind=kind, batch_size=9, seed=5)) == flat(one)
    assert (flat(build_stream(LABELS, kind=kind, batch_size=4, seed=6)) != flat(one)) == (kind != "ordered")


def test_ordered_is_the_order_of_the_domains_and_their_images():
    assert flat(build_stream(LABELS, kind="ordered", batch_size=4, seed=1)) == list(range(31))


@pytest.mark.parametrize("kind", ONCE)
def test_streams_are_pinned(kind):
    stream = build_stream(LABELS, kind=kind, batch_size=4, seed=11)
    assert stream.digest == hashlib.sha256(str(stream.batches).encode()).hexdigest()[:12]
    assert stream.digest == PINNED[kind]


def test_permutation_is_a_permutation_and_leaves_global_state_alone():
    before = torch.get_rng_state()
    assert sorted(permutation(100, 1, 2).tolist()) == list(range(100))
    assert permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()
    assert torch.equal(torch.get_rng_state(), before)


def test_reset_policies_and_kinds_agree():
    assert tuple(KINDS) == STREAM_KINDS
    assert {kind: default_reset(kind) for kind in STREAM_KINDS} == {
        "iid": "domain",
        "continual": "never",
        "label_shift": "domain",
        "gradual": "never",
        "mixed": "never",
        "correlated": "never",
        "blind_spot": "domain",
        "ordered": "never",
        "recurring": "never",
        "markov": "never",
        "polluted": "domain",
    }


def longest_run(classes):
    """Mean length of the runs of one class."""
    return len(classes) / (1 + sum(a != b for a, b in pairwise(classes)))


@pytest.mark.parametrize("kind", ["label_shift", "correlated"])
def test_dirichlet_goes_from_sorted_to_shuffled(kind):
    labels = [torch.arange(10).repeat(100)] * 2
    runs, streams = [], []
    for concentration in (1e-4, 0.1, 1.0, 1000.0):
        stream = build_stream(labels, kind=kind, batch_size=64, seed=2, dirichlet=concentration)
        order = flat(stream)
        assert sorted(order) == list(range(2000))
        assert [p // 1000 for p in order] == [0] * 1000 + [1] * 1000
        runs.append(longest_run([p % 10 for p in order]))
        # Between classes, how unequal the first tenth of a domain is: 1 where one class has it all.
        streams.append(max(torch.bincount(torch.tensor(order[:100]) % 10, minlength=10).tolist()) / 100)
    assert runs == sorted(runs, reverse=True)
    assert runs[0] > 45
    assert runs[-1] < 12  # a tenth of 100 samples of each class, in turn
    assert streams[0] > 0.9
    assert streams[-1] < 0.2


def test_correlated_is_label_shift_with_a_tenth():
    labels = [torch.arange(10).repeat(20)]
    expected = build_stream(labels, kind="label_shift", seed=3, dirichlet=0.1)
    assert build_stream(labels, kind="correlated", seed=3).batches == expected.batches
    assert build_stream(labels, kind="correlated", seed=3, dirichlet=5.0).batches != expected.batches
    assert build_stream(LABELS, kind="label_shift", batch_size=4, seed=11, dirichlet=0.5).digest == "0d1537c074cf"


def test_dirichlet_shares_have_the_right_mean_and_spread():
    shares = np.stack([_dirichlet(0.5, 4, seed) for seed in range(4000)])
    assert np.allclose(shares.sum(1), 1)
    assert np.allclose(shares.mean(0), 0.25, atol=0.02)
    assert np.allclose(shares.var(0), 0.25 * 0.75 / 3, atol=0.01)  # a (a0 - a) / (a0^2 (a0 + 1)), a0 = 2


@pytest.mark.parametrize("kind", ["iid", "continual", "mixed", "gradual", "blind_spot"])
def test_dirichlet_where_it_has_no_meaning(kind):
    with pytest.raises(ConfigError, match="label_shift, correlated, recurring or polluted"):
        build_stream(LABELS, kind=kind, dirichlet=0.1)


@pytest.mark.parametrize(
    "wrong", [{"kind": "sorted"}, {"batch_size": 0}, {"batch_size": 1.5}, {"seed": -1}, {"dirichlet": 0.0}]
)
def test_wrong_values(wrong):
    with pytest.raises(ConfigError, match=r"stream|batch_size|order_seed|dirichlet"):
        build_stream(LABELS, **wrong)
