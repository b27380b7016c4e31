"""Adapters that are trained on the source: what learns, what a checkpoint holds, and MoSA's parts."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_tta import ConfigError, SourceClassifier, adapt
from lightning_tta.methods.components.adapters import adapter_names
from lightning_tta.modules.loading import load_source
from nets import make_images, make_net, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"kind": "lora", "rank": 2}


def fit(model, batches, epochs=1):
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(model, loader)
    return trainer


def batches(number, size=16):
    return [{"image": make_images(6, seed=n, size=size), "label": torch.arange(6) % 5} for n in range(number)]


def test_only_adapters_and_the_head_learn_and_the_checkpoint_has_them(tmp_path):
    with pytest.warns(UserWarning, match="beside the adapters are random"):
        SourceClassifier("cifar/resnet20", 5, adapters=LORA)
    fit(SourceClassifier("cifar/resnet20", 5), batches(1, 32)).save_checkpoint(tmp_path / "source/best.ckpt")
    options = {"weights": str(tmp_path / "source"), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    model = SourceClassifier("cifar/resnet20", 5, **options, adapters=LORA)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    fit(model, batches(3, 32)).save_checkpoint(tmp_path / "adapted/best.ckpt")
    moved = {name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*adapter_names(model.backbone), "net.linear.weight", "net.linear.bias"}
    loaded = load_source(str(tmp_path / "adapted")).eval()
    images = make_images(4, size=32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval().backbone(images))
    assert adapter_names(loaded) == adapter_names(model.backbone)
    method = adapt(loaded, "tent", select="adapters", lr=1e-2)
    assert set(method.adaptable) == {f"model.{name}" for name in adapter_names(loaded)}
    method(images)
    assert method.export().state_dict().keys() == load_source("none", "cifar/resnet20", 5).state_dict().keys()


def test_mosa_by_hand():
    net = make_net("ln")
    optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.5)
    model = SourceClassifier(net, 5, optimizer=optimizer, adapters=LORA, adapter_parts=3)
    names = [name for name in adapter_names(net) if net.get_parameter(name).ndim == 2]
    torch.manual_seed(0)
    for name in names:
        torch.nn.init.normal_(net.get_parameter(name), std=0.3)
    start = {name: net.get_parameter(name).detach().clone() for name in names}
    (momenta,) = (optimizer.state for optimizer in fit(model, batches(1)).optimizers)
    for name in names:
        changed = (net.get_parameter(name) != start[name]).any(0 if ".down" in name else 1)
        kept = momenta[net.get_parameter(name)]["momentum_buffer"] != 0
        assert torch.equal(kept.any(0 if ".down" in name else 1), changed)  # what did not run has no gradient
        width = len(changed)
        part = torch.arange(width) * 3 // width
        assert len(set(part[changed].tolist())) <= 1, name  # one part of three, the others exactly as they were
    assert any(not torch.equal(net.get_parameter(name), start[name]) for name in names)
    fit(model, batches(8), epochs=3)
    assert all((net.get_parameter(n) != start[n]).all(0 if ".down" in n else 1).all() for n in names)  # all in turn


def test_the_pass_of_a_step_has_one_part_alone():
    net, seen = make_net("gn"), {}
    model = SourceClassifier(net, 5, optimizer=partial(torch.optim.SGD, lr=0.0), adapters=LORA, adapter_parts=2)
    name = "conv2.parametrizations.weight.0.up0"
    torch.nn.init.ones_(net.get_parameter(name))
    net.conv2.register_forward_pre_hook(lambda *_: seen.update(rows=net.get_parameter(name).detach().sum(1)))
    fit(model, batches(1))
    assert sorted(seen["rows"].tolist()) == [0.0] * 6 + [2.0] * 6
    assert max_difference(net.get_parameter(name).detach(), torch.ones(12, 2)) == 0


def test_wrong_options():
    for options, message in (
        ({"adapters": "norm"}, "adapters must be kinds"),
        ({"adapters": "lroa"}, "Unknown select"),
        ({"adapter_parts": 2}, "needs adapters"),
        ({"adapters": "lora", "adapter_parts": 1}, "parts must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            SourceClassifier(make_net("gn"), 5, **options)
