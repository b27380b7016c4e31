"""What the base does for every method: states of others, nets that cannot learn, statistics of a batch."""

import copy

import pytest
import torch

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from nets import make_images, make_net, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("own", "other"), [("sgd", "adam"), ("adam", "sgd"), ("adamw", "sgd")])
def test_state_of_another_optimizer_is_refused(own, other):
    method, given = (adapt(make_net("gn"), "tent", optimizer=kind) for kind in (own, other))
    given(make_images(4))
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ConfigError, match="optimizers' settings"):
        method.load_state_dict(given.state_dict())
    assert same(method.state_dict(), before)
    assert torch.isfinite(method(make_images(4))).all()


def test_a_net_that_hides_its_gradients_is_refused():
    net = make_net("gn")
    net.forward = torch.no_grad()(net.forward)
    with pytest.raises(UnsupportedModelError, match="no_grad"):
        adapt(net, "tent")(make_images(4))


def test_a_scripted_net_is_refused():
    with pytest.raises(UnsupportedModelError, match="scripted"):
        adapt(torch.jit.trace(make_net("gn"), make_images(2)), "tent")


def test_nothing_is_said_of_images_that_nobody_gave():
    method = adapt(make_net("gn"), "lame")
    method(torch.full((2, 3, 16, 16), float("nan")))
    assert set(method.stats) == {"forwards", "backwards", "skipped_steps", "nonfinite_images"}


def test_statistics_are_of_the_last_step():
    method = adapt(make_net("gn"), "eta", lr=50.0, steps=2, entropy_margin=0.8)
    method(make_images(8))
    assert method.stats["kept"] == 0
    assert "loss" not in method.stats  # the first step had one
