"""The doctor: what it says of a net and its images must be what a user can check by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lightning_tta import Backbone, ConfigError, InputError, adapt, create_backbone, diagnosis, doctor
from lightning_tta.diagnosis import ADVICE, FEW, MANY
from lightning_tta.methods import find, names
from nets import make_images, make_net


class Softmaxed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(-1)


@pytest.fixture(scope="module")
def trained():
    """A net that is sure of images normalized with 0.5 and 0.5, and unsure of pixels as they are."""
    net = make_net("bn")
    images = make_images(64)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    labels = torch.arange(64) % 5
    net.train()
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net((images - 0.5) / 0.5), labels).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture
def few(monkeypatch):
    """Of the methods those that are advised for some net alone: nothing else hangs on how many are tried."""
    tried = sorted({"source", *(method for advice in ADVICE.values() for method, _, _ in advice)})
    monkeypatch.setattr(diagnosis, "names", lambda: tried)


def test_every_method_is_tried():
    found = doctor(make_net("bn"), make_images(FEW))
    assert {trial.method for trial in found.trials} == set(names()) - {"source"}
    written = json.loads(json.dumps(found.to_dict()))
    assert written["recommended"][0] == "eta"
    assert len(written["trials"]) == len(found.trials)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("kind", "batch", "advice"),
    [
        ("bn", FEW, "batch norm"),
        ("bn", FEW - 1, "batch norm, small batches"),
        ("bn", 1, "batch norm, one image"),
        ("gn", 1, "other norm"),
        ("ln", 8, "other norm"),
    ],
)
def test_methods_follow_from_norm_layers_and_batch_size(kind, batch, advice):
    found = doctor(make_net(kind), make_images(batch))
    assert [(trial.method, trial.options) for trial in found.recommended] == [
        (method, dict(options)) for method, options, _ in ADVICE[advice]
    ]
    assert found.configuration()["method"]["class_path"].endswith(find(ADVICE[advice][0][0]).__name__)


def test_every_advised_method_exists_and_takes_its_options():
    for advice in ADVICE.values():
        for method, options, _ in advice:
            net = make_net("bn")
            assert adapt(net, method, **options).name == method


@pytest.mark.usefixtures("few")
def test_costs_are_those_of_a_step():
    found = {trial.method: trial for trial in doctor(make_net("bn"), make_images(FEW)).trials}
    tent = adapt(make_net("bn"), "zerosiam")
    tent(make_images(FEW))
    for count in ("forwards", "backwards"):
        assert getattr(found["zerosiam"], count) == tent.stats[count]
    assert (found["norm"].backwards, found["norm"].kept) == (0, 0)
    assert found["zerosiam"].kept > 16 * 4 * make_images(FEW).numel() // 3 // 16  # at least one map of the first layer
    assert found["eta"].backwards == 1  # also where it would keep no sample of this batch


def test_the_net_is_left_alone():
    net = make_net("bn").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [parameter.requires_grad for parameter in net.parameters()]
    doctor(net, make_images(4))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert net.training


@pytest.mark.usefixtures("few")
def test_a_missing_normalization_is_noticed(trained):
    hint = next(text for text in doctor(trained, make_images(64)).warnings if "normalized" in text)
    assert "mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]" in hint
    inside = doctor(Backbone(trained, [0.5], [0.5]), make_images(64))
    assert not [text for text in inside.warnings if "normalized" in text]
    assert "inside the net: mean [0.5, 0.5, 0.5]" in inside.facts["preprocessing"]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("net", "images", "names_", "words"),
    [
        (lambda: Softmaxed(make_net("bn")), make_images(4), None, "probabilities already"),
        (lambda: make_net("gn"), make_images(4) * 2 - 1, None, "span"),
        (lambda: make_net("gn"), make_images(4), list("abcdefgh"), "can never predict f, g, h"),
        (lambda: make_net("gn"), make_images(4), list("abc"), "3 classes, the net has 5 logits"),
        (lambda: make_net("bn"), make_images(FEW - 1), None, f"{MANY} or more"),
        (lambda: create_backbone("timm/test_resnet", 5), make_images(4, size=32), None, "random"),
        (lambda: create_backbone("timm/test_resnet", 5), make_images(4, size=32), None, "160"),
    ],
)
def test_what_would_go_wrong_is_said(net, images, names_, words):
    found = doctor(net(), images, class_names=names_)
    assert any(words in text for text in found.warnings), found.warnings
    assert words in " ".join(str(found).split())


@pytest.mark.usefixtures("few")
def test_nothing_is_said_of_a_sound_net_and_batch(trained):
    assert doctor(Backbone(trained, [0.5], [0.5]), make_images(64)).warnings == []


@pytest.mark.usefixtures("few")
def test_images_that_are_not_finite_are_counted():
    images = make_images(8)
    images[2, 0, 0, 0] = float("nan")
    assert any(text.startswith("1 images") for text in doctor(make_net("gn"), images).warnings)


@pytest.mark.usefixtures("few")
def test_logits_that_are_not_finite_are_told():
    net = make_net("gn")
    with torch.no_grad():
        net.conv1.weight[0, 0] = float("inf")
    with pytest.warns(UserWarning, match="not all finite"):
        found = doctor(net, make_images(8))
    assert any("not finite for 8 of 8 images" in text for text in found.warnings)


@pytest.mark.usefixtures("few")
def test_a_net_that_keeps_what_it_computed_and_one_in_half_precision():
    class Keeps(Softmaxed):
        def forward(self, x):
            self.last = self.net(x)
            return self.last

    net = Keeps(make_net("gn"))
    net(make_images(2))
    assert {t.method for t in doctor(net, make_images(4)).trials if t.role == "start here"} == {
        "zerosiam",
        "ostta",
        "sar",
    }
    half = doctor(make_net("gn").half(), make_images(4))
    assert "ImageNet's" in half.facts["preprocessing"]


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="No image"):
        doctor(make_net("gn"), make_images(4) * float("nan"))
    with pytest.raises(ConfigError, match="--data"):
        doctor(make_net("bn"), "photos")
    with pytest.raises(InputError, match="0-255"):
        doctor(make_net("bn"), make_images(4) * 255)


@pytest.mark.usefixtures("few")
def test_a_method_that_cannot_run_says_why():
    found = doctor(make_net("gn"), make_images(4))
    refused = {t.method: t.reason for t in found.trials if t.role == "cannot run"}
    assert "no BatchNorm" in refused["norm"]
    assert "  norm: " in str(found)


@pytest.mark.usefixtures("few")
def test_all_of_it_is_primitive():
    found = json.loads(json.dumps(doctor(make_net("gn"), make_images(4)).to_dict()))
    assert found["recommended"][0] == "zerosiam"
    assert found["facts"]["norm layers"] == "2 GroupNorm"


@pytest.mark.usefixtures("few")
def test_the_published_size_is_no_claim_about_ones_own_weights(tmp_path):
    torch.save(create_backbone("timm/test_resnet", 10).net.state_dict(), tmp_path / "own.pt")
    own = create_backbone("timm/test_resnet", 10, weights=tmp_path / "own.pt")
    said = str(doctor(own, torch.rand(16, 3, 32, 32)))
    assert "was published for 160" in said
    assert "the weights were trained" not in said
