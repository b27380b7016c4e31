"""SPA and its views against plain loops in float64; what it keeps, what it survives."""

import math

import pytest
import torch

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.draws import random_normals, random_words
from lightning_tta.views.deteriorated import noised, without_frequencies
from nets import KINDS, make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainMethod, PlainSGD, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def frequencies(side, window):
    """Those of the central window of a spectrum that is shifted so that 0 is at ``side // 2``."""
    size = max(1, int(side * window))
    first = math.ceil((side - size) / 2)
    return [position - side // 2 for position in range(first, first + size)]


def plain_without_frequencies(images, key, ratio, window):
    """Pair by pair, in the whole complex spectrum."""
    height, width = images.shape[-2:]
    rows, columns = frequencies(height, window), frequencies(width, window)
    uniform = (random_words(key, images.shape[0] * images.shape[1] * len(rows) * len(columns)).double() + 2**31) / 2**32
    draws = iter(uniform.tolist())
    spectrum = torch.fft.fft2(images.double() - 0.5)
    for b in range(images.shape[0]):
        for c in range(images.shape[1]):
            for p in rows:
                for q in columns:
                    if next(draws) < ratio and (p < 0 or (p == 0 and q <= 0)):
                        spectrum[b, c, p % height, q % width] = 0
                        spectrum[b, c, -p % height, -q % width] = 0
    result = torch.fft.ifft2(spectrum)
    assert result.imag.abs().max() < 1e-12
    return result.real + 0.5


def plain_noised(images, key, a):
    """Cell by cell, on values in [-1, 1]."""
    noise = random_normals(key, *images.shape[1:]).double()
    x, rows = 2 * images - 1, []
    for i in range(x.shape[-2]):
        row = []
        for j in range(x.shape[-1]):
            share = a[i * a.shape[0] // x.shape[-2], j * a.shape[1] // x.shape[-1]] ** 2
            row.append(((1 - share) * x[..., i, j] + share * noise[:, i, j]).clamp(-1, 1))
        rows.append(torch.stack(row, -1))
    return (torch.stack(rows, -2) + 1) / 2


KEY = torch.tensor([3, 7])


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (15, 20), (9, 32), (1, 4)])
@pytest.mark.parametrize(("ratio", "window"), [(0.3, 0.2), (0.5, 0.5), (0.5, 1.0), (1.0, 0.2), (0.0, 0.5)])
def test_missing_frequencies(size, ratio, window):
    images = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = without_frequencies(images, KEY, ratio, window)
    assert max_difference(ours, plain_without_frequencies(images, KEY, ratio, window)) < 1e-12
    if size != (1, 4):  # where hardly any may be missing
        assert (max_difference(ours, images) < 1e-12) == (ratio == 0)


