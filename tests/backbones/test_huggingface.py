"""Image classifiers of transformers, from a folder as save_pretrained writes it, without network."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_tta import ConfigError, SourceClassifier, WeightsError, create_backbone
from lightning_tta.modules.loading import load_source

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic",
        id2label={0: "cat", 1: "dog", 2: "owl"},
    )  # fmt: skip
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    recipe = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True, "do_rescale": True}
    recipe |= {"rescale_factor": 1 / 255, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**recipe, "do_center_crop": True, "resample": 3}))
    return folder


def test_a_folder_brings_weights_normalisation_and_names(folder):
    net = create_backbone(f"hf/{folder}")
    assert all(module.training for module in net.modules())  # fit trains its BatchNorm
    net.eval()
    assert (net.num_classes, net.class_names, net.pretrained) == (3, ["cat", "dog", "owl"], True)
    expected = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.8}
    assert net.preprocessing == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], **expected}
    images = torch.rand(2, 3, 32, 32)
    plain = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    torch.testing.assert_close(net(images), plain((images - mean) / std).logits)
    assert torch.equal(load_source(None, f"transformers/{folder}").eval()(images), net(images))


def test_its_checkpoint_needs_no_folder(folder, tmp_path, monkeypatch):
    model = SourceClassifier(f"hf/{folder}", 3)
    config = json.loads(json.dumps(model.backbone.config))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("the folder was read"))
    again = create_backbone(**config)
    again.load_state_dict(model.backbone.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.backbone.eval()(images))
    assert (again.preprocessing["mean"], again.class_names) == ([0.1, 0.2, 0.3], ["cat", "dog", "owl"])


def test_another_number_of_classes_is_said(folder):
    with pytest.warns(UserWarning, match="weights for 3 classes; the classifier for 7 is random"):
        net = create_backbone(f"hf/{folder}", 7)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("recipe", "mean", "std"),
    [
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [51.0]}, 0.5, 0.2),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0], "image_std": [1.0]}, 0.5, 0.5),
    ],
)
def test_recipes_in_other_units(folder, tmp_path, recipe, mean, std):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe))
    net = create_backbone(f"hf/{tmp_path}")
    assert net.preprocessing["mean"] == pytest.approx([mean] * 3)
    assert net.preprocessing["std"] == pytest.approx([std] * 3)


def test_what_is_missing_is_said(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.warns(UserWarning, match=r"With which mean and std was hf/.* trained"):
        create_backbone(f"hf/{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, WeightsError), match="empty"):
        create_backbone(f"hf/{tmp_path}/empty")
    with pytest.raises(ConfigError, match=r"has no option 'hiden_act'. Did you mean hidden_act"):
        create_backbone(f"hf/{folder}", hiden_act="gelu")


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def test_code_of_a_folder_is_neither_run_nor_asked_about(copied, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"}
    (copied / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (copied / "evil.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match="needs code of its own, which is not run"):
        create_backbone(f"hf/{copied}")


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_weights_that_hold_code(copied, capsys):
    (copied / "model.safetensors").unlink()
    torch.save({"x": Code()}, copied / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"code would have to run.*safetensors"):
        create_backbone(f"hf/{copied}")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("preprocessor_config.json", '{"image_mean": [', r"preprocessor_config.json is no JSON"),
        ("preprocessor_config.json", '{"image_mean": [0.5]}', "image_mean and image_std or neither"),
        ("model.safetensors", "cut", "cannot be read"),
    ],
)
def test_damaged_files_of_a_folder(copied, file, text, words):
    (copied / file).write_text(text)
    with pytest.raises(WeightsError, match=words):
        create_backbone(f"hf/{copied}")


def test_a_backbone_without_its_classifier(copied):
    state = load_file(copied / "model.safetensors")
    save_file({name: value for name, value in state.items() if "classifier" not in name}, copied / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.warns(UserWarning, match=r"has no weights for classifier.1.bias, classifier.1.weight: they are random"):
        create_backbone(f"hf/{copied}")


def test_random_weights_are_not_promised(folder):
    with pytest.raises(ConfigError, match=r"comes with its weights: leave source_ckpt='none' out"):
        load_source("none", f"hf/{folder}")
