"""PERK's inner loop against steps written out by hand, and its outer gradient against finite differences."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax

from lightning_tta import ConfigError, InputError, UnsupportedModelError
from lightning_tta.meta.perk import ContextLoop, TokenWeights, learn_context, mean_loss, run_with
from lightning_tta.meta.unrolling import AdamW
from lightning_tta.methods.components.adapters import put_in
from nets import max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
V, T = 7, 5


class TinyLM(nn.Module):
    """A causal net in few lines: embeddings, one attention over earlier tokens, an MLP, a head."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.place = nn.Parameter(torch.randn(16, width))
        self.q, self.k, self.v, self.mlp = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, V)

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.place[: input_ids.shape[1]]
        x = x + nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)
        return self.head(x + torch.tanh(self.mlp(x)))


def make(seed=0, started=True):
    torch.manual_seed(seed)
    net = TinyLM().double().eval()
    names = list(put_in(net, {"kind": "lora", "rank": 2})[1])
    if started:  # else up = 0, and half of the first gradient is 0
        for name in names:
            net.get_parameter(name).data.normal_(std=0.3)
    return net, names


def data(contexts=2, segments=3, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(V, (contexts, segments, T))
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[0, -1, 3:] = False  # padding
    questions = torch.randint(V, (contexts, 2, 4))
    answers = torch.zeros_like(questions, dtype=torch.bool)
    answers[..., -1] = True
    return ids, counts, questions, answers


def plain_loss(logits, ids, counts):
    """Token by token; (S, T, V), (S, T), (S, T)."""
    terms = [
        -log_softmax(logits[s, t - 1], 0)[ids[s, t]]
        for s in range(ids.shape[0])
        for t in range(1, ids.shape[1])
        if counts[s, t]
    ]
    return sum(terms) / len(terms)


def plain_steps(net, names, ids, counts, inner, rates):
    """One context: the adapter after the steps, with torch's own autograd and a detach before the last T steps."""
    values = {name: net.get_parameter(name) for name in names}
    first = dict.fromkeys(names, 0.0)
    second = dict.fromkeys(names, 0.0)
    for step in range(inner.steps):
        with sdpa_kernel(SDPBackend.MATH):
            loss = plain_loss(functional_call(net, values, (ids,)), ids, counts)
        gradients = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        if step < inner.steps - inner.unrolled_steps:
            gradients = [gradient.detach() for gradient in gradients]
        for number, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            move = gradient
            if inner.inner_optimizer == "adamw":
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                root = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                move = first[name] / (1 - 0.9 ** (step + 1)) / root
            values[name] = values[name] - rates[step, number] * move
    return values


def outer(net, names, inner, rates=None, seed=1, **options):
    ids, counts, questions, answers = data(seed=seed)
    learned = learn_context(net, names, ids, counts, inner, differentiable=True, rates=rates, **options)
    return mean_loss(run_with(net, learned.parameters, questions), questions, answers).mean()


def adapter(net, names):
    return [net.get_parameter(name) for name in names]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("unrolled", [0, 1, 3])
def test_steps_and_outer_gradient_are_those_of_steps_by_hand(optimizer, unrolled):
    net, names = make()
    inner = ContextLoop(3, unrolled, optimizer, 0.1)
    rates = (0.05 + 0.1 * torch.rand(3, len(names), dtype=torch.float64)).requires_grad_()
    ids, counts, questions, answers = data()
    learned = learn_context(net, names, ids, counts, inner, differentiable=True, rates=rates)
    ours = mean_loss(run_with(net, learned.parameters, questions), questions, answers).mean()
    theirs = 0.0
    for d in range(2):
        values = plain_steps(net, names, ids[d], counts[d], inner, rates)
        for name in names:
            assert max_difference(learned.parameters[name][d].detach(), values[name].detach()) < 1e-12
        with sdpa_kernel(SDPBackend.MATH):
            logits = functional_call(net, values, (questions[d],))
        theirs = theirs + plain_loss(logits, questions[d], answers[d]) / 2
    assert abs(ours - theirs) < 1e-12
    wanted = [*adapter(net, names), rates]
    ours, theirs = (torch.autograd.grad(loss, wanted) for loss in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6
        assert max_difference(a, b) < 1e-10 * (1 + b.abs().max().item())


def test_truncation_changes_the_gradient_and_not_the_steps():
    net, names = make()
    losses, gradients = [], []
    for unrolled in (0, 1, 2, 3):
        losses.append(outer(net, names, ContextLoop(3, unrolled, "sgd", 0.3)))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses[-1], adapter(net, names))]))
    assert len({loss.item() for loss in losses}) == 1
    errors = [max_difference(gradient, gradients[-1]) for gradient in gradients[:-1]]
    assert min(errors) > 1e-4
    assert errors[0] > errors[1] > errors[2]  # each step that is differentiated brings it closer to the exact one


