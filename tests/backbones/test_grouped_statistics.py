"""Statistics of parts of a batch, in one pass."""

import copy

import pytest
import torch

from lightning_tta.backbones.norms import batch_statistics, grouped_batch_statistics
from nets import KINDS, make_images, make_net, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4])
def test_grouped_statistics_are_those_of_each_part(kind, size):
    net = make_net(kind).double()
    before = copy.deepcopy(net.state_dict())
    parts = [make_images(size, seed=i, dtype=torch.float64) for i in range(3)]
    with torch.no_grad():
        plain = net(parts[0])
        expected = []
        for part in parts:
            with batch_statistics(net):
                expected.append(net(part))
        with grouped_batch_statistics(net, 3):
            logits = net(torch.cat(parts))
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-10, atol=1e-10)
        if kind == "bn":
            with batch_statistics(net):
                assert not torch.allclose(net(torch.cat(parts)), logits, atol=1e-3)
        assert torch.equal(net(parts[0]), plain)
    assert same(net.state_dict(), before)


def test_grouped_statistics_are_gone_after_an_error():
    net = make_net("bn")
    images = make_images(4)
    with torch.no_grad():
        expected = net(images)
        with pytest.raises(RuntimeError), grouped_batch_statistics(net, 2):
            net(torch.rand(4, 5, 16, 16))
        with pytest.raises(KeyError), grouped_batch_statistics(net, 2):
            raise KeyError
        assert torch.equal(net(images), expected)
    assert all("forward" not in vars(module) for module in net.modules())
