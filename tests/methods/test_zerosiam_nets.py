"""ZeroSiam's learning rates by architecture, and the nets that it refuses."""

import pytest
import torch
from torch import nn

from lightning_tta import UnsupportedModelError, adapt
from nets import make_images, make_net, same

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """Self-attention layers of the given widths."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(w, 1, batch_first=True) for w in widths)


def layer_norms(*widths, before=()):
    return nn.Sequential(*before, *(nn.LayerNorm(w) for w in widths), nn.Linear(widths[-1], 2))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)), (2.5e-4, 2.5e-3)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.GroupNorm(2, 8), nn.Linear(8, 2)), (2.5e-3, 2.5e-2)),
        (layer_norms(768, 768), (5e-3, 5e-3)),  # ViT-Base
        (layer_norms(384, 384, before=[Attention(384)]), (1e-3, 1e-2)),  # ViT-Small
        (layer_norms(8, 16), (2.5e-4, 2.5e-3)),  # ConvNeXt
        (layer_norms(8, 16, before=[nn.Linear(8, 32), nn.Linear(32, 8)]), (2.5e-4, 2.5e-3)),  # with its MLPs
        (layer_norms(8, 16, before=[Attention(8, 16)]), (5e-4, 2.5e-3)),  # Swin
        (layer_norms(8, 16, before=[nn.Linear(8, 24)]), (5e-4, 2.5e-3)),  # with one matrix for q, k and v
    ],
)
def test_default_learning_rates(net, expected):
    method = adapt(net, "zerosiam")
    rates = [method.optimizers[name].param_groups[0]["initial_lr"] for name in ("model", "predictor")]
    assert tuple(rates) == expected
    method = adapt(net, "zerosiam", lr=0.125)
    assert method.optimizers["model"].param_groups[0]["initial_lr"] == 0.125
    assert method.optimizers["predictor"].param_groups[0]["initial_lr"] == expected[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", (2.5e-4, 2.5e-3)),
        ("test_efficientnet_gn", (2.5e-3, 2.5e-2)),
        ("test_vit", (1e-3, 1e-2)),
        ("test_convnext", (2.5e-4, 2.5e-3)),
    ],
)
def test_timm_nets(name, expected):
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=4, **size)
    method = adapt(net, "zerosiam")
    rates = [method.optimizers[key].param_groups[0]["initial_lr"] for key in ("model", "predictor")]
    assert tuple(rates) == expected
    before = {key: t.detach().clone() for key, t in method.adaptable.items()}
    for images in (make_images(2, size=32), make_images(2, size=32, seed=1)):
        assert torch.isfinite(method(images)).all()
    assert not torch.equal(method.predictor.weight, before["predictor.weight"])
    assert method.stats["alignment"] > 0


class SoftmaxAfterHead(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(1)


def test_something_after_the_head():
    method = adapt(SoftmaxAfterHead(make_net("gn")), "zerosiam")
    before = {name: t.detach().clone() for name, t in method.adaptable.items()}
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="raw logits"):
            method(make_images(4))
    assert same(dict(method.adaptable), before)


def test_net_without_a_linear_head():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        adapt(net, "zerosiam")
