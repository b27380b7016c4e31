"""Copies of frozen weights under autocast: the same bits as autocast without its cache, and fewer casts."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tta.backbones.casts import FrozenCasts
from lightning_tta.backbones.passes import safe_checkpoints

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


class CastsOf(TorchDispatchMode):
    """Counts conversions of tensors of the given sizes."""

    def __init__(self, tensors):
        super().__init__()
        self.shapes, self.number = {tuple(t.shape) for t in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::_to_copy" and tuple(args[0].shape) in self.shapes:
            self.number += 1
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Layers of every kind with a cast; a head that is used by itself, too, and in a region without autocast."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 8)
        self.line = nn.Conv1d(8, 6, 3, bias=False)
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(2)
        x = self.hidden(self.line(x).mean(-1)).relu()
        with torch.autocast("cpu", enabled=False):
            exact = self.head(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            other = self.head(x)
        return self.head(x) + exact + other + x.float() @ nn.functional.normalize(self.head.weight).T


def outcome(net, x, dtype, casts=None, weights=None):
    """Logits and gradients under autocast without its cache."""
    learned = [p for p in net.parameters() if p.requires_grad]
    casting = (casts or FrozenCasts(nn.Module())).active
    with torch.autocast("cpu", dtype, cache_enabled=False), safe_checkpoints(), casting(CPU):
        logits = net(x) if weights is None else functional_call(net, weights, (x,))
    return [logits.detach(), *torch.autograd.grad(logits.float().square().mean(), learned)]


def frozen(but=("norm.weight", "norm.bias")):
    net = Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in but)
    return net, torch.rand(4, 3, 6, 6)


def equal(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@DTYPES
@pytest.mark.parametrize(
    "learned", [("norm.weight",), ("norm.bias", "hidden.bias", "conv.weight"), ("line.weight", "head.weight")]
)
def test_the_same_bits(dtype, learned):
    net, x = frozen(learned)
    casts = FrozenCasts(net)
    names = [name for name, _ in net.named_parameters()]
    for _ in range(2):
        assert equal(outcome(net, x, dtype, casts), outcome(net, x, dtype))
    assert [name for name, _ in net.named_parameters()] == names == list(net.state_dict())
    assert all("forward" not in vars(module) for module in net.modules())


@DTYPES
def test_nothing_frozen_is_cast_again(dtype):
    net, x = frozen()
    net.forward = lambda x: net.head(net.hidden(net.line(net.norm(net.conv(x)).flatten(2)).mean(-1)))
    weights = [p for p in net.parameters() if not p.requires_grad]
    casts = FrozenCasts(net)
    numbers = []
    for given in (None, casts, casts):
        with CastsOf(weights) as counted:
            outcome(net, x, dtype, given)
        numbers.append(counted.number)
    assert numbers == [7, 7, 0]
    assert casts.nbytes == 2 * sum(p.numel() for p in weights)


CHANGES = {
    "written in place": lambda net: net.head.weight.mul_(2),
    "loaded": lambda net: net.load_state_dict(Net().state_dict()),
    "rounded": lambda net: net.bfloat16().float(),
    "other storage": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data * 3),
    "another layout": lambda net: net.to(memory_format=torch.channels_last),
    "learns now": lambda net: net.head.weight.requires_grad_(),
    "learns no more": lambda net: net.norm.bias.requires_grad_(False),
    "another parameter": lambda net: setattr(net.head, "weight", nn.Parameter(torch.rand(5, 7), requires_grad=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    net, x = frozen()
    casts = FrozenCasts(net)
    before = outcome(net, x, torch.bfloat16, casts)
    held = [cast.copy for cast in casts._casts]
    with torch.no_grad():
        CHANGES[change](net)
    after = outcome(net, x, torch.bfloat16, casts)
    assert equal(after, outcome(net, x, torch.bfloat16))
    if change in ("written in place", "loaded"):
        assert not torch.equal(before[0], after[0])
        now = [cast.copy for cast in casts._casts]
        assert all(a is b for a, b in zip(held, now, strict=True))  # where a recorded step has its addresses


def test_a_change_in_the_middle_of_a_call_is_noticed():
    net, x = frozen()
    casts = FrozenCasts(net)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad(), casts.active(CPU):
        source = net(x)
        for layer, factor in ((net.conv, 2.0), (net.head, 3.0)):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        moved = net(x)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
        assert torch.equal(moved, net(x))
    assert not torch.equal(moved, source)


def test_other_tensors_in_the_places_of_weights():
    net, x = frozen()
    casts = FrozenCasts(net)
    outcome(net, x, torch.bfloat16, casts)
    weights = {"head.weight": torch.rand(5, 7), "conv.bias": torch.rand(8)}
    assert equal(outcome(net, x, torch.bfloat16, casts, weights), outcome(net, x, torch.bfloat16, weights=weights))


def test_a_first_call_in_inference_mode_leaves_copies_that_can_be_differentiated():
    net, x = frozen()
    casts = FrozenCasts(net)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), casts.active(CPU):
        net(x)
    assert equal(outcome(net, x, torch.bfloat16, casts), outcome(net, x, torch.bfloat16))


def test_a_copy_has_copies_of_its_own_net():
    net, x = frozen()
    casts = FrozenCasts(net)
    outcome(net, x, torch.bfloat16, casts)
    twin_net, twin = copy.deepcopy((net, casts))
    assert twin.model is twin_net
    with torch.no_grad():
        twin_net.head.weight.zero_()
    assert equal(outcome(twin_net, x, torch.bfloat16, twin), outcome(twin_net, x, torch.bfloat16))
    assert equal(outcome(net, x, torch.bfloat16, casts), outcome(net, x, torch.bfloat16))


def test_layers_with_a_forward_or_a_weight_of_their_own_are_left_alone():
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.weight.sum()

    net = nn.Sequential(Halved(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    net[2].forward = lambda x: x
    net.requires_grad_(False)
    casts = FrozenCasts(net)
    with torch.autocast("cpu", torch.bfloat16), casts.active(CPU):
        net(torch.rand(2, 4))
    assert casts.nbytes == 0
    with casts.active(CPU):
        assert all("forward" not in vars(module) for module in list(net.modules())[:-1])


def test_nested_calls_and_errors_leave_the_net_as_it_was():
    net, _ = frozen()
    casts = FrozenCasts(net)
    with torch.autocast("cpu", torch.bfloat16):
        with casts.active(CPU):
            with casts.active(CPU):
                pass
            assert "forward" in vars(net.head)
        with pytest.raises(ZeroDivisionError), casts.active(CPU):
            raise ZeroDivisionError
    assert all("forward" not in vars(module) for module in net.modules())
