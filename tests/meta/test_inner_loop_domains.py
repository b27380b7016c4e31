"""Which layers adapt, by depth and shortcut, and what comes before them running once."""

import pytest
import torch
from test_inner_loop import LABELS, PHASES, gradient, images_of, settings
from torch import nn

from lightning_tta.backbones.norms import shortcut_norms
from lightning_tta.meta.inner_loop import InnerLoop, InnerParameters
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from meta_reference import plain_outer_loss
from nets import max_difference

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """A block with a shortcut, twice; the second has none."""

    def __init__(self):
        super().__init__()

        def branch(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b))

        self.stem, self.act = branch(3, 4), nn.ReLU(inplace=True)
        self.deep = nn.ModuleList([nn.Module(), nn.Module()])
        for i, block in enumerate(self.deep):
            block.main = branch(4 if i == 0 else 6, 6)
            block.aside = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)) if i == 0 else nn.Identity()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        for block in self.deep:
            shortcut = block.aside(x)
            x = block.main(x)
            x += shortcut
            x = x.relu_()
        return self.head(x.mean((2, 3)))


def test_parameters_by_depth_without_shortcuts():
    net = convert_mixed_bn(Residual())
    assert shortcut_norms(net) == {"deep.0.aside.1"}
    rate_of = InnerParameters(net, InnerLoop(max_layers=0.4)).rate_of
    assert rate_of["max"] == {"deep.1.main.1.bias": "max"}
    scales = {f"{layer}.weight": "scale" for layer in ("stem.1", "deep.0.main.1", "deep.1.main.1")}
    assert rate_of["min"] == {**scales, "stem.1.bias": "shift", "deep.0.main.1.bias": "shift"}
    rate_of = InnerParameters(net, InnerLoop(adapt_layers=0.7, max_steps=0, source_weight_lr=0.1)).rate_of
    assert set(rate_of) == {"min"}
    assert rate_of["min"] == {
        f"{layer}.{leaf}": kind
        for layer in ("deep.0.main.1", "deep.1.main.1")
        for leaf, kind in (("weight", "scale"), ("bias", "shift"), ("source_weight", "source_weight"))
    }


def test_shortcuts_of_known_nets():
    import timm
    import torchvision

    def names(net):
        return {name for name, _ in net.named_modules() if "downsample" in name and name.endswith(("1", "2"))}

    for net in (torchvision.models.resnet18(), timm.create_model("resnet26d"), timm.create_model("test_resnet")):
        found = shortcut_norms(net)
        assert found
        assert found <= names(net)
        assert all("downsample" in name for name in found)
    assert len(shortcut_norms(torchvision.models.resnet18())) == 3
    for net in (
        torchvision.models.mobilenet_v2(),
        torchvision.models.efficientnet_b0(),
        timm.create_model("test_efficientnet"),
    ):
        assert shortcut_norms(net) == set()


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("share", [0.34, 0.7, 1.0])
def test_what_runs_once_changes_no_number(phases, share, monkeypatch):
    """In-place operations, shortcuts and unadapted deep layers included."""
    torch.manual_seed(0)
    net = convert_mixed_bn(Residual().double().eval(), 0.6, 0.05)
    inner = settings(adapt_layers=share, min_steps=2)
    forward, calls = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(self) or forward(self, x))
    ours = gradient(net, inner, phases=phases, second_order=True)
    passes = sum(inner.steps(phase) for phase in phases) + 1
    assert calls.count(net.stem[0]) == 1
    assert calls.count(net.deep[1].main[0]) == (passes if share > 0.34 and phases != ("max",) else 1)
    rate_of = InnerParameters(net, inner).rate_of
    rates_of = {phase: {name: inner.rates[kind] for name, kind in kinds.items()} for phase, kinds in rate_of.items()}
    loss = plain_outer_loss(net, images_of(), LABELS, inner, phases, rates_of)
    theirs = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    assert max(max_difference(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-10
    assert all("forward" not in module.__dict__ for module in net.modules())
