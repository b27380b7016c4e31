"""SoTTA against a plain net, a memory made of a list and torch's Adam; and what its memory holds."""

import copy

import pytest
import torch

from contract import VARIANTS, build
from lightning_tta import adapt
from lightning_tta.draws import random_integers, random_rows
from memory_reference import (
    TOLERANCE,
    AveragedBN,
    SlotMemory,
    assert_same_step,
    learned,
    log_softmax,
    moved,
    set_mode,
    with_layers,
)
from nets import KINDS, make_images, make_net, make_stream, max_difference, norm_weights, same

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainSoTTA:
    def __init__(self, net, classes, *, lr, momentum, size, every, threshold, rho, seed):
        self.net = with_layers(net, lambda layer: AveragedBN(layer, momentum, share=1.0, unbiased=True))
        self.memory = SlotMemory(size, classes, seed, threshold)
        self.every, self.rho = every, rho
        self.weights = list(learned(self.net).values())
        self.adam = torch.optim.Adam(self.weights, lr=lr)

    def __call__(self, images):
        return torch.stack([self.one(image) for image in images])

    def one(self, image):
        set_mode(self.net, False)
        with torch.no_grad():
            (logits,) = self.net(image[None])
        p = logits.exp() / logits.exp().sum()
        self.memory.add(image, int(p.argmax()), float(p.max()))
        if self.memory.seen % self.every == 0 and self.memory.items():
            self.update()
        return logits

    def gradient(self):
        logits = self.net(torch.stack([item[0] for item in self.memory.items()]))
        loss = -(log_softmax(logits).exp() * log_softmax(logits)).sum(1).mean()
        return torch.autograd.grad(loss, self.weights)

    def update(self):
        set_mode(self.net, True)
        gradients = self.gradient()
        norm = sum((g**2).sum() for g in gradients).sqrt()
        start = [w.detach().clone() for w in self.weights]
        with torch.no_grad():
            for weight, g in zip(self.weights, gradients, strict=True):
                weight += self.rho * g / norm
        gradients = self.gradient()
        with torch.no_grad():
            for weight, value, g in zip(self.weights, start, gradients, strict=True):
                weight.copy_(value)
                weight.grad = g
        self.adam.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("classes", "size", "threshold", "sizes"),
    [(5, 8, 0.3, (7, 7, 7, 9)), (9, 4, 0.0, (1, 1, 2, 14, 1, 5)), (3, 12, 0.385, (10, 10, 10))],
    ids=["balanced", "more classes than slots", "sure"],
)
def test_three_steps_and_more(kind, classes, size, threshold, sizes):
    net = make_net(kind, classes).double()
    options = {"lr": 2e-2, "threshold": threshold, "rho": 0.1, "seed": 3}
    method = adapt(net, "sotta", bn_momentum=0.3, capacity=size, update_every=6, frozen_fraction=0.0, **options)
    reference = PlainSoTTA(net, classes, momentum=0.3, size=size, every=6, **options)
    for number, batch in enumerate(sizes):
        assert_same_step(method, reference, make_images(batch, seed=number, dtype=torch.float64))
    assert moved(reference.net, net) > 1e-4


def test_defaults_are_the_authors():
    net = make_net("bn").double()
    method = adapt(net, "sotta")
    assert method.options["threshold"] == method.images.threshold == 0.99
    method = adapt(net, "sotta", threshold=0.3, frozen_fraction=0.0)
    reference = PlainSoTTA(net, 5, lr=1e-3, momentum=0.2, size=64, every=64, threshold=0.3, rho=0.05, seed=0)
    for images in make_stream(3, batch=70, dtype=torch.float64):
        assert max_difference(method(images), reference(images)) < TOLERANCE
    assert set(adapt(make_net("bn"), "sotta").adaptable) < {f"model.{name}" for name in norm_weights(net)}


@pytest.mark.parametrize("skips", [True, False])
def test_nothing_sure_is_no_step_and_no_fault(skips):
    method = adapt(make_net("bn"), "sotta", threshold=1.0, update_every=4)
    method.skips_when_empty = skips
    method(make_images(10))
    assert method.stats["skipped_steps"] == 0
    assert method.value("images.seen") == 10
    assert same(dict(method.model.state_dict()), dict(make_net("bn").state_dict()))
    assert torch.equal(method.value("net.statistics.moments"), method.source_value("net.statistics.moments"))


def test_a_stream_of_which_nothing_was_sure_goes_on_from_a_saved_state():
    method, other = (adapt(make_net("bn"), "sotta", threshold=0.999, update_every=4) for _ in range(2))
    method(make_images(6))
    other.load_state_dict(method.state_dict())
    for each in (method, other):
        each.images.threshold = 0.0
    for seed in (1, 2):
        images = make_images(6, seed=seed)
        assert torch.equal(method(images), other(images))
    assert same(method.state_dict(), other.state_dict())


def test_a_failed_step_leaves_out_what_led_to_it(monkeypatch):
    method = build("sotta", VARIANTS["sotta"][0], "bn")
    method(make_images(4))
    before = copy.deepcopy(method.state_dict())
    monkeypatch.setattr("lightning_tta.methods.sotta.entropy", lambda logits: logits.sum(1) * float("inf"))
    for skips in (True, False):
        method.skips_when_empty = skips
        method(make_images(10, seed=3))
        assert method.stats["skipped_steps"] >= 1
        assert same(method.state_dict(), before)


def test_rows_of_draws_are_those_of_their_keys():
    rows = random_rows(7, torch.tensor([3, 0, 12]), 5)
    for row, counter in zip(rows, (3, 0, 12), strict=True):
        assert torch.equal(row, random_integers(torch.tensor([7, counter]), 5))
