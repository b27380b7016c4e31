"""EATA-C against a plain net whose blocks are left out by hand, with the loss and SGD written out."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_tta import UnsupportedModelError, adapt
from lightning_tta.losses import fused_divergence
from nets import KINDS, make_images, make_net, make_stream, max_difference, without_running_statistics
from plain import TOLERANCE, PlainMethod, assert_same_sgd

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*normalises BatchNorm layers"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.left_out = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), False

    def forward(self, x):
        return x if self.left_out else x + torch.tanh(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.blocks, self.head = nn.Sequential(Block(), Block(), Block()), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)) * 4)


class PlainEATAC(PlainMethod):
    """``leave(net, draw)`` makes the sub-network; the kept images alone go through it."""

    def __init__(self, net, lr, margin, similarity, alpha, smoothing):
        super().__init__(net, lr)
        self.margin, self.similarity, self.alpha, self.s, self.mean = margin, similarity, alpha, smoothing, None

    def __call__(self, images, sub):
        with torch.no_grad():
            logits = self.net(images)
            p = logits.softmax(1)
            kept = -(p * p.log()).sum(1) < self.margin * math.log(5)
            if self.mean is not None:
                kept &= torch.cosine_similarity(self.mean[None], p, dim=1) < self.similarity
        self.kept = kept
        q, p = sub(self.net, images[kept]).softmax(1), p[kept]
        fused = (p + (1 - self.s) * q) / (2 - self.s)
        divergence = (fused * (fused.log() - q.log())).sum(1)
        self.agree = q.argmax(1) == p.argmax(1)
        entropy = -(q * q.log()).sum(1)
        loss = (divergence + self.alpha * torch.where(self.agree, entropy, -entropy)).mean()
        gradients = torch.autograd.grad(loss, list(self.weights.values()), materialize_grads=True, allow_unused=True)
        self.sgd.step(gradients)  # zeros for a block that is left out
        new = p.mean(0)
        self.mean = new if self.mean is None else 0.9 * self.mean + 0.1 * new
        return logits, loss.item()


def compare(net, sub_of, **options):
    options = {"alpha": 0.7, "smoothing": 0.3, "drop_rate": 0.5, "seed": 3, **options}
    stream = make_stream(3, batch=10, dtype=torch.float64)
    p = without_running_statistics(copy.deepcopy(net))(stream[0]).softmax(1)
    entropies = (-(p * p.log()).sum(1)).detach().sort().values
    margin = (entropies[6] + entropies[7]).item() / 2 / math.log(5)
    method = adapt(net, "eata_c", lr=0.05, entropy_margin=margin, diversity_margin=0.9999, fisher_alpha=0.0, **options)
    reference = PlainEATAC(net, 0.05, margin, 0.9999, 0.7, 0.3)
    agree = []
    for images in stream:
        keep = method._drawn().tolist()
        expected, loss = reference(images, sub_of(keep))
        assert max_difference(method(images), expected) < TOLERANCE
        assert 1 < reference.kept.sum() < 10 + (images is not stream[0])
        assert method.stats["loss"] == pytest.approx(loss, rel=1e-9)
        assert method.stats["kept"] == pytest.approx(reference.kept.double().mean().item())
        assert method.stats["agree"] == pytest.approx(reference.agree.double().mean().item())
        assert (method.stats["forwards"], method.stats["backwards"]) == (2, 1)
        assert max_difference(method.value("mean_probability"), reference.mean) < TOLERANCE
        assert_same_sgd(method, reference.sgd)
        agree.append(method.stats["agree"])
    return method, agree


def test_blocks():
    def sub_of(keep):
        def sub(net, images):
            for block, stays in zip(net.blocks, keep, strict=True):
                block.left_out = not stays
            logits = net(images)
            for block in net.blocks:
                block.left_out = False
            return logits

        return sub

    torch.manual_seed(0)
    method, agree = compare(Residual().double().eval(), sub_of)
    assert method.blocks == ["blocks.0", "blocks.1", "blocks.2"]
    assert min(agree) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_features(kind):
    method, _ = compare(
        make_net(kind).double(),
        lambda keep: lambda net, images: net.head(net.features(images) * 2 * torch.tensor(keep)),
    )
    assert method.blocks == []


def test_without_anything_left_out_the_two_are_one():
    """The divergence has no gradient, and the entropy is Tent's."""
    method = adapt(make_net("gn"), "eata_c", lr=0.1, drop_rate=0.0, entropy_margin=None, diversity_margin=None,
                   fisher_alpha=0.0, alpha=1.0)  # fmt: skip
    tent = adapt(make_net("gn"), "tent", lr=0.1, optimizer="sgd")
    for number in range(2):
        images = make_images(6, seed=number)
        assert max_difference(method(images), tent(images)) < 1e-6
        assert method.stats["agree"] == 1


def test_the_penalty_is_part_of_the_loss():
    """It is 0 in the first step, after which two nets with and without it are still one."""
    options = {"lr": 1.0, "entropy_margin": None, "diversity_margin": None}
    plain, held = (adapt(make_net("gn").double(), "eata_c", fisher_alpha=alpha, **options) for alpha in (0.0, 5.0))
    held.prepare([{"image": make_images(8, dtype=torch.float64)}])
    source = {name: tensor.detach().clone() for name, tensor in held.adaptable.items()}
    first, second = make_stream(2, dtype=torch.float64)
    plain(first), held(first)
    moved = [(tensor.detach() - source[name]).square() for name, tensor in held.adaptable.items()]
    penalty = sum((held.get_buffer(f"fisher_{n}") * square).sum().item() for n, square in enumerate(moved))
    plain(second), held(second)
    assert penalty > 1e-6
    assert held.stats["loss"] - plain.stats["loss"] == pytest.approx(5 * penalty, rel=1e-6)


def test_the_share_of_what_is_left_out():
    method = adapt(make_net("bn"), "eata_c", fisher_alpha=0.0, drop_rate=0.25)
    kept = []
    for _ in range(200):
        kept.append(method._drawn().double().mean().item())
        method.value("draws").add_(torch.tensor([0, 1]))
    assert abs(sum(kept) / len(kept) - 0.75) < 0.03


def test_fused_divergence_of_saturated_logits_is_finite():
    p, q = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    value = fused_divergence(p, q, 0.5)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_needs_blocks_if_asked_for():
    with pytest.raises(UnsupportedModelError, match="drop='features'"):
        adapt(make_net("bn"), "eata_c", drop="blocks")
