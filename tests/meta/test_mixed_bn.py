"""Mixed batch norm against the formula in float64, and against torch's own BatchNorm at its limits."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, UnsupportedModelError
from lightning_tta.backbones.norms import batch_statistics, norm_parameters
from lightning_tta.meta.mixed_bn import (
    MixedBatchNorm,
    batch_of_domains,
    convert_mixed_bn,
    make_mixed_layers,
    mixed_batch_norm_layers,
    mixed_layers,
)
from nets import make_images, make_net, max_difference, norm_weights, same

pytestmark = pytest.mark.usefixtures("one_thread")


def make_norm(channels=4, kind=nn.BatchNorm2d, **options):
    norm = kind(channels, **options).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def mixture(x, norm, w):
    """The moments of a mixture, w source and 1 - w batch, from E[x^2] - E[x]^2, then the affine map."""
    dims = [0, *range(2, x.ndim)]
    count = x.numel() / x.shape[1]
    mean_t = x.sum(dims) / count
    var_t = ((x - mean_t.view(1, -1, *[1] * (x.ndim - 2))) ** 2).sum(dims) / (count - 1)
    mean = w * norm.running_mean + (1 - w) * mean_t
    second = w * (norm.running_var + norm.running_mean**2) + (1 - w) * (var_t + mean_t**2)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - mean.view(shape)) / (second - mean**2 + norm.eps).sqrt().view(shape)
    return y * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else y


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "size"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (3, 4, 5, 2)), (nn.BatchNorm3d, (2, 4, 2, 3, 2))]
)
@pytest.mark.parametrize("parametrization", ["raw", "sigmoid"])
def test_is_the_mixture(kind, size, affine, parametrization):
    norm = make_norm(kind=kind, affine=affine)
    layer = MixedBatchNorm(norm, 0.6, 0.2, parametrization)
    w = layer.source_weight.detach()
    w = 1 / (1 + (-w).exp()) if parametrization == "sigmoid" else w
    assert w.std() > 0.02
    x = torch.randn(size, dtype=torch.float64) * 2 + 1
    assert max_difference(layer(x), mixture(x, norm, w)) < 1e-12
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_gradients():
    layer = MixedBatchNorm(make_norm(), 0.6, 0.1)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = [layer.weight, layer.bias, layer.source_weight]

    def run(x, weight, bias, source_weight):
        return torch.func.functional_call(layer, dict(weight=weight, bias=bias, source_weight=source_weight), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_weight_on_the_source_is_eval_mode(dtype):
    net, images = make_net("bn").to(dtype), make_images(5, dtype=dtype)
    expected = net(images)
    convert_mixed_bn(net, 1.0)
    assert max_difference(net(images), expected) < 20 * torch.finfo(dtype).eps * expected.abs().max()


def test_no_weight_on_the_source_is_unbiased_batch_statistics():
    net, images = make_net("bn").double(), make_images(5, dtype=torch.float64)
    with batch_statistics(net):
        biased = net(images)
    convert_mixed_bn(net, 0.0)
    assert 0 < max_difference(net(images), biased) < 0.2  # n / (n - 1) of 320 and 80 values a channel
    norm = make_norm()
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    expected = nn.functional.batch_norm(
        x, x.mean((0, 2, 3)), x.var((0, 2, 3)), norm.weight, norm.bias, training=False, eps=norm.eps
    )
    assert max_difference(MixedBatchNorm(norm, 0.0)(x), expected) < 1e-12


def test_source_statistics_never_move():
    net = convert_mixed_bn(make_net("user")).train()
    before = copy.deepcopy({k: v for k, v in net.state_dict().items() if "running" in k or "num_batches" in k})
    net(make_images(4))
    assert same({k: v for k, v in net.state_dict().items() if k in before}, before)


@pytest.mark.parametrize("kind", ["bn", "user"])
def test_conversion_adds_the_mixing_weights_and_nothing_else(kind):
    net, images = make_net(kind), make_images(4)
    parameters = dict(net.named_parameters())
    state, expected = copy.deepcopy(net.state_dict()), net(images)
    assert convert_mixed_bn(net) is net
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert set(net.state_dict()) == {*state, *(f"{n}.source_weight" for n in mixed_batch_norm_layers(net))}
    assert same({name: net.state_dict()[name] for name in state}, state)
    assert all(net.get_parameter(name) is parameter for name, parameter in parameters.items())
    with torch.no_grad():
        assert not torch.equal(net(images), expected)


def test_a_lone_layer_comes_back_as_a_new_module():
    assert isinstance(convert_mixed_bn(make_norm()), MixedBatchNorm)


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(3)
    net = nn.Sequential(norm, nn.ReLU(), norm)
    convert_mixed_bn(net)
    assert net[0] is net[2]
    assert isinstance(net[0], MixedBatchNorm)


def test_stands_in_only_while_active():
    net, images = make_net("bn"), make_images(4)
    expected = net(images)
    layers = make_mixed_layers(net, 0.5)
    mixed = convert_mixed_bn(make_net("bn"), 0.5)(images)
    with mixed_layers(net, layers):
        assert torch.equal(net(images), mixed)
    with pytest.raises(RuntimeError), mixed_layers(net, layers):
        net(images[:, :2])
    assert torch.equal(net(images), expected)
    net.double()
    for layer in layers.values():
        layer.double()
    with mixed_layers(net, layers):
        assert max_difference(net(images.double()).float(), mixed) < 1e-5


@pytest.mark.parametrize("domains", [1, 2, 3])
def test_domains_have_their_own_statistics_and_parameters(domains):
    net = convert_mixed_bn(make_net("bn").double(), 0.6, 0.1)
    images = make_images(12, dtype=torch.float64)
    own = []
    for number in range(domains):
        torch.manual_seed(number)
        names = [*norm_parameters(net), *(f"{n}.source_weight" for n in mixed_batch_norm_layers(net))]
        own.append({name: net.get_parameter(name) + 0.1 * torch.randn(()) for name in names})
    with batch_of_domains(net, domains):
        stacked = {name: torch.stack([values[name] for values in own]) for name in own[0]}
        together = torch.func.functional_call(net, stacked, (images,))
    apart = [torch.func.functional_call(net, own[d], (part,)) for d, part in enumerate(images.chunk(domains))]
    assert max_difference(together, torch.cat(apart)) < 1e-12
    assert all(layer.domains == 1 for layer in mixed_batch_norm_layers(net).values())


def test_one_value_a_channel_uses_the_source():
    norm = make_norm(kind=nn.BatchNorm1d)
    x = torch.randn(1, 4, dtype=torch.float64)
    assert max_difference(MixedBatchNorm(norm, 0.3)(x), norm(x)) < 1e-12


def test_raw_weights_outside_the_interval_stay_finite():
    layer = MixedBatchNorm(make_norm(), 1.0)
    layer.source_weight.data.fill_(3.0)
    x = 100 + torch.randn(4, 4, 3, 3, dtype=torch.float64)
    assert torch.isfinite(layer(x)).all()


def test_only_the_input_is_kept_for_backward():
    def kept(layer, x):
        sizes = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.__setitem__(t.untyped_storage().data_ptr(), t.numel()) or t, lambda t: t
        )
        with hooks:
            y = layer(x)
        return sum(size for size in sizes.values() if size >= x.numel()), y

    norm = make_norm(8, track_running_stats=True)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    ours, _ = kept(MixedBatchNorm(norm), x)
    theirs, _ = kept(norm.train(), x)
    assert ours == theirs == x.numel()


def test_fused_activation():
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(4, act_layer=nn.SiLU).double().eval()
    norm.running_mean.normal_()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = norm(x)
    assert max_difference(convert_mixed_bn(norm, 1.0)(x), expected) < 1e-12


def test_tent_leaves_the_mixing_weights_alone():
    net = convert_mixed_bn(make_net("bn"))
    assert set(norm_parameters(net)) == set(norm_weights(make_net("bn")))


class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (make_net("gn"), "no BatchNorm layer"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)), "'1'.*running statistics"),
        (nn.Sequential(Odd(3)), "forward of its own"),
    ],
)
def test_nets_that_cannot_be_converted(net, words):
    before = list(net.modules())
    with pytest.raises(UnsupportedModelError, match=words):
        convert_mixed_bn(net)
    assert list(net.modules()) == before


@pytest.mark.parametrize(
    "options",
    [
        {"source_weight": 1.2},
        {"std": -0.1},
        {"parametrization": "clamp"},
        {"source_weight": 1.0, "parametrization": "sigmoid"},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ConfigError, match=r"must be|cannot be reached"):
        convert_mixed_bn(make_net("bn"), **options)


def test_a_batch_that_does_not_divide():
    net = convert_mixed_bn(make_net("bn"))
    with batch_of_domains(net, 3), pytest.raises(ConfigError, match="multiple of its 3 domains"):
        net(make_images(4))
