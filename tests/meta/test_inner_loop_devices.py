"""Outer and test-time steps on a GPU that is not there: one device, no question to the host, and how many kernels."""

import pytest
import torch
from test_inner_loop import settings
from test_mixing import Kernels
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import cross_entropy

from fake_gpu import DEVICE, move
from lightning_tta.backbones import create_backbone
from lightning_tta.meta.inner_loop import InnerParameters, adapt_inner
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from lightning_tta.meta.synthesis import DomainShiftSynthesis
from lightning_tta.methods import MetaTTT
from nets import make_images, make_net

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # by torch's own check of parameters
]
OPTIONS = [{}, {"temperature": "gem_t", "confident_loss": "entropy", "source_weight_lr": 0.1, "min_steps": 2}]


@pytest.fixture
def no_values():
    """Tensors made meanwhile are on a GPU and have no values: to ask for one, or to mix devices, is an error."""
    with FakeTensorMode(), torch.device(DEVICE):
        yield


def with_values(make):
    """What is made while tensors have values, on the CPU."""
    with unset_fake_temporarily(), torch.device("cpu"):
        return make()


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_outer_step(no_values, second_order, options):
    net = with_values(lambda: convert_mixed_bn(make_net("bn"), 0.6))
    inner = settings(**options)
    parameters = with_values(lambda: InnerParameters(net, inner))
    net, rate = move(net), torch.ones((), requires_grad=True)
    with DomainShiftSynthesis(net, 0.5).active(*torch.rand(2, 2, 8)):
        result = adapt_inner(
            net,
            torch.rand(8, 3, 8, 8),
            inner,
            domains=2,
            second_order=second_order,
            differentiable=True,
            rates={**inner.rates, "scale": rate},
            inner_parameters=parameters,
        )
    loss = cross_entropy(result.after.flatten(0, 1), torch.zeros(8, dtype=torch.int64))
    gradients = torch.autograd.grad(loss, [*net.parameters(), rate], materialize_grads=True)
    assert {value.device.type for value in (*gradients, *result.parameters.values(), result.before)} == {DEVICE}


@pytest.mark.parametrize("episodic", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_at_test_time(no_values, episodic, options):
    method = move(with_values(lambda: MetaTTT(make_net("bn"), episodic=episodic, **options)))
    with torch.enable_grad(), method.running():
        logits = method.step(torch.rand(8, 3, 8, 8))
    assert logits.device.type == DEVICE
    assert {value.device.type for value in method.adaptable.values()} == {DEVICE}


def test_a_question_is_found(no_values):
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        bool(torch.rand(1) > 0)
    with pytest.raises(RuntimeError, match="device"):
        torch.rand(1) + torch.rand(1, device="cpu")


def test_kernels_of_an_outer_step():
    """ResNet-20, 19 BatchNorm layers, on a CPU; they were 6,100 with operations of torch alone."""
    net = convert_mixed_bn(create_backbone("cifar/resnet20", 10).eval(), 0.6)
    with Kernels() as kernels:
        result = adapt_inner(net, make_images(8, size=32), settings(max_steps=0), domains=2, second_order=True)
        torch.autograd.grad(result.after.sum(), list(net.parameters()), materialize_grads=True)
    assert kernels.number < 4000
