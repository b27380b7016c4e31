"""SAR against a reference written with plain torch, and its identities."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_tta import adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_account
from plain import FROZEN, TOLERANCE, PlainMethod, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def entropies_of(net, images, entropy="softmax"):
    logits = rows = net(images)
    if entropy == "come":
        length = (logits**2).sum(1, keepdim=True).sqrt()
        opinion = [logits / length * length.detach(), torch.full_like(logits[:, :1], math.log(logits.shape[1]))]
        rows = torch.cat(opinion, 1)
    p = rows.exp() / rows.exp().sum(1, keepdim=True)
    return logits.detach(), [-(row * row.log()).sum() for row in p]


class PlainSAR(PlainMethod):
    """Two passes a batch, by hand."""

    def __init__(self, net, kind, lr, entropy_margin, rho, reset_threshold, entropy="softmax"):
        super().__init__(net, lr, frozen=FROZEN[kind])
        self.entropy = entropy
        self.entropy_margin, self.rho, self.reset_threshold = entropy_margin, rho, reset_threshold
        self.average = None

    def mean_gradient(self, terms):
        loss = sum(terms) / len(terms)
        return loss.item(), self.sgd.gradients(loss)

    def __call__(self, images):
        logits, first = entropies_of(self.net, images, self.entropy)
        bound = self.entropy_margin * math.log(logits.shape[1])
        chosen = [i for i, h in enumerate(first) if h.item() < bound]
        report = {"kept": len(chosen), "kept_twice": None, "loss": None, "recoveries": 0, "passes": (1, 0)}
        if not chosen:
            return logits, report
        report["loss"], ascent = self.mean_gradient([first[i] for i in chosen])
        length = math.sqrt(sum((g**2).sum().item() for g in ascent))
        saved = [w.detach().clone() for w in self.weights.values()]
        with torch.no_grad():
            for weight, gradient in zip(self.weights.values(), ascent, strict=True):
                weight += self.rho * gradient / length
        _, second = entropies_of(self.net, images, self.entropy)
        chosen = [i for i in chosen if second[i].item() < bound]
        report |= {"kept_twice": len(chosen), "passes": (2, 1)}
        if chosen:
            report["loss"], gradients = self.mean_gradient([second[i] for i in chosen])
        with torch.no_grad():
            for weight, value in zip(self.weights.values(), saved, strict=True):
                weight.copy_(value)
        if not chosen:
            return logits, report
        report["passes"] = (2, 2)
        self.sgd.step(gradients)
        self.average = report["loss"] if self.average is None else 0.9 * self.average + 0.1 * report["loss"]
        if self.reset_threshold is not None and self.average < self.reset_threshold:
            report["recoveries"] = 1
            self.average = None
            self.sgd.restart()
        return logits, report


def assert_same_state(method, reference):
    assert {n.removeprefix("model.") for n in method.adaptable} == set(reference.weights)
    assert_same_sgd(method, reference.sgd)
    ours = method.memory["mean_loss"]
    assert (ours is None) == (reference.average is None)
    assert ours is None or abs(ours.item() - reference.average) < TOLERANCE


def compare(kind, batches, **options):
    net = make_net(kind).double()
    reports = []
    method, reference = adapt(net, "sar", optimizer="sgd", **options), PlainSAR(net, kind, **options)
    for images in make_stream(batches, batch=8, dtype=torch.float64):
        expected, report = reference(images)
        assert (
            max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE
        )  # logits come from before the step
        assert max_difference(method(images), expected) < TOLERANCE
        stats = method.stats
        assert (stats["forwards"], stats["backwards"]) == report["passes"]
        assert stats["kept"] == pytest.approx(report["kept"] / 8)
        if report["kept_twice"] is not None:
            assert stats["kept_twice"] == pytest.approx(report["kept_twice"] / 8)
        assert stats["recoveries"] == report["recoveries"]
        assert stats.get("loss", 0) == pytest.approx(report["loss"] or 0, abs=TOLERANCE)
        assert_same_state(method, reference)
        reports.append(report)
    return reports, reference.sgd.moved()


MARGIN = {"bn": 0.8, "gn": 0.8, "ln": 0.62, "user": 0.8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.05, 0.2])
def test_five_steps(kind, rho):
    reports, moved = compare(kind, 5, lr=0.05, entropy_margin=MARGIN[kind], rho=rho, reset_threshold=None)
    assert 0 < sum(r["kept"] for r in reports) < 40
    assert any(r["passes"] == (2, 2) for r in reports)
    assert moved > 1e-4


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_come_in_both_filters_and_both_passes(rho):
    options = {"lr": 0.05, "entropy_margin": 0.75, "rho": rho, "reset_threshold": None, "entropy": "come"}
    reports, moved = compare("gn", 5, **options)
    assert 0 < sum(r["kept"] for r in reports) < 40
    assert moved > 1e-4


def test_the_second_filter_decides_too():
    reports, _ = compare("bn", 5, lr=0.05, entropy_margin=0.8, rho=0.5, reset_threshold=None)
    assert any(r["kept_twice"] is not None and r["kept_twice"] < r["kept"] for r in reports)


def test_nothing_passes_the_second_filter():
    reports, moved = compare("gn", 3, lr=0.05, entropy_margin=0.75, rho=20.0, reset_threshold=None)
    assert any(r["passes"] == (2, 1) for r in reports)
    assert all(r["kept_twice"] == 0 for r in reports if r["kept_twice"] is not None)
    assert moved == 0


@pytest.mark.parametrize(("kind", "threshold"), [("gn", 1.15), ("ln", 0.95)])
def test_recovery_is_a_reset(kind, threshold):
    reports, _ = compare(kind, 8, lr=0.3, entropy_margin=0.95, rho=0.05, reset_threshold=threshold)
    recovered = [i for i, r in enumerate(reports) if r["recoveries"]]
    assert recovered
    assert 0 < recovered[0] < 7
    net = make_net(kind)
    method = adapt(net, "sar", optimizer="sgd", lr=0.3, entropy_margin=0.95, reset_threshold=100.0)
    fresh = copy.deepcopy(method.state_dict())
    method(make_images(8))
    assert method.stats["recoveries"] == 1
    assert same(method.state_dict(), fresh)  # weights, momentum and average


def test_never_resets_without_threshold():
    method = adapt(make_net("gn"), "sar", optimizer="sgd", lr=0.3, entropy_margin=None, reset_threshold=None)
    for images in make_stream(20):
        method(images)
        assert method.stats["recoveries"] == 0
    assert method.memory["mean_loss"] < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_without_radius_and_filter_it_is_tent(kind):
    net = make_net(kind).double()
    sar = {"rho": 0.0, "entropy_margin": None, "reset_threshold": None, "frozen_fraction": 0.0}
    options = {"lr": 0.1, "optimizer": "sgd"}
    method, tent = adapt(net, "sar", **sar, **options), adapt(net, "tent", **options)
    for images in make_stream(4, dtype=torch.float64):
        assert max_difference(method(images), tent(images)) < TOLERANCE
    assert method.adaptable.keys() == tent.adaptable.keys()
    for name, tensor in tent.adaptable.items():
        assert max_difference(tensor.detach(), method.adaptable[name].detach()) < TOLERANCE


def test_the_radius_changes_the_step():
    net, images = make_net("gn").double(), make_images(8, dtype=torch.float64)
    results = []
    for rho in (0.0, 0.05):
        method = adapt(net, "sar", optimizer="sgd", lr=0.1, entropy_margin=None, rho=rho)
        method(images)
        results.append((method.stats["loss"], [t.detach().clone() for t in method.adaptable.values()]))
    assert results[1][0] > results[0][0] + 1e-3  # climbed
    assert not same(results[0][1], results[1][1])


class BadSecondPass(nn.Module):
    """Finite logits; infinite gradients, or an error, in every second pass."""

    def __init__(self, net, error):
        super().__init__()
        self.net, self.head, self.error, self.calls = net, net.head, error, 0

    def forward(self, x):
        self.calls += 1
        features = self.net.features(x)
        if self.calls % 2 == 0:
            if self.error:
                raise KeyboardInterrupt
            features.register_hook(lambda gradient: gradient * float("inf"))
        return self.head(features)


@pytest.mark.parametrize("error", [False, True])
def test_a_bad_second_pass_leaves_everything_where_it_was(error):
    method = adapt(BadSecondPass(make_net("gn"), error), "sar", entropy_margin=None)
    before = copy.deepcopy(method.state_dict())
    if error:
        with pytest.raises(KeyboardInterrupt):
            method(make_images(4))
    else:
        assert torch.isfinite(method(make_images(4))).all()
        assert (method.stats["backwards"], method.stats["skipped_steps"]) == (2, 1)
    assert same(without_account(method.state_dict()), without_account(before))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 1000])
@pytest.mark.parametrize("batch", [1, 4])
def test_nothing_kept(kind, num_classes, batch):
    method = adapt(make_net(kind, num_classes), "sar", entropy_margin=1e-9)
    before = copy.deepcopy(method.state_dict())
    images = make_images(batch)
    expected = method.predict(images, statistics="batch")
    assert torch.equal(method(images), expected)
    assert method.stats["kept"] == method.stats["backwards"] == method.stats["skipped_steps"] == 0
    assert method.stats["forwards"] == 1
    assert same(without_account(method.state_dict()), without_account(before))


def test_average_is_saved_and_forgotten_by_reset():
    options = {"lr": 0.1, "optimizer": "sgd", "entropy_margin": 0.9, "reset_threshold": None}
    method, other = (adapt(make_net("gn", seed=seed), "sar", **options) for seed in (0, 5))
    saved = assert_goes_on_after_loading(method, other, make_stream(4, batch=8))
    assert saved["_extra_state"]["memory"]["mean_loss"] is not None
    method.reset()
    assert method.memory["mean_loss"] is None
