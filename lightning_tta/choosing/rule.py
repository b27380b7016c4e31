"""From scores to a decision: the source stays unless the evidence is clear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_tta.choosing.candidates import SOURCE
from lightning_tta.choosing.scores import Scores

EVENNESS, ORDER, HOLDING = 0.53, 1.1, 0.5
"""Weights of three scores in the estimated gain; fitted on recorded streams, docs/results/choices.md."""
STEADY_AT = 0.55
"""Steadiness from which on a difference to the source speaks for the candidate."""
RUNS = 0.1
"""Order from which on a stream has runs; chance gives less than half of it to a few hundred images."""
NOISE, NOISE_OF_DIFFERING = 0.008, 0.12
"""Standard deviation of the estimated gain: where both never differ, and what an image on which they do adds to it."""
CLEAR, CLEAR_WITH_LABELS = 0.9, 0.8
"""What the probability of a gain must be at least: of scores alone, which may all be wrong; and with labels."""
LEAST_GAIN = 0.005
"""What the estimated gain in accuracy must be at least."""
PRIOR_LABELS = 4
"""Weight, in labels, of the share of images on which both differ in the variance of what a label says."""


@dataclass(frozen=True)
class Decision:
    """The name of the chosen candidate, the probability that it is better than the source, and why in a sentence."""

    name: str
    confidence: float
    why: str


@dataclass(frozen=True)
class Gain:
    """What is known of the accuracy of a candidate, less that of the source.

    Attributes:
        estimate: In [-1, 1].
        deviation: Its standard deviation.
        probability: That it is above 0.
    """

    estimate: float
    deviation: float
    probability: float

    @property
    def sure(self) -> float:
        """What the gain hardly falls below: the estimate less its deviation."""
        return self.estimate - self.deviation


def runs_of(scores: Mapping[str, Scores]) -> float:
    """How surely the stream's classes come in runs, in [0, 1]: the largest order of all candidates over :data:`RUNS`.

    The largest, for a net whose predictions are of one class, or at random, sees no runs.
    """
    return min(1.0, max(0.0, *(own["order"] for own in scores.values())) / RUNS)


def evidence(own: Scores, source: Scores, runs: float) -> float:
    """What the scores say of the gain in accuracy, without labels.

    ::

        gain = 0.53 e s + 1.1 r o + 0.5 d (s - 0.55)        (e in the place of e s, where e is below 0)

    e is the difference of evenness to the source: a shift pulls predictions into few classes, and what undoes it
    spreads them again. o is the difference of order to the source, r how surely the stream has runs: there errors break
    them. d is the share of images on which both differ, and s the steadiness of these answers: what a candidate says in
    any company is more often right than what it says in one. Bounded by d, since no more can be won or lost.

    Args:
        own: Scores of the candidate.
        source: Of the source.
        runs: :func:`runs_of` all candidates.
    """
    differ, steady = 1 - own["agreement_source"], own["steadiness"]
    even = own["evenness"] - source["evenness"]
    gain = EVENNESS * even * (steady if even > 0 else 1.0)
    gain += ORDER * runs * (own["order"] - source["order"]) + HOLDING * differ * (steady - STEADY_AT)
    return max(-differ, min(gain, differ))


def gain_of(own: Scores, source: Scores, runs: float, labels: int = 0) -> Gain:
    """The gain of a candidate, from scores alone, or with labels.

    The gain is normal around :func:`evidence`, with the standard deviation ``0.008 + 0.12 d``; d is the share of images
    on which both differ. Of n labels the candidate alone is right on w, the source alone on l: a measurement
    ``(w - l) / n`` of the same gain, with the variance ``v / n``. v is the mean square of the difference of an image,
    ``(w + l + 4 (d + 0.01)) / (n + 4)``, so that few labels that happen to agree are not sure. The posterior of both
    is normal again; many labels outweigh the scores.

    Args:
        own: Scores of the candidate.
        source: Of the source.
        runs: As for :func:`evidence`.
        labels: n, images with labels.
    """
    differ = 1 - own["agreement_source"]
    estimate, deviation = evidence(own, source, runs), NOISE + NOISE_OF_DIFFERING * differ
    if labels:
        won, lost = own["labels_won"] * labels, own["labels_lost"] * labels
        square = (won + lost + PRIOR_LABELS * (differ + 0.01)) / (labels + PRIOR_LABELS)
        of_scores, of_labels = deviation**-2, labels / square
        estimate = (of_scores * estimate + of_labels * (won - lost) / labels) / (of_scores + of_labels)
        deviation = (of_scores + of_labels) ** -0.5
    return Gain(estimate, deviation, 0.5 * (1 + math.erf(estimate / deviation / math.sqrt(2))))


def gains(scores: Mapping[str, Scores], labels: int = 0) -> dict[str, Gain]:
    """The gain of each candidate but the source, by name.

    Args:
        scores: By candidate, those of the source among them.
        labels: Images with labels.
    """
    runs = runs_of(scores)
    return {name: gain_of(own, scores[SOURCE], runs, labels) for name, own in scores.items() if name != SOURCE}


def decide(scores: Mapping[str, Scores], labels: int = 0, clear_at: float | None = None) -> Decision:
    """The candidate of the largest sure gain among those whose gain is clear; else the source.

    Not of the largest estimate: of many, the largest is too large, the more so the less sure they are. Of several that
    are level, the first: without labels within :data:`LEAST_GAIN`.

    Args:
        scores: By candidate, those of the source among them; of a candidate that could not run, nothing.
        labels: Images with labels.
        clear_at: Probability of a gain that a candidate must have at least; ``None``: :data:`CLEAR`, or with labels
            :data:`CLEAR_WITH_LABELS`.
    """
    found = gains(scores, labels)
    if not found:
        return Decision(SOURCE, 1.0, "None: stay with the source, for no other candidate ran.")
    if clear_at is None:
        clear_at = CLEAR_WITH_LABELS if labels else CLEAR
    clear = {n: g for n, g in found.items() if g.probability >= clear_at and g.estimate >= LEAST_GAIN}
    heard = f"the scores and {labels} labels" if labels else "the scores, without labels,"
    if not clear:
        best = max(found, key=lambda name: found[name].probability)
        chance = found[best].probability
        return Decision(
            SOURCE,
            1 - chance,
            f"None: stay with the source, for {heard} are clear for no candidate; the nearest is {best}, better with "
            f"an estimated probability of {chance:.2f}.",
        )
    most = max(gain.sure for gain in clear.values())
    best = next(name for name, gain in clear.items() if gain.sure >= most - (0 if labels else LEAST_GAIN))
    return Decision(
        best,
        clear[best].probability,
        f"{best}: {heard} speak for a gain on the source, with an estimated probability of "
        f"{clear[best].probability:.2f}.",
    )
