"""The yardsticks of the GPU's benchmark are the methods they stand for: the same numbers in float64."""

import pytest
import torch

import by_hand
from lightning_tta import adapt
from nets import make_images, make_net, make_stream, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "tent": {},
    "come": {},
    "eata": {"entropy_margin": 0.9, "diversity_margin": 0.95},
    "sar": {"entropy_margin": 0.8, "reset_threshold": 1.09},
    "deyo": {"entropy_margin": 0.9, "plpd_threshold": -0.1, "patches": 1},  # one patch: each draws its own shuffles
}


def net(kind):
    return make_net(kind).double()


def learned(method):
    return [key.removeprefix("model.") for key in method.adaptable if key.startswith("model.")]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_authors_algorithms(name):
    method, more = adapt(net("gn"), name, optimizer="sgd", lr=0.1, **SETTINGS[name]), {}
    if name == "eata":
        method.prepare([{"image": make_images(8, 50 + i), "label": torch.zeros(8)} for i in range(2)])
        more = {"fisher": [value for key, value in method.named_buffers() if key.startswith("fisher_")]}
    loop = by_hand.LOOPS[name](net("gn"), learned(method), lr=0.1, **SETTINGS[name], **more)
    source, moved, kept, resets = net("gn"), 0.0, 1.0, 0.0
    for images in make_stream(8, dtype=torch.float64):
        logits = method(images)
        assert max_difference(logits, loop(images)) < 1e-9
        moved = max(moved, max_difference(logits, source(images)))
        kept, resets = min(kept, method.stats.get("kept", 1.0)), resets + method.stats.get("recoveries", 0.0)
    assert moved > 1e-3
    assert (kept < 1) == (name not in ("tent", "come"))
    assert (resets > 0) == (name == "sar")


def test_cotta_with_a_sure_anchor():
    options = {"optimizer": "sgd", "lr": 0.1, "symmetric": True, "ema_decay": 0.7, "restore": 0.0}
    method = adapt(net("bn"), "cotta", anchor_threshold=1e-6, **options)
    loop = by_hand.CoTTA(net("bn"), lr=0.1, decay=0.7, restore=0.0)
    for images in make_stream(4, dtype=torch.float64):
        assert max_difference(method(images), loop(images)) < 1e-9
    assert max_difference(loop.student.conv1.weight.detach(), loop.source["conv1.weight"].detach()) > 1e-3


def test_the_least_that_tent_is():
    method = adapt(net("bn"), "tent", optimizer="sgd", lr=0.1)
    least = by_hand.Least(net("bn"), learned(method), lr=0.1)
    for images in make_stream(4, dtype=torch.float64):
        logits = method(images)
        assert max_difference(logits, least(images).double()) < 1e-5  # it computes the loss in float32
    assert max_difference(logits, adapt(net("bn"), "norm")(images)) > 1e-3
