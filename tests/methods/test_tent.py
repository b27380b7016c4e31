"""Tent against a reference written with plain torch: own batch statistics, own loss, own Adam and SGD."""

import copy

import pytest
import torch

from lightning_tta import UnsupportedModelError, adapt
from nets import KINDS, make_net, make_stream, max_difference, norm_weights, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10  # float64


class PlainTent:
    """min mean_b H(p_b) in the norm layers of a copy of ``net``; ``moments``: (m, v) of Adam or (buffer,) of SGD."""

    def __init__(self, net, optimizer, lr, momentum=0.9, weight_decay=0.0):
        self.net = without_running_statistics(copy.deepcopy(net))
        self.weights = norm_weights(self.net)
        self.optimizer, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.moments = {n: (torch.zeros_like(w),) * (1 if optimizer == "sgd" else 2) for n, w in self.weights.items()}
        self.count = 0

    def __call__(self, images, lr_factor=1.0):
        logits = self.net(images)
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = -(p * p.log()).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        self.count += 1
        with torch.no_grad():
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
                self.update(name, weight, gradient, self.lr * lr_factor)
        return logits.detach(), loss.item()

    def update(self, name, weight, g, lr):
        mu, t = self.momentum, self.count
        if self.optimizer == "adamw":
            weight -= lr * self.weight_decay * weight
        else:
            g = g + self.weight_decay * weight
        if self.optimizer == "sgd":
            (buffer,) = self.moments[name]
            self.moments[name] = (mu * buffer + g,)
            weight -= lr * self.moments[name][0]
        else:
            m, v = self.moments[name]
            m, v = mu * m + (1 - mu) * g, 0.999 * v + 0.001 * g * g
            self.moments[name] = (m, v)
            weight -= lr * (m / (1 - mu**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def assert_same_state(method, reference):
    ours = {name.removeprefix("model."): tensor for name, tensor in method.adaptable.items()}
    assert ours.keys() == reference.weights.keys()
    keys = ("momentum_buffer",) if reference.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
    for name, weight in reference.weights.items():
        assert max_difference(ours[name].detach(), weight.detach()) < TOLERANCE
        for key, moment in zip(keys, reference.moments[name], strict=True):
            assert max_difference(method.optimizers["model"].state[ours[name]][key], moment) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "lr": 1e-2},
        {"optimizer": "adam", "lr": 1e-2, "momentum": 0.5, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        {"optimizer": "sgd", "lr": 5e-2},
        {"optimizer": "sgd", "lr": 5e-2, "momentum": 0.3, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_five_steps(kind, options):
    net = make_net(kind).double()
    method, reference = adapt(net, "tent", **options), PlainTent(net, **options)
    for images in make_stream(5, batch=6, dtype=torch.float64):
        expected, loss = reference(images)
        assert (
            max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE
        )  # logits come from before the step
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        assert abs(method.stats["entropy"] - loss) < TOLERANCE
        assert_same_state(method, reference)
    start = norm_weights(net)
    assert all((weight - start[name]).abs().max() > 1e-3 for name, weight in reference.weights.items())


def test_defaults_are_the_authors():
    net = make_net("bn").double()
    method, reference = adapt(net, "tent"), PlainTent(net, "adam", 1e-3)
    for images in make_stream(2, dtype=torch.float64):
        reference(images)
        method(images)
    assert_same_state(method, reference)


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_steps_per_batch(kind):
    net = make_net(kind).double()
    method, reference = adapt(net, "tent", lr=1e-2, steps=3), PlainTent(net, "adam", 1e-2)
    for images in make_stream(2, dtype=torch.float64):
        for _ in range(3):
            expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE  # of the last step
        assert abs(method.stats["loss"] - loss) < TOLERANCE
    assert_same_state(method, reference)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learning_rate_follows_the_batch_size(optimizer):
    net = make_net("gn").double()
    method = adapt(net, "tent", lr=2e-2, optimizer=optimizer, lr_batch_size=8)
    reference = PlainTent(net, optimizer, 2e-2)
    for size in (4, 8, 1, 20):
        (images,) = make_stream(1, batch=size, seed=size, dtype=torch.float64)
        reference(images, lr_factor=size / 8)
        method(images)
        assert_same_state(method, reference)


def test_learning_rate_counts_only_finite_images():
    net = make_net("gn").double()
    method, reference = adapt(net, "tent", lr=2e-2, lr_batch_size=8), PlainTent(net, "adam", 2e-2)
    (images,) = make_stream(1, batch=4, dtype=torch.float64)
    reference(images[:3], lr_factor=3 / 8)
    images[3] = float("nan")
    method(images)
    assert_same_state(method, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_only_norm_layers_learn(kind):
    method = adapt(make_net(kind), "tent")
    expected = {f"model.{name}" for name in norm_weights(method.model)}
    assert {name for name, p in method.named_parameters() if p.requires_grad} == expected
    assert set(method.adaptable) == expected


def test_net_without_norm_layers():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 5))
    with pytest.raises(UnsupportedModelError, match="no normalisation layer"):
        adapt(net, "tent")
