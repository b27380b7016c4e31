"""ROID against plain nets: own batch statistics, weights, losses, Adam, merging and correction, written out."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, adapt
from lightning_tta.losses import soft_likelihood_ratio
from lightning_tta.methods.components import drawing
from nets import KINDS, make_images, make_net, make_stream, max_difference, norm_weights, without_running_statistics

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*normalises BatchNorm layers"),
]
TOLERANCE = 1e-9  # float64


class PlainROID:
    """A copy of ``net``, whose kept images alone go through the pass of the view, as in the authors' code."""

    def __init__(self, net, lr=1e-2, keep=0.9, tau=1 / 3, momentum=0.9, detach=False, form="probabilities", clip=0.99):
        self.net = without_running_statistics(copy.deepcopy(net))
        self.weights = norm_weights(self.net)
        self.source = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.lr, self.keep, self.tau, self.momentum, self.detach = lr, keep, tau, momentum, detach
        self.form, self.clip = form, clip
        self.moments = {name: (0.0, 0.0) for name in self.weights}
        self.q, self.count = None, 0

    def loss(self, logits, images, view):
        p = logits.softmax(1)
        classes = p.shape[1]
        self.q = torch.full((classes,), 1 / classes, dtype=p.dtype) if self.q is None else self.q
        with torch.no_grad():
            d = torch.stack([1 - (self.q @ row) / (self.q.norm() * row.norm()) for row in p])
            c = (p * p.log()).sum(1)
            d, c = ((v - v.min()) / (v.max() - v.min()) for v in (d, c))
            kept = d >= d.mean()
            w = (d * c / self.tau).exp()[kept]
            self.q = self.momentum * self.q + (1 - self.momentum) * p.mean(0)
        self.kept = kept
        clipped = p[kept].clamp(max=self.clip)
        ratio = -(clipped * (clipped / (1 - clipped)).log()).sum(1)
        loss = (w * ratio).sum() / len(images)
        if view is not None:
            p_view, target = self.net(view[kept]).softmax(1), p[kept].detach() if self.detach else p[kept]
            cross = -0.5 * (target * p_view.log()).sum(1) - 0.5 * (p_view * target.log()).sum(1)
            loss = loss + (w * cross).sum() / len(images)
        return loss

    def merge(self):
        for name, weight in self.weights.items():
            weight.copy_(self.keep * weight + (1 - self.keep) * self.source[name])

    def __call__(self, images, view):
        logits = self.net(images)
        loss = self.loss(logits, images, view)
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        self.count += 1
        with torch.no_grad():
            for (name, weight), g in zip(self.weights.items(), gradients, strict=True):
                m, v = self.moments[name]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                self.moments[name] = (m, v)
                weight -= self.lr * (m / (1 - 0.9**self.count)) / ((v / (1 - 0.999**self.count)).sqrt() + 1e-8)
            self.merge()
            prior = logits.softmax(1).mean(0)
            smooth = max(1 / len(images), 1 / logits.shape[1]) / prior.max()
            factors = (prior + smooth) / (1 + smooth * logits.shape[1])
            corrected = logits * factors if self.form == "logits" else logits + factors.log()
        return (logits if self.form == "none" else corrected).detach(), loss.item()


@pytest.fixture
def views(monkeypatch):
    """A view that a test can know: the images, darker and shifted."""
    seen = []

    def view(images, key, **options):
        seen.append((key.tolist(), options))
        return images.mul(0.7).roll(1, -1)

    monkeypatch.setattr(drawing, "jitter", view)
    return seen


def assert_same_weights(method, reference):
    ours = {name.removeprefix("model."): tensor for name, tensor in method.adaptable.items()}
    assert ours.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        assert max_difference(ours[name].detach(), weight.detach()) < TOLERANCE
    assert max_difference(method.value("mean_probability"), reference.q) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["default", "logits", "detached", "alone"])
def test_three_steps(kind, variant, views):
    ours = {
        "logits": {"prior_correction": "logits"},
        "detached": {"detach_target": True, "prior_correction": "none"},
        "alone": {"consistency": False, "diversity_momentum": 0.5, "temperature": 1.0},
    }.get(variant, {})
    theirs = {
        "logits": {"form": "logits"},
        "detached": {"detach": True, "form": "none"},
        "alone": {"momentum": 0.5, "tau": 1.0},
    }.get(variant, {})
    net = make_net(kind).double()
    method = adapt(net, "roid", lr=1e-2, keep=0.9, seed=4, **ours)
    reference = PlainROID(net, **theirs)
    for images in make_stream(3, batch=10, dtype=torch.float64):
        view = None if variant == "alone" else images.mul(0.7).roll(1, -1)
        expected, loss = reference(images, view)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, rel=1e-9)
        assert method.stats["kept"] == pytest.approx(reference.kept.double().mean().item())
        assert 0 < method.stats["kept"] < 1
        assert method.stats["forwards"] == (1 if variant == "alone" else 2)
        assert_same_weights(method, reference)
    options = {"padding": "reflect", "blur": False, "noise": False}
    assert views == ([] if variant == "alone" else [([4, number], options) for number in range(3)])


def test_soft_likelihood_ratio():
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0], [9.0, 0.0], [400.0, 0.0]], dtype=torch.float64, requires_grad=True)
    p = [0.5, 1 / (1 + math.exp(-3))]
    expected = [-sum(k * math.log(k / (1 - k)) for k in (q, 1 - q)) for q in p]
    values = soft_likelihood_ratio(logits)
    assert values[:2].tolist() == pytest.approx(expected)
    assert torch.isfinite(values).all()
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert gradient[3].abs().max() < 1e-9  # the probability is above the bound
    assert gradient[1].abs().max() > 0.1


@pytest.mark.parametrize("images", [make_images(1), make_images(1).repeat(4, 1, 1, 1)], ids=["one", "equal"])
def test_equal_images_count_alike(images):
    method = adapt(make_net("gn"), "roid", lr=1e-2)
    assert torch.isfinite(method(images)).all()
    assert method.stats["kept"] == 1
    assert method.stats["skipped_steps"] == 0


def test_a_view_moves_the_weights():
    """The real view: another seed, other weights; the same one, the same."""
    weights = []
    for seed in (0, 0, 1):
        method = adapt(make_net("bn"), "roid", lr=1e-2, optimizer="sgd", seed=seed)
        method(make_images(8))
        weights.append(method.model.norm1.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_gradients_go_through_the_statistics_of_the_images_that_count():
    """As if the others were not in the batch."""
    net, images = make_net("bn").double(), make_images(8, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    method = adapt(net, "tent", in_place=True)
    weight = net.norm1.weight
    with method.running():
        (expected,) = torch.autograd.grad(method.logits(images[mask]).square().sum(), weight)
        with method.counting(mask):
            (found,) = torch.autograd.grad(method.logits(images)[mask].square().sum(), weight)
    assert max_difference(found, expected) < TOLERANCE


def test_no_second_prior():
    with pytest.raises(ConfigError, match="prior_correction='none'"):
        adapt(make_net("bn"), "roid", prior="em")
    assert adapt(make_net("bn"), "roid", prior="em", prior_correction="none").corrections


def test_exports_the_correction():
    method = adapt(make_net("gn"), "roid", lr=1e-2)
    for images in make_stream(2):
        method(images)
    plain = method.export()
    assert max_difference(plain(images).detach(), method.predict(images)) < 1e-5
    assert isinstance(plain, nn.Module)
