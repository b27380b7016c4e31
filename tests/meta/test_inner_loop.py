"""The inner loop of Meta-TTT: values and gradients against a plain reference, finite differences and `higher`."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_tta import ConfigError, UnsupportedModelError
from lightning_tta.meta.inner_loop import InnerLoop, InnerParameters, adapt_inner
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from meta_reference import plain_adapt, plain_loss
from nets import make_images, make_net, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")

PHASES = {"max": ("max",), "min": ("min",), "chained": ("max", "min")}  # alternating: max and min in turn
LABELS = torch.arange(12) % 5


def make_mixed(kind="bn", std=0.05):
    torch.manual_seed(3)
    net = make_net(kind).double()
    with torch.no_grad():
        net.head.weight.mul_(4)
    return convert_mixed_bn(net, 0.6, std)


def settings(**options):
    # 0.5: of the twelve images some are confident, some not, none comes near the threshold on the way
    given = {"threshold": 0.5, "max_lr": 0.01, "scale_lr": 0.015, "shift_lr": 0.01, "max_layers": 0.5}
    return InnerLoop(**{**given, **options})


def images_of(count=12):
    return make_images(count, dtype=torch.float64)


def outer_loss(net, inner, **options):
    result = adapt_inner(net, images_of(), inner, differentiable=True, **options)
    return cross_entropy(result.after.flatten(0, 1), LABELS)


def gradient(net, inner, **options):
    parameters = list(net.parameters())
    return torch.autograd.grad(outer_loss(net, inner, **options), parameters, materialize_grads=True)


# A plain reference -----------------------------------------------------------------------------------------------


def rates_by_hand(inner):
    """Of ConvNet: norm2 is the max layer."""
    rates = {"norm1.weight": inner.scale_lr, "norm2.weight": inner.scale_lr, "norm1.bias": inner.shift_lr}
    if inner.source_weight_lr:
        rates |= {f"norm{i}.source_weight": inner.source_weight_lr for i in (1, 2)}
    return {"max": {"norm2.bias": inner.max_lr}, "min": rates}


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 3, "min_steps": 3},
        {"temperature": "gem_t"},
        {"confident_loss": "entropy", "source_weight_lr": 0.1, "min_steps": 2},
    ],
    ids=str,
)
def test_steps_are_those_of_the_reference(phases, second_order, options):
    net, inner = make_mixed(), settings(**options)
    before = copy.deepcopy(net.state_dict())
    result = adapt_inner(net, images_of(), inner, phases=phases, second_order=second_order)
    weights = plain_adapt(net, images_of(), inner, phases, rates_by_hand(inner), second_order)
    logits = functional_call(net, weights, (images_of(),)).detach()
    assert max_difference(result.after[0].detach(), logits) < 1e-12
    assert max_difference(result.before[0].detach(), net(images_of()).detach()) < 1e-12
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, weights[name])}
    assert set(result.parameters) == moved
    for name, value in result.parameters.items():
        assert max_difference(value.detach(), weights[name].detach()) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_confident_and_unconfident_samples_both_count():
    p = make_mixed()(images_of()).softmax(1).amax(1)
    assert 3 <= (p >= 0.5).sum() <= 9
    assert (p - 0.5).abs().min() > 0.005


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("domains", [2, 3])
def test_domains_adapt_on_their_own(phases, domains):
    net, inner = make_mixed(), settings(min_steps=2)
    together = adapt_inner(net, images_of(), inner, phases=phases, domains=domains)
    for d, part in enumerate(images_of().chunk(domains)):
        apart = adapt_inner(net, part, inner, phases=phases)
        assert max_difference(together.after[d], apart.after[0]) < 1e-12
        for name, value in apart.parameters.items():
            assert max_difference(together.parameters[name][d], value) < 1e-12


# Second order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("options", [{}, {"confident_loss": "entropy", "source_weight_lr": 0.05}], ids=str)
def test_outer_gradient_against_finite_differences(phases, steps, domains, options):
    net = make_mixed()
    inner = settings(max_steps=steps, min_steps=steps, **options)
    parameters = list(net.parameters())
    exact = gradient(net, inner, phases=phases, domains=domains, second_order=True)
    first = gradient(net, inner, phases=phases, domains=domains)
    for seed in range(3):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]

        def loss_at(step, direction=direction):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=step)
            value = outer_loss(net, inner, phases=phases, domains=domains).item()
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=step)
            return value

        h = 2e-5  # fourth order: error h^4
        numeric = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
        along = sum((g * d).sum() for g, d in zip(exact, direction, strict=True)).item()
        along_first = sum((g * d).sum() for g, d in zip(first, direction, strict=True)).item()
        assert abs(numeric - along) < 1e-6 * abs(numeric)
        assert abs(numeric - along_first) > 1e-5 * abs(numeric)


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("temperature", ["none", "gem_t"])
def test_outer_gradient_against_higher(phases, steps, domains, temperature):
    higher = pytest.importorskip("higher", reason="the oracle is a dev extra: pip install -e '.[dev]'")
    net = make_mixed()
    inner = settings(max_steps=steps, min_steps=steps, temperature=temperature)
    ours = gradient(net, inner, phases=phases, domains=domains, second_order=True)
    rate_of = InnerParameters(net, inner).rate_of
    names = [name for name, _ in net.named_parameters()]
    groups = [{"params": [p], "lr": 0.0} for p in net.parameters()]
    theirs = [torch.zeros_like(p) for p in net.parameters()]
    for part, labels in zip(images_of().chunk(domains), LABELS.chunk(domains), strict=True):
        optimizer = torch.optim.SGD(groups, lr=0.0)
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, differentiable):
            for phase in phases:
                rates = [inner.rates[rate_of[phase][n]] if n in rate_of[phase] else 0.0 for n in names]
                for _ in range(steps):
                    loss = plain_loss(fast(part), phase, inner)
                    differentiable.step(loss, override={"lr": rates})
            loss = cross_entropy(fast(part), labels) / domains
            parts = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
        theirs = [a + b for a, b in zip(theirs, parts, strict=True)]
    for a, b in zip(ours, theirs, strict=True):
        assert max_difference(a, b) < 1e-10


def test_learned_rates_get_gradients():
    net, inner = make_mixed(), settings()
    rate = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)

    def loss_at(value):
        return outer_loss(net, inner, second_order=True, rates={**inner.rates, "scale": value})

    (slope,) = torch.autograd.grad(loss_at(rate), rate)
    numeric = (loss_at(0.07 + 1e-5) - loss_at(0.07 - 1e-5)).item() / 2e-5
    assert abs(slope.item() - numeric) < 1e-6 * abs(numeric)


# Behaviour ---------------------------------------------------------------------------------------------------------


def entropy_of_unconfident(logits, threshold):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)[p.amax(-1) < threshold].mean().item()


def test_max_raises_and_min_lowers_the_entropy_of_unconfident_samples():
    net = make_mixed()
    for phase, sign in (("max", 1), ("min", -1)):
        inner = settings(threshold=0.999, max_lr=0.02, scale_lr=0.02, shift_lr=0.02)  # all are unconfident
        result = adapt_inner(net, images_of(), inner, phases=(phase,))
        before, after = (entropy_of_unconfident(x.detach(), 0.999) for x in (result.before, result.after))
        assert sign * (after - before) > 1e-4


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("temperature", ["none", "gem_t"])
@pytest.mark.parametrize("images", [images_of(), images_of(1), images_of()[:1].expand(4, -1, -1, -1)])
def test_only_confident_or_only_unconfident_samples(threshold, temperature, images):
    net = make_mixed()
    inner = settings(threshold=threshold, temperature=temperature, max_steps=2, min_steps=2)
    result = adapt_inner(net, images, inner, second_order=True)
    gradients = torch.autograd.grad(result.after.logsumexp(-1).sum(), list(net.parameters()), materialize_grads=True)
    assert all(torch.isfinite(value).all() for value in (result.after, *result.parameters.values(), *gradients))


def test_saturated_logits_stay_finite():
    net = make_mixed()
    with torch.no_grad():
        net.head.weight.mul_(1e4)
    result = adapt_inner(net, images_of(), settings(threshold=1.0), second_order=True)
    assert torch.isfinite(result.after).all()


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1},
        {"max_steps": 0, "min_steps": 0},
        {"scale_lr": -0.1},
        {"threshold": 1.1},
        {"max_layers": 0.0},
        {"confident_loss": "mse"},
        {"temperature": "hot"},
    ],
    ids=str,
)
def test_wrong_settings(options):
    with pytest.raises(ConfigError, match=r"must be|both 0"):
        InnerLoop(**options)


def test_nets_that_cannot_adapt():
    with pytest.raises(UnsupportedModelError, match="no mixed batch norm"):
        InnerParameters(make_net("bn"), InnerLoop())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(UnsupportedModelError, match="no weight and bias"):
        InnerParameters(convert_mixed_bn(plain), InnerLoop())
