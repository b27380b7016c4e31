import math

import pytest
import torch

from lightning_tta import losses
from lightning_tta.losses import (
    confident_loss,
    consistency,
    entropy,
    log_mean_probability,
    marginal_entropy,
    soft_cross_entropy,
    symmetric_kl,
    unconfident_entropy,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = {
    "entropy": lambda a, b: entropy(a),
    "symmetric": symmetric_kl,
    "soft_cross_entropy": soft_cross_entropy,
    "both_ways": lambda a, b: soft_cross_entropy(a, b, 0.25),
}


def probabilities(row):
    shifted = [math.exp(v - max(row)) for v in row]
    return [v / math.fsum(shifted) for v in shifted]


def divergence(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cross(p, q):
    return -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))


def rows(classes, scale=3.0):
    a, b = (scale * torch.randn(6, classes, dtype=torch.float64) for _ in range(2))
    return a, b, [probabilities(row) for row in a.tolist()], [probabilities(row) for row in b.tolist()]


@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_against_sums_over_classes(classes):
    a, b, p, q = rows(classes)
    expected = {
        "entropy": [-math.fsum(v * math.log(v) for v in row) for row in p],
        "kl": [divergence(x, y) for x, y in zip(p, q, strict=True)],
        "symmetric": [divergence(x, y) + divergence(y, x) for x, y in zip(p, q, strict=True)],
        "soft_cross_entropy": [cross(x, y) for x, y in zip(p, q, strict=True)],
        "both_ways": [0.75 * cross(x, y) + 0.25 * cross(y, x) for x, y in zip(p, q, strict=True)],
    }
    for name, loss in LOSSES.items():
        value = loss(a, b)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    a, b, _, _ = rows(4)
    loss = LOSSES[name]
    torch.autograd.gradcheck(lambda x: loss(x, b), a.requires_grad_())
    if name != "entropy":
        torch.autograd.gradcheck(lambda y: loss(a.detach(), y), b.requires_grad_())


