"""Meta-training on nets as users bring them: the inner loop and its outer gradient are those of a plain twin."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import UnsupportedModelError
from lightning_tta.meta.inner_loop import InnerLoop, adapt_inner
from lightning_tta.meta.mixed_bn import convert_mixed_bn, make_mixed_layers
from nets import make_images
from odd_nets import RIGHT, Through, parametrized, plain, pruned

pytestmark = pytest.mark.usefixtures("one_thread")
INNER = InnerLoop(threshold=0.4, max_steps=2, min_steps=2)
KINDS = [
    "checkpointed",
    "checkpointed, reentrant",
    "writes into its input",
    "a plain list of layers",
    "a layer held twice",
]


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outer_gradient_of_the_plain_twin(kind, second_order):
    outcomes = []
    for net in RIGHT[kind]():
        net = copy.deepcopy(convert_mixed_bn(net.double()))  # what a strategy or an average of weights does
        images = make_images(8, dtype=torch.float64)
        before = images.clone()
        result = adapt_inner(net, images, INNER, domains=2, second_order=second_order, differentiable=True)
        assert torch.equal(images, before)
        named = dict(net.named_parameters())
        gradients = torch.autograd.grad(result.after.square().mean(), list(named.values()), materialize_grads=True)
        outcomes.append([result.after, *gradients])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_computed_weights_are_refused():
    for net in (parametrized()[0], pruned()):
        with pytest.raises(UnsupportedModelError, match=r"Layer '1'.*computed.*permanent"):
            make_mixed_layers(net)


def test_no_gradient_is_no_step():
    net = convert_mixed_bn(Through(plain(), lambda net, x: net[6:](net[:6](x).detach())))
    with pytest.raises(UnsupportedModelError, match="No gradient reaches"):
        adapt_inner(net, make_images(4), INNER)
    net = convert_mixed_bn(nn.Sequential(plain()[:6], nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 3)).eval())
    net[0].forward = torch.no_grad()(net[0].forward)  # the first layers alone: the others move
    assert adapt_inner(net, make_images(4), INNER).parameters["2.weight"].ne(1).any()
