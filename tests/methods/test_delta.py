"""DELTA against a plain net with batch renormalisation, class weights and SGD written out."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta import UnsupportedModelError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, norm_weights

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10  # float64


class Renorm(nn.Module):
    """(x - m_b) / s_b * r + d, r and d without gradient, from an average that starts at the first batch, with it in."""

    def __init__(self, layer, momentum):
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = layer.weight, layer.bias, layer.eps, momentum
        self.mean = self.var = None

    def forward(self, x):
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        mean, var = x.mean(dims), x.var(dims, correction=0)
        before = (mean.detach(), var.detach()) if self.mean is None else (self.mean, self.var)
        self.mean = (1 - self.momentum) * before[0] + self.momentum * mean.detach()
        self.var = (1 - self.momentum) * before[1] + self.momentum * var.detach()
        std, average = (var + self.eps).sqrt(), (self.var + self.eps).sqrt()
        r, d = std.detach() / average, (mean.detach() - self.mean) / average
        y = (x - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape)


class PlainDELTA:
    def __init__(self, net, lr, margin, decay, momentum):
        self.net, self.lr, self.margin, self.decay = copy.deepcopy(net).eval(), lr, margin, decay
        self.weights = norm_weights(self.net)
        for name, layer in list(self.net.named_modules()):
            if isinstance(layer, _BatchNorm):
                parent, _, leaf = name.rpartition(".")
                setattr(self.net.get_submodule(parent), leaf, Renorm(layer, momentum))
        self.q = None
        self.buffers = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def __call__(self, images):
        logits = self.net(images)
        p = logits.softmax(1)
        classes = p.shape[1]
        self.q = torch.full((classes,), 1 / classes, dtype=p.dtype) if self.q is None else self.q
        entropies = -(p * p.log()).sum(1)
        by_class = (1 / self.q) / (1 / self.q).sum()
        rare = by_class[p.argmax(1)]
        weight = rare / rare.sum() * len(images)
        self.kept = torch.ones(len(images), dtype=torch.bool)
        if self.margin is not None:
            certainty = (self.margin * math.log(classes) - entropies.detach()).exp()
            self.kept, weight = certainty > 1, weight * certainty
        loss = (entropies * weight)[self.kept].mean()
        if self.kept.any():
            gradients = torch.autograd.grad(loss, list(self.weights.values()))
            with torch.no_grad():
                for (name, w), g in zip(self.weights.items(), gradients, strict=True):
                    self.buffers[name] = 0.9 * self.buffers[name] + g
                    w -= self.lr * self.buffers[name]
        self.q = self.decay * self.q + (1 - self.decay) * p.mean(0).detach()
        return logits.detach(), loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["half", "all", "none"])
def test_three_steps(kind, which):
    net = make_net(kind).double()
    options = {"frequency_decay": 0.6, "statistics_momentum": 0.2}
    first = make_stream(1, batch=12, dtype=torch.float64)[0]
    p = PlainDELTA(net, 0.0, None, 1.0, 0.2)(first)[0].softmax(1)
    half = -(p * p.log()).sum(1).median().item() / math.log(p.shape[1]) + 1e-6
    margin = {"half": half, "all": None, "none": 0.01}[which]
    method = adapt(net, "delta", lr=0.1, optimizer="sgd", entropy_margin=margin, **options)
    reference = PlainDELTA(net, 0.1, margin, 0.6, 0.2)
    stream = [first, *make_stream(3, batch=12, dtype=torch.float64)[1:]]
    for images in stream:
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["kept"] == pytest.approx(reference.kept.double().mean().item())
        assert which != "half" or images is not first or 0.4 < method.stats["kept"] < 0.7
        assert which != "none" or method.stats["kept"] == 0
        assert which == "none" or not method.stats["kept"] or method.stats["loss"] == pytest.approx(loss, rel=1e-9)
        assert max_difference(method.value("mean_probability"), reference.q) < TOLERANCE
        for name, weight in reference.weights.items():
            assert max_difference(method.adaptable[f"model.{name}"].detach(), weight.detach()) < TOLERANCE


def test_without_class_weights_and_moving_statistics_it_is_tent():
    stream = make_stream(3)
    tent = adapt(make_net("bn"), "tent", lr=1e-2)
    options = {"entropy_margin": None, "frequency_decay": 1.0}
    ours = [
        adapt(make_net("bn"), "delta", lr=1e-2, statistics_momentum=None, **options),
        adapt(make_net("bn"), "delta", lr=1e-2, statistics="batch", **options),
    ]
    for images in stream:
        expected = tent(images)
        for method in ours:
            assert max_difference(method(images), expected) < 1e-6


def test_other_statistics_take_the_place_of_its_own():
    method = adapt(make_net("bn"), "delta", statistics={"kind": "balanced", "eta": 0.3})
    method(make_images(8))
    tent = adapt(make_net("bn"), "tent", statistics={"kind": "balanced", "eta": 0.3})
    own = {name for name in method.memory if name.startswith("statistics.")}
    assert own == {name for name in tent.memory if name.startswith("statistics.")}


def test_a_class_that_is_never_predicted():
    method = adapt(make_net("gn"), "delta", lr=1e-2, entropy_margin=None, frequency_decay=0.0)
    method.sized("mean_probability", torch.zeros(5)).copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    assert torch.isfinite(method(make_images(8))).all()
    assert method.stats["skipped_steps"] == 0


def test_a_net_without_source_statistics():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.LazyLinear(5)
    )
    net(make_images(2))
    with pytest.raises(UnsupportedModelError, match="Use statistics_momentum=None"):
        adapt(net, "delta")
    assert adapt(net, "delta", statistics_momentum=None)(make_images(8)).isfinite().all()
