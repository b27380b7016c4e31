"""What methods with an auxiliary share: what a failed preparation leaves behind, and what a checkpoint may say."""

import copy

import pytest
import torch

from lightning_tta import DataError, WeightsError, adapt
from lightning_tta.auxiliary.base import Trained, find_trained, note_trained
from lightning_tta.auxiliary.rotation import Rotation
from nets import make_images, make_net

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("ttt", "ttt_pp", "itta", "eco_tta")


class Failing:
    """Source batches that break off in a later pass over them."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield {"image": make_images(8, seed=50), "label": torch.arange(8) % 5}
        if self.passes == 3:
            raise KeyboardInterrupt


def tensors(method):
    return {name: value for name, value in copy.deepcopy(method.state_dict()).items() if torch.is_tensor(value)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:The net was not trained with")
def test_a_preparation_that_breaks_off_leaves_nothing_behind(name):
    method = adapt(make_net("bn"), name)
    before = tensors(method)
    with pytest.raises(KeyboardInterrupt):
        method.prepare(Failing())
    assert not method.prepared
    assert all(torch.equal(value, before[key]) for key, value in tensors(method).items())


@pytest.mark.filterwarnings("ignore:The net was not trained with")
def test_a_projector_without_source_moments_is_not_kept():
    method = adapt(make_net("gn"), "ttt_pp", head_lr=0.1)
    before = tensors(method)
    with pytest.raises(DataError, match="found 1"):
        method.prepare([{"image": make_images(1)}])
    assert all(torch.equal(value, before[key]) for key, value in tensors(method).items())


def test_what_a_checkpoint_says_must_fit():
    net = make_net("gn")
    net.auxiliary = torch.nn.Identity()  # a net may have one of its own
    assert find_trained(net, Rotation) is None
    note_trained(net, {"rotation": Trained({"depth": 3}, {})})
    with pytest.raises(WeightsError, match="depth"):
        find_trained(copy.deepcopy(net), Rotation)
    note_trained(net, {"rotation": Trained({}, {})})
    with pytest.raises(WeightsError, match="Missing key"):
        adapt(net, "ttt")
