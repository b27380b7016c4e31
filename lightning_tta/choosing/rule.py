"""From scores to a decision: the source stays unless the evidence is clear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_tta.choosing.candidates import SOURCE
from lightning_tta.choosing.scores import Scores

UNSTEADY, STEADY, UNEVEN = 0.2, 0.5, 0.8
"""Price of an answer of its own that is another in other company; the least steadiness; the least evenness."""
NOISE, NOISE_OF_DIFFERING = 0.01, 0.03
"""Standard deviation of the evidence where there is no gain, and what an image on which both differ adds to it."""
LEAST, MOST = 0.25, 0.98
"""What scores alone can make of a probability, so that labels can outweigh them; against a method they know less."""
CLEAR, LEAST_GAIN = 0.95, 0.005
"""What the probability of a gain must be at least, and the estimated gain in accuracy."""
WORTH = 20
"""So many labels weigh as much as the scores do in the estimated gain."""


@dataclass(frozen=True)
class Decision:
    """The name of the chosen candidate, the probability that it is better than the source, and why in a sentence."""

    name: str
    confidence: float
    why: str


@dataclass(frozen=True)
class Gain:
    """What is known of the accuracy of a candidate, less that of the source: an estimate, and whether it is above 0."""

    estimate: float
    probability: float


def evidence(own: Scores, source: Scores) -> float:
    """What the scores say of the gain in accuracy, without labels; conservative.

    ``(aetta + infomax) / 2``, as differences to the source, less ``0.2 d (1 - steadiness)`` and less what evenness
    lacks to 0.8. d is the share of images on which both differ, and bounds it. It is 0 at most where less than half of
    its own answers stay the same in other company; and without AETTA, as whatever makes predictions sharper raises
    InfoMax.
    """
    differ = 1 - own["agreement_source"]
    estimated = "aetta" in own and "aetta" in source
    may_gain = estimated and own["steadiness"] >= STEADY
    aetta = own["aetta"] - source["aetta"] if estimated else 0.0
    gain = (aetta + own["infomax"] - source["infomax"]) / 2
    gain -= UNSTEADY * differ * (1 - own["steadiness"]) + max(0.0, UNEVEN - own["evenness"])
    return max(-differ, min(gain, differ if may_gain else 0.0))


def probability_of_scores(gain: float, differ: float) -> float:
    """That a candidate is better, from :func:`evidence` and the share of images on which it differs from the source."""
    z = gain / (NOISE + NOISE_OF_DIFFERING * differ)
    return min(max(0.5 * (1 + math.erf(z / math.sqrt(2))), LEAST), MOST)


def odds_of_labels(won: int, lost: int) -> float:
    """Odds that a candidate is better, from labels: it alone was right ``won`` times, the source alone ``lost`` times.

    The chance t of a win among these has a uniform prior, so its posterior is Beta(won + 1, lost + 1), of which
    ``P(t < 1/2)`` is a binomial sum. Images on which both are right, or both wrong, say nothing.
    """
    number = won + lost + 1
    below: float = sum(math.comb(number, wins) for wins in range(won + 1, number + 1)) / 2**number
    return (1 - below) / below


def gains(scores: Mapping[str, Scores], labels: int = 0) -> dict[str, Gain]:
    """The gain of each candidate but the source, by name.

    The odds of the scores times those of the labels; the estimate is a weighted mean of both.

    Args:
        scores: By candidate, those of the source among them.
        labels: Images with labels.
    """
    found = {}
    for name, own in scores.items():
        if name == SOURCE:
            continue
        estimate = evidence(own, scores[SOURCE])
        probability = probability_of_scores(estimate, 1 - own["agreement_source"])
        if labels:
            won, lost = (round(own[f"labels_{which}"] * labels) for which in ("won", "lost"))
            odds = probability / (1 - probability) * odds_of_labels(won, lost)
            estimate = (WORTH * estimate + won - lost) / (WORTH + labels)
            probability = odds / (1 + odds)
        found[name] = Gain(estimate, probability)
    return found


def decide(scores: Mapping[str, Scores], labels: int = 0) -> Decision:
    """The candidate of the largest estimated gain among those whose gain is clear; else the source.

    Of several that are level, within :data:`LEAST_GAIN`, the first.

    Args:
        scores: By candidate, those of the source among them; of a candidate that could not run, nothing.
        labels: Images with labels.
    """
    found = gains(scores, labels)
    if not found:
        return Decision(SOURCE, 1.0, "None: stay with the source, for no candidate could run.")
    clear = {n: g for n, g in found.items() if g.probability >= CLEAR and g.estimate >= LEAST_GAIN}
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
    most = max(gain.estimate for gain in clear.values())
    best = next(name for name, gain in clear.items() if gain.estimate >= most - LEAST_GAIN)
    return Decision(
        best,
        clear[best].probability,
        f"{best}: {heard} speak for a gain on the source, with an estimated probability of "
        f"{clear[best].probability:.2f}.",
    )
