"""Which norm layers count as the last ones, in nets of several shapes."""

import pytest
from torch import nn

from lightning_tta import ConfigError
from lightning_tta.backbones.norms import early_norm_parameters


class Stages(nn.Module):
    """A stem, four stages of several norm layers, a final norm: the shape of most pyramids."""

    def __init__(self):
        super().__init__()
        self.stem = nn.BatchNorm2d(3)
        for i in range(4):
            setattr(self, f"s{i}", nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(i + 2))))
        self.last = nn.BatchNorm2d(3)


class Blocks(nn.Module):
    """Blocks in a list, a final norm: the shape of a ViT, in a wrapper."""

    def __init__(self, count):
        super().__init__()
        self.inside = nn.Module()
        self.inside.stack = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)) for _ in range(count))
        self.inside.last = nn.LayerNorm(4)


def frozen_layers(net, fraction):
    free = {name.rpartition(".")[0] for name in early_norm_parameters(net, fraction)}
    return [n for n, m in net.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) and n not in free]


def test_last_parts_are_frozen():
    assert frozen_layers(Stages(), 0.25) == [*(f"s3.{i}.0" for i in range(5)), "last"]
    assert frozen_layers(Stages(), 0.5) == [*(f"s2.{i}.0" for i in range(4)), *frozen_layers(Stages(), 0.25)]
    assert frozen_layers(Stages(), 0.26) == frozen_layers(Stages(), 0.5)
    assert frozen_layers(Stages(), 0.0) == []
    assert len(frozen_layers(Stages(), 1.0)) == 3 + 4 + 5 + 1  # never the first part, nor what is before it
    twelve = [f"inside.stack.{i}.{j}" for i in (9, 10, 11) for j in (0, 1)]
    assert frozen_layers(Blocks(12), 0.25) == [*twelve, "inside.last"]
    assert frozen_layers(Blocks(1), 1.0) == ["inside.stack.0.1", "inside.last"]
    assert len(frozen_layers(Blocks(10), 0.1)) == 3


@pytest.mark.parametrize(
    ("name", "frozen", "free"),
    [
        ("resnet50", "layer4", "layer3"),
        ("vit_tiny_patch16_224", ("blocks.9", "blocks.10", "blocks.11", "norm"), "blocks"),
        ("convnext_atto", ("stages.3", "head"), "stages.2"),
        ("swin_tiny_patch4_window7_224", ("layers.3", "norm"), "layers.2"),
    ],
)
def test_the_same_layers_as_the_authors_name(name, frozen, free):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name).to("meta")  # not made there: timm 1.0.20 reads numbers from tensors
    layers = {n for n, m in net.named_modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")}
    adapted = {n.rpartition(".")[0] for n in early_norm_parameters(net, 0.25)}
    assert layers - adapted == {n for n in layers if n.startswith(frozen)}
    assert any(n.startswith(free) for n in adapted)


def test_fraction_out_of_range():
    for fraction in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="frozen_fraction"):
            early_norm_parameters(Blocks(2), fraction)


def test_parts_are_those_with_something_to_learn():
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    assert set(early_norm_parameters(net, 0.5)) == {"2.weight", "2.bias"}
    assert set(early_norm_parameters(net[:3], 0.25)) == {"2.weight", "2.bias"}
