import inspect
import subprocess
import sys

import pytest
import torch

import lightning_tta
from language_nets import TinyLM
from lightning_tta import ConfigError, LightningTTAError, TTAMethod, UnsupportedModelError, adapt, available_methods
from lightning_tta.errors import check_choice, check_range, did_you_mean
from lightning_tta.methods import create_method, docstring, find
from nets import kind_for, make_images, make_net, same


def test_three_lines():
    images = make_images(4)
    method = adapt(make_net("gn"), "tent", lr=1e-3)
    logits = method(images)
    method.reset()
    assert torch.equal(method(images), logits)


def test_default_method_is_zerosiam():
    assert type(adapt(make_net("gn"))) is available_methods()["zerosiam"]


@pytest.mark.parametrize("name", available_methods())
def test_methods_by_name(name):
    is_of_images = "images" in available_methods()[name].tasks
    method = adapt(make_net(kind_for(name, "bn")) if is_of_images else TinyLM(), name)
    assert isinstance(method, TTAMethod)
    assert type(method) is available_methods()[name]
    assert method.name == name
    assert type(method).__name__.lower() == name.replace("_", "")
    assert getattr(lightning_tta.methods, type(method).__name__) is type(method)
    assert find(name) is find(type(method).__name__) is type(method)
    assert docstring(name) == inspect.getdoc(type(method))


def test_names_are_sorted_and_the_dictionary_is_a_copy():
    names = available_methods()
    assert list(names) == sorted(names)
    names.clear()
    assert available_methods()


def test_copy_or_in_place():
    net = make_net("gn")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    copied = adapt(net, "tent", lr=0.1)
    copied(make_images(4))
    assert same(dict(net.state_dict()), before)
    used = adapt(net, "tent", in_place=True, lr=0.1)
    used(make_images(4))
    assert not same(dict(net.state_dict()), before)
    assert create_method("tent", net).model is net


def test_options_arrive():
    method = adapt(make_net("gn"), "tent", lr=0.25, optimizer="sgd", steps=3)
    group = method.optimizers["model"].param_groups[0]
    assert (group["lr"], group["momentum"], method.steps) == (0.25, 0.9, 3)
    assert isinstance(method.optimizers["model"], torch.optim.SGD)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tnet", r"mean tent\?"), ("Tents", r"mean tent\?"), ("qqq", "Available: "), (None, "None")],
)
def test_unknown_method(name, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        adapt(make_net("gn"), name)
    assert all(known in str(caught.value) for known in available_methods())


def test_unknown_option_lists_the_known():
    with pytest.raises(ConfigError, match=r"no option 'rate'.*lr, optimizer, momentum"):
        adapt(make_net("gn"), "tent", rate=0.1)
    with pytest.raises(ConfigError, match="no option 'lr'"):
        adapt(make_net("gn"), "norm", lr=0.1)


@pytest.mark.parametrize("model", [lambda x: x, "resnet18", None])
def test_not_a_module(model):
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module; got"):
        adapt(model, "source")


def test_net_that_returns_no_logits():
    method = adapt(torch.nn.Conv2d(3, 5, 3), "source")
    with pytest.raises(UnsupportedModelError, match="must return logits"):
        method(make_images(2))


def test_errors_have_one_base():
    assert issubclass(ConfigError, LightningTTAError)
    assert issubclass(UnsupportedModelError, LightningTTAError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("name", lightning_tta.__all__)
def test_public_names_exist(name):
    assert getattr(lightning_tta, name) is not None
    assert name in dir(lightning_tta)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        _ = lightning_tta.adopt
    for name in ("Tnet", "TENT", "adopt"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(lightning_tta.methods, name)


def test_did_you_mean():
    assert did_you_mean("Tnet", ["norm", "tent", "source"]) == " Did you mean tent?"
    assert did_you_mean("gausian", ["gaussian", "Gausiann", "fog"], count=3) == " Did you mean gaussian or Gausiann?"
    assert did_you_mean("xyz", ["tent"]) == did_you_mean(None, []) == ""


def test_plain_use_imports_no_lightning():
    code = (
        "import sys, lightning_tta, torch\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(12), torch.nn.Linear(12, 2))\n"
        "lightning_tta.adapt(net, 'tent')(torch.rand(2, 3, 2, 2))\n"
        "print([m for m in ('lightning', 'timm', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [0, 1, 0.5, 1.0])
def test_range_accepts(value):
    check_range("x", value, 0, 1)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, True])
def test_range_refuses(value):
    with pytest.raises(ConfigError, match=r"^x must be a number in \[0, 1\]; got "):
        check_range("x", value, 0, 1)


def test_range_bounds():
    check_range("x", 1e30, 0)
    check_range("x", -1e30, None, 0)
    with pytest.raises(ConfigError, match=r"in \(0, inf\)"):
        check_range("x", 0, 0, low_open=True)
    with pytest.raises(ConfigError, match=r"in \[0, inf\)"):
        check_range("x", float("inf"), 0)
    check_range("x", 3, 1, integer=True)
    for value in (1.5, 2.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a whole number"):
            check_range("x", value, 1, integer=True)


def test_choice():
    check_choice("x", "a", ("a", "b"))
    with pytest.raises(ConfigError, match="x must be one of 'a', 'b'; got 'c'"):
        check_choice("x", "c", ("a", "b"))
