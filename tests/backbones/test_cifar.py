import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tta.backbones.cifar import CIFAR_NETS, CifarResNet, GroupNormResNet, WideResNet
from lightning_tta.errors import ConfigError

State = dict[str, Tensor]


def randomised(net: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value, so that no term of the reference can be dropped."""
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            one_sided = name.endswith("running_var") or value.ndim == 1
            value.copy_(noise.abs() * 0.2 + 0.5 if one_sided else noise * 0.2)
    return net.double().eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch_norm(s: State, name: str, x: Tensor) -> Tensor:
    mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def group_norm(s: State, name: str, x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    grouped = x.reshape(b, groups, -1)
    grouped = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return grouped.reshape(b, c, h, w) * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def conv(s: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x.mean((2, 3)) @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def option_a(x: Tensor, planes: int) -> Tensor:
    """Every second pixel of the input in the middle channels of a larger tensor of zeros."""
    if x.shape[1] == planes:
        return x
    out = torch.zeros(x.shape[0], planes, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2, dtype=x.dtype)
    first = (planes - x.shape[1]) // 2
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            out[:, first : first + x.shape[1], row, column] = x[:, :, 2 * row, 2 * column]
    return out


def reference_resnet(s: State, x: Tensor, blocks: int) -> Tensor:
    x = batch_norm(s, "bn1", conv(s, "conv1", x)).relu()
    for stage in (1, 2, 3):
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            out = batch_norm(s, f"{name}.bn1", conv(s, f"{name}.conv1", x, stride)).relu()
            out = batch_norm(s, f"{name}.bn2", conv(s, f"{name}.conv2", out))
            x = (out + option_a(x, out.shape[1])).relu()
    return linear(s, "linear", x)


def reference_group_norm_resnet(s: State, x: Tensor, blocks: int, groups: int) -> Tensor:
    x = conv(s, "conv1", x)
    for stage in (1, 2, 3):
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            out = conv(s, f"{name}.conv1", group_norm(s, f"{name}.bn1", x, groups).relu(), stride)
            out = conv(s, f"{name}.conv2", group_norm(s, f"{name}.bn2", out, groups).relu())
            if stride == 2:
                pooled = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
                x = torch.cat([pooled, torch.zeros_like(pooled)], dim=1)
            x = x + out
    return linear(s, "fc", group_norm(s, "bn", x, groups).relu())


def reference_wide_resnet(s: State, x: Tensor, blocks: int) -> Tensor:
    x = conv(s, "conv1", x)
    for stage in (1, 2, 3):
        for i in range(blocks):
            name = f"block{stage}.layer.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            activated = batch_norm(s, f"{name}.bn1", x).relu()
            out = batch_norm(s, f"{name}.bn2", conv(s, f"{name}.conv1", activated, stride)).relu()
            out = conv(s, f"{name}.conv2", out)
            x = out + (conv(s, f"{name}.convShortcut", activated, stride) if i == 0 else x)
    return linear(s, "fc", batch_norm(s, "bn1", x).relu())


def test_resnet_equals_a_reference_on_public_names() -> None:
    net = randomised(CifarResNet(depth=20, num_classes=7))
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(net(x), reference_resnet(net.state_dict(), x, 3), rtol=1e-9, atol=1e-9)


def test_group_norm_resnet_equals_a_reference_on_public_names() -> None:
    net = randomised(GroupNormResNet(depth=26))
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(
        net(x), reference_group_norm_resnet(net.state_dict(), x, blocks=4, groups=8), rtol=1e-9, atol=1e-9
    )


def test_wide_resnet_equals_a_reference_on_public_names() -> None:
    net = randomised(WideResNet(depth=16, widen_factor=2))
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(net(x), reference_wide_resnet(net.state_dict(), x, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("resnet20", 0.27, 2),  # He et al., table 6
        ("resnet32", 0.46, 2),
        ("resnet44", 0.66, 2),
        ("resnet56", 0.85, 2),
        ("wrn_28_10", 36.5, 1),  # Zagoruyko and Komodakis, table 4
        ("wrn_40_2", 2.2, 1),
        ("resnet26_gn", 0.37, 2),  # the size of the public checkpoint
    ],
)
def test_parameter_count_is_the_papers(name: str, millions: float, digits: int) -> None:
    spec = CIFAR_NETS[name]
    with torch.device("meta"):
        net = spec.build(**spec.fixed)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, digits) == pytest.approx(round(millions, digits))


@pytest.mark.parametrize("name", sorted(CIFAR_NETS))
def test_named_nets_map_images_to_logits(name: str) -> None:
    spec = CIFAR_NETS[name]
    net = spec.build(num_classes=5, in_chans=1, **spec.fixed).eval()
    with torch.no_grad():
        logits = net(torch.rand(2, 1, 16, 16))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_wide_resnet_drops_in_train_mode_only() -> None:
    net = WideResNet(depth=10, widen_factor=1, drop_rate=0.5)
    x = torch.rand(4, 3, 16, 16)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(("build", "depth"), [(CifarResNet, 21), (GroupNormResNet, 7), (WideResNet, 29)])
def test_impossible_depth_is_refused(build: type[nn.Module], depth: int) -> None:
    with pytest.raises(ConfigError, match="depth"):
        build(depth=depth)


def test_groups_must_divide_the_first_width() -> None:
    with pytest.raises(ConfigError, match="groups must divide 16"):
        GroupNormResNet(groups=6)
