import math

import pytest
import torch

from lightning_tta.losses import entropy, kl_divergence, symmetric_kl

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = {
    "entropy": lambda a, b: entropy(a),
    "kl": kl_divergence,
    "symmetric": symmetric_kl,
}


def probabilities(row):
    shifted = [math.exp(v - max(row)) for v in row]
    return [v / math.fsum(shifted) for v in shifted]


def divergence(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


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
    assert torch.equal(kl_divergence(a, a), torch.zeros(6))
    torch.testing.assert_close(entropy(a + 7), entropy(a))
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(b, a))
    assert (kl_divergence(a, b) > 0).all()
    assert not torch.allclose(kl_divergence(a, b), kl_divergence(b, a))
    # CE(p, q) = H(p) + KL(p || q)
    cross_entropy = torch.nn.functional.cross_entropy(b, a.softmax(1), reduction="none")
    torch.testing.assert_close(cross_entropy, entropy(a) + kl_divergence(a, b))


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
