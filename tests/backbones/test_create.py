import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from lightning_tta.backbones import Backbone, create_backbone, list_backbones, state_digest
from lightning_tta.errors import ConfigError, DataError, UnsupportedModelError, WeightsError

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# The backbone


def test_pixels_are_normalised_channel_by_channel() -> None:
    backbone = Backbone(nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    images = torch.tensor([0.6, 0.7, 0.9]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    expected = torch.tensor([1.0, 2.0, 0.3]).view(1, 3, 1, 1).expand(2, 3, 4, 5)  # (0.6 - 0.1) / 0.5, ...
    torch.testing.assert_close(backbone(images), expected)


def test_pixels_are_normalised_in_the_nets_precision() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, 3, 8, 8))
    pixels = torch.rand(2, 3, 8, 8).bfloat16()
    logits = Backbone(net.bfloat16(), [0.5], [0.25])(pixels)
    assert torch.equal(logits, net((pixels - 0.5) / 0.25))


def test_a_single_value_serves_every_channel() -> None:
    backbone = Backbone(nn.Identity(), (0.5,), (0.25,), in_chans=2)
    assert backbone.mean.shape == backbone.std.shape == (1, 2, 1, 1)
    torch.testing.assert_close(backbone(torch.ones(1, 2, 3, 3)), torch.full((1, 2, 3, 3), 2.0))


def test_state_dict_is_the_nets_behind_a_prefix() -> None:
    backbone = create_backbone("cifar/resnet20")
    assert list(backbone.state_dict()) == [f"net.{name}" for name in backbone.net.state_dict()]
    backbone.double()
    assert backbone.mean.dtype == torch.float64  # yet the buffers follow the module


@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)],
    ids=["no batch", "channels", "integers"],
)
def test_other_than_pixel_batches_are_refused(images: Tensor) -> None:
    with pytest.raises(DataError, match=r"float images \(B, 3, H, W\) in \[0, 1\]; got torch"):
        Backbone(nn.Identity(), (0.5,), (0.5,))(images)


def test_a_net_without_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UnsupportedModelError, match="tuple"):
        Backbone(Pair(), (0.5,), (0.5,))(torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ((0.5, 0.5), (0.5,), "mean must be a list of 1 or 3"),
        ((0.5,), (0.5, 0.0, 0.5), "std must be a number in"),
        ((float("nan"),), (0.5,), "mean must be a number"),
        ((0.5,), (float("inf"),), "std must be a number in"),
        (0.5, (0.5,), "mean must be a list"),
        ((127.5,), (127.5,), "Divide mean and std by 255"),
        ((0.4, 123.7, 0.4), (0.2,), "mean is that of pixels in"),
    ],
)
def test_wrong_mean_or_std_is_refused(mean: Any, std: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Backbone(nn.Identity(), mean, std)
    with pytest.raises(ConfigError, match=says):
        create_backbone("cifar/resnet20", mean=mean, std=std)


def test_info_follows_the_values() -> None:
    backbone = create_backbone("cifar/resnet20", 4)
    info = backbone.info
    assert info == {
        "name": "cifar/resnet20",
        "num_classes": 4,
        "pretrained": False,
        "weights": "random",
        "digest": state_digest(backbone),
    }
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    assert backbone.info["digest"] != info["digest"]


# Building by name


@pytest.mark.parametrize(
    ("name", "num_classes", "options"),
    [
        ("timm/test_resnet", 4, {}),
        ("timm/test_vit", 4, {"img_size": 32}),
        ("timm/test_efficientnet_gn", None, {"in_chans": 1, "mean": [0.5], "std": [0.25]}),
        ("torchvision/shufflenet_v2_x0_5", 4, {"mean": [0.1, 0.2, 0.3]}),
        ("cifar/resnet26_gn", 4, {"depth": 8, "groups": 4}),
    ],
)
def test_config_rebuilds_the_same_net(name: str, num_classes: int | None, options: dict[str, Any]) -> None:
    first = create_backbone(name, num_classes, **options).eval()
    config = json.loads(json.dumps(first.config))
    second = create_backbone(**config).eval()
    assert second.config == first.config
    assert second.preprocessing == first.preprocessing
    second.load_state_dict(first.state_dict(), strict=True)
    images = torch.rand(2, options.get("in_chans", 3), 32, 32)
    with torch.no_grad():
        logits = first(images)
        assert logits.shape == (2, num_classes or 1000)
        assert torch.equal(second(images), logits)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar/resnet20", *IMAGENET),
        ("cifar/resnet26_gn", [0.5] * 3, [0.5] * 3),
        ("cifar/wrn_40_2", [0.5] * 3, [0.5] * 3),
        ("torchvision/squeezenet1_1", *IMAGENET),
    ],
)
def test_default_normalisation_is_the_families(name: str, mean: list[float], std: list[float]) -> None:
    preprocessing = create_backbone(name).preprocessing
    assert (preprocessing["mean"], preprocessing["std"]) == (mean, std)


def test_timm_normalisation_is_its_pretrained_cfg() -> None:
    backbone = create_backbone("timm/test_vit", img_size=32)
    cfg = timm.get_pretrained_cfg("test_vit")
    assert cfg is not None
    assert backbone.preprocessing == {
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "input_size": [3, 32, 32],
        "interpolation": cfg.interpolation,
        "crop_pct": cfg.crop_pct,
    }
    assert tuple(cfg.mean) != tuple(IMAGENET[0])  # else this test could not tell


