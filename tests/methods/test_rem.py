"""REM against a reference written with plain torch; attention and fewer tokens on real nets; what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.backbones.attention import chosen_tokens, find_attention, watched_attention
from lightning_tta.methods.rem import REM
from nets import TokenViT, make_images, make_net, make_stream, max_difference, norm_weights
from plain import TOLERANCE, PlainSGD, assert_same_sgd
from vits import hf_vit, mixer, relative_positions, swin, timm_vit, torchvision_vit

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainREM:
    """A TokenViT of 16 patches written out, image by image where patches are chosen."""

    def __init__(self, net, lr, fractions, weight, margin):
        self.net = copy.deepcopy(net)
        frozen = ("norm.", f"blocks.{len(net.blocks) - 1}.")
        weights = {name: w for name, w in norm_weights(self.net).items() if not name.startswith(frozen)}
        self.sgd = PlainSGD(weights, lr)
        self.fractions, self.weight, self.margin = fractions, weight, margin

    def tokens(self, images):
        x = self.net.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.net.token.expand(len(x), -1, -1), x], 1) + self.net.positions

    def run(self, x):
        """Logits, and the attention of the class token in the last block."""
        for block in self.net.blocks:
            query, key, value = block.qkv(block.norm1(x)).chunk(3, -1)
            attention = (query @ key.transpose(1, 2) / math.sqrt(x.shape[-1])).softmax(-1)
            x = x + attention @ value
            x = x + block.mlp(block.norm2(x))
        return self.net.head(self.net.norm(x)[:, 0]), attention[:, 0].detach()

    def __call__(self, images):
        x = self.tokens(images)
        logits, attention = self.run(x)
        views = [logits]
        for fraction in self.fractions:
            parts = []
            for one, row in zip(x, attention, strict=True):
                patches = sorted(range(1, len(row)), key=lambda n: row[n].item())[: round(fraction * (len(row) - 1))]
                parts.append(one[[0, *sorted(patches)]])
            views.append(self.run(torch.stack(parts))[0])
        p = [view.softmax(1) for view in views]
        entropies = [-(q * q.log()).sum(1) for q in p]
        bound = self.margin * math.log(logits.shape[1])
        loss = 0
        for i in range(len(p)):
            for j in range(len(p)):
                if j < i:
                    loss = loss - (p[j].detach() * p[i].log()).sum(1).mean()
                if i < j:
                    gap = entropies[i] - entropies[j].detach() + bound
                    loss = loss + self.weight * torch.where(gap > 0, gap, 0).mean()
        self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), loss.item()


class SixteenPatches(TokenViT):
    """A class token and 16 patches, of which some matter more than others."""

    def __init__(self, num_classes=5):
        super().__init__(num_classes)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 17, 8) / 2)
        with torch.no_grad():
            self.head.weight.mul_(8)
            for block in self.blocks:
                block.qkv.weight.mul_(4)

    def features(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.norm(self.blocks(x)[:, 0])


def make_sixteen(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SixteenPatches().eval()


@pytest.mark.parametrize(
    ("views", "masked", "weight", "margin"), [(3, 0.25, 1.0, 0.0), (2, 0.5, 0.3, 0.2), (4, 0.25, 2.0, 0.1)]
)
def test_three_steps(views, masked, weight, margin):
    net = make_sixteen().double()
    options = {"lr": 0.05, "optimizer": "sgd", "frozen_fraction": 0.3}
    method = adapt(net, "rem", views=views, masked=masked, weight=weight, margin=margin, **options)
    reference = PlainREM(net, 0.05, [1 - i * masked for i in range(1, views)], weight, margin)
    for images in make_stream(3, batch=6, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method.predict(images), expected) < TOLERANCE
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert method.stats["forwards"] == views
        assert method.stats["consistency"] + weight * method.stats["ranking"] == pytest.approx(loss)
        assert_same_sgd(method, reference.sgd)
    assert method.stats["ranking"] > 0
    assert reference.sgd.moved() > 1e-4


def test_shares_of_patches_are_not_rounded_down():
    """The authors' numbers of 196 and 576 patches; and 0.9 of 20, which is less than 18 in floating point."""
    method = adapt(make_sixteen(), "rem", views=3, masked=0.1)
    expected = {196: [176, 156], 576: [518, 460], 20: [18, 16], 1: [1, 1]}
    assert {n: [method.number_of(n, share) for share in method.shares] for n in expected} == expected


# Real nets -----------------------------------------------------------------------------------------------------------


def fused(flag):
    def make():
        net = timm_vit()
        for block in net.blocks:
            block.attn.fused_attn = flag
        return net

    return make


def hf_eager():
    net = hf_vit()
    net.set_attn_implementation("eager")
    return net


