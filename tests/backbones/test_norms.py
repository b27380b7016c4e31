import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lightning_tta import ConfigError, UnsupportedModelError
from lightning_tta.backbones.norms import (
    batch_moments,
    batch_norm_layers,
    batch_statistics,
    bn_statistics,
    early_norm_parameters,
    is_norm_layer,
    norm_layers,
    norm_parameters,
)
from nets import KINDS, make_images, make_net, norm_weights, same, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


class MyNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True) * self.gain[:, None, None] + self.shift[:, None, None]


class NormalisingConv(nn.Conv2d):
    """'Norm' in its name, but with a weight matrix."""


class Normalise(nn.Module):
    """'Norm' in its name, but nothing to learn."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))


class Scale(nn.Module):
    """One-dimensional parameters, but no normalisation."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class PixelNormalize(nn.Module):
    """An affine map of pixels, whatever its parameters are called."""

    def __init__(self, shift="mean", scale="std"):
        super().__init__()
        self.names = shift, scale
        self.register_parameter(shift, nn.Parameter(torch.rand(3)))
        self.register_parameter(scale, nn.Parameter(torch.rand(3) + 1))

    def forward(self, x):
        shift, scale = (getattr(self, name)[:, None, None] for name in self.names)
        return (x - shift) / scale


class EnormousBias(nn.Module):
    """Has "norm" in its name by accident."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x + self.bias


class TokenRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.g


class RunningNorm(nn.Module):
    """In eval mode affine, by running statistics."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        return x / self.running_var.sqrt()[:, None, None] * self.gamma[:, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_norm_parameters_are_all_and_only_those_of_norm_layers(kind):
    net = make_net(kind)
    found, expected = norm_parameters(net), norm_weights(net)
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)


def zero(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


@pytest.mark.parametrize(
    ("layer", "is_norm"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm3d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, affine=True), True),
        (nn.GroupNorm(2, 4), True),
        (nn.LayerNorm(4), True),
        (nn.RMSNorm(4), True),
        (MyNorm(4), True),
        (TokenRMSNorm(), True),
        (zero(TokenRMSNorm()), True),
        (RunningNorm(), True),
        (PixelNormalize(), False),
        (PixelNormalize("weight", "bias"), False),
        (EnormousBias(), False),
        (NormalisingConv(3, 4, 1), False),
        (Normalise(), False),
        (Scale(), False),
        (nn.Linear(4, 4), False),
        (nn.Sequential(nn.LayerNorm(4)), False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_norm_layers_are_told_by_type_and_structure(layer, is_norm):
    assert is_norm_layer(layer) is is_norm


def test_own_and_fused_layers():
    timm_layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(
        Normalise(), nn.Conv2d(3, 4, 1), MyNorm(4), timm_layers.BatchNormAct2d(4), NormalisingConv(4, 4, 1), Scale()
    )
    assert list(norm_parameters(net)) == ["2.gain", "2.shift", "3.weight", "3.bias"]
    assert list(norm_layers(net)) == ["2", "3"]
    assert list(batch_norm_layers(net)) == ["3"]


def test_shared_parameters_once():
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    net[2].weight = net[0].weight
    net.append(net[3])
    assert list(norm_parameters(net)) == ["0.weight", "0.bias", "2.bias", "3.weight", "3.bias"]


def test_what_a_computed_weight_is_computed_from():
    class Square(nn.Module):
        def forward(self, w):
            return w * w

        def right_inverse(self, w):
            return w.sqrt()

    net = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(4), nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
    parametrize.register_parametrization(net[0], "weight", Square())
    parametrize.register_parametrization(net[2], "weight", Square(), unsafe=True)
    prune.l1_unstructured(net[1], "weight", 0.5)
    names = ["0.bias", "0.parametrizations.weight.original", "1.bias", "1.weight_orig", "3.weight", "3.bias"]
    assert list(norm_parameters(net)) == names
    assert list(early_norm_parameters(net, 0.25)) == names[:4]
    alone = parametrize.register_parametrization(nn.LayerNorm(4), "weight", Square())
    assert list(norm_parameters(alone)) == ["bias", "parametrizations.weight.original"]


def test_a_norm_layer_alone_has_plain_names():
    assert list(norm_parameters(nn.LayerNorm(4))) == ["weight", "bias"]


@pytest.mark.parametrize(
    "net",
    [nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2)), nn.Sequential(nn.BatchNorm2d(3, affine=False))],
    ids=["no norm layer", "not affine"],
)
def test_no_norm_parameters(net):
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no normalisation layer.*'source'"):
        norm_parameters(net)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_batch_moments(shape, unbiased):
    x = torch.rand(shape, dtype=torch.float64)
    channels = x.transpose(0, 1).flatten(1)
    mean, var = batch_moments(x, unbiased=unbiased)
    expected = ((channels - channels.mean(1, keepdim=True)) ** 2).sum(1) / (channels.shape[1] - unbiased)
    torch.testing.assert_close(mean, channels.sum(1) / channels.shape[1])
    torch.testing.assert_close(var, expected)
    assert batch_moments(x.bfloat16())[1].dtype == torch.float32


