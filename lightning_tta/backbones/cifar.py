"""The small nets of the CIFAR literature, with the parameter names of their public checkpoints.

Input: images (B, C, H, W), normalised by the caller (32 x 32 in the papers; any size from 8 x 8 works, the last
pooling is global). Output: logits (B, num_classes).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tta.errors import ConfigError, check_range


def _conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


def _stage(
    block: Callable[[int, int, int], nn.Module], n: int, in_planes: int, planes: int, stride: int
) -> nn.Sequential:
    """``n`` blocks, called with (in_planes, planes, stride); the first changes the width and has the stride."""
    return nn.Sequential(*(block(planes if i else in_planes, planes, 1 if i else stride) for i in range(n)))


def _blocks_per_stage(depth: int, layers: int, extra: int) -> int:
    """Solve ``depth = layers * n + extra`` for a whole number ``n`` of blocks, or raise :class:`ConfigError`."""
    check_range("depth", depth, low=layers + extra, integer=True)
    if (depth - extra) % layers:
        raise ConfigError(f"depth must be {layers} n + {extra} for a whole number n of blocks a stage; got {depth}.")
    return (depth - extra) // layers


def _initialize(net: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """He initialisation of the convolutions; norm layers start as the identity, the classifier's bias at zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class _BasicBlock(nn.Module):
    """Two convolutions, post-activation; option-A shortcut: every ``stride``-th pixel, zeros in the new channels."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn1, self.act1 = nn.BatchNorm2d(planes), nn.ReLU()
        self.conv2 = _conv3x3(planes, planes)
        self.bn2, self.act2 = nn.BatchNorm2d(planes), nn.ReLU()
        self.stride, new_planes = stride, planes - in_planes
        self.zeros = (0, 0, 0, 0, new_planes // 2, new_planes - new_planes // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        activated: Tensor = self.act2(out + F.pad(x[:, :, :: self.stride, :: self.stride], self.zeros))
        return activated


class CifarResNet(nn.Module):
    """ResNet-20/32/44/56 with BatchNorm and parameter-free option-A shortcuts (He et al. 2016, arXiv 1512.03385, 4.2).

    Args:
        depth: Number of weight layers, 6 n + 2.
        num_classes: Number of logits K.
        in_chans: Channels of the input.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        n = _blocks_per_stage(depth, 6, 2)
        self.conv1 = _conv3x3(in_chans, 16)
        self.bn1, self.act1 = nn.BatchNorm2d(16), nn.ReLU()
        self.layer1 = _stage(_BasicBlock, n, 16, 16, 1)
        self.layer2 = _stage(_BasicBlock, n, 16, 32, 2)
        self.layer3 = _stage(_BasicBlock, n, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)
        _initialize(self, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x = self.act1(self.bn1(self.conv1(x)))
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))
        return logits


class _GroupNormBlock(nn.Module):
    """Norm, ReLU, convolution, twice; shortcut: average pooling by ``stride``, zeros behind the old channels."""

    def __init__(self, in_planes: int, planes: int, stride: int, groups: int) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.GroupNorm(groups, in_planes), nn.ReLU()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn2, self.act2 = nn.GroupNorm(groups, planes), nn.ReLU()
        self.conv2 = _conv3x3(planes, planes)
        self.stride, self.zeros = stride, (0, 0, 0, 0, 0, planes - in_planes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.act2(self.bn2(self.conv1(self.act1(self.bn1(x))))))
        return out + F.pad(F.avg_pool2d(x, self.stride) if self.stride > 1 else x, self.zeros)