REAL = {
    "timm, fused": (fused(True), 1),
    "timm": (fused(False), 1),
    "timm, registers": (lambda: timm_vit(reg_tokens=2), 3),
    "timm, qk norm": (lambda: timm_vit(qk_norm=True), 1),
    "torchvision": (torchvision_vit, 1),
    "Hugging Face": (hf_vit, 1),
    "Hugging Face, eager": (hf_eager, 1),
}


def weights_of(kind, net, images):
    """The attention (B, heads, N, N) of the last block, as the library itself gives it."""
    if kind.startswith("Hugging Face"):
        net.set_attn_implementation("eager")
        return net(images, output_attentions=True).attentions[-1]
    found = []
    if kind == "torchvision":
        layer = net.encoder.layers[-1].self_attention

        def hook(module, inputs, output):
            if not found:
                found.append(None)
                found[0] = module(*inputs, need_weights=True, average_attn_weights=False)[1]

        handle = layer.register_forward_hook(hook)
        net(images)
        handle.remove()
        return found[0]
    attention = net.blocks[-1].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    net(images)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", REAL)
def test_attention_of_real_nets(kind):
    make, prefix = REAL[kind]
    torch.manual_seed(0)
    net = make().eval()
    for name, parameter in net.named_parameters():
        if "norm" not in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)  # attention that is not even
    tokens, images = find_attention(net), make_images(4)
    assert tokens.prefix == prefix
    with torch.no_grad():
        plain = getattr(out := net(images), "logits", out)
        with watched_attention(net, tokens) as rows:
            again = getattr(out := net(images), "logits", out)
        expected = weights_of(kind, copy.deepcopy(net), images)[:, :, 0].mean(1)
    torch.testing.assert_close(again, plain)  # torch's attention layer has a fast path, which a watched one has not
    assert len(rows) == 1
    torch.testing.assert_close(rows[0], expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 1e-3
    with torch.no_grad():
        everything = torch.arange(16).flip(0).expand(4, -1)  # in another order: positions are in the tokens already
        with chosen_tokens(net, tokens, everything):
            shuffled = getattr(out := net(images), "logits", out)
        with chosen_tokens(net, tokens, everything[:, :4]):
            fewer = getattr(out := net(images), "logits", out)
    torch.testing.assert_close(shuffled, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fewer, plain, atol=1e-3)
    method = adapt(net, "rem", lr=0.01, masked=0.3)
    assert all(method(x).isfinite().all() for x in make_stream(2))
    assert method.stats["backwards"] == 1
    assert not torch.equal(method.predict(images), plain)


def test_gradients_under_checkpoints():
    """What is computed again in the backward pass has the same tokens as at first."""
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = timm_vit().eval()
        net.set_grad_checkpointing(checkpointed)
        method = adapt(net, "rem", lr=0.1, optimizer="sgd", masked=0.4)
        outcomes.append([method(images) for images in make_stream(3)])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


class Sigmoid(nn.Module):
    """A block whose tokens attend without a softmax."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)

    def forward(self, x):
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        return x + F.sigmoid(query @ key.transpose(1, 2)) @ value


def without_softmax():
    net = make_sixteen()
    net.blocks = nn.Sequential(Sigmoid(), Sigmoid())
    return net


REFUSED = {
    "a convolutional net": (lambda: make_net("gn"), "no sequence of two or more blocks"),
    "windows": (swin, "no sequence|no class token|not fewer"),
    "no class token": (lambda: timm_vit(class_token=False, global_pool="avg"), "no class token"),
    "relative positions": (relative_positions, "and not fewer|shows no attention"),
    "no attention": (mixer, "no class token|no sequence"),
    "no softmax": (without_softmax, "shows no attention over its 17 tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_reason_and_remedy(kind):
    make, words = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=f"(?s)({words}).*'sar' or 'deyo'"):
        adapt(make().eval(), "rem")


def test_shares_of_patches_are_whole_numbers():
    assert [REM.number_of(100, 1 - number * 0.1) for number in (1, 3, 9)] == [90, 70, 10]
    assert REM.number_of(4, 0.2) == 1


def test_options_that_leave_no_patch():
    with pytest.raises(ConfigError, match="no patch"):
        adapt(make_sixteen(), "rem", views=5, masked=0.25)
    with pytest.raises(ConfigError, match="views"):
        adapt(make_sixteen(), "rem", views=1)


@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes(classes):
    method = adapt(make_net("vit", classes), "rem", masked=0.45)
    for batch in (1, 3):
        assert torch.isfinite(method(make_images(batch))).all()
    assert all(torch.isfinite(tensor).all() for tensor in method.adaptable.values())
