"""Meta-TTT written out plainly, for the tests of its inner loop and of its training module."""

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy


def plain_loss(logits, phase, inner):
    """The inner loss, sample by sample, from probabilities."""
    total = torch.zeros((), dtype=logits.dtype)
    centred = logits
    if inner.temperature == "gem_t":
        centred = logits - logits.mean(1, keepdim=True).detach()
        centred = centred / logits.detach().std(0, correction=0).mean()
    for row, cold in zip(logits, centred, strict=True):
        p = row.exp() / row.exp().sum()
        if p.max() >= inner.threshold:
            h = -(p * p.log()).sum() if inner.confident_loss == "entropy" else -p.max().log()
            total = total + 2 / len(logits) * h
        else:
            q = cold.exp() / cold.exp().sum()
            total = total + (1 if phase == "min" else -1) * 2 / len(logits) * -(q * q.log()).sum()
    return total


def plain_adapt(net, images, inner, phases, rates_of, second_order):
    """One domain: the parameters after the steps, connected to the net's. ``rates_of``: phase -> name -> rate."""
    weights = dict(net.named_parameters())
    for phase in phases:
        for _ in range(inner.steps(phase)):
            used = {name: value.view_as(value) for name, value in weights.items()}
            loss = plain_loss(functional_call(net, used, (images,)), phase, inner)
            names = list(rates_of[phase])
            gradients = torch.autograd.grad(loss, [used[name] for name in names], create_graph=second_order)
            for name, gradient in zip(names, gradients, strict=True):
                weights[name] = weights[name] - rates_of[phase][name] * gradient
    return weights


def plain_outer_loss(net, images, labels, inner, phases, rates_of, *, domains=1, second_order=True):
    """The mean over domains of the cross-entropy after adaptation, one domain at a time."""
    losses = []
    for part, wanted in zip(images.chunk(domains), labels.chunk(domains), strict=True):
        weights = plain_adapt(net, part, inner, phases, rates_of, second_order)
        losses.append(cross_entropy(functional_call(net, weights, (part,)), wanted))
    return sum(losses) / domains
