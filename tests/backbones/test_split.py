from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_tta import UnsupportedModelError
from lightning_tta.backbones.split import HeadSplit, as_logits, find_head
from nets import KINDS, make_images, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_own_nets(kind):
    net, images = make_net(kind), make_images(3)
    split = HeadSplit(net)
    assert split.head is net.head
    assert split.name == ("decide" if kind == "user" else "head")
    assert (split.num_features, split.num_classes) == (net.head.in_features, 5)
    features, logits = split(images)
    assert torch.equal(features, net.features(images))
    torch.testing.assert_close(logits, features @ net.head.weight.T + net.head.bias)
    assert features.grad_fn is not None
    assert not net.head._forward_hooks


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_timm_nets(name):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=7, **({"img_size": 32} if "vit" in name else {})).eval()
    images = make_images(2, size=32)
    split = HeadSplit(net)
    assert split.head is net.get_classifier()
    with torch.no_grad():
        features, logits = split(images)
        expected = net.forward_head(net.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(logits, net(images))


def test_torchvision_net_with_two_linear_layers():
    models = pytest.importorskip("torchvision.models")
    net = models.mobilenet_v3_small(num_classes=6).eval()
    images = make_images(2, size=32)
    split = HeadSplit(net)
    assert split.head is net.classifier[3]
    with torch.no_grad():
        features, logits = split(images)
        expected = net.classifier[:3](net.avgpool(net.features(images)).flatten(1))
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(logits, net(images))


class Wrapped(nn.Module):
    def __init__(self, net, after=lambda x: x):
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x):
        return self.after(self.net(x))


class HeadFirst(nn.Module):
    """Declares its classifier before another linear layer, and says so in timm's way, or not."""

    def __init__(self):
        super().__init__()
        self.classifier, self.body = nn.Linear(6, 4), nn.Linear(768, 6)

    def forward(self, x):
        return self.classifier(self.body(x.flatten(1)))


class HeadFirstSaid(HeadFirst):
    def get_classifier(self):
        return self.classifier


def test_order_of_the_search():
    assert find_head(HeadFirst())[0] == "body"
    assert find_head(HeadFirstSaid())[0] == "classifier"
    assert find_head(Wrapped(HeadFirstSaid()))[0] == "net.classifier"
    assert find_head(HeadFirst(), "classifier")[0] == "classifier"
    assert find_head(HeadFirstSaid(), "body")[0] == "body"


def test_head_argument():
    net = HeadFirst()
    split = HeadSplit(net, head="classifier")
    features, logits = split(make_images(2))
    assert torch.equal(features, net.body(make_images(2).flatten(1)))
    assert torch.equal(logits, net.classifier(features))
    with pytest.raises(UnsupportedModelError, match=r"head='fc' is not a linear layer.*classifier, body"):
        find_head(net, "fc")
    with pytest.raises(UnsupportedModelError, match=r"head=\['classifier'\] is not a linear layer"):
        HeadSplit(net, head=["classifier"])
    with pytest.raises(UnsupportedModelError, match="head='norm1'"):
        find_head(make_net("bn"), "norm1")


@pytest.mark.parametrize("classifier", [nn.Identity(), nn.Conv2d(3, 4, 1), None])
def test_get_classifier_that_is_no_linear_layer(classifier):
    net = make_net("bn")
    net.get_classifier = lambda: classifier
    assert find_head(net)[0] == "head"


def test_no_linear_layer():
    with pytest.raises(UnsupportedModelError, match="'norm', 'tent'"):
        find_head(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))


@pytest.mark.parametrize(
    "after", [lambda x: x.softmax(1), lambda x: x / 2, lambda x: x[:, :2]], ids=["softmax", "scale", "cut"]
)
def test_something_after_the_head(after):
    with pytest.raises(UnsupportedModelError, match="raw logits"):
        HeadSplit(Wrapped(make_net("gn"), after))(make_images(2))


@pytest.mark.parametrize("after", [lambda x: x.clone(), lambda x: x.view(len(x), -1), lambda x: x.double()])
def test_same_values_after_the_head_are_fine(after):
    net = make_net("gn")
    features, _ = HeadSplit(Wrapped(net, after))(make_images(2))
    assert torch.equal(features, net.features(make_images(2)))


def test_an_overflow_does_not_hide_something_after_the_head():
    net = Wrapped(make_net("gn"), lambda x: x.softmax(1))
    split = HeadSplit(net)
    split(torch.full((2, 3, 16, 16), float("inf")))  # nothing to compare
    with pytest.raises(UnsupportedModelError, match="raw logits"):
        split(make_images(2))


def test_wrong_last_linear_layer():
    with pytest.raises(UnsupportedModelError, match=r"pass head="):
        HeadSplit(HeadFirst())(make_images(2))


def test_head_that_runs_twice_or_never():
    net = make_net("gn")
    with pytest.raises(UnsupportedModelError, match="ran 2 times"):
        HeadSplit(Wrapped(net, lambda x: net.head(net.features(make_images(2)))))(make_images(2))
    net.unused = nn.Linear(3, 3)
    with pytest.raises(UnsupportedModelError, match="ran 0 times"):
        HeadSplit(net)(make_images(2))
    assert not net.head._forward_hooks


class HeadPerPatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(x.flatten(2).transpose(1, 2)).mean(1)


def test_head_on_every_patch():
    with pytest.raises(UnsupportedModelError):
        HeadSplit(HeadPerPatch())(make_images(2))


def test_hook_is_removed_after_an_error():
    net = make_net("gn")
    with pytest.raises(RuntimeError):
        HeadSplit(net)(torch.zeros(2, 5, 16, 16))
    assert not net.head._forward_hooks


def test_as_logits():
    logits = torch.rand(2, 5)
    assert as_logits(logits) is logits
    assert as_logits(SimpleNamespace(logits=logits, loss=None)) is logits
    for output, given in [((logits,), "tuple"), (logits[0], r"\(5,\)"), ({"logits": logits}, "dict"), (None, "None")]:
        with pytest.raises(UnsupportedModelError, match=f"logits.*got .*{given}"):
            as_logits(output)
    with pytest.raises(UnsupportedModelError, match=r"one output an image, \(2, 1\).*two logits"):
        as_logits(logits[:, :1])
    with pytest.raises(UnsupportedModelError, match=r"tuple of a tensor of shape \(2, 5\), a NoneType"):
        as_logits((logits, None))