def test_known_values():
    uniform = torch.zeros(3, 8)
    torch.testing.assert_close(entropy(uniform), torch.full((3,), math.log(8)))
    certain = torch.tensor([[100.0, 0.0, 0.0]])
    assert entropy(certain).item() == pytest.approx(0, abs=1e-6)
    a, b, _, _ = rows(5)
    torch.testing.assert_close(entropy(a + 7), entropy(a))
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(b, a))
    assert (symmetric_kl(a, b) > 0).all()
    assert torch.equal(symmetric_kl(a, a), torch.zeros(6))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits(name, scale, dtype):
    a = (scale * torch.eye(4, dtype=dtype)).requires_grad_()
    b = (scale * torch.eye(4, dtype=dtype)[[1, 0, 2, 3]]).requires_grad_()
    value = LOSSES[name](a, b)
    assert torch.isfinite(value).all()
    for gradient in torch.autograd.grad(value.sum(), [a] if name == "entropy" else [a, b]):
        assert torch.isfinite(gradient).all()
    if name == "entropy":
        assert torch.equal(value, torch.zeros_like(value))
    else:
        expected = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=dtype) * scale * (2 if name == "symmetric" else 1)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    a, b, _, _ = rows(6)
    a, b = a.to(dtype), b.to(dtype)
    value = LOSSES[name](a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[name](a.double(), b.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_leading_dimensions(name):
    a, b, _, _ = rows(5)
    value = LOSSES[name](a.view(2, 3, 5), b.view(2, 3, 5))
    assert value.shape == (2, 3)
    assert torch.equal(value.flatten(), LOSSES[name](a, b))
    assert LOSSES[name](a[0], b[0]).shape == ()


def plain_minimax_parts(logits, threshold, kind, temperature):
    """(L_conf, L_ent) sample by sample from probabilities."""
    spread = logits.std(0, correction=0).mean() if temperature == "gem_t" else 1.0
    confident, unconfident = [], []
    for row in logits:
        p = row.exp() / row.exp().sum()
        if p.max() >= threshold:
            confident.append(-p.max().log() if kind == "hard_ce" else -(p * p.log()).sum())
        else:
            scaled = (row - row.mean()) / spread if temperature == "gem_t" else row
            q = scaled.exp() / scaled.exp().sum()
            unconfident.append(-(q * q.log()).sum())
    parts = []
    for values in (confident, unconfident):
        mean = sum(values) / len(values) if values else torch.tensor(0.0, dtype=logits.dtype)
        parts.append(2 * len(values) / len(logits) * mean)
    return parts


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["hard_ce", "entropy"])
@pytest.mark.parametrize("temperature", ["none", "gem_t"])
def test_confident_and_unconfident_losses(threshold, kind, temperature):
    logits = torch.randn(9, 4, dtype=torch.float64) * 2
    high, low = plain_minimax_parts(logits, threshold, kind, temperature)
    assert abs(confident_loss(logits, threshold, kind) - high) < 1e-12
    assert abs(unconfident_entropy(logits, threshold, temperature) - low) < 1e-12
    domains = torch.stack([logits, logits.flip(1) + 1])
    for loss in (confident_loss(domains, threshold), unconfident_entropy(domains, threshold, temperature)):
        assert loss.shape == (2,)
    assert abs(unconfident_entropy(domains, threshold, temperature)[0] - low) < 1e-12


def test_temperature_is_a_constant():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(unconfident_entropy(logits, 1.0, "gem_t"), logits)
    spread = logits.detach().std(0, correction=0).mean()
    p = ((logits - logits.detach().mean(1, keepdim=True)) / spread).softmax(1)
    (theirs,) = torch.autograd.grad(2 * -(p * p.log()).sum(1).mean(), logits)
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("logits", [torch.zeros(1, 3), torch.full((4, 3), 2.0), torch.eye(3) * 1e4], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_minimax_losses_of_one_sample_equal_and_saturated_logits(logits, threshold):
    logits = logits.clone().requires_grad_()
    loss = confident_loss(logits, threshold) + unconfident_entropy(logits, threshold, "gem_t")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def view_probabilities(logits):
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return p, p.mean(-2, keepdim=True)


def test_marginal_entropy_and_consistency():
    logits = torch.randn(3, 6, 4, dtype=torch.float64) * 3
    p, mean = view_probabilities(logits)
    assert (marginal_entropy(logits) + (mean * mean.log()).sum((-1, -2))).abs().max() < 1e-12
    assert (log_mean_probability(logits) - mean[:, 0].log()).abs().max() < 1e-12
    assert (consistency(logits) - (p * (p / mean).log()).sum(-1).mean(-1)).abs().max() < 1e-12
    reverse = (mean * (mean / p).log()).sum(-1).mean(-1)
    assert (consistency(logits, "mean_to_view") - reverse).abs().max() < 1e-12


def test_marginal_entropy_is_mean_entropy_plus_consistency():
    logits = torch.randn(5, 8, 10, dtype=torch.float64) * 2
    total = entropy(logits).mean(-1) + consistency(logits)
    assert (marginal_entropy(logits) - total).abs().max() < 1e-12


@pytest.mark.parametrize("direction", ["view_to_mean", "mean_to_view"])
def test_detaching_the_mean(direction):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    full, fixed = (torch.autograd.grad(consistency(logits, direction, detach), logits)[0] for detach in (False, True))
    p, mean = view_probabilities(logits)
    mean = mean.detach()
    by_hand = p * (p / mean).log() if direction == "view_to_mean" else mean * (mean / p).log()
    (expected,) = torch.autograd.grad(by_hand.sum(-1).mean(), logits)
    assert (fixed - expected).abs().max() < 1e-12
    assert ((full - fixed).abs().max() < 1e-12) == (direction == "view_to_mean")


def test_views_that_are_saturated_and_apart_stay_finite():
    logits = (1e4 * torch.eye(4)).requires_grad_()
    loss = marginal_entropy(logits) + consistency(logits)
    assert torch.isclose(loss, torch.tensor(2 * math.log(4)))
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_divergences_against_their_formulas():
    p_logits, q_logits = (
        2 * torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2)
    )
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = (p + q) / 2
    expected = {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "symmetric_kl": kl(p, q) + kl(q, p),
        "js": (kl(p, m) + kl(q, m)) / 2,
        "mse": ((p - q) ** 2).sum(-1),
    }
    for kind, values in expected.items():
        torch.testing.assert_close(losses.divergence(p_logits, q_logits, kind), values, rtol=1e-10, atol=1e-12)
        assert float(losses.divergence(p_logits, p_logits, kind).abs().max()) < 1e-12
