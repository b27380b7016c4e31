"""TRIBE against three plain nets, whose layers keep statistics of each class in loops, and torch's Adam."""

import copy
import math

import pytest
import torch
from torch import nn

from contract import VARIANTS, build
from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.methods.components import drawing
from memory_reference import TOLERANCE, dimmed, learned, log_softmax, with_layers
from nets import KINDS, make_images, make_net, make_stream, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")


class BBN(nn.Module):
    """Mean and variance of each class; those of the balanced population normalise."""

    def __init__(self, layer, classes, eta, gamma):
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.mean, self.var = ([v.clone() for _ in range(classes)] for v in (layer.running_mean, layer.running_var))
        self.eta, self.gamma, self.labels = eta, gamma, None

    def forward(self, x):
        view = (1, -1) + (1,) * (x.ndim - 2)
        if self.labels is not None:
            self.take(x.detach().flatten(2) if x.ndim > 2 else x.detach()[..., None])
        means, variances = torch.stack(self.mean), torch.stack(self.var)
        mean = means.mean(0)
        var = variances.mean(0) + ((means - mean) ** 2).mean(0)
        x = (x - mean.view(view)) / (var.view(view) + self.eps).sqrt()
        return x * self.weight.view(view) + self.bias.view(view)

    def take(self, x):
        classes, changes = len(self.mean), {}
        for k in sorted(set(self.labels)):
            members = [image for image, label in zip(x, self.labels, strict=True) if label == k]
            n = len(members)
            m = 1 / n if n > 1 / self.eta else self.eta
            delta = m * sum((image - self.mean[k][:, None]).mean(1) for image in members)
            squares = m * sum(((image - self.mean[k][:, None]) ** 2).mean(1) for image in members)
            changes[k] = delta, squares, m * n
        delta = sum(change[0] for change in changes.values()) / classes
        squares = sum(change[1] - change[0] ** 2 for change in changes.values()) / classes
        share = sum(change[2] for change in changes.values()) / classes
        for k in range(classes):
            var = self.var[k]
            if k in changes:
                own, own_squares, own_share = changes[k]
                self.mean[k] = self.mean[k] + (1 - self.gamma) * own
                self.var[k] = self.var[k] + (1 - self.gamma) * (own_squares - own_share * var - own**2)
            self.mean[k] = self.mean[k] + self.gamma * delta
            self.var[k] = self.var[k] + self.gamma * (squares - share * var)


def set_labels(net, labels):
    for layer in net.modules():
        if isinstance(layer, BBN):
            layer.labels = labels


class PlainTRIBE:
    def __init__(self, net, classes, *, lr=1e-3, entropy_margin=0.05, weight=0.5, eta=0.01, gamma=0.0):
        self.teacher, self.student, self.anchor = (
            with_layers(net, lambda layer: BBN(layer, classes, eta, gamma)) for _ in range(3)
        )
        for module, other in zip(self.teacher.modules(), self.student.modules(), strict=True):
            for name, p in other.named_parameters(recurse=False):
                setattr(module, name, p)  # the same weights
        self.entropy_margin, self.weight, self.classes = entropy_margin, weight, classes
        self.adam = torch.optim.Adam(learned(self.student).values(), lr=lr)

    def __call__(self, images, view):
        set_labels(self.teacher, None)
        with torch.no_grad():
            logits = self.teacher(images)
        for net in (self.teacher, self.student, self.anchor):
            set_labels(net, logits.argmax(1).tolist())
        t, s = self.teacher(images), self.student(view(images))
        with torch.no_grad():
            a = self.anchor(images)
        entropies = -(log_softmax(t).exp() * log_softmax(t)).sum(1)
        kept = [n for n, h in enumerate(entropies.tolist()) if h < self.entropy_margin * math.log(self.classes)]
        self.kept = len(kept) / len(images)
        if kept:
            labels = t.argmax(1)
            self.loss = sum(
                -log_softmax(s)[n, labels[n]] + self.weight * ((t[n] - a[n]) ** 2).mean() for n in kept
            ) / len(kept)
            self.adam.zero_grad()
            self.loss.backward()
            self.adam.step()
        return logits