@pytest.mark.parametrize("kind", ["bn", "user"])
def test_batch_statistics_equal_training_mode_with_gradients(kind):
    net = make_net(kind).double()
    reference = without_running_statistics(copy.deepcopy(net))
    images = make_images(4, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    with batch_statistics(net):
        logits = net(images)
    expected = reference(images)
    assert torch.equal(logits, expected)
    for a, b in zip(
        torch.autograd.grad(logits.square().sum(), list(net.parameters())),
        torch.autograd.grad(expected.square().sum(), list(reference.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert same(net.state_dict(), before)


def test_fused_batch_norm():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d(3).eval()
    nn.init.uniform_(layer.weight)
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    with torch.no_grad(), batch_statistics(layer):
        out = layer(x)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    expected = ((x - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None]).relu()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("unbiased", [False, True])
def test_mixture_of_source_and_batch(unbiased):
    layer = nn.BatchNorm1d(3).double().eval()
    layer.running_mean.copy_(torch.tensor([1.0, -1.0, 0.5]))
    layer.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    with batch_statistics(layer, 0.3, unbiased=unbiased):
        out = layer(x)
    mean = 0.3 * layer.running_mean + 0.7 * x.detach().mean(0)
    var = 0.3 * layer.running_var + 0.7 * x.detach().var(0, correction=int(unbiased))
    torch.testing.assert_close(out, (x - mean) / (var + layer.eps).sqrt())
    (gradient,) = torch.autograd.grad(out.sum(), x)  # the statistics are constants
    torch.testing.assert_close(gradient, (1 / (var + layer.eps).sqrt()).expand(6, 3))


def test_mixture_needs_a_source_and_a_weight_in_range():
    layer = nn.BatchNorm1d(3, track_running_stats=False).eval()
    with pytest.raises(UnsupportedModelError, match="source_weight=0"), batch_statistics(layer, 0.5):
        layer(torch.rand(4, 3))
    with pytest.raises(ConfigError, match="source_weight"):
        batch_statistics(layer, 1.5)


def test_rule_gets_names_layers_and_inputs():
    net, seen = make_net("bn"), []

    def rule(name, layer, x):
        seen.append((name, layer, x.shape))
        return torch.full_like(layer.running_mean, 2.0), torch.full_like(layer.running_var, 3.0)

    images = make_images(2)
    with torch.no_grad(), bn_statistics(net, rule):
        logits = net(images)
    assert seen == [("norm1", net.norm1, (2, 8, 8, 8)), ("norm2", net.norm2, (2, 12, 4, 4))]
    other = copy.deepcopy(net)
    for layer in (other.norm1, other.norm2):
        layer.running_mean.fill_(2.0)
        layer.running_var.fill_(3.0)
    with torch.no_grad():
        assert torch.equal(logits, other(images))


class Failing(nn.BatchNorm2d):
    error: type[BaseException] | None = None

    def forward(self, x):
        if self.error is not None:
            raise self.error("inside the layer")
        return super().forward(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("rule", [lambda *_: None, lambda *_: (torch.zeros(4), torch.ones(4))])
def test_statistics_are_back_after_an_error(error, rule):
    layer = Failing(4).eval()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.BatchNorm2d(4)).eval()
    mean, var = layer.running_mean, layer.running_var
    layer.error = error
    with pytest.raises(error), bn_statistics(net, rule):
        net(make_images(2))
    assert layer.running_mean is mean
    assert layer.running_var is var
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer.error = None
    with torch.no_grad():
        net(make_images(2))


def test_statistics_are_back_after_an_error_in_the_rule():
    net = make_net("bn")
    kept = {name: (layer.running_mean, layer.running_var) for name, layer in batch_norm_layers(net).items()}

    def rule(name, layer, x):
        if name == "norm2":
            raise ValueError("no statistics")
        return None

    with pytest.raises(ValueError, match="no statistics"), bn_statistics(net, rule):
        net(make_images(2))
    for name, layer in batch_norm_layers(net).items():
        assert (layer.running_mean is kept[name][0], layer.running_var is kept[name][1]) == (True, True)
        assert not layer._forward_hooks


def test_a_layer_used_twice():
    layer = nn.BatchNorm2d(3).eval()
    net = nn.Sequential(layer, nn.ReLU(), layer)
    x = make_images(4)
    with torch.no_grad():
        with batch_statistics(net):
            logits = net(x)
        fresh = nn.BatchNorm2d(3).train()
        assert torch.equal(logits, fresh(fresh(x).relu()))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_one_value_a_channel_keeps_the_source_statistics():
    layer = nn.BatchNorm2d(3).eval()
    layer.running_mean.fill_(0.5)
    calls = []
    with torch.no_grad(), bn_statistics(layer, lambda *args: calls.append(args)):
        out = layer(torch.full((1, 3, 1, 1), 0.75))
        assert not calls
        torch.testing.assert_close(out, torch.full((1, 3, 1, 1), 0.25), rtol=1e-4, atol=0)
        layer(torch.rand(1, 3, 1, 2))
        layer(torch.rand(2, 3, 1, 1))
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["gn", "ln"])
def test_other_nets_are_left_as_they_are(kind):
    net, images = make_net(kind), make_images(3)
    with torch.no_grad():
        expected = net(images)
        with batch_statistics(net):
            assert torch.equal(net(images), expected)
