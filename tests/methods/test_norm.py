"""BatchNorm statistics of the test stream, against layers written out by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from lightning_tta import UnsupportedModelError, adapt
from nets import make_images, make_net, make_stream, max_difference, same, without_account, without_running_statistics
from plain import assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10


def moments(x):
    """Mean and biased variance per channel (C,) of (B, C, H, W), by sums."""
    count = x.numel() / x.shape[1]
    mean = x.sum((0, 2, 3)) / count
    return mean, ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / count


def by_hand(net, images, choose):
    """The logits of the tests' BatchNorm net; ``choose(number, layer, mean, var)`` gives each layer's statistics."""
    x = images
    for number, (conv, norm) in enumerate([(net.conv1, net.norm1), (net.conv2, net.norm2)]):
        x = conv(x)
        mean, var = choose(number, norm, *moments(x))
        x = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
        x = silu(x * norm.weight[:, None, None] + norm.bias[:, None, None])
    return (x.mean((2, 3)) @ net.head.weight.T + net.head.bias).detach()


def mixture(weight):
    def choose(number, layer, mean, var):
        return weight * layer.running_mean + (1 - weight) * mean, weight * layer.running_var + (1 - weight) * var

    return choose


@pytest.mark.parametrize("kind", ["bn", "user"])
def test_batch_statistics_are_those_of_training_mode(kind):
    net = make_net(kind)
    method, trained = adapt(net, "norm"), without_running_statistics(copy.deepcopy(net))
    before = copy.deepcopy(method.state_dict())
    for images in make_stream(3):
        with torch.no_grad():
            assert torch.equal(method(images), trained(images))
            assert torch.equal(method.predict(images, statistics="batch"), trained(images))
    assert same(without_account(method.state_dict()), without_account(before))


@pytest.mark.parametrize("kind", ["bn", "user"])
def test_source_weight_one_is_the_source(kind):
    net = make_net(kind)
    method = adapt(net, "norm", source_weight=1.0)
    for images in make_stream(2):
        with torch.no_grad():
            assert torch.equal(method(images), net(images))


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_mixture_by_hand(weight):
    net = make_net("bn").double()
    method = adapt(net, "norm", source_weight=weight)
    for images in make_stream(2, dtype=torch.float64):
        expected = by_hand(net, images, mixture(weight))
        assert max_difference(method(images), expected) < TOLERANCE
        assert max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.1, 0.6, 1.0])
def test_moving_average_by_hand(momentum, weight):
    net = make_net("bn").double()
    method = adapt(net, "norm", momentum=momentum, source_weight=weight)
    ema = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in (net.norm1, net.norm2)]

    def mixed(number, layer):
        mean, var = ema[number]
        return weight * layer.running_mean + (1 - weight) * mean, weight * layer.running_var + (1 - weight) * var

    def update(number, layer, mean, var):
        old_mean, old_var = ema[number]
        ema[number] = (1 - momentum) * old_mean + momentum * mean, (1 - momentum) * old_var + momentum * var
        return mixed(number, layer)

    probe = make_images(2, seed=9, dtype=torch.float64)
    for images in make_stream(3, dtype=torch.float64):
        assert max_difference(method(images), by_hand(net, images, update)) < TOLERANCE
        frozen = by_hand(net, probe, lambda number, layer, mean, var: mixed(number, layer))
        assert max_difference(method.predict(probe), frozen) < TOLERANCE  # predicting takes nothing in
    kept = list(method.adaptable.values())
    assert len(kept) == 2
    for (mean, var), tensor in zip(ema, kept, strict=True):
        assert max_difference(tensor, torch.stack([mean, var])) < TOLERANCE


def test_moving_average_is_saved_and_reset():
    method, other = (adapt(make_net("bn", seed=seed), "norm", momentum=0.3) for seed in (0, 5))
    source = adapt(make_net("bn"), "source")
    probe = make_images(2, seed=9)
    assert torch.equal(method.predict(probe), source(probe))  # starts at the source
    assert_goes_on_after_loading(method, other, make_stream(4))
    for each in (method, other):
        assert not torch.equal(each.predict(probe), source(probe))
        each.reset()
        assert torch.equal(each.predict(probe), source(probe))


def test_running_statistics_survive():
    for options in ({}, {"source_weight": 0.5}, {"momentum": 0.5}):
        net = make_net("bn")
        before = copy.deepcopy(net.state_dict())
        method = adapt(net, "norm", in_place=True, **options)
        for images in make_stream(2):
            method(images)
        assert same(net.state_dict(), before)


@pytest.mark.parametrize("options", [{}, {"source_weight": 0.5}, {"momentum": 0.5}], ids=str)
def test_one_value_a_channel_keeps_the_source_statistics(options):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    net[2].running_mean.fill_(0.3)
    net[2].running_var.fill_(2.0)
    image = torch.rand(1, 3, 2, 2)
    method = adapt(net, "norm", **options)
    with torch.no_grad():
        assert torch.equal(method(image), net(image))


@pytest.mark.parametrize("kind", ["gn", "ln"])
def test_nets_without_batch_norm(kind):
    with pytest.raises(UnsupportedModelError, match="no BatchNorm layer"):
        adapt(make_net(kind), "norm")


def test_layer_without_running_statistics():
    net = without_running_statistics(make_net("bn"))
    for options in ({"source_weight": 0.5}, {"momentum": 0.1}):
        with pytest.raises(UnsupportedModelError, match="keeps no running statistics"):
            adapt(net, "norm", **options)
    images = make_images(4)
    with torch.no_grad():
        assert torch.equal(adapt(net, "norm")(images), net(images))
