"""Source weights: damaged ones are refused, names of classes come along."""

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from lightning_tta import ConfigError, DataError, SourceClassifier, TestTimeAdaptation, WeightsError, create_backbone
from lightning_tta.data import ImageFolderData
from lightning_tta.methods import Tent
from lightning_tta.modules.classes import check_class_counts, count_logits
from lightning_tta.modules.loading import load_source

pytestmark = pytest.mark.usefixtures("one_thread")
NET = ("cifar/resnet26_gn", 5)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of an untrained SourceClassifier with names of classes, and its content."""
    model = SourceClassifier(*NET, backbone_options={"depth": 8})
    model.backbone.class_names = list("abcde")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


def change(path, name, value):
    content = torch.load(path, weights_only=True)
    content["state_dict"][name].view(-1)[0] = value
    torch.save(content, path)


def test_names_of_classes_come_with_the_checkpoint(checkpoint):
    assert load_source(str(checkpoint)).class_names == list("abcde")
    module = TestTimeAdaptation(
        lambda net: __import__("lightning_tta").adapt(net, "source"), str(checkpoint), classes=[3, 1]
    )
    assert module.class_names == ["d", "b"]


def test_one_changed_value_is_seen(checkpoint):
    change(checkpoint, "backbone.net.conv1.weight", 0.125)
    with pytest.raises(WeightsError, match=r"are not those that were saved .* damaged"):
        load_source(str(checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(checkpoint, tmp_path, value):
    change(checkpoint, "backbone.net.conv1.weight", value)
    with pytest.raises(WeightsError, match=r"NaN or infinite values in 1 of \d+ tensors: conv1.weight"):
        load_source(str(checkpoint))
    net = create_backbone(*NET, depth=8)
    before = net.net.fc.bias.clone()
    state = {**net.net.state_dict(), "fc.bias": torch.full((5,), value)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"fc.bias"):
        load_source(str(tmp_path / "w.pt"), net)
    assert torch.equal(net.net.fc.bias, before)


def test_options_that_have_a_place_of_their_own():
    with pytest.raises(ConfigError, match=r"backbone_options must not have 'num_classes'.*--model.num_classes"):
        SourceClassifier("cifar/resnet20", backbone_options={"num_classes": 3})


def test_classes_and_logits(recwarn):
    check_class_counts(["a", "b"], 2, ["a", "b"])
    check_class_counts(["a", "b"], None)
    check_class_counts([], 2)
    assert not recwarn
    with pytest.raises(ConfigError, match=r"12 classes, 5 logits.*Classes: 0, 1, 2, 3, 4, ... and 7 more; .*: 5, 6, 7"):
        check_class_counts([str(n) for n in range(12)], 5)
    with pytest.warns(UserWarning, match=r"2 classes, 4 logits: .* \(c, d\)"):
        check_class_counts(["a", "b"], 4, list("abcd"))
    with pytest.warns(UserWarning, match=r"2 classes, 4 logits: .* all classes of the net: --data.classes 4\.$"):
        check_class_counts(["a", "b"], 4, of_pixels=True)
    with pytest.warns(UserWarning, match="label 0 is 'b' in the data and 'a' in the net, so the accuracy is wrong"):
        check_class_counts(["b", "c"], 3, list("abc"))


def test_logits_are_counted_where_they_can_be():
    one = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    assert count_logits(one) == 3
    assert count_logits(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))) is None
    assert count_logits(create_backbone("cifar/resnet20", 7)) == 7


@pytest.mark.parametrize(
    "entry",
    ["x", {"backbone": "cifar/resnet20"}, {"backbone": {"depth": 8}}, {"backbone": {"name": 5}}, {"class_names": 5},
     {"backbone": {"name": "cifar/resnet20", "weights": "w.pt"}}, {"mixed_bn": 3, "meta_ttt": {}}],
)  # fmt: skip
def test_a_checkpoint_that_was_changed_by_hand(checkpoint, entry):
    content = torch.load(checkpoint, weights_only=True)
    given = {**content["lightning_tta"], **entry} if isinstance(entry, dict) else entry
    torch.save({**content, "lightning_tta": given}, checkpoint)
    with pytest.raises(WeightsError, match="its entry 'lightning_tta' is not as SourceClassifier writes it"):
        load_source(str(checkpoint))


def test_a_label_of_ones_own_images_without_a_logit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text("5.png,3\n")
    data = ImageFolderData(str(tmp_path), labels="labels.csv", batch_size=2)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    module = TestTimeAdaptation(Tent, None, net)
    with pytest.raises(DataError, match="label 3, but the net has 3 logits"):
        Trainer(accelerator="cpu", enable_progress_bar=False).predict(module, data)
    assert not [*tmp_path.rglob("predictions.csv")]


@pytest.mark.parametrize("net_says", [True, False], ids=["before the stream", "with the logits"])
def test_a_label_that_the_net_has_no_logit_for(tmp_path, monkeypatch, net_says):
    import lightning_tta

    monkeypatch.chdir(tmp_path)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    net = nn.Sequential(*layers) if net_says else nn.Sequential(*layers, nn.Linear(5, 5))
    before = [parameter.clone() for parameter in net.parameters()]
    batch = {"image": torch.rand(6, 3, 8, 8), "label": torch.arange(6) + 6}
    module = TestTimeAdaptation(lambda net: lightning_tta.methods.Tent(net, lr=0.1), None, net)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(lightning_tta.DataError, match="label 11, but the net has 5 logits"):
        trainer.predict(module, loader)
    same = [torch.equal(a, b) for a, b in zip(before, module.method.model.parameters(), strict=True)]
    assert all(same) == net_says  # refused before the step
