"""References for methods that step on a memory of images: BatchNorm with statistics of its own, in plain torch."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta.draws import random_rows
from nets import max_difference

TOLERANCE = 1e-6  # float64; Adam scales rounding noise of small gradients up


class AveragedBN(nn.Module):
    """BatchNorm whose statistics are an average; in train mode with the batch in them, and gradient through it."""

    def __init__(self, layer, momentum, share=None, unbiased=False):
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()
        self.momentum, self.share, self.unbiased = momentum, momentum if share is None else share, unbiased

    def forward(self, x):
        view = (1, -1) + (1,) * (x.ndim - 2)
        mean, var = self.mean, self.var
        if self.training and x.numel() > x.shape[1]:  # else there is no variance
            dims = [d for d in range(x.ndim) if d != 1]
            batch_mean, batch_var = x.mean(dims), x.var(dims, unbiased=False)
            mean = (1 - self.share) * self.mean + self.share * batch_mean
            var = (1 - self.share) * self.var + self.share * batch_var
            kept = x.var(dims, unbiased=self.unbiased).detach()
            self.mean = (1 - self.momentum) * self.mean + self.momentum * batch_mean.detach()
            self.var = (1 - self.momentum) * self.var + self.momentum * kept
        x = (x - mean.view(view)) / (var.view(view) + self.eps).sqrt()
        return x * self.weight.view(view) + self.bias.view(view)


def with_layers(net, make):
    """A copy of the net in which ``make(layer)`` stands for each BatchNorm layer; norm layers alone learn."""
    net = copy.deepcopy(net).requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, _BatchNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, make(layer))
        if isinstance(layer, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            layer.weight.requires_grad_(True), layer.bias.requires_grad_(True)
    return net


def set_mode(net, train):
    """Train mode of the averaged layers alone: no dropout."""
    for layer in net.modules():
        if isinstance(layer, AveragedBN):
            layer.training = train


def learned(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def moments_of(net):
    """Means and variances in rows, the layers one after the other."""
    layers = [layer for layer in net.modules() if isinstance(layer, AveragedBN)]
    return torch.stack([torch.cat([layer.mean for layer in layers]), torch.cat([layer.var for layer in layers])])


def moved(net, start):
    """The largest change of the learned tensor that changed least."""
    return min((p - start.get_parameter(name)).abs().max().item() for name, p in learned(net).items())


def dimmed(images, key=None):
    """A view, in the place of a random one."""
    return (0.7 * images).roll(2, -1)


def log_softmax(logits):
    return logits - logits.exp().sum(1, keepdim=True).log()


class SlotMemory:
    """A memory in which a random image makes room; slots in a list, of (image, label, score) or None."""

    def __init__(self, size, classes, seed=0, threshold=None, reservoir=False):
        self.slots, self.size, self.seed = [None] * size, size, seed
        self.threshold, self.reservoir = threshold, reservoir
        self.seen, self.counts = 0, [0] * classes

    def add(self, image, label, score):
        extra = int(self.reservoir)
        draws = random_rows(self.seed, torch.tensor([self.seen]), self.size + extra)[0].tolist()
        draws = [draw / 2**64 + 0.5 for draw in draws]
        self.seen += 1
        self.counts[label] += 1
        if self.threshold is not None and score < self.threshold:
            return
        labels = [slot and slot[1] for slot in self.slots]
        if None in labels:
            rivals = [n for n, slot in enumerate(self.slots) if slot is None]
        else:
            number = {k: labels.count(k) for k in set(labels)}
            most = max(number.values())
            rivals = [n for n, k in enumerate(labels) if number[k] == most]
            if number.get(label) == most:
                if self.reservoir and draws[0] > most / self.counts[label]:
                    return
                rivals = [n for n in rivals if labels[n] == label]
        self.slots[max(rivals, key=lambda n: draws[n + extra])] = (image, label, score)

    def items(self):
        return [slot for slot in self.slots if slot is not None]


def assert_same_step(method, reference, images):
    """A batch in a method with one net, and in its reference with a :class:`SlotMemory`: logits and state."""
    predicted = method.predict(images[:1])
    logits, expected = method(images), reference(images)
    assert max_difference(logits, expected) < TOLERANCE
    assert max_difference(predicted, logits[:1]) < TOLERANCE
    for name, p in learned(reference.net).items():
        assert max_difference(method.model.get_parameter(name).detach(), p.detach()) < TOLERANCE
    if any(isinstance(layer, AveragedBN) for layer in reference.net.modules()):
        assert max_difference(method.value("net.statistics.moments"), moments_of(reference.net)) < TOLERANCE
    assert method.value("images.labels").tolist() == [-1 if s is None else s[1] for s in reference.memory.slots]
    assert method.value("images.seen") == reference.memory.seen