@pytest.mark.parametrize("weighted", [False, True])
def test_whole_second_order_is_the_derivative(weighted):
    net, names = make()
    rates = torch.full((3, len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    options, parameters = {}, [*adapter(net, names), rates]
    if weighted:
        weights = TokenWeights(6, 3).double()
        nn.init.normal_(weights.second.weight)
        options = {"weights": weights, "head": net.head}
        parameters += list(weights.parameters())
    inner = ContextLoop(3, 3, "sgd", 0.3)
    exact = torch.autograd.grad(outer(net, names, inner, rates, **options), parameters)
    first = torch.autograd.grad(
        outer(net, names, ContextLoop(3, 0, "sgd"), rates, **options), parameters, materialize_grads=True
    )
    for seed in range(2):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]

        def at(step, direction=direction):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=step)
            value = outer(net, names, inner, rates, **options).item()
            with torch.no_grad():
                torch._foreach_sub_(parameters, direction, alpha=step)
            return value

        h = 1e-4  # fourth order: error h^4
        numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        along, along_first = (sum((g * d).sum() for g, d in zip(x, direction, strict=True)) for x in (exact, first))
        assert abs(numeric - along) < 1e-7 * abs(numeric) + 1e-9
        assert abs(numeric - along_first) > 1e-3 * abs(numeric)


def test_gradients_stay_finite_where_lora_starts():
    net, names = make(started=False)
    for optimizer in ("sgd", "adamw"):
        loss = outer(net, names, ContextLoop(2, 2, optimizer, 0.1))
        gradients = torch.autograd.grad(loss, adapter(net, names))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_adamw_leaves_what_has_no_gradient():
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    gradient = torch.tensor([0.0, 3.0], dtype=torch.float64, requires_grad=True)
    moved = AdamW()(0, values, gradient, 0.1)
    assert moved[0] == 1
    assert abs(moved[1] - 1.9) < 1e-8  # the first step is the gradient's sign
    (slope,) = torch.autograd.grad(moved.sum(), gradient)
    assert slope[0] == 0
    assert slope[1].abs() < 1e-8


def test_order_of_segments_does_not_matter_and_contexts_are_apart():
    net, names = make()
    ids, counts, *_ = data()
    inner = ContextLoop(3, 0, "sgd", 0.3)
    learned = learn_context(net, names, ids, counts, inner).parameters
    turned = learn_context(net, names, ids[:, [2, 0, 1]], counts[:, [2, 0, 1]], inner).parameters
    alone = [learn_context(net, names, ids[d : d + 1], counts[d : d + 1], inner).parameters for d in range(2)]
    for name in names:
        assert max_difference(learned[name], turned[name]) < 1e-12
        assert max_difference(learned[name], torch.cat([each[name] for each in alone])) < 1e-12
        assert max_difference(learned[name][0], learned[name][1]) > 1e-3


def test_padding_does_not_count():
    net, names = make()
    ids, counts, *_ = data()
    other = torch.where(counts, ids, (ids + 1) % V)
    a, b = (learn_context(net, names, x, counts, ContextLoop(2, 0)).parameters for x in (ids, other))
    assert all(torch.equal(a[name], b[name]) for name in names)


def test_weights_are_one_at_first():
    weights = TokenWeights(4)(torch.randn(3, 5, 4))
    assert max_difference(weights, torch.ones(3, 5)) < 1e-6
    assert math.isclose(nn.functional.softplus(torch.zeros(()), beta=3).item(), math.log(2) / 3, rel_tol=1e-6)


def test_no_steps_are_the_start():
    net, names = make()
    ids, counts, *_ = data()
    learned = learn_context(net, names, ids, counts, ContextLoop(0, 0))
    assert not learned.losses
    assert all(torch.equal(learned.parameters[name][1], net.get_parameter(name)) for name in names)


def test_what_is_refused():
    net, names = make()
    ids, counts, *_ = data()
    for options in ({"steps": -1}, {"steps": 2, "unrolled_steps": 3}, {"inner_lr": 0.0}, {"inner_optimizer": "adam"}):
        with pytest.raises(ConfigError, match="must be"):
            ContextLoop(**options)
    with pytest.raises(InputError, match="token ids"):
        learn_context(net, names, ids[0], counts[0], ContextLoop())
    net.forward = lambda input_ids: input_ids
    with pytest.raises(UnsupportedModelError, match="logits"):
        learn_context(net, names, ids, counts, ContextLoop())
