"""ZeroSiam's objective in the inner loop: against a plain reference, finite differences and what it is at one step."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_tta import ConfigError, methods
from lightning_tta.losses import entropy
from lightning_tta.meta.inner_loop import PREDICTOR, InnerLoop, InnerParameters, adapt_inner, alignment
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from nets import make_images, make_net, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.arange(12) % 5
RATES = {"norm1.weight": 0.3, "norm2.weight": 0.3, "norm1.bias": 0.2, "norm2.bias": 0.2}


def make_mixed():
    torch.manual_seed(3)
    net = make_net("bn").double()
    with torch.no_grad():
        net.head.weight.mul_(4)
    return convert_mixed_bn(net, 0.6, 0.05)


def settings(**options):
    given = {"max_steps": 0, "min_steps": 3, "scale_lr": 0.3, "shift_lr": 0.2, "predictor_lr": 0.7}
    return InnerLoop(min_objective="zerosiam", **{**given, **options})


def images_of(count=12):
    return make_images(count, dtype=torch.float64)


def plain_adapt(net, images, steps, predictor_lr, second_order, targets=None):
    """Sample by sample and class by class, with the predictor (F, F) beside the net's parameters.

    ``targets``: the logits of the reference branch at each step, where they are others than the net's.
    """
    weights, h = dict(net.named_parameters()), torch.eye(12, dtype=torch.float64, requires_grad=True)
    for step in range(steps):
        used = {name: value.view_as(value) for name, value in weights.items()}
        own = h.view_as(h)
        seen = []
        handle = net.head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        logits = functional_call(net, used, (images,))
        handle.remove()
        total = torch.zeros((), dtype=torch.float64)
        for z, u in zip(seen[0], logits if targets is None else targets[step], strict=True):
            online = net.head.weight @ (own @ z) + net.head.bias
            p, q = u.detach().exp() / u.detach().exp().sum(), online.exp() / online.exp().sum()
            for pk, qk in zip(p, q, strict=True):
                total = total - qk * qk.log() + pk * (pk / qk).log() + qk * (qk / pk).log()
        names = list(RATES)
        *gradients, of_h = torch.autograd.grad(
            total / len(images), [*(used[name] for name in names), own], create_graph=second_order
        )
        for name, gradient in zip(names, gradients, strict=True):
            weights[name] = weights[name] - RATES[name] * gradient
        h = h - predictor_lr * of_h
    return weights, h


@pytest.mark.parametrize("second_order", [False, True])
def test_steps_are_those_of_the_reference(second_order):
    net = make_mixed()
    result = adapt_inner(net, images_of(), settings(), second_order=second_order)
    weights, h = plain_adapt(net, images_of(), 3, 0.7, second_order)
    assert max_difference(result.after[0].detach(), functional_call(net, weights, (images_of(),)).detach()) < 1e-12
    assert set(result.parameters) == {*RATES, PREDICTOR}
    for name in RATES:
        assert max_difference(result.parameters[name].detach(), weights[name].detach()) < 1e-12
    assert max_difference(result.parameters[PREDICTOR].detach(), h.detach()) < 1e-12
    assert (h - torch.eye(12)).abs().max() > 1e-3
    loss = cross_entropy(result.after[0], LABELS) if second_order else None
    if loss is not None:
        parameters = list(net.parameters())
        ours = torch.autograd.grad(loss, parameters)
        theirs = torch.autograd.grad(cross_entropy(functional_call(net, weights, (images_of(),)), LABELS), parameters)
        assert max(max_difference(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-11


def test_outer_gradient_against_finite_differences():
    """Of the reference, whose targets stay where they are."""
    net = make_mixed()
    parameters = list(net.parameters())
    targets = [net(images_of()).detach()]
    for steps in (1, 2):
        weights, _ = plain_adapt(net, images_of(), steps, 0.7, False)
        targets.append(functional_call(net, weights, (images_of(),)).detach())
    torch.manual_seed(0)
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def loss_at(step):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
        weights, _ = plain_adapt(net, images_of(), 3, 0.7, False, targets)
        loss = cross_entropy(functional_call(net, weights, (images_of(),)), LABELS).item()
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=step)
        return loss

    along = {}
    for second_order in (True, False):
        result = adapt_inner(net, images_of(), settings(), second_order=second_order, differentiable=True)
        gradients = torch.autograd.grad(cross_entropy(result.after[0], LABELS), parameters, materialize_grads=True)
        along[second_order] = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    h = 2e-5  # fourth order: error h^4
    numeric = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    assert abs(numeric - along[True]) < 1e-6 * abs(numeric)
    assert abs(numeric - along[False]) > 1e-3 * abs(numeric)


def test_the_first_step_is_that_of_tent():
    net = make_mixed()
    result = adapt_inner(net, images_of(), settings(min_steps=1))
    named = dict(net.named_parameters())
    gradients = torch.autograd.grad(entropy(net(images_of())).mean(), [named[name] for name in RATES])
    for (name, rate), gradient in zip(RATES.items(), gradients, strict=True):
        assert max_difference(result.parameters[name], named[name].detach() - rate * gradient) < 1e-13


def test_domains_have_a_predictor_each():
    net = make_mixed()
    together = adapt_inner(net, images_of(), settings(max_steps=1, max_lr=0.1), domains=2)
    for d, part in enumerate(images_of().chunk(2)):
        apart = adapt_inner(net, part, settings(max_steps=1, max_lr=0.1))
        assert max_difference(together.after[d], apart.after[0]) < 1e-12
        assert max_difference(together.parameters[PREDICTOR][d], apart.parameters[PREDICTOR]) < 1e-12


def test_alignment_is_of_the_net_alone():
    net, inner = make_mixed(), settings()
    result = adapt_inner(net, images_of(), inner, differentiable=True, keep_before=True)
    labels = net(images_of()).argmax(1)
    cosine = alignment(result, InnerParameters(net, inner), labels).item()
    named = dict(net.named_parameters())
    parameters = [named[name] for name in result.gradients if name != PREDICTOR]
    losses = entropy(net(images_of())).mean(), cross_entropy(net(images_of()), labels)
    first, second = (torch.cat(torch.autograd.grad(loss, parameters)) for loss in losses)
    assert math.isclose(cosine, (first @ second / first.norm() / second.norm()).item(), abs_tol=1e-9)


def test_online_the_predictor_goes_on_and_a_reset_takes_it_back():
    options = {"min_objective": "zerosiam", "max_steps": 0, "min_steps": 2, "predictor_lr": 0.5}
    online = methods.MetaTTT(make_net("bn").double(), episodic=False, **options)
    online(images_of())
    after_one = online.predictor.weight.detach().clone()
    online(images_of())
    assert not torch.equal(after_one, torch.eye(12))
    assert not torch.equal(online.predictor.weight, after_one)
    online.reset()
    assert torch.equal(online.predictor.weight, torch.eye(12, dtype=torch.float64))
    episodic = methods.MetaTTT(make_net("bn").double(), **options)
    assert torch.equal(episodic(images_of()), episodic(images_of()))
    assert torch.equal(episodic.predictor.weight, torch.eye(12, dtype=torch.float64))


def test_what_it_cannot_be():
    with pytest.raises(ConfigError, match="min_objective"):
        InnerLoop(min_objective="tent")
    with pytest.raises(ConfigError, match="predictor_lr"):
        InnerLoop(predictor_lr=-1.0)
    assert PREDICTOR not in InnerLoop().rates