class GroupNormResNet(nn.Module):
    """Pre-activation ResNet with GroupNorm, as in test-time training and MEMO (arXiv 1909.13231, 2110.09506).

    Args:
        depth: Number of weight layers, 6 n + 2; 26 in the papers.
        num_classes: Number of logits K.
        in_chans: Channels of the input.
        groups: Groups of each GroupNorm, a divisor of 16 (the width of the first stage).
    """

    def __init__(self, depth: int = 26, num_classes: int = 10, in_chans: int = 3, groups: int = 8) -> None:
        super().__init__()
        n = _blocks_per_stage(depth, 6, 2)
        check_range("groups", groups, low=1, high=16, integer=True)
        if 16 % groups:
            raise ConfigError(f"groups must divide 16, the channels of the first stage; got {groups}.")
        self.conv1 = _conv3x3(in_chans, 16)
        block = partial(_GroupNormBlock, groups=groups)
        self.layer1 = _stage(block, n, 16, 16, 1)
        self.layer2 = _stage(block, n, 16, 32, 2)
        self.layer3 = _stage(block, n, 32, 64, 2)
        self.bn, self.act = nn.GroupNorm(groups, 64), nn.ReLU()
        self.fc = nn.Linear(64, num_classes)
        _initialize(self, "fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(self.act(self.bn(x)).mean(dim=(2, 3)))
        return logits


class _WideBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; a 1 x 1 convolution of the activated input where the width changes."""

    def __init__(self, in_planes: int, planes: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(in_planes), nn.ReLU()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn2, self.act2 = nn.BatchNorm2d(planes), nn.ReLU()
        self.conv2 = _conv3x3(planes, planes)
        self.dropout = nn.Dropout(drop_rate)
        changes = in_planes != planes or stride != 1
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        out: Tensor = self.conv2(self.dropout(self.act2(self.bn2(self.conv1(activated)))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(nn.Module):
    """Wide ResNet, WRN-``depth``-``widen_factor``, with BatchNorm (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

    Args:
        depth: Number of weight layers, 6 n + 4.
        widen_factor: Width of the stages in units of (16, 32, 64) channels.
        num_classes: Number of logits K.
        in_chans: Channels of the input.
        drop_rate: Dropout probability between the two convolutions of a block, in [0, 1].
    """

    def __init__(
        self, depth: int = 28, widen_factor: int = 10, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        n = _blocks_per_stage(depth, 6, 4)
        check_range("widen_factor", widen_factor, low=1, integer=True)
        check_range("drop_rate", drop_rate, low=0, high=1)
        width = 16 * widen_factor
        self.conv1 = _conv3x3(in_chans, 16)
        block = partial(_WideBlock, drop_rate=drop_rate)
        self.block1 = nn.Sequential(OrderedDict(layer=_stage(block, n, 16, width, 1)))
        self.block2 = nn.Sequential(OrderedDict(layer=_stage(block, n, width, 2 * width, 2)))
        self.block3 = nn.Sequential(OrderedDict(layer=_stage(block, n, 2 * width, 4 * width, 2)))
        self.bn1, self.act1 = nn.BatchNorm2d(4 * width), nn.ReLU()
        self.fc = nn.Linear(4 * width, num_classes)
        _initialize(self, "fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(self.act1(self.bn1(x)).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class CifarNet:
    """A named net: its class, the arguments that the name fixes, and the mean and std its checkpoints expect."""

    build: Callable[..., nn.Module]
    fixed: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # akamaster's CIFAR nets use these too

CIFAR_NETS: dict[str, CifarNet] = {
    **{f"resnet{depth}": CifarNet(CifarResNet, {"depth": depth}, **_IMAGENET) for depth in (20, 32, 44, 56)},
    "resnet26_gn": CifarNet(GroupNormResNet, {}, mean=(0.5,), std=(0.5,)),
    # RobustBench's "Standard" WRN-28-10 takes pixels in [0, 1] as they are; AugMix's WRN-40-2 a mean and std of 0.5.
    "wrn_28_10": CifarNet(WideResNet, {"depth": 28, "widen_factor": 10}),
    "wrn_40_2": CifarNet(WideResNet, {"depth": 40, "widen_factor": 2}, mean=(0.5,), std=(0.5,)),
}
