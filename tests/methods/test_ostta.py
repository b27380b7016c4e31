"""OSTTA against a reference with a second net, and its filter in the methods that take it."""

import copy

import pytest
import torch

from lightning_tta import adapt
from nets import (
    KINDS,
    make_images,
    make_net,
    make_stream,
    max_difference,
    norm_weights,
    same,
    without_account,
    without_running_statistics,
)
from plain import TOLERANCE, PlainMethod, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainOSTTA(PlainMethod):
    """The objective with a second net and loops over samples."""

    def __init__(self, net, lr, alpha):
        super().__init__(net, lr)
        self.source, self.alpha = without_running_statistics(copy.deepcopy(net)), alpha

    def __call__(self, images):
        logits = self.net(images)
        p, q = logits.softmax(1), self.source(images).detach().softmax(1)
        mask = [bool(p[i, q[i].argmax()] >= q[i].max()) for i in range(len(images))]
        terms = [-(row * row.log()).sum() for row, kept in zip(p, mask, strict=True) if kept]
        if not terms:
            return logits.detach(), None, mask
        mean = p.mean(0)
        loss = sum(terms) / len(terms) + self.alpha * (mean * mean.log()).sum()
        self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), loss.item(), mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_five_steps(kind, alpha):
    net = make_net(kind).double()
    method, reference = adapt(net, "ostta", lr=0.1, optimizer="sgd", alpha=alpha), PlainOSTTA(net, 0.1, alpha)
    masks = []
    for images in make_stream(5, batch=8, dtype=torch.float64):
        expected, loss, mask = reference(images)
        assert (
            max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE
        )  # logits come from before the step
        assert max_difference(method(images), expected) < TOLERANCE
        assert (method.stats["forwards"], method.stats["backwards"]) == (2, float(loss is not None))
        assert method.stats["kept_by_source_filter"] == pytest.approx(sum(mask) / 8)
        assert method.stats.get("loss", 0) == pytest.approx(loss or 0, abs=TOLERANCE)
        assert_same_sgd(method, reference.sgd)
        masks.append(mask)
    assert all(masks[0])  # the net is the source
    if alpha:
        assert not all(map(all, masks[1:]))
    assert reference.sgd.moved() > 1e-4


METHODS = {  # options without any other filter, and where the kept share of all filters is
    "tent": ({}, "kept_by_source_filter"),
    "come": ({}, "kept_by_source_filter"),
    "ostta": ({"alpha": 0.0}, "kept_by_source_filter"),
    "eata": ({"fisher_alpha": 0.0, "entropy_margin": None, "diversity_margin": None}, "kept"),
    "eta": ({"entropy_margin": None, "diversity_margin": None}, "kept"),
    "sar": ({"entropy_margin": None, "rho": 0.0, "frozen_fraction": 0.0, "reset_threshold": None}, "kept_twice"),
    "zerosiam": ({"predictor": "identity", "lr_batch_size": None}, "kept_by_source_filter"),
}


def filtered(net, name, **more):
    options = dict(METHODS[name][0])
    if name != "ostta":
        options["source_filter"] = True
    if name != "zerosiam":
        options["optimizer"] = "sgd"
    return adapt(net, name, lr=0.1, **options, **more)


