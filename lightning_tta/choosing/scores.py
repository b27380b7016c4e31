"""Every score of a candidate after a trial, from what it answered; none but ``labels`` has seen a label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_tta.choosing.trial import Record, answered
from lightning_tta.evidence.accuracy import aetta
from lightning_tta.evidence.scores import agreement, infomax, negative_mean_entropy, order, snd

Scores = dict[str, float]


def score(record: Record, source: Record, labels: Mapping[int, int] | None = None) -> Scores:
    """Scores by name; the larger, the better, if nothing else is said.

    - ``aetta``: accuracy as AETTA estimates it, of all answers together: of one batch of a class-sorted stream it takes
      few classes for a collapse; ``aetta_end``: of the net at the end. Only where the net ends in a linear layer.
    - ``infomax``, ``snd``, ``entropy`` (minus the mean entropy over log K): of the net at the end.
    - ``agreement_view``: with its own predictions for shifted views; ``agreement_company``: of its answers with its
      predictions for the same images in other batches; ``agreement_source``: with the source.
    - ``steadiness``: as ``agreement_company``, of the images on which it differs from the source; 1 without any.
    - ``evenness``: of the predicted classes, as in :func:`evenness`; ``order``: of their runs, :func:`mean_order`.
    - ``labels``: accuracy on the images with labels, where there are some; ``labels_won``, ``labels_lost``: share of
      them on which it alone is right, or the source alone.

    Args:
        record: Of the candidate.
        source: Of the source, over the same images.
        labels: Label by position among the images of the trial.
    """
    known = _known(record) & _known(source)
    answers, final, view = record.answers[known], record.final[known], record.view[known]
    scores = {
        "infomax": infomax(final),
        "snd": snd(final.softmax(-1)),
        "entropy": negative_mean_entropy(final),
        "agreement_view": agreement(final, view),
        "agreement_company": agreement(answers, final),
        "agreement_source": agreement(answers, source.answers[known]),
        "evenness": evenness(answers),
        "order": mean_order(answers, [int(part.sum()) for part in torch.split(known, record.sizes or len(known))]),
    }
    steady, differs = (answers.argmax(-1) == final.argmax(-1)), answers.argmax(-1) != source.answers[known].argmax(-1)
    scores["steadiness"] = 1 - (differs & ~steady).sum() / differs.sum().clamp_min(1)
    found = {name: float(value) for name, value in scores.items()}
    head = _head(record)
    if head is not None and record.features is not None:
        found["aetta"] = 1 - aetta(record.features[known], head, answers)[0]
        if record.final_features is not None:
            found["aetta_end"] = 1 - aetta(record.final_features[known], head, final)[0]
    labels = {place: label for place, label in (labels or {}).items() if known[place]}
    if labels:
        positions, truth = torch.tensor(list(labels)), torch.tensor(list(labels.values()))
        right, source_right = (r.answers[positions].argmax(-1) == truth for r in (record, source))
        found["labels"] = float(right.double().mean())
        found["labels_won"] = float((right & ~source_right).double().mean())
        found["labels_lost"] = float((source_right & ~right).double().mean())
    return found


def evenness(logits: Tensor) -> Tensor:
    """Entropy of how often each class is predicted, for logits (N, K), over its largest value log min(N, K); [0, 1]."""
    counts = _counts(logits)
    most = math.log(max(2, min(logits.shape)))
    entropy: Tensor = torch.special.entr(counts / counts.sum().clamp_min(1)).sum() / most
    return entropy


def mean_order(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean :func:`~lightning_tta.evidence.scores.order` of batches, each by its pairs of neighbors; in [-1, 1].

    Args:
        logits: Of all images (N, K), in the order of the stream.
        sizes: Images of each batch; their sum is N.
    """
    pairs = torch.tensor([max(0, size - 1) for size in sizes], dtype=torch.float64)
    by_batch = torch.stack([order(part) for part in torch.split(logits, list(sizes))])
    return (by_batch * pairs).sum() / pairs.sum().clamp_min(1)


def _counts(logits: Tensor) -> Tensor:
    return torch.bincount(logits.argmax(-1), minlength=logits.shape[-1]).double()


def _known(record: Record) -> Tensor:
    """Which images were not left out."""
    return answered(record.answers) & answered(record.final) & answered(record.view)


def _head(record: Record) -> nn.Linear | None:
    if record.weight is None:
        return None
    head = nn.Linear(record.weight.shape[1], record.weight.shape[0], bias=record.bias is not None)
    with torch.no_grad():
        head.weight.copy_(record.weight)
        if record.bias is not None:
            head.bias.copy_(record.bias)
    return head
