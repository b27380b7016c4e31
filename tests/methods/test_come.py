"""COME's entropy against its definition, and the method against a reference written with plain torch."""

import math

import pytest
import torch

from lightning_tta import ConfigError, adapt
from lightning_tta.losses import come_entropy
from nets import KINDS, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainMethod, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def opinion_entropy(row, mass=None):
    """One row of logits (K,), by the definition: beliefs exp(u_k) / S and uncertainty m / S, S = m + sum exp(u)."""
    mass = len(row) if mass is None else mass
    length = math.sqrt(sum(v.item() ** 2 for v in row))
    row = row * (length / (row**2).sum().sqrt())
    total = mass + row.exp().sum()
    beliefs, uncertainty = row.exp() / total, mass / total
    return -(beliefs * beliefs.log()).sum() - uncertainty * uncertainty.log()


@pytest.mark.parametrize("mass", [None, 3.5, 1000])
@pytest.mark.parametrize("num_classes", [2, 5, 1000])
def test_entropy_against_the_definition(num_classes, mass):
    generator = torch.Generator().manual_seed(num_classes)
    logits = (3 * torch.randn(4, num_classes, generator=generator, dtype=torch.float64)).requires_grad_()
    ours = come_entropy(logits, mass)
    expected = torch.stack([opinion_entropy(row, mass) for row in logits])
    assert max_difference(ours.detach(), expected.detach()) < TOLERANCE
    assert (ours > 0).all()
    assert (ours < math.log(num_classes + 1)).all()
    gradients = [torch.autograd.grad(values.sum(), logits)[0] for values in (ours, expected)]
    assert max_difference(*gradients) < TOLERANCE
    assert gradients[0].abs().max() > 1e-3


def test_no_gradient_along_the_logits():
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(come_entropy(logits).sum(), logits)
    assert (gradient * logits).sum(1).abs().max() < 1e-14
    assert gradient.norm(dim=1).min() > 1e-2


def test_equal_logits():
    value = come_entropy(torch.full((2, 7), 1e-6, dtype=torch.float64))
    assert value.tolist() == pytest.approx([0.5 * math.log(14) + 0.5 * math.log(2)] * 2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e3, 1e15])
def test_finite_at_the_ends(dtype, scale):
    logits = (scale * torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 1.0]])).to(dtype).requires_grad_()
    value = come_entropy(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    if scale >= 1e3:
        assert value.abs().max() < 1e-6


class PlainCOME(PlainMethod):
    """min of the mean opinion entropy."""

    def __init__(self, net, lr, mass):
        super().__init__(net, lr)
        self.mass = mass

    def __call__(self, images):
        logits = self.net(images)
        loss = sum(opinion_entropy(row, self.mass) for row in logits) / len(logits)
        self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), loss.item()


@pytest.mark.parametrize("options", [{}, {"uncertainty": None}, {"uncertainty": 30.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_five_steps(kind, options):
    net = make_net(kind).double()
    method = adapt(net, "come", lr=0.1, optimizer="sgd", **options)
    reference = PlainCOME(net, 0.1, options.get("uncertainty", 1000))
    for images in make_stream(5, batch=6, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert_same_sgd(method, reference.sgd)
    assert reference.sgd.moved() > 1e-4


def test_as_an_option_of_tent_and_zerosiam():
    net = make_net("gn").double()
    come = adapt(net, "come", lr=0.1, optimizer="sgd", uncertainty=None)
    tent = adapt(net, "tent", lr=0.1, optimizer="sgd", entropy="come")
    siam = adapt(net, "zerosiam", lr=0.1, lr_batch_size=None, predictor="identity", entropy="come")
    softmax = adapt(net, "tent", lr=0.1, optimizer="sgd")
    for images in make_stream(3, dtype=torch.float64):
        expected = come(images)
        assert torch.equal(tent(images), expected)
        assert max_difference(siam(images), expected) < TOLERANCE
        assert siam.stats["online_entropy"] == pytest.approx(come.stats["loss"], abs=TOLERANCE)
        softmax(images)
    for name, tensor in come.adaptable.items():
        assert max_difference(tensor.detach(), siam.adaptable[name].detach()) < TOLERANCE
        assert max_difference(tensor.detach(), softmax.adaptable[name].detach()) > 1e-4


def test_which_predictions_become_surer():
    """Those whose classes together, here 408 and 11, outweigh the uncertainty, about: at m = K nearly all."""
    logits = torch.tensor([[6.0, 1.0, 0.0, -1.0], [2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for mass, expected in ((4.0, [True, True]), (200.0, [True, False]), (1e4, [False, False])):
        (down,) = torch.autograd.grad(-come_entropy(logits, mass).sum(), logits)
        (up,) = torch.autograd.grad(logits.softmax(1).amax(1).sum(), logits)
        assert ((down * up).sum(1) > 0).tolist() == expected


def test_an_uncertainty_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="uncertainty"):
        adapt(make_net("gn"), "come", uncertainty=0)
