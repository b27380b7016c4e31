import hashlib

import pytest
import torch

from lightning_tta.data.streams import KINDS, STREAM_KINDS, build_stream, default_reset, permutation
from lightning_tta.errors import ConfigError

LABELS = [torch.tensor([0, 1, 2] * 5), torch.tensor([2, 0] * 6), torch.tensor([1] * 4)]  # 15, 12 and 4 samples
DOMAIN_OF = [0] * 15 + [1] * 12 + [2] * 4
CLASS_OF = torch.cat(LABELS).tolist()

# Written down once: a stream must never change, or results can no longer be compared.
PINNED = {
    "iid": "0a4e28ef12ab",
    "continual": "0a4e28ef12ab",
    "label_shift": "86b4fb62a89c",
    "mixed": "4e286fd223fd",
}


def flat(stream):
    return [position for batch in stream.batches for position in batch]


@pytest.mark.parametrize("kind", STREAM_KINDS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_sample_once_in_batches_of_the_asked_size(kind, batch_size):
    stream = build_stream(LABELS, kind=kind, batch_size=batch_size, seed=3)
    assert sorted(flat(stream)) == list(range(31))
    assert all(1 <= len(batch) <= batch_size for batch in stream.batches)
    sizes = [31] if kind == "mixed" else [15, 12, 4]
    assert len(stream.batches) == sum(-(-size // batch_size) for size in sizes)
    assert stream.sizes == (15, 12, 4)


@pytest.mark.parametrize("kind", ["iid", "continual", "label_shift"])
def test_domains_follow_each_other_and_share_no_batch(kind):
    stream = build_stream(LABELS, kind=kind, batch_size=4, seed=1)
    assert [DOMAIN_OF[p] for p in flat(stream)] == DOMAIN_OF
    assert all(len({DOMAIN_OF[p] for p in batch}) == 1 for batch in stream.batches)


def test_mixed_batches_hold_several_domains():
    stream = build_stream(LABELS, kind="mixed", batch_size=8, seed=1)
    assert all(len({DOMAIN_OF[p] for p in batch}) > 1 for batch in stream.batches[:3])


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


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_seed_decides_the_order_and_batch_size_does_not(kind):
    one, same = (build_stream(LABELS, kind=kind, batch_size=4, seed=5) for _ in range(2))
    assert one == same
    assert flat(build_stream(LABELS, kind=kind, batch_size=9, seed=5)) == flat(one)
    assert flat(build_stream(LABELS, kind=kind, batch_size=4, seed=6)) != flat(one)


@pytest.mark.parametrize("kind", STREAM_KINDS)
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
        "mixed": "never",
    }


@pytest.mark.parametrize("wrong", [{"kind": "sorted"}, {"batch_size": 0}, {"batch_size": 1.5}, {"seed": -1}])
def test_wrong_values(wrong):
    with pytest.raises(ConfigError, match=r"stream|batch_size|order_seed"):
        build_stream(LABELS, **wrong)