def disturb(method, seed=0):
    """Move the net away from the source, so that the filter has something to say."""
    generator = torch.Generator().manual_seed(seed)
    with method.hold(), torch.no_grad():
        for tensor in method.adaptable.values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_filter_in_every_method(name, kind):
    net = make_net(kind).double()
    method, images = filtered(net, name), make_images(8, dtype=torch.float64)
    disturb(method, {"gn": 1}.get(kind, 0))
    plain = without_running_statistics(copy.deepcopy(net))
    now = without_running_statistics(copy.deepcopy(method.model))
    with torch.no_grad():
        q, logits = plain(images).softmax(1), now(images)
    answer = q.argmax(1)
    rows = torch.arange(8)
    mask = logits.softmax(1)[rows, answer] >= q[rows, answer]
    assert 0 < mask.sum() < 8
    before = {n: t.detach().clone() for n, t in method.adaptable.items()}
    assert max_difference(method(images), logits) < TOLERANCE
    stats = method.stats
    assert stats["kept_by_source_filter"] == stats[METHODS[name][1]] == mask.sum() / 8
    assert stats["forwards"] == (3 if name == "sar" else 2)
    kept = now(images)[mask]
    if name == "come":
        kept = torch.cat([kept, torch.full((len(kept), 1), 1000.0, dtype=torch.float64).log()], 1)
    p = kept.softmax(1)
    loss = -(p * p.log()).sum(1).mean()
    assert stats["loss"] == pytest.approx(loss.item(), abs=TOLERANCE)
    if name != "come":
        weights = {f"model.{n}": w for n, w in norm_weights(now).items()}
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for weight, gradient in zip(weights, gradients, strict=True):
            ours = method.adaptable[weight].detach()
            assert max_difference(ours, before[weight] - 0.1 * gradient) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_kept(name, kind):
    method, images = filtered(make_net(kind), name), make_images(1)
    for seed in range(100):  # away from the source, until it is less sure of the image
        disturb(method, seed)
        before = copy.deepcopy(method.state_dict())
        expected = method.predict(images, statistics="batch")
        logits = method(images)
        assert torch.equal(logits, expected)
        if method.stats["kept_by_source_filter"] == 0:
            break
        method.reset()
    assert method.stats["kept_by_source_filter"] == 0
    assert method.stats["backwards"] == method.stats["skipped_steps"] == 0
    assert "loss" not in method.stats
    assert same(without_account(method.state_dict()), without_account(before))


@pytest.mark.parametrize("name", METHODS)
def test_first_batch_keeps_all(name):
    for kind in KINDS:
        method = filtered(make_net(kind), name)
        method(make_images(8))
        assert method.stats["kept_by_source_filter"] == 1


class Attends(torch.nn.Module):
    """torch's own attention, which takes another path where nothing needs a gradient."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 4, stride=4)
        layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("name", METHODS)
def test_first_batch_keeps_all_with_torchs_attention(name):
    method = filtered(Attends(), name)
    method(make_images(64))
    assert method.stats["kept_by_source_filter"] == 1
    assert torch.backends.mha.get_fastpath_enabled()  # as it was


def test_the_source_is_not_touched_by_its_pass():
    net = make_net("bn")
    method = filtered(net, "tent")
    disturb(method)
    seen = []
    weight = method.model.norm1.weight
    method.model.register_forward_hook(lambda *_: seen.append(weight.detach().clone()))
    learned = weight.detach().clone()
    method(make_images(4))
    assert torch.equal(seen[0], net.norm1.weight)
    assert torch.equal(seen[1], learned)


class Failing(torch.nn.Module):
    """Raises when told to."""

    def __init__(self, net):
        super().__init__()
        self.net, self.fail = net, False

    def forward(self, x):
        if self.fail:
            raise KeyboardInterrupt
        return self.net(x)


def test_an_interrupted_source_pass_loses_nothing():
    method = adapt(Failing(make_net("gn")), "ostta", lr=0.1)
    method(make_images(4))
    before = copy.deepcopy(method.state_dict())
    method.model.fail = True
    with pytest.raises(KeyboardInterrupt):
        method(make_images(4))
    assert same(without_account(method.state_dict()), without_account(before))


def test_the_diversity_term_raises_the_mean_entropy():
    entropies = []
    for alpha in (0.0, 2.0):
        method = adapt(make_net("gn").double(), "ostta", lr=0.02, optimizer="sgd", alpha=alpha)
        images = make_images(8, dtype=torch.float64)
        for _ in range(3):
            logits = method(images)
        mean = logits.softmax(1).mean(0)
        entropies.append(-(mean * mean.log()).sum().item())
    assert entropies[1] > entropies[0] + 1e-3