@pytest.fixture
def known_view(monkeypatch):
    monkeypatch.setattr(drawing, "jitter", dimmed)


def assert_same_state(method, reference, kind):
    for name, p in learned(reference.student).items():
        assert max_difference(method.model.get_parameter(name).detach(), p.detach()) < TOLERANCE
    for net in ("teacher", "student", "anchor") if kind in ("bn", "user") else ():
        layers = [layer for layer in getattr(reference, net).modules() if isinstance(layer, BBN)]
        for row, values in enumerate(("mean", "var")):
            expected = torch.cat([torch.stack(getattr(layer, values)) for layer in layers], 1)
            assert max_difference(method.value(f"{net}.statistics.classes")[row], expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{"entropy_margin": 0.9, "eta": 0.2}, {"entropy_margin": 0.98, "eta": 0.4, "gamma": 0.3, "weight": 2.0}],
    ids=["without gamma", "with gamma"],
)
def test_four_steps(kind, settings, known_view):
    net = make_net(kind).double()
    net.head.weight.data.mul_(2)  # so that some samples are kept, some not
    method, reference = adapt(net, "tribe", lr=2e-2, **settings), PlainTRIBE(net, 5, lr=2e-2, **settings)
    shares = []
    for number, batch in enumerate((6, 9, 3, 7)):
        images = make_images(batch, seed=number, dtype=torch.float64)
        predicted = method.predict(images)
        logits, expected = method(images), reference(images, dimmed)
        assert max_difference(logits, expected) < TOLERANCE
        assert max_difference(predicted, logits) < TOLERANCE
        assert method.stats["kept"] == pytest.approx(reference.kept)
        if reference.kept:
            assert method.stats["loss"] == pytest.approx(reference.loss.item(), abs=TOLERANCE)
        assert_same_state(method, reference, kind)
        shares.append(reference.kept)
    assert sum(share > 0 for share in shares) >= 3
    assert method.value("steps_taken") == 4


def test_defaults_are_the_authors(known_view):
    net = make_net("bn").double()
    net.head.weight.data.mul_(30)
    method, reference = adapt(net, "tribe"), PlainTRIBE(net, 5)
    for images in make_stream(3, batch=12, dtype=torch.float64):
        assert max_difference(method(images), reference(images, dimmed)) < TOLERANCE
    assert reference.kept > 0
    assert_same_state(method, reference, "bn")


@pytest.mark.parametrize("skips", [True, False])
def test_nothing_kept_moves_the_statistics_alone(skips):
    method = adapt(make_net("bn"), "tribe", entropy_margin=1e-9)
    method.skips_when_empty = skips
    method(make_images(6))
    assert method.stats["kept"] == method.stats["skipped_steps"] == 0
    assert same(dict(method.model.state_dict()), dict(make_net("bn").state_dict()))
    moments = method.value("teacher.statistics.moments")
    assert not torch.equal(moments, method.source_value("teacher.statistics.moments"))


def test_views_come_from_the_seed():
    runs = []
    for seed in (0, 0, 1):
        method = adapt(make_net("gn"), "tribe", lr=0.1, entropy_margin=1.5, seed=seed)
        runs.append([method(images) for images in make_stream(3)])
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_export_is_the_teacher():
    method = build("tribe", VARIANTS["tribe"][0], "bn")
    for images in make_stream(3):
        method(images)
    torch.testing.assert_close(method.export()(images), method.predict(images))


def test_what_does_not_fit_is_refused():
    for options in ({"entropy_margin": 0}, {"eta": 0}, {"gamma": 2}, {"weight": -1}):
        with pytest.raises(ConfigError):
            adapt(make_net("bn"), "tribe", **options)
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="linear layer"):
        adapt(copy.deepcopy(headless), "tribe")
