"""Passes with other parameters, and checkpoints that keep their gradients."""

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from lightning_tta.backbones.passes import call_with, names_by_parameter, outside_inference_mode, safe_checkpoints


class Twice(nn.Module):
    """A layer under two names, another one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.alias, self.other.weight = self.one, self.one.weight
        self.register_parameter("own", nn.Parameter(torch.ones(3)))
        self.register_parameter("again", self.own)

    def forward(self, x):
        return self.other(self.alias(x)) * self.own * self.again


def test_other_values_in_every_place_and_back_again():
    net, x = Twice(), torch.rand(2, 3)
    assert names_by_parameter(net)[net.one.weight] == ["one.weight", "other.weight"]
    weight, before = torch.rand(3, 3), net(x)
    with torch.no_grad():
        expected = (x @ weight.T + net.one.bias) @ weight.T + net.other.bias
    torch.testing.assert_close(call_with(net, {net.one.weight: weight}, x), expected)
    twice = call_with(net, {net.one.weight: weight, net.own: torch.full((3,), 2.0)}, x)
    torch.testing.assert_close(twice, 4 * expected)
    assert isinstance(net.alias.weight, nn.Parameter)
    assert torch.equal(net(x), before)


def gradient(reentrant):
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.fill_(0.1)
    y = checkpoint.checkpoint(lambda x: layer(x).sin(), torch.ones(1, 2), use_reentrant=reentrant)
    return torch.autograd.grad(y.sum(), layer.bias, allow_unused=True)[0] if y.requires_grad else None


def test_checkpoints_keep_gradients():
    originals = checkpoint.CheckpointFunction
    for recompute in (True, False):
        with safe_checkpoints(recompute=recompute):
            assert torch.equal(gradient(True), gradient(False))
    assert checkpoint.CheckpointFunction is originals
    assert gradient(True) is None  # torch's own way


def test_nothing_is_computed_again():
    calls = []

    def function(x):
        calls.append(1)
        return x.sin()

    for recompute, number in ((True, 2), (False, 1)):
        for reentrant in (True, False):
            calls.clear()
            x = torch.ones(2, requires_grad=True)
            with safe_checkpoints(recompute=recompute):
                y = checkpoint.checkpoint(function, x, use_reentrant=reentrant)
                torch.autograd.grad(y.sum(), x)
            assert len(calls) == number


def test_contexts_of_several_threads_end_in_any_order():
    original, first, second = checkpoint.CheckpointFunction, threading.Event(), threading.Event()

    def outlive():
        with safe_checkpoints(recompute=False):
            first.set()
            second.wait(10)

    with safe_checkpoints():
        thread = threading.Thread(target=outlive)
        thread.start()
        first.wait(10)
    assert checkpoint.CheckpointFunction is not original
    second.set()
    thread.join()
    assert checkpoint.CheckpointFunction is original


@pytest.mark.parametrize("inference", [False, True])
def test_outside_inference_mode(inference):
    with torch.inference_mode(inference), torch.no_grad(), outside_inference_mode():
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_one_that_an_interrupt_left_open_does_no_harm_later():
    """torch's own guard would switch gradients off when it is collected."""
    with torch.no_grad():
        guard = outside_inference_mode()
        guard.__enter__()
    torch.set_grad_enabled(True)
    del guard
    gc.collect()
    assert torch.is_grad_enabled()


CHANNELS_LAST = """
import torch
from torch import nn
from lightning_tta import adapt

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
)
x = torch.rand(4, 3, 12, 12)
plain, last = (adapt(net.to(memory_format=layout), "tent", lr=1e-2, optimizer="sgd")
               for layout in (torch.contiguous_format, torch.channels_last))
for _ in range(20):
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), plain(x))
y = torch.rand(4, 8, 8, 8).to(memory_format=torch.channels_last)
print("done", nn.GroupNorm(2, 8)(y).is_contiguous(memory_format=torch.channels_last))
"""


def test_group_norm_learns_from_channels_last_images():
    """With torch 2.11 to 2.13 the process crashes in backward; so in one of its own. Outside, torch is as it was."""
    run = subprocess.run([sys.executable, "-c", CHANNELS_LAST], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["done", "True"], run.stderr
