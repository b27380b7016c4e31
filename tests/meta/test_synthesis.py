"""Domain shift synthesis: what it changes, where, and how its random numbers are drawn."""

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, UnsupportedModelError
from lightning_tta.meta.synthesis import DomainShiftSynthesis
from nets import make_images, make_net, max_difference


def test_scales_and_shifts_the_first_convolution():
    net, images = make_net("bn").double(), make_images(6, dtype=torch.float64)
    synthesis = DomainShiftSynthesis(net, 0.5)
    scale, shift = torch.rand(2, 3, 8, dtype=torch.float64)
    seen = {}
    handle = net.norm1.register_forward_pre_hook(lambda layer, inputs: seen.update(x=inputs[0]))
    with synthesis.active(scale, shift):
        net(images)
    handle.remove()
    plain = net.conv1(images)
    for d in range(3):
        part = slice(2 * d, 2 * d + 2)
        expected = plain[part] * scale[d].view(1, -1, 1, 1) + shift[d].view(1, -1, 1, 1)
        assert max_difference(seen["x"][part], expected) < 1e-12
    assert torch.equal(net.conv1(images), plain)  # nothing stays


def test_how_often_and_from_where():
    net = nn.Conv2d(3, 20000, 1)
    (scale,), (shift,) = DomainShiftSynthesis(net, 0.3).draw(["a"])
    for value, rest in ((scale, 1.0), (shift, 0.0)):
        drawn = value[value != rest]
        assert abs(len(drawn) / 20000 - 0.3) < 0.015
        assert 0 <= drawn.min() < 0.01
        assert 0.99 < drawn.max() <= 1
        assert abs(drawn.mean() - 0.5) < 0.02
    both = ((scale != 1) & (shift != 0)).float().mean()
    assert abs(both - 0.09) < 0.01  # independently


def test_a_row_depends_on_its_key_alone():
    synthesis = DomainShiftSynthesis(make_net("bn"), 0.5)
    state = torch.get_rng_state()
    scale, shift = synthesis.draw(["a", "b", "c"])
    assert torch.equal(torch.get_rng_state(), state)
    again = synthesis.draw(["c"])
    assert torch.equal(scale[2], again[0][0])
    assert torch.equal(shift[2], again[1][0])
    assert not torch.equal(scale[0], scale[1])


def test_probability_zero_is_the_identity():
    scale, shift = DomainShiftSynthesis(make_net("bn"), 0).draw(["a"])
    assert (scale == 1).all()
    assert (shift == 0).all()


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="probability"):
        DomainShiftSynthesis(make_net("bn"), 1.5)
    with pytest.raises(UnsupportedModelError, match="synthesis_probability=0"):
        DomainShiftSynthesis(nn.Linear(3, 2), 0.1)
