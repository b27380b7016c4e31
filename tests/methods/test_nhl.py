"""NHL against its rule patch by patch; the rule finds principal directions; its plain net."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import pad, silu, unfold

from lightning_tta import UnsupportedModelError, adapt
from nets import make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainSGD

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainNHL:
    """conv1 has no bias, and halves the map: each patch by itself."""

    def __init__(self, net, lr, momentum, hebbian_lr, beta):
        self.net, self.hebbian_lr, self.beta = copy.deepcopy(net), hebbian_lr, beta
        self.gains = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        self.sgd = PlainSGD({"gains": self.gains}, lr, momentum)

    def logits(self, x):
        h = self.net.conv1(x) * (1 + self.gains).view(1, -1, 1, 1)
        return self.net.head(silu(self.net.norm2(self.net.conv2(silu(self.net.norm1(h))))).mean((2, 3)))

    def __call__(self, images):
        logits = self.logits(images)
        p = logits.softmax(1)
        loss = -(p * p.log()).sum(1).mean()
        gradients = self.sgd.gradients(loss)
        self.sgd.step(gradients)
        w = self.net.conv1.weight.detach().flatten(1)
        patches = unfold(pad(images, (1, 1, 1, 1)), 3, stride=2).transpose(1, 2).reshape(-1, 27)
        change = torch.zeros_like(w)
        for patch in patches:
            u = w @ patch
            y = (self.beta * u).exp() / (self.beta * u).exp().sum()
            for k in range(8):
                change[k] += y[k] * (patch - u[k] * w[k]) / len(patches)
        with torch.no_grad():
            self.net.conv1.weight += self.hebbian_lr * change.view(8, 3, 3, 3)
        return logits.detach(), loss.item()


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_three_steps(kind):
    net = make_net(kind).double()
    method = adapt(net, "nhl", lr=0.5, momentum=0.5, hebbian_lr=0.2, inverse_temperature=3.0)
    reference = PlainNHL(net, 0.5, 0.5, 0.2, 3.0)
    for images in make_stream(3, batch=3, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        assert max_difference(method.model.conv1.weight.detach(), reference.net.conv1.weight.detach()) < TOLERANCE
        assert max_difference(method.gains.detach(), reference.gains.detach()) < TOLERANCE
        assert max_difference(method.predict(images), reference.logits(images).detach()) < TOLERANCE
    assert reference.sgd.moved() > 1e-7
    assert max_difference(method.model.conv1.weight.detach(), net.conv1.weight.detach()) > 1e-3
    assert max_difference(method.export()(images).detach(), reference.logits(images).detach()) < TOLERANCE
    assert torch.equal(method.model.conv2.weight, net.conv2.weight)


def test_the_rule_alone_finds_the_principal_direction():
    """One filter has no rival: Oja's rule, whose weight becomes the first eigenvector, of length 1."""
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.LazyLinear(2)).double()
    images = make_images(8, size=8, dtype=torch.float64)
    net(images)
    method = adapt(net, "nhl", lr=0.0, hebbian_lr=0.1)
    patches = unfold(images, 3).transpose(1, 2).reshape(-1, 27)
    first = torch.linalg.eigh(patches.T @ patches)[1][:, -1]
    assert abs(method.model[0].weight.detach().flatten() @ first) < 0.9
    for _ in range(60):
        method(images)
    weight = method.model[0].weight.detach().flatten()
    assert abs(abs(weight @ first) - 1) < 1e-3
    assert abs(weight.norm() - 1) < 1e-3


def test_a_bias_takes_no_part_in_the_rule():
    net = make_net("gn").double()
    with_bias = make_net("gn").double()
    with_bias.conv1.bias = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))
    images = make_images(3, dtype=torch.float64)
    one, other = (adapt(each, "nhl", hebbian_lr=1.0).hebbian_change(images) for each in (net, with_bias))
    assert max_difference(one, other) < TOLERANCE


def test_a_net_without_a_convolution_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    with pytest.raises(UnsupportedModelError, match="no convolution"):
        adapt(net, "nhl")
