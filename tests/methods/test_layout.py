"""Channels last: for which nets, and that a method whose net, state and images lie so does the same."""

import pytest
import torch
from torch import nn

from contract import FIRST, build, each, run, state_of
from lightning_tta import adapt
from lightning_tta.backbones.layout import wanted_layout
from nets import KINDS, make_images, make_net, make_stream

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CPU, CUDA, LAST = torch.device("cpu"), torch.device("cuda"), torch.channels_last


def block(norm, width=8):
    return nn.Sequential(nn.Conv2d(width, width, 3), norm, nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten())


NETS = {
    "convolutions and BatchNorm": (lambda: make_net("bn"), True),
    "GroupNorm": (lambda: make_net("gn"), False),
    "tokens": (lambda: make_net("ln"), False),
    "one convolution": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), False),
    "no norm layer": (lambda: block(nn.Identity()), True),
    "InstanceNorm": (lambda: block(nn.InstanceNorm2d(8, affine=True)), False),
    "mostly linear": (lambda: nn.Sequential(block(nn.BatchNorm2d(8)), nn.Linear(8, 8), nn.Linear(8, 8)), False),
}


@pytest.mark.parametrize("what", NETS)
def test_which_nets(what):
    make, wanted = NETS[what]
    for precision in ("bf16", "tf32", "exact", None):
        now = LAST if wanted and precision in ("bf16", "tf32") else None
        assert wanted_layout(make(), CUDA, precision) == now
        assert wanted_layout(make(), CPU, precision) is None


def last_and_plain(case, **options):
    methods = [build(*case, **options) for _ in range(2)]
    methods[0]._lay_out(LAST)
    return methods


def strides_fit(method):
    """Whether moments, and what the method keeps beside weights, lie as the weights do."""
    tensors = [*method.adaptable.values(), *method._rest.values()]
    return all(t.is_contiguous(memory_format=LAST) for t in tensors if t.ndim == 4)


@each(FIRST)
def test_the_same_up_to_rounding(case):
    last, plain = last_and_plain(case)
    before = dict(last.model.named_parameters())
    stream = make_stream(2)
    for images in stream:
        torch.testing.assert_close(last(images), plain(images), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(last.predict(images), plain.predict(images), rtol=1e-3, atol=1e-3)
    assert strides_fit(last)
    assert all(p is before[name] for name, p in last.model.named_parameters())
    assert any(p.ndim == 4 and not p.is_contiguous() for p in last.model.parameters())


@each(FIRST)
def test_reset_and_states_of_either_layout(case):
    last, plain = last_and_plain(case)
    stream = make_stream(2)
    first = run(last, stream)
    state = state_of(last)
    more = run(last, stream)
    last.reset()
    source = build(*case)
    assert all(torch.equal(a, b) for a, b in zip(last.adaptable.values(), source.adaptable.values(), strict=True))
    again = run(last, stream)
    assert all(map(torch.equal, first, again))
    last.load_state_dict(state)
    assert all(map(torch.equal, more, run(last, stream)))
    plain.load_state_dict(state)
    for a, b in zip(run(plain, stream), more, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    last.load_state_dict(source.state_dict())
    assert all(map(torch.equal, first, run(last, stream)))
    assert strides_fit(last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["tf32", "exact", None])
def test_chosen_at_the_first_batch_on_cuda(kind, precision):
    method = adapt(make_net(kind), "cotta", precision=precision)
    plain = adapt(make_net(kind), "cotta", precision=precision)
    with method.computing(CPU):
        assert method._layout is None
        assert not method._layout_chosen
    with method.hold(), method.computing(CUDA):
        assert (method._layout is LAST) == (kind == "bn" and precision == "tf32")
    images = make_images(4)
    torch.testing.assert_close(method(images), plain(images), rtol=1e-3, atol=1e-3)
    with method.computing(CUDA):
        assert method._layout_chosen