def test_the_window_of_224_pixels():
    """The authors': the middle 44 of 224, 0 in the middle of them."""
    assert frequencies(224, 0.2) == list(range(-22, 22))
    images = torch.rand(24, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    gone = torch.fft.fft2(without_frequencies(images, KEY, 0.2, 0.2).double() - 0.5).abs() < 1e-3
    share = gone.double().mean((0, 1))
    assert share[:22, :22].mean().item() == pytest.approx(0.2, abs=0.008)
    assert share[23:202].max() == 0
    assert share[:, 23:202].max() == 0
    assert not torch.equal(gone[0], gone[1])


def test_no_frequency_is_grey():
    assert (
        max_difference(without_frequencies(torch.rand(1, 3, 8, 8), KEY, 1.0, 1.0), torch.full((1, 3, 8, 8), 0.5)) < 1e-6
    )


@pytest.mark.parametrize(("size", "cells"), [(16, 4), (16, 3), (5, 14)])
def test_noise(size, cells):
    images = make_images(2, dtype=torch.float64, size=size)
    a = torch.rand(cells, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, expected = noised(images, KEY, a.square()), plain_noised(images, KEY, a)
    assert max_difference(ours.detach(), expected.detach()) < 1e-12
    weights = torch.rand(images.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((view * weights).sum(), a)[0] for view in (ours, expected)]
    assert max_difference(*gradients) < 1e-10
    assert gradients[0].abs().max() > 0.1


class PlainSPA(PlainMethod):
    """The objective from its formula; noise climbs, everything else descends."""

    def __init__(self, net, ratios=(0.3, 0.4), cells=4, auxiliary="none", weight=0.1, norm_lr=0.005):
        super().__init__(net, norm_lr)
        self.h = torch.eye(net.head.in_features, dtype=torch.float64, requires_grad=True)
        self.a = torch.full((cells, cells), math.sqrt(ratios[1]), dtype=torch.float64, requires_grad=True)
        self.h_sgd, self.a_sgd = PlainSGD({"weight": self.h}, 0.03), PlainSGD({"noise": self.a}, 1.0)
        self.ratios, self.auxiliary, self.weight = ratios, auxiliary, weight
        self.counter, self.average = 0, None

    def auxiliary_loss(self, u):
        p = u.softmax(1)
        entropies, bound = -(p * p.log()).sum(1), 0.4 * math.log(u.shape[1])
        if self.auxiliary == "tent":
            return entropies.mean()
        chosen = [
            b
            for b in range(len(u))
            if entropies[b] < bound
            and (self.average is None or torch.cosine_similarity(self.average, p[b].detach(), dim=0) < 0.05)
        ]
        if not chosen:
            return torch.zeros((), dtype=torch.float64)
        mean = p[chosen].detach().mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return sum((bound - entropies[b].detach()).exp() * entropies[b] for b in chosen) / len(chosen)

    def __call__(self, images):
        weight, bias = self.net.head.weight, self.net.head.bias
        u = self.net.features(images) @ weight.T + bias
        p, loss, self.kept = u.detach().softmax(1), 0.0, []
        views = [
            plain_without_frequencies(images, torch.tensor([0, self.counter]), self.ratios[0], 0.2),
            plain_noised(images, torch.tensor([0, self.counter + 1]), self.a),
        ]
        for view in views:
            q = ((self.net.features(view) @ self.h.T) @ weight.T + bias).softmax(1)
            kept = [b for b in range(len(p)) if p[b].max() > q[b].max()]
            self.kept.append(len(kept))
            if kept:
                loss = loss + sum((p[b] * (p[b].log() - q[b].log())).sum() for b in kept) / len(kept)
        if self.auxiliary != "none":
            loss = loss + self.weight * self.auxiliary_loss(u)
        if not sum(self.kept):
            return u.detach(), None
        loss = loss + 0 * self.a.sum()  # where none is kept for the noise
        *gradients, for_h, for_a = torch.autograd.grad(loss, [*self.weights.values(), self.h, self.a])
        self.sgd.step(gradients)
        self.h_sgd.step([for_h])
        self.a_sgd.step([-for_a])
        with torch.no_grad():
            self.a.mul_((self.ratios[1] / self.a.square().mean()).sqrt()).clamp_(-1, 1)
        self.counter += 2
        return u.detach(), loss.item()


def plain(net, **options):
    settings = {"lr": 0.005, "predictor_lr": 0.03, "frequency_ratio": 0.3, "noise_ratio": 0.4, "cells": 4}
    return adapt(net, "spa", **{**settings, **options})


@pytest.mark.parametrize("auxiliary", ["none", "tent", "eta"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps(kind, auxiliary):
    net = make_net(kind).double()
    with torch.no_grad():
        net.head.weight.mul_(2)  # some are sure enough for ETA
    method, reference = plain(net, auxiliary=auxiliary), PlainSPA(net, auxiliary=auxiliary)
    total = 0
    for images in make_stream(3, batch=12, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats.get("loss") == (loss if loss is None else pytest.approx(loss, abs=TOLERANCE))
        kept = [12 * method.stats[f"kept_by_{name}"] for name in ("frequencies", "noise")]
        assert kept == pytest.approx(reference.kept)
        total += sum(kept)
        assert_same_sgd(method, reference.sgd)
        assert_same_sgd(method, reference.h_sgd, "predictor", "predictor.")
        assert max_difference(method.noise.detach(), reference.a.detach()) < TOLERANCE
    assert 8 <= total <= 64  # else the choice is not tested
    assert reference.sgd.moved() > 1e-5
    assert reference.a.std() > 1e-3
    if auxiliary == "eta":
        assert max_difference(method.value("mean_probability"), reference.average) < TOLERANCE
    before = method.predict(images)
    assert max_difference(method.predict(images), before) == 0


def test_noise_keeps_its_mean_and_grows_where_it_hurts():
    """Only the left half of the image reaches the net, so only there noise can raise the loss."""
    net = make_net("gn")
    net.conv1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * (torch.arange(16) < 8),))
    method = adapt(net, "spa", lr=0.0, predictor_lr=0.0, noise_ratio=0.2, frequency_ratio=0.0, cells=2, noise_lr=10.0)
    for images in make_stream(10, batch=16):
        method(images)
        assert method.noise.square().mean().item() <= 0.2 + 1e-6
    assert method.noise[:, 0].square().min() > 1.2 * method.noise[:, 1].square().max()


def test_noise_has_no_weight_decay():
    methods = [plain(make_net("gn"), lr=0.0, predictor_lr=0.0, weight_decay=decay) for decay in (0.0, 0.5)]
    for images in make_stream(2, batch=8):
        for method in methods:
            method(images)
    assert methods[0].noise.std() > 1e-3
    assert torch.equal(*(method.noise for method in methods))


def test_nothing_kept_is_no_step():
    net = make_net("bn")
    with torch.no_grad():
        net.head.weight.zero_(), net.head.bias.zero_()
    method = plain(net)  # all predictions are uniform: none is surer than another
    before = {name: tensor.detach().clone() for name, tensor in method.adaptable.items()}
    for skips in (True, False):
        method.skips_when_empty = skips
        assert torch.isfinite(method(make_images(4))).all()
        assert method.stats["kept_by_noise"] == method.stats["kept_by_frequencies"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.adaptable.items())
    assert method.value("draws").tolist() == [0, 0]


@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes(classes):
    method = plain(make_net("gn", classes), auxiliary="eta")
    for batch in (1, 3):
        assert torch.isfinite(method(make_images(batch))).all()
    assert all(torch.isfinite(tensor).all() for tensor in method.adaptable.values())


def test_no_noise_at_all():
    method = plain(make_net("gn"), noise_ratio=0.0)
    method(make_images(4))
    assert method.noise.abs().max() == 0


def test_refusals():
    with pytest.raises(ConfigError, match="frequency_ratio"):
        plain(make_net("gn"), frequency_ratio=1.5)
    with pytest.raises(ConfigError, match="auxiliary"):
        plain(make_net("gn"), auxiliary="sar")
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        plain(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten()))
