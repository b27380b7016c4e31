"""The label shift adapter against its formula written out; what its training teaches it; its plain net."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import DataError, UnsupportedModelError, adapt
from nets import make_images, make_net, make_stream, max_difference
from plain import TOLERANCE

pytestmark = pytest.mark.usefixtures("one_thread")


def source(number=2, size=8):
    return [
        {"image": make_images(size, seed=60 + i, dtype=torch.float64), "label": torch.arange(size) % 4}
        for i in range(number)
    ]


def prepared(kind="gn", **options):
    """With an adapter of random weights."""
    method = adapt(make_net(kind).double(), "label_shift_adapter", **{"hidden": 6, "epochs": 1, **options})
    with pytest.warns(UserWarning, match="1 of the net's 5 classes"):
        method.prepare(source())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return method


class Plain:
    def __init__(self, net, adapter, momentum):
        self.net, self.adapter, self.momentum = net, copy.deepcopy(adapter), momentum
        self.prior = torch.tensor([5.0, 5, 5, 5, 1], dtype=torch.float64) / 21

    def logits(self, z):
        first, second = self.adapter[0], self.adapter[2]
        out = second.weight @ (first.weight @ (5 * self.prior).log() + first.bias).clamp_min(0) + second.bias
        gamma, beta, q = 1 + out[:12], out[12:24], out[24:36] + 12**-0.5
        p, more = out[36:41], out[41:46]
        weight = self.net.head.weight + p[:, None] * q[None]
        return torch.stack([weight @ (gamma * row + beta) + self.net.head.bias + more for row in z])

    @torch.no_grad()
    def __call__(self, images):
        z = self.net.features(images)
        self.prior = self.momentum * self.prior + (1 - self.momentum) * self.logits(z).softmax(1).mean(0)
        return self.logits(z)


@pytest.mark.parametrize("kind", ["bn", "gn", "ln"])
def test_four_steps(kind):
    method = prepared(kind, momentum=0.6)
    reference = Plain(make_net(kind).double(), method.adapter, 0.6)
    assert max_difference(method.value("prior"), reference.prior) < TOLERANCE
    for images in make_stream(4, batch=3, dtype=torch.float64):
        expected = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert max_difference(method.value("prior"), reference.prior) < TOLERANCE
        assert max_difference(method.predict(images), expected) < TOLERANCE
    assert max_difference(expected, reference.net(images).detach()) > 1e-2
    plain = method.export()
    assert type(plain) is type(method.model)
    assert max_difference(plain(images).detach(), expected) < TOLERANCE
    method.reset()
    assert abs(method.value("prior")[4] - 1 / 21) < TOLERANCE


def test_it_starts_as_the_net():
    net = make_net("gn").double()
    method = adapt(net, "label_shift_adapter", train_lr=0.0)
    method.prepare([{"image": make_images(10, dtype=torch.float64), "label": torch.arange(10) % 5}])
    images = make_images(4, dtype=torch.float64)
    assert max_difference(method(images), net(images).detach()) < TOLERANCE


def test_training_teaches_the_adjustment_that_is_exact():
    """Labels drawn from the net's own probabilities: then ``u + log pi - log pi_s`` is right for any pi."""
    torch.manual_seed(0)
    net = make_net("ln").double()
    images = make_images(600, dtype=torch.float64)
    with torch.no_grad():
        logits = net(images)
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
    method = adapt(net, "label_shift_adapter", epochs=30, train_lr=5e-3)
    method.prepare([{"image": images, "label": labels}])
    before, after = [], []
    for number in range(8):
        prior = method.draw_prior(method.prior, torch.tensor([100, 7 * number]))
        exact = logits + prior.log() - method.prior.log()
        weight, bias = method.classifier(prior)
        with torch.no_grad():
            adapted = net.features(images) @ weight.T + bias
        for one, distances in ((logits, before), (adapted, after)):
            p = exact.softmax(1)
            distances.append((p * (exact.log_softmax(1) - one.log_softmax(1))).sum(1).mean().item())
    assert sum(after) < sum(before) / 3


def test_distributions_that_are_drawn():
    method = prepared(priors="three")
    source_prior = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05], dtype=torch.float64)
    drawn = {tuple(method.draw_prior(source_prior, torch.tensor([1, k])).tolist()) for k in range(60)}
    inverse = (1 / source_prior) / (1 / source_prior).sum()
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    assert drawn == {tuple(each.tolist()) for each in (source_prior, uniform, inverse)}
    method.priors = "random"
    drawn = [method.draw_prior(source_prior, torch.tensor([1, k])) for k in range(60)]
    assert all(abs(each.sum() - 1) < 1e-9 and each.min() > 0 for each in drawn)
    assert len({tuple(each.tolist()) for each in drawn}) > 10


def test_what_it_refuses():
    net = make_net("gn")
    net.head = nn.Linear(12, 5, bias=False)
    with pytest.raises(UnsupportedModelError, match="prior='em'"):
        adapt(net, "label_shift_adapter")
    method = adapt(make_net("gn").double(), "label_shift_adapter", train_lr=1e300)
    before = copy.deepcopy(method.adapter.state_dict())
    with pytest.raises(DataError, match=r"rate of 1e\+300"):
        method.prepare([{"image": make_images(10, dtype=torch.float64), "label": torch.arange(10) % 5}] * 20)
    assert all(torch.equal(value, before[name]) for name, value in method.adapter.state_dict().items())
    with pytest.raises(DataError, match="label"):
        method.prepare([{"image": make_images(4)}])
