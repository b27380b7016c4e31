"""Copies of nets that keep computed tensors; nets without values."""

import functools
import threading

import pytest
import torch
from torch import nn

from lightning_tta import UnsupportedModelError
from lightning_tta.backbones.copying import check_initialized, copy_net
from nets import make_images, make_net


class Keeper:
    def __init__(self, value):
        self.value = value

    def use(self):
        return self.value


@pytest.mark.parametrize(
    "hide",
    [
        lambda t: t,
        lambda t: [{"a": (t,)}],
        Keeper,
        lambda t: Keeper(t).use,
        lambda t: functools.partial(print, t, end=t),
        lambda t: functools.partial(Keeper(t).use),
    ],
)
def test_computed_tensors_are_copied_without_their_graph(hide):
    net = make_net("bn")
    kept = net(make_images(2))
    net.kept = hide(kept)
    copied = copy_net(net)
    assert type(copied.kept) is type(net.kept)
    assert kept.grad_fn is not None
    for one, other in zip(net.state_dict().values(), copied.state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_shared_tensors_are_the_same():
    net = make_net("gn")
    copied = copy_net(net, net.parameters())
    assert all(a is b for a, b in zip(net.parameters(), copied.parameters(), strict=True))


def test_what_cannot_be_copied_is_named():
    net = nn.Sequential(make_net("bn"))
    net[0].norm1.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match=r"'lock' of module '0\.norm1'.*in_place=True"):
        copy_net(net)
    net = make_net("bn")
    net.register_forward_hook(Keeper(i for i in ()).use)
    with pytest.raises(UnsupportedModelError, match="a forward hook of the net"):
        copy_net(net)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.LazyConv2d(3, 3)), "lazy layer"),
        (nn.Sequential(nn.LazyBatchNorm2d(affine=False)), "lazy layer"),
        (nn.Linear(2, 2, device="meta"), "device 'meta'"),
    ],
)
def test_nets_without_values(net, words):
    with pytest.raises(UnsupportedModelError, match=words):
        check_initialized(net)
    with pytest.raises(UnsupportedModelError, match=words):
        copy_net(net)
