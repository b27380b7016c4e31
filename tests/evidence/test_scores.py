"""Scores against references in NumPy, and what they say of a good net, a doubtful one and a collapse."""

import math

import numpy as np
import pytest
import torch

from lightning_tta.evidence import scores

K = 5


def logits_of(number=60, seed=0, scale=2.0):
    return scale * torch.randn(number, K, generator=torch.Generator().manual_seed(seed))


def softmax(u):
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_infomax_and_entropy():
    u = logits_of()
    p = softmax(u.double().numpy())
    conditional, mean = -(p * np.log(p)).sum(1).mean(), p.mean(0)
    marginal = -(mean * np.log(mean)).sum()
    assert float(scores.infomax(u)) == pytest.approx((marginal - conditional) / math.log(K), abs=1e-6)
    assert float(scores.infomax(u, 0.3)) == pytest.approx((0.3 * marginal - conditional) / math.log(K), abs=1e-6)
    assert float(scores.negative_mean_entropy(u)) == pytest.approx(-conditional / math.log(K), abs=1e-6)


def test_infomax_is_largest_for_sure_and_even_predictions():
    even, one_class = 50 * torch.eye(K).repeat(4, 1), 50 * torch.eye(K)[:1].repeat(20, 1)
    assert float(scores.infomax(even)) == pytest.approx(1)
    assert float(scores.infomax(one_class)) == pytest.approx(0, abs=1e-6)
    assert float(scores.infomax(torch.zeros(20, K))) == pytest.approx(0, abs=1e-6)
    assert float(scores.negative_mean_entropy(one_class)) == pytest.approx(0, abs=1e-6)


def test_snd(monkeypatch):
    z = logits_of().softmax(1)
    x = z.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(x)):
        similarity = np.delete(x @ x[i], i) / 0.05
        p = softmax(similarity)
        total -= (p * np.log(p + 1e-300)).sum() / len(x)
    assert float(scores.snd(z)) == pytest.approx(total, rel=1e-4)
    monkeypatch.setattr(scores, "_ROWS", 7)
    assert float(scores.snd(z)) == pytest.approx(total, rel=1e-4)
    assert float(scores.snd(torch.ones(20, 3))) == pytest.approx(math.log(19), rel=1e-5)


def test_agreement():
    u = logits_of()
    other = u.clone()
    other[:15] = other[:15].roll(1, 1)  # another class for a quarter of them
    assert float(scores.agreement(u, u)) == 1
    assert float(scores.agreement(u, other)) == 0.75
    p = softmax(other.double().numpy() / 1.5)
    expected = p[np.arange(len(u)), u.argmax(1).numpy()].mean()
    assert float(scores.soft_agreement(u, other, 1.5)) == pytest.approx(expected, abs=1e-6)
    assert float(scores.soft_agreement(u, 1000 * u)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("number", [3, 60])
def test_nuclear_norm(number):
    u = logits_of(number)
    singular = np.linalg.svd(softmax(u.double().numpy()), compute_uv=False)
    assert float(scores.nuclear_norm(u)) == pytest.approx(singular.sum() / math.sqrt(number * min(number, K)), rel=1e-5)
    assert float(scores.nuclear_norm(50 * torch.eye(K).repeat(4, 1))) == pytest.approx(1)
    assert float(scores.nuclear_norm(50 * torch.eye(K)[:1].repeat(20, 1))) == pytest.approx(1 / math.sqrt(K))


def test_the_source_does_not_follow_a_net_into_wrong_classes():
    source = 5 * torch.eye(K).repeat(4, 1)
    wrong = source.roll(1, 1)
    assert float(scores.infomax(wrong)) == pytest.approx(float(scores.infomax(source)))
    assert float(scores.source_weighted_infomax(wrong, source)) < 0.1 * float(
        scores.source_weighted_infomax(source, source)
    )


@pytest.mark.parametrize("score", [scores.infomax, scores.negative_mean_entropy, scores.nuclear_norm])
def test_half_precision(score):
    assert score(logits_of().half()).dtype == torch.float32
    assert float(score(logits_of().half())) == pytest.approx(float(score(logits_of())), abs=2e-3)


def test_order_against_counts():
    u = torch.stack([logits_of(23, seed) for seed in range(3)])
    found = scores.order(u)
    for batch, order in zip(u.argmax(-1).tolist(), found.tolist(), strict=True):
        neighbors = np.mean([batch[place] == batch[place + 1] for place in range(22)])
        pairs = np.mean([batch[one] == batch[other] for one in range(23) for other in range(one)])
        assert order == pytest.approx(neighbors - pairs, abs=1e-12)
    assert float(scores.order(torch.eye(K).repeat_interleave(10, 0))) == pytest.approx(45 / 49 - 9 / 49)
    assert float(scores.order(u[0, :1])) == float(scores.order(torch.ones(7, K))) == 0
