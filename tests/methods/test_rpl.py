"""RPL against its formula with loops over samples, in float64."""

import math

import pytest
import torch

from lightning_tta import ConfigError, adapt
from lightning_tta.losses import generalized_cross_entropy
from nets import KINDS, make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainMethod, PlainSGD, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainRPL(PlainMethod):
    def __init__(self, net, lr, q, params="norm"):
        super().__init__(net, lr)
        self.q = q
        if params == "all":
            self.sgd = PlainSGD(dict(self.net.named_parameters()), lr)

    def __call__(self, images):
        logits = self.net(images)
        terms = []
        for row in logits:
            p = row.exp() / row.exp().sum()
            terms.append((1 - p[p.argmax()] ** self.q) / self.q)
        loss = sum(terms) / len(terms)
        self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q", "params"), [(0.8, "norm"), (0.1, "norm"), (1.0, "norm"), (0.8, "all")])
def test_four_steps(kind, q, params):
    net = make_net(kind).double()
    method = adapt(net, "rpl", lr=0.05, optimizer="sgd", q=q, params=params)
    reference = PlainRPL(net, 0.05, q, params)
    for images in make_stream(4, batch=6, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 1)
        assert_same_sgd(method, reference.sgd)
    if params == "norm":  # a bias before BatchNorm has no effect
        assert reference.sgd.moved() > 1e-5


def test_the_loss_between_its_ends():
    logits = 3 * torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 7
    p = logits.softmax(1)[torch.arange(50), labels]
    assert max_difference(generalized_cross_entropy(logits, labels, 1.0), 1 - p) < 1e-12
    assert max_difference(generalized_cross_entropy(logits, labels, 1e-9), -p.log()) < 1e-6
    assert max_difference(generalized_cross_entropy(logits, labels, 0.8), (1 - p**0.8) / 0.8) < 1e-12


def test_saturated_logits_have_finite_gradients():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    for labels in ([0, 1], [1, 2]):
        losses = generalized_cross_entropy(logits, torch.tensor(labels), 0.8)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
    assert losses[0].item() == pytest.approx(1 / 0.8)


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_one_image(num_classes):
    method = adapt(make_net("gn", num_classes), "rpl")
    for images in make_stream(2, batch=1):
        assert method(images).isfinite().all()
    assert 0 <= method.stats["loss"] <= (1 - (1 / num_classes) ** 0.8) / 0.8 + 1e-6
    assert not math.isnan(method.stats["loss"])


@pytest.mark.parametrize("wrong", [{"q": 0}, {"q": 1.1}, {"q": float("nan")}, {"params": "head"}], ids=str)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "rpl", **wrong)


def test_unsure_labels_count_less():
    """The gradient is that of the cross-entropy times p_y^q."""
    images = make_images(1, dtype=torch.float64)
    net = make_net("gn").double()
    logits = net(images)
    y = logits.argmax(1)
    weight = logits.softmax(1).max().item() ** 0.8
    ours = torch.autograd.grad(generalized_cross_entropy(logits, y, 0.8).sum(), net.norm1.weight, retain_graph=True)[0]
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), net.norm1.weight)[0]
    assert max_difference(ours, weight * plain) < 1e-12
