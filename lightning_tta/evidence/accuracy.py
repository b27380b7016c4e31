"""Estimates of a classifier's accuracy without labels: AETTA, confidence, and others. Tensors in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.draws import random_flags
from lightning_tta.errors import DataError, check_range
from lightning_tta.losses import at_least_float32, entropy

PASSES, EXPONENT, OLD = 10, 3.0, 0.6
"""AETTA's authors: dropout passes, exponent, and the weight of what the average was."""
_ELEMENTS = 2**22  # of the masks that are made at once


def dropout_rate(classes: int) -> float:
    """The authors' dropout rate: 0.4 up to 10 classes (CIFAR-10), 0.3 up to 100 (CIFAR-100), else 0.2 (ImageNet)."""
    return 0.4 if classes <= 10 else 0.3 if classes <= 100 else 0.2


def dropout_votes(
    features: Tensor, head: nn.Linear, predictions: Tensor, key: Tensor, *, passes: int = PASSES, rate: float
) -> tuple[Tensor, Tensor]:
    """What a head says of features when some of them are dropped at random, in several passes.

    Each pass keeps each feature with probability 1 - ``rate`` and divides it by that, independently for each sample.

    Args:
        features: (B, D), inputs of the head.
        head: (D -> K).
        predictions: Classes (B,), int64, with which each pass is compared.
        key: Of the draws, (2,), int64, as in :mod:`lightning_tta.draws`: the same key, the same draws on any device.
        passes: How many, at least 1.
        rate: In [0, 1).

    Returns:
        Share of passes (B,) whose class is another than the prediction; and the mean over passes of the predicted
        distributions (B, K). At least float32.
    """
    features = at_least_float32(features.detach())
    weight, bias = (None if p is None else p.detach().to(features) for p in (head.weight, head.bias))
    assert weight is not None
    length = passes * features.shape[1]
    size = max(2, _ELEMENTS // length // 2 * 2)  # even, as each part of a draw begins at an even number
    differ, mean = [], []
    for start in range(0, len(features), size):
        part = features[start : start + size]
        number = len(part) * length
        kept = random_flags(key, number, 1 - rate, start=start * length, device=features.device)
        dropped = part[:, None] * kept.view(len(part), passes, -1) / (1 - rate)
        logits = nn.functional.linear(dropped, weight, bias)
        differ.append((logits.argmax(-1) != predictions[start : start + size, None]).to(part.dtype).mean(1))
        mean.append(logits.softmax(-1).mean(1))
    return torch.cat(differ), torch.cat(mean)


def aetta_error(disagreement: float, mean_entropy: float, classes: int, exponent: float = EXPONENT) -> float:
    """AETTA's error: ``e / (E / log K)^exponent``, clipped to [0, 1 - 1/K].

    A stream of one sure class has E = 0, and so the largest error, whatever e is: the limit of a collapse.

    Args:
        disagreement: e, mean share of dropout passes with another class than the prediction, in [0, 1].
        mean_entropy: E, entropy in nats of the mean prediction over samples and passes, in [0, log K].
        classes: K.
        exponent: 0 leaves the entropy out.
    """
    most = 1 - 1 / classes
    evenness = (max(mean_entropy, 0.0) / math.log(classes)) ** exponent
    return most if evenness < 1e-12 else min(most, disagreement / evenness)


def aetta(
    features: Tensor,
    head: nn.Linear,
    predictions: Tensor,
    *,
    key: Tensor | None = None,
    passes: int = PASSES,
    rate: float | None = None,
    exponent: float = EXPONENT,
) -> tuple[float, float, float]:
    """AETTA's estimate of the error of a batch, from dropout on the inputs of the last layer.

    With the classes c_i of n passes and the predictions y: ``e = mean [c_i != y]``, and E the entropy of the mean
    predicted distribution over samples and passes; the error is that of :func:`aetta_error`. A net that has collapsed
    agrees with itself; the exponent of E takes that back.

    Args:
        features: (B, D), B >= 1, inputs of the head in the pass that gave ``predictions``.
        head: (D -> K).
        predictions: Classes (B,), or logits (B, K).
        key: Of the draws, (2,), int64; ``None``: that of seed 0.
        passes: n, at least 1; the authors' 10.
        rate: Of dropout; ``None``: :func:`dropout_rate`.
        exponent: The authors' 3.

    Returns:
        Error in [0, 1 - 1/K], disagreement e in [0, 1], entropy E in nats. This asks the device once.

    Source: Lee et al., AETTA, CVPR 2024, arXiv 2404.01351. Differs from the authors' code, which also drops feature
    maps after each of four stages, so that a pass is one through nearly the whole net: here the head's inputs alone are
    dropped, which costs no pass of the net. No 1e-6 in the logarithm; E = 0 divides nothing by 0.
    """
    predictions = predictions.argmax(-1) if predictions.ndim > 1 else predictions
    classes = head.out_features
    key = torch.zeros(2, dtype=torch.int64) if key is None else key
    rate = dropout_rate(classes) if rate is None else rate
    differ, mean = dropout_votes(features, head, predictions, key, passes=passes, rate=rate)
    both = torch.stack([differ.mean(), _entropy_of(mean.mean(0))]).double()
    disagreement, mean_entropy = both.tolist()
    return aetta_error(disagreement, mean_entropy, classes, exponent), disagreement, mean_entropy


def _entropy_of(p: Tensor) -> Tensor:
    """Of distributions (..., K), which need not come from logits."""
    entropies: Tensor = torch.special.entr(p).sum(-1)
    return entropies


class AETTA:
    """AETTA along a stream: the error of each batch enters an average, ``old * average + (1 - old) * error``.

    The average starts at the disagreement of the first batch, as in the authors' code. The authors' batches have 64
    images, and E of few images says nothing of a collapse: smaller batches are added up to ``images``.

    Args:
        passes: At least 1; the authors' 10.
        rate: Of dropout, in [0, 1); ``None``: by the number of classes (:func:`dropout_rate`).
        exponent: At least 0; the authors' 3.
        old: Weight of the average so far, in [0, 1]; the authors' 0.6.
        images: Of how many an error is made at least, at least 1; the authors' 64.
        seed: Of the draws, which a run repeats.

    Attributes:
        average: Of the error; ``None`` before the first one.
        last: Error, disagreement and entropy of the last one; ``None`` before it.
        updates: Errors so far.

    Raises:
        ConfigError: If one is out of range.
    """

    def __init__(
        self,
        *,
        passes: int = PASSES,
        rate: float | None = None,
        exponent: float = EXPONENT,
        old: float = OLD,
        images: int = 64,
        seed: int = 0,
    ) -> None:
        check_range("passes", passes, 1, integer=True)
        if rate is not None:
            check_range("rate", rate, 0, 0.99)
        check_range("exponent", exponent, 0)
        check_range("old", old, 0, 1)
        check_range("images", images, 1, integer=True)
        check_range("seed", seed, 0, integer=True)
        self.passes, self.rate, self.exponent, self.old, self.images = passes, rate, exponent, old, images
        self.seed = seed
        self.batches = 0
        self.begin()

    def begin(self) -> None:
        """Forget all, but not which draw comes next."""
        self.average: float | None = None
        self.last: tuple[float, float, float] | None = None
        self.updates = 0
        self._waiting: Tensor | None = None  # sums over samples: number, disagreements, mean predictions (K)

    def update(self, features: Tensor, head: nn.Linear, predictions: Tensor) -> bool:
        """Take in a batch, as :func:`aetta` does; returns whether there is a new error."""
        if not len(features):
            return False
        predictions = predictions.argmax(-1) if predictions.ndim > 1 else predictions
        rate = dropout_rate(head.out_features) if self.rate is None else self.rate
        key = torch.tensor([self.seed, self.batches])
        differ, mean = dropout_votes(features, head, predictions, key, passes=self.passes, rate=rate)
        self.batches += 1
        sums = torch.cat([differ.sum()[None], mean.sum(0)]).double().cpu()
        if not sums.isfinite().all():  # features that overflowed
            return False
        sums = torch.cat([torch.full((1,), float(len(features)), dtype=torch.float64), sums])
        waiting = sums if self._waiting is None else self._waiting + sums
        if waiting[0] < self.images:
            self._waiting = waiting
            return False
        self._waiting = None
        shares = waiting[1:] / waiting[0]
        disagreement, mean_entropy = float(shares[0]), float(_entropy_of(shares[1:]))
        error = aetta_error(disagreement, mean_entropy, head.out_features, self.exponent)
        average = disagreement if self.average is None else self.average
        self.average = self.old * average + (1 - self.old) * error
        self.last = error, disagreement, mean_entropy
        self.updates += 1
        return True

    @property
    def estimate(self) -> float | None:
        """Estimated accuracy in [0, 1]; ``None`` before the first error."""
        return None if self.average is None else 1 - self.average

    def state_dict(self) -> dict[str, Any]:
        """What was seen, in plain values and a tensor."""
        waiting = None if self._waiting is None else self._waiting.clone()
        return {"average": self.average, "last": self.last, "updates": self.updates, "batches": self.batches} | {
            "waiting": waiting
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.average, self.updates, self.batches = (state[name] for name in ("average", "updates", "batches"))
        self.last = None if state["last"] is None else tuple(state["last"])
        self._waiting = None if state["waiting"] is None else state["waiting"].clone()


def average_confidence(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of the largest probability, AC, a scalar in [1/K, 1], for logits (B, K) divided by a temperature.

    Source: Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136; AETTA's authors compare with it at temperature 2.
    """
    return (at_least_float32(logits) / temperature).softmax(-1).amax(-1).mean()


def difference_of_confidences(confidence: float, source_confidence: float, source_accuracy: float) -> float:
    """DoC: accuracy on the source less the fall of the mean confidence since, clipped to [0, 1].

    Source: Guillory et al., ICCV 2021, arXiv 2107.03315 (the form without regression).
    """
    return min(1.0, max(0.0, source_accuracy - (source_confidence - confidence)))


def negative_entropy(logits: Tensor) -> Tensor:
    """Score of ATC for logits (B, K): minus the entropy of the prediction (B,), larger where it is surer."""
    return -entropy(logits)


def atc_threshold(scores: Tensor, right: Tensor) -> float:
    """ATC's threshold t: of held-out source samples, the share with a score below t is the share that is wrong.

    Args:
        scores: (N,), larger where the prediction is surer.
        right: (N,), bool: whether it is right.

    Raises:
        DataError: If there is no sample.
    """
    if not len(scores):
        raise DataError("ATC needs held-out source images with labels to set its threshold; got none.")
    wrong = int((~right).sum())
    if wrong == len(scores):
        return math.inf
    return float(scores.sort().values[wrong])


def average_thresholded_confidence(scores: Tensor, threshold: float) -> Tensor:
    """ATC: share of scores (B,) at or above the threshold, a scalar in [0, 1].

    Source: Garg et al., ICLR 2022, arXiv 2201.04234.
    """
    return (scores >= threshold).to(at_least_float32(scores).dtype).mean()


def fit_temperature(logits: Tensor, labels: Tensor, *, steps: int = 60) -> float:
    """Temperature T in [1/20, 20] that minimises the mean cross-entropy of ``logits / T`` (N, K) with labels (N,).

    By golden section on log T, in which the cross-entropy falls and then rises: it is convex in 1/T. Source: Guo et
    al., ICML 2017, arXiv 1706.04599.

    Raises:
        DataError: If there is no sample.
    """
    if not len(logits):
        raise DataError("A temperature needs held-out source images with labels; got none.")
    logits = logits.double()

    def loss(log_t: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_t), labels))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = -math.log(20), math.log(20)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)


CONSENSUS = {"source": 0.2, "same_source": 0.65, "dropout": 1.0, "evenness": 1.25}
"""Weights of :func:`consensus_accuracy`, in log odds. Fitted on held-out corruptions; docs/results/estimates.md."""
_LEAST_SHARE = 0.02  # whose log odds count; beyond, a share of few samples says no more


def log_odds(share: float) -> float:
    """Of a share, which is first clipped to [0.02, 0.98]."""
    share = min(1 - _LEAST_SHARE, max(_LEAST_SHARE, share))
    return math.log(share / (1 - share))


def consensus_sums(
    logits: Tensor,
    source: Tensor,
    same_source: Tensor,
    features: Tensor,
    head: nn.Linear,
    key: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """What :func:`consensus_accuracy` needs of a batch, as sums over samples, (3 + 2K,), float64.

    Three numbers: the probability that the source gives to the predicted class, that the source with the batch's
    statistics gives to it (both at a temperature), and the share of dropout passes that repeat it. Then two
    distributions (K,): what the dropout passes predict, and the source.

    Args:
        logits: (B, K), whose classes are rated.
        source: (B, K), of the source net.
        same_source: (B, K), of the source weights with the method's statistics.
        features: (B, D), inputs of the head in the pass that gave ``logits``.
        head: (D -> K).
        key: Of the draws, as of :func:`dropout_votes`.
        temperature: By which the source's logits are divided.
    """
    predictions = logits.argmax(-1)
    differ, mean = dropout_votes(features, head, predictions, key, rate=dropout_rate(logits.shape[-1]))
    p, q = ((at_least_float32(u) / temperature).softmax(-1) for u in (source, same_source))
    trust = torch.stack([each.gather(1, predictions[:, None]).sum() for each in (p, q)])
    return torch.cat([trust, (1 - differ).sum()[None], mean.sum(0), p.sum(0)]).double()


def consensus_accuracy(means: Sequence[float], anchor: Mapping[str, float]) -> float:
    """Accuracy from what the source, the source with other statistics, and dropout think of the predictions.

    ::

        logit(accuracy) = logit(a) + sum_i w_i (logit(s_i) - logit(t_i)) + w_e log(E / E_source)

    with s the three means of :func:`consensus_sums` and t the same of the source on its own held-out images, where its
    accuracy is a; E and E_source are the entropies of the mean predictions of dropout and of the source, so that a
    stream that is sorted by class is no collapse, and a net that gives up classes which the source sees is one. On the
    source's own data the estimate is a.

    Args:
        means: Of :func:`consensus_sums`, over samples, (3 + 2K,).
        anchor: ``accuracy``, ``source``, ``same_source``, ``dropout`` of the source on held-out images.

    Returns:
        In (0, 1).

    The weights w are :data:`CONSENSUS`, fitted by least squares. The estimate is ours; that the source rates the
    predictions is an idea of agreement-based estimates (Jiang et al., ICLR 2022, arXiv 2106.13799), dropout and entropy
    are AETTA's.
    """
    classes = (len(means) - 3) // 2
    total = log_odds(anchor["accuracy"])
    for name, mean in zip(("source", "same_source", "dropout"), means, strict=False):
        total += CONSENSUS[name] * (log_odds(mean) - log_odds(anchor[name]))
    parts = (means[3 : 3 + classes], means[3 + classes :])
    passes, source = (-sum(p * math.log(max(p, 1e-12)) for p in part) / math.log(classes) for part in parts)
    total += CONSENSUS["evenness"] * math.log(max(passes, _LEAST_SHARE) / max(source, _LEAST_SHARE))
    return 1 / (1 + math.exp(-total))
