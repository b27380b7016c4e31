"""Which of several methods that saw the same images should answer: evidence without labels, and a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, entropy

_LEAST_VOTE = 0.01


@dataclass(frozen=True)
class Contest:
    """Scores C rivals, of which number 0 is the source, and says who answers.

    The evidence of a rival over a batch of predicted distributions p_b, with classes K and H the entropy over log K::

        standing = max(H(m_recent), H(m_long)) - u - d
        m        = mean of p_b, u = mean of H(p_b), d = share of predictions that the other rivals outvote

    ``m_long`` is an average over ``horizon`` images, all others over the last ``recent``: weights B / (min(n, N) + B)
    of a batch of B images after n others. The difference of the first two is the mutual information of image and class:
    small where a method is unsure, and after a collapse to one class. The larger mean counts, for a stream sorted by
    class shows few classes at a time to a method that is right. Of one that forces all classes into each batch it shows
    as dissent: the others' distributions, each weighted by the square of its information, have another arg-max.

    Attributes:
        recent: Images, at least 1. A rival counts once a quarter of them were seen.
        horizon: Images, at least 1.
        margin: What a rival must be better by than the source, to be preferred, in [-2, 2].
        hysteresis: What it must be better by than who answers, beside that, >= 0. The source needs none to come back.
        fall: How far below the source it has fallen, so that it is to be reset, > 0.

    Raises:
        ConfigError: If one is out of range.

    Own work; the mutual information is that of :func:`~lightning_tta.evidence.scores.infomax`.
    """

    recent: int = 128
    horizon: int = 1024
    margin: float = 0.05
    hysteresis: float = 0.03
    fall: float = 0.3

    def __post_init__(self) -> None:
        for name in ("recent", "horizon"):
            check_range(name, getattr(self, name), 1, integer=True)
        check_range("margin", self.margin, -2, 2)
        check_range("hysteresis", self.hysteresis, 0)
        check_range("fall", self.fall, 0, low_open=True)

    def take_in(self, evidence: Tensor, logits: Tensor, rivals: Sequence[int]) -> Tensor:
        """The evidence with a batch in it.

        Args:
            evidence: (C, 2 K + 3): the two means, u, d, and the number of images; all 0: nothing was seen.
            logits: Of some rivals on the same images, (R, B, K), finite.
            rivals: Which these are; R numbers.
        """
        p, (count, classes) = at_least_float32(logits).softmax(-1), logits.shape[1:]
        old = evidence[list(rivals)]
        images = old[:, -1:]
        now, before = count / (images.clamp(max=self.recent) + count), count / (images.clamp(max=self.horizon) + count)
        mean, unsure = p.mean(1), entropy(logits).mean(1, keepdim=True) / math.log(classes)
        recent, long = old[:, :classes].lerp(mean, now), old[:, classes:-3].lerp(mean, before)
        unsure = old[:, -3:-2].lerp(unsure, now)
        dissent = old[:, -2:-1].lerp(_dissent(p, _information(recent, long, unsure[:, 0]))[:, None], now)
        new = evidence.clone()
        new[list(rivals)] = torch.cat([recent, long, unsure, dissent, images + count], 1)
        return new

    def standings(self, evidence: Tensor) -> list[float]:
        """Of each rival; -inf: too little was seen of it. Asks the device."""
        classes = (evidence.shape[1] - 3) // 2
        standing = _information(evidence[:, :classes], evidence[:, classes:-3], evidence[:, -3]) - evidence[:, -2]
        found: list[float] = standing.where(evidence[:, -1] >= self.recent / 4, -math.inf).tolist()
        return found

    def decide(self, standings: Sequence[float], answering: int) -> tuple[int, list[int]]:
        """Who answers from here on, and who has fallen.

        Args:
            standings: As :meth:`standings` gives them.
            answering: Who has answered.
        """
        source = standings[0]
        fallen = [rival for rival, standing in enumerate(standings) if -math.inf < standing < source - self.fall]
        if answering in fallen or source == -math.inf:
            return 0, fallen
        preferred = [source + self.margin, *standings[1:]]
        best = max(range(len(preferred)), key=preferred.__getitem__)
        ahead = preferred[best] - preferred[answering]
        return best if ahead > (self.hysteresis if best else 0) else answering, fallen


def _information(recent: Tensor, long: Tensor, unsure: Tensor) -> Tensor:
    """Mutual information over log K, (R,), of mean predictions (R, K) and mean entropies (R,) over log K."""
    diverse = torch.maximum(torch.special.entr(recent).sum(1), torch.special.entr(long).sum(1))
    return diverse / math.log(recent.shape[1]) - unsure


def _dissent(p: Tensor, information: Tensor) -> Tensor:
    """Share (R,) of predictions (R, B, K) of which the others' weighted vote has another arg-max; 0 of one alone."""
    if len(p) == 1:
        return p.new_zeros(1)
    votes = p * information.clamp(min=_LEAST_VOTE).square()[:, None, None]
    others = votes.sum(0) - votes
    return (others.argmax(-1) != p.argmax(-1)).to(p.dtype).mean(1)
