"""Residual blocks of real architectures, found by what they do; passes without some of them."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_tta import create_backbone
from lightning_tta.backbones.residual import residual_blocks, without_blocks
from nets import KINDS, make_images, make_net, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = {  # how many, and the first
    "resnet18": (torchvision.models.resnet18, 5, "layer1.0"),  # those that do not change the shape
    "resnet20": (lambda: create_backbone("cifar/resnet20", num_classes=10), 7, None),
    "resnet26_gn": (lambda: create_backbone("cifar/resnet26_gn", num_classes=10), 10, None),
    "vit": (lambda: timm.create_model("test_vit"), 6, "blocks.0"),
    "convnext": (lambda: timm.create_model("test_convnext"), 9, None),
    "vgg": (lambda: torchvision.models.vgg11_bn(num_classes=10), 0, None),
}


@pytest.mark.parametrize("name", NETS)
def test_found_by_what_they_do(name):
    make, number, first = NETS[name]
    blocks = residual_blocks(make().eval())
    assert len(blocks) == number
    assert first is None or blocks[0] == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_without_any_has_none(kind):
    assert residual_blocks(make_net(kind)) == []


class Residual(nn.Module):
    """Three blocks, the second of another shape."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(6, 5)
        self.first, self.second, self.third = Block(4, 4), Block(4, 6), Block(6, 6)

    def forward(self, x):
        return self.head(self.third(self.second(self.first(self.stem(x)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return x + y if x.shape == y.shape else y


class Odd(Residual):
    """One block runs twice; another sees zeros alone, which it returns whatever it does."""

    def __init__(self):
        super().__init__()
        self.of_zeros = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))

    def forward(self, x):
        x = self.second(self.first(self.first(self.stem(x))))
        return self.head(self.third(x + self.of_zeros(0 * x)).mean((2, 3)))


def test_what_runs_twice_or_sees_nothing_is_none():
    assert residual_blocks(Odd().eval()) == ["third"]


def test_left_out_a_block_returns_its_input():
    net, images = Residual().eval(), make_images(2)
    names = residual_blocks(net)
    assert names == ["first", "third"]
    expected = net.head(net.third(net.second(net.stem(images))).mean((2, 3)))
    with without_blocks(net, names, torch.tensor([False, True])):
        assert max_difference(net(images), expected) == 0
    assert max_difference(net(images), expected) > 1e-3
