"""Scores of predictions without labels, to choose among methods: the larger, the better the predictions should be.

Each takes logits (N, K) of one method over the same N samples, or features (N, D), and returns a scalar tensor on their
device, of at least float32. None is an accuracy: only scores of the same kind, over the same samples, compare.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_tta.losses import at_least_float32, entropy

_ROWS = 2048  # of the similarities that are in memory at once


def negative_mean_entropy(logits: Tensor) -> Tensor:
    """Minus the mean entropy of the predictions, over log K; in [-1, 0]. Larger is better, and best after a collapse.

    Source: Morerio et al., ICLR 2018, arXiv 1711.10288, who choose hyper-parameters by it.
    """
    return -entropy(logits).mean() / math.log(logits.shape[-1])


def infomax(logits: Tensor, weight: float = 1.0) -> Tensor:
    """Mutual information of sample and class, over log K: ``weight * H(mean p) - mean H(p)``. Larger is better.

    In [0, 1] with ``weight`` 1: 1 if each prediction is sure and all classes come equally often; 0 after a collapse to
    one class. A stream sorted by class lowers it, too: compare methods over the same samples.

    Args:
        logits: (N, K).
        weight: Of the marginal entropy, at least 0.

    Source: Shi and Sha, ICML 2012, arXiv 1206.6438; as a validator: Musgrave et al., arXiv 2208.07360.
    """
    p = at_least_float32(logits).softmax(-1)
    marginal = torch.special.entr(p.mean(0)).sum()
    information: Tensor = (weight * marginal - entropy(logits).mean()) / math.log(logits.shape[-1])
    return information


def snd(features_or_probabilities: Tensor, temperature: float = 0.05) -> Tensor:
    """Soft neighbourhood density: mean entropy of the softmax over a sample's similarities to all others.

    Rows are scaled to length 1; of their cosine similarities over the temperature, without the sample itself, the
    softmax is taken, and its entropy, in [0, log(N - 1)]. Larger is better: samples lie in dense groups of alike
    predictions. After a collapse to one point it is largest of all: use it beside :func:`infomax`.

    Args:
        features_or_probabilities: (N, D), N >= 2; the authors take the predicted distributions.
        temperature: Above 0; the authors' 0.05.

    Source: Saito et al., ICCV 2021, arXiv 2108.10860. Memory of 2,048 rows of the (N, N) similarities at once.
    """
    rows = torch.nn.functional.normalize(at_least_float32(features_or_probabilities), dim=-1)
    total = rows.new_zeros(())
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        similarity = part @ rows.T / temperature
        itself = torch.arange(start, start + len(part), device=rows.device)[:, None]
        similarity = similarity.scatter(1, itself, -math.inf)
        p = similarity.softmax(-1)
        total = total + torch.special.entr(p).sum()
    return total / len(rows)


def order(logits: Tensor) -> Tensor:
    """How much the predicted classes of a batch come in runs; (...), float64, in [-1, 1], for logits (..., B, K).

    The share of neighbors with the same class, less that of all pairs of images: 0 where classes come at random, where
    there is one class alone, or one image; near 1 where many classes come sorted. Of a stream with runs, larger is
    better: errors break runs. Two batches are not to be joined: where the domain changes, predictions change with it.
    """
    classes, number = logits.argmax(-1), logits.shape[-2]
    if number < 2:
        return logits.new_zeros(logits.shape[:-2], dtype=torch.float64)
    counts = torch.nn.functional.one_hot(classes, logits.shape[-1]).sum(-2).double()
    by_chance = (counts * (counts - 1)).sum(-1) / (number * (number - 1))
    return (classes[..., 1:] == classes[..., :-1]).double().mean(-1) - by_chance


def agreement(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Share of samples to which both give the same class, in [0, 1]. Larger is better: less was unlearned.

    The other may be the source net, another view of the images, or dropout.
    """
    return (logits.argmax(-1) == other_logits.argmax(-1)).to(at_least_float32(logits).dtype).mean()


def soft_agreement(logits: Tensor, other_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean probability that the other gives to the predicted class, in [0, 1]. Larger is better.

    Args:
        logits: (N, K), whose classes are rated.
        other_logits: (N, K), of the one who rates.
        temperature: By which the other's logits are divided, above 0.
    """
    p = (at_least_float32(other_logits) / temperature).softmax(-1)
    return p.gather(-1, logits.argmax(-1, keepdim=True)).mean()


def nuclear_norm(logits: Tensor) -> Tensor:
    """Nuclear norm of the predicted distributions (N, K), over its largest value ``sqrt(N min(N, K))``; in (0, 1].

    Large where predictions are sure and spread over the classes. Larger is better. Source: Deng et al., ICML 2023,
    arXiv 2302.01094.
    """
    p = at_least_float32(logits).softmax(-1)
    norm: Tensor = torch.linalg.matrix_norm(p, "nuc") / math.sqrt(p.shape[0] * min(p.shape))
    return norm


def source_weighted_infomax(logits: Tensor, source_logits: Tensor) -> Tensor:
    """:func:`infomax` times the mean probability that the source gives to the predicted classes; in [0, 1].

    Larger is better. A method that has spread its predictions evenly and surely over wrong classes has the first, but
    not the second.
    """
    return infomax(logits).clamp_min(0) * soft_agreement(logits, source_logits)