@pytest.mark.parametrize("name", ["wrn_40_2", "test_resnet", "shufflenet_v2_x0_5"])
def test_a_bare_name_of_one_family_is_enough(name: str) -> None:
    families = [f for f in ("cifar", "torchvision", "timm") if f"{f}/{name}" in list_backbones(f)]
    assert [create_backbone(name).name] == [f"{family}/{name}" for family in families]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet50", "ambiguous; say which: torchvision/resnet50, timm/resnet50"),
        ("cifar/resnet21", "Unknown backbone 'cifar/resnet21'; similar: .*cifar/resnet20"),
        ("tset_resnet", "similar: .*timm/test_resnet"),
        ("keras/resnet50", "Unknown family 'keras'.*cifar, torchvision, timm"),
        ("", "Unknown backbone"),
        ("timm/test_resnet.no_such_tag", "no_such_tag"),
    ],
)
def test_wrong_names_get_suggestions(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        create_backbone(name)


def test_list_backbones_covers_all_families() -> None:
    everything = list_backbones()
    assert {"cifar/resnet20", "torchvision/resnet50", "timm/test_resnet"} <= set(everything)
    assert list_backbones("cifar") == [name for name in everything if name.startswith("cifar/")]
    with pytest.raises(ConfigError, match="family"):
        list_backbones("keras")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "cifar/resnet20", "num_classes": 0}, "num_classes"),
        ({"name": "cifar/resnet20", "depth": 32}, "depth"),
        ({"name": "cifar/resnet20", "colour": 1}, "colour"),
        ({"name": "timm/test_resnet", "img_size": 32}, "img_size=32.*unexpected keyword"),
        ({"name": "timm/test_resnet", "norm_layer": nn.BatchNorm2d}, "norm_layer must be a primitive"),
        ({"name": "timm/test_resnet", "pretrained": True, "weights": "w.pt"}, "either pretrained=True or weights="),
        ({"name": "cifar/resnet20", "pretrained": True}, "no weights to download"),
        ({"name": "cifar/resnet20", "in_chans": 1}, "takes 1 channels, but its own mean has 3"),
        ({"name": "torchvision/resnet18", "weights": "IMAGENET1K_V9"}, "IMAGENET1K_V9.*IMAGENET1K_V1"),
        ({"name": "torchvision/resnet18", "weights": "DEFAULT", "num_classes": 5}, "1000 classes, not 5"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        create_backbone(**arguments)


@pytest.mark.parametrize("name", ["cifar/wrn_40_2", "timm/test_resnet", "torchvision/resnet18"])
def test_a_missing_file_is_named_before_the_net_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda *_, **__: pytest.fail("the net was built"))
    with pytest.raises(WeightsError, match=r"no/such/file\.pt does not exist"):
        create_backbone(name, weights="no/such/file.pt")


# Weights


def test_weights_file_is_loaded_and_named(tmp_path: Path) -> None:
    original = create_backbone("timm/test_resnet", 4)
    torch.save({"state_dict": {f"model.{k}": v for k, v in original.state_dict().items()}}, tmp_path / "source.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = create_backbone("timm/test_resnet", 4, weights=tmp_path / "source.ckpt", mean=[0.1], std=[0.2])
    assert loaded.info == {**original.info, "weights": "source.ckpt"}
    with pytest.raises(WeightsError, match="num_classes=4"):
        create_backbone("timm/test_resnet", 5, weights=tmp_path / "source.ckpt")


def test_timm_pretrained_weights_bring_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model
    seen: dict[str, Any] = {}

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        seen.update(name=name, pretrained=pretrained)
        return build(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    backbone = create_backbone("timm/test_resnet", pretrained=True)
    assert seen == {"name": "test_resnet", "pretrained": True}
    assert backbone.info["pretrained"] is True
    assert backbone.info["weights"] == "r160_in1k"
    with pytest.warns(UserWarning, match=r"mean=\[0\.485, 0\.456, 0\.406\] differs from the mean \[0\.5, 0\.5, 0\.5\]"):
        create_backbone("timm/test_resnet", pretrained=True, mean=IMAGENET[0], std=[0.5])


@pytest.mark.parametrize("arguments", [{"weights": "IMAGENET1K_V1"}, {"pretrained": True}])
def test_torchvision_weights_by_enum(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    published = models.shufflenet_v2_x0_5()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: published.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = create_backbone("torchvision/shufflenet_v2_x0_5", **arguments)
    assert state_digest(backbone.net) == state_digest(published)
    assert backbone.info["weights"] == "IMAGENET1K_V1"
    assert backbone.preprocessing == {
        "mean": IMAGENET[0],
        "std": IMAGENET[1],
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }
    with pytest.warns(UserWarning, match=r"std=\[0\.5\] differs"):
        create_backbone("torchvision/shufflenet_v2_x0_5", **arguments, std=[0.5])


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(WeightsError, match=r"cannot be fetched.*no network.*give the file as weights="):
        create_backbone("torchvision/shufflenet_v2_x0_5", pretrained=True)


def test_import_leaves_timm_and_torchvision_alone() -> None:
    code = "import sys, lightning_tta.backbones; print([m for m in ('timm', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
