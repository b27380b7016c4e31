"""Mixed batch norm's written-out derivatives against autograd through the formula, in float64, and what they cost."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tta.meta.mixing import Inner, Source, mixed_batch_norm
from nets import max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-2


def formula(x, weight, bias, w, source, domains):
    """The same, put together from operations that autograd knows."""
    groups = x.reshape(domains, -1, x.shape[1], x[0, 0].numel())
    mean, var = groups.mean((1, 3)), groups.var((1, 3), correction=1)
    mixed = w * source.var + (1 - w) * var + w * (1 - w) * (source.mean - mean) ** 2
    mixed = mixed.clamp_min(0) if source.bounded else mixed
    mean = w * source.mean + (1 - w) * mean
    y = (groups - mean[:, None, :, None]) / (mixed + source.eps).sqrt()[:, None, :, None]
    y = y if weight is None else y * weight.expand_as(mean)[:, None, :, None]
    y = y if bias is None else y + bias.expand_as(mean)[:, None, :, None]
    return y.reshape(x.shape)


def make(domains=2, rows=(1, 1, 1), affine=True, bounded=True, shape=(3, 2), dtype=torch.float64):
    """Inputs; ``rows``: of weight, bias and w, whether there is one a domain."""
    torch.manual_seed(0)
    channels = 3

    def values(each):
        return torch.randn((domains, channels) if each else channels, dtype=dtype)

    x = (torch.randn(2 * domains, channels, *shape, dtype=dtype) * 2 + 1).requires_grad_()
    weight, bias, w = (values(each).requires_grad_() for each in rows)
    w = w.detach().mul_(0.2).add_(0.6).requires_grad_()
    source = Source(torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5, EPS, bounded)
    return [x, weight if affine else None, bias if affine else None, w], source


def first_and_second(function, inputs, source, domains, wanted):
    """The result, gradients, and gradients of a product with gradients by those inputs whose numbers are ``wanted``."""
    torch.manual_seed(1)
    learned = [value for value in inputs if value is not None and value.requires_grad]
    y = function(*inputs, source, domains)
    g = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, learned, g, create_graph=True)
    product = sum((value * torch.randn_like(value)).sum() for n, value in enumerate(first) if n in wanted)
    second = torch.autograd.grad(product, [*learned, g], materialize_grads=True)
    return [y, *first, *second]


def assert_same_derivatives(inputs, source, domains, wanted):
    pairs = [first_and_second(f, inputs, source, domains, wanted) for f in (mixed_batch_norm, formula)]
    for ours, theirs in zip(*pairs, strict=True):
        assert max_difference(ours.detach(), theirs.detach()) < 1e-11 * (1 + theirs.detach().abs().max())


CASES = {
    "all domains alike": {"rows": (0, 0, 0)},
    "weights of each domain": {"rows": (1, 1, 0)},
    "biases of each domain": {"rows": (0, 1, 0)},
    "all of each domain": {},
    "one domain": {"domains": 1, "rows": (0, 0, 0)},
    "no affine map": {"affine": False},
    "not bounded": {"bounded": False, "rows": (0, 0, 0)},
    "no space": {"shape": ()},
    "a line": {"shape": (5,)},
}


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_formula(case):
    inputs, source = make(**CASES[case])
    domains = CASES[case].get("domains", 2)
    numbers = range(sum(value is not None for value in inputs))
    for wanted in itertools.chain(*(itertools.combinations(numbers, size) for size in range(1, len(numbers) + 1))):
        assert_same_derivatives(inputs, source, domains, wanted)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 3), (1, 2, 3)])
def test_what_is_frozen_changes_no_other_derivative(frozen):
    inputs, source = make(rows=(0, 1, 0))
    for number in frozen:
        inputs[number].requires_grad_(False)
    wanted = range(4 - len(frozen))
    assert_same_derivatives(inputs, source, 2, wanted)


def test_a_bounded_variance_is_a_constant():
    inputs, source = make(rows=(0, 0, 0))
    with torch.no_grad():
        inputs[0].add_(20)
        inputs[3].copy_(torch.tensor([3.0, 0.5, -2.0]))  # far outside, inside, far outside
    assert_same_derivatives(inputs, source, 2, range(4))


def test_gradients_of_gradients_by_finite_differences():
    inputs, source = make(domains=2, rows=(1, 0, 1), shape=(2,))
    assert torch.autograd.gradcheck(lambda *values: mixed_batch_norm(*values, source, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda *values: mixed_batch_norm(*values, source, 2), inputs)


def test_a_third_derivative_is_refused():
    inputs, source = make()
    y = mixed_batch_norm(*inputs, source, 2)
    (first,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


def test_a_step_leaves_the_mixing_weights_out():
    inputs, source = make()
    inner = Inner()
    y = mixed_batch_norm(*inputs, source, 2, inner).square().sum()
    for wanted in (False, True):
        inner.mixing = wanted
        *_, gradient = torch.autograd.grad(y, inputs, retain_graph=True, allow_unused=True)
        assert (gradient is not None) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_rounds_and_no_more(dtype):
    exact, source = make(rows=(0, 0, 0), shape=(4, 4))
    with torch.no_grad():
        exact[0].copy_(exact[0].to(dtype))
    rough = [value.detach().to(dtype if n == 0 else torch.float32).requires_grad_() for n, value in enumerate(exact)]
    outcomes = []
    for inputs in (rough, exact):
        statistics = (value.to(inputs[1].dtype) for value in source[:2])
        y = mixed_batch_norm(*inputs, Source(*statistics, EPS, True), 2)
        first = torch.autograd.grad(y.double().square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(value.double().square().sum() for value in first), inputs)
        assert [value.dtype for value in second] == [value.dtype for value in inputs]
        outcomes.append([y, *first, *second])
    for ours, theirs in zip(*outcomes, strict=True):
        assert (
            max_difference(ours.detach().double(), theirs.detach()) < 40 * torch.finfo(dtype).eps * theirs.abs().max()
        )


def test_layout_and_room_to_write_in():
    inputs, source = make(shape=(4, 4))
    inputs[0] = inputs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = mixed_batch_norm(*inputs, source, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y._is_view()
    (gradient,) = torch.autograd.grad(y.relu_().sum(), inputs[0])  # in place, and no graph of copies behind it
    assert gradient.is_contiguous(memory_format=torch.channels_last)


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        self.number += not (func.is_view or name in ("detach", "empty_like", "empty"))
        return func(*args, **(kwargs or {}))


def test_kernels_of_a_layer():
    """On a CPU, where the moments are five and not one; the formula's are 23, 33 and 122."""
    numbers = []
    for function in (mixed_batch_norm, formula):
        inputs, source = make(rows=(1, 1, 0), shape=(4, 4))
        with Kernels() as forward:
            y = function(*inputs, source, 2)
        with Kernels() as gradient:
            first = torch.autograd.grad(y, inputs[:3], torch.ones_like(y), create_graph=True)
        first = [value for value in first if value.requires_grad]
        with Kernels() as second:
            torch.autograd.grad(first, inputs, [torch.ones_like(value) for value in first], allow_unused=True)
        numbers.append((forward.number, gradient.number, second.number))
    ours, theirs = numbers
    assert all(number <= limit for number, limit in zip(ours, (26, 19, 41), strict=True)), numbers
    assert sum(theirs) > 2 * sum(ours), numbers
