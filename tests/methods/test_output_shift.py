"""Output shift against the average written out."""

import pytest
import torch

from lightning_tta import ConfigError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference
from plain import assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10  # float64


def source_batches(dtype=torch.float64):
    """Two, of 8 and 5 images."""
    return [{"image": make_images(size, seed=500 + size, dtype=dtype)} for size in (8, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "momentum"), [(1.0, 0.1), (0.5, 0.3), (0.0, 1.0)])
def test_five_batches(kind, gamma, momentum):
    net = make_net(kind).double()
    method = adapt(net, "output_shift", gamma=gamma, momentum=momentum)
    method.prepare(source_batches())
    weight, bias = net.head.weight.detach(), net.head.bias.detach()
    with torch.no_grad():
        mu = torch.cat([net.features(batch["image"]) for batch in source_batches()]).mean(0)
    ema, probe = None, make_images(3, seed=77, dtype=torch.float64)
    for number, size in enumerate((6, 1, 9, 4, 12)):
        images = make_images(size, seed=number, dtype=torch.float64)
        with torch.no_grad():
            z, z_probe = net.features(images), net.features(probe)
        moved = z if ema is None else z + gamma * (mu - ema)
        assert max_difference(method(images), moved @ weight.T + bias) < TOLERANCE
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 0)
        ema = z.mean(0) if ema is None else (1 - momentum) * ema + momentum * z.mean(0)
        assert max_difference(method.value("shift"), ema - mu) < TOLERANCE
        assert max_difference(method.predict(probe), (z_probe + gamma * (mu - ema)) @ weight.T + bias) < TOLERANCE
        if gamma:
            assert max_difference(moved, z) > 1e-3 or number == 0
    assert max_difference(method.export()(probe), method.predict(probe)) < TOLERANCE


def test_the_first_batch_after_a_reset_is_the_sources():
    net = make_net("gn")
    method = adapt(net, "output_shift")
    method.prepare(source_batches(torch.float32))
    images = make_images(6)
    for _ in range(2):
        with torch.no_grad():
            assert max_difference(method(images), net(images)) < 1e-6
        assert max_difference(method(images), method.predict(images)) < 1e-5
        with torch.no_grad():
            assert max_difference(method.predict(images), net(images)) > 1e-3
        method.reset()


def test_save_and_reset_in_mid_stream():
    methods = [adapt(make_net("bn", seed=seed), "output_shift") for seed in (0, 5)]
    for method in methods:
        method.prepare(source_batches(torch.float32))
    assert_goes_on_after_loading(*methods, make_stream(5, batch=7))


@pytest.mark.parametrize(("option", "value"), [("gamma", -1), ("momentum", 0), ("momentum", 1.5)])
def test_wrong_options(option, value):
    with pytest.raises(ConfigError, match=rf"{option} must be .*; got"):
        adapt(make_net("bn"), "output_shift", **{option: value})
