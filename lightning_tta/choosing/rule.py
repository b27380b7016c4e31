"""From scores to a decision: the source stays unless the evidence is clear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_tta.choosing.candidates import SOURCE
from lightning_tta.choosing.scores import Scores

WEIGHTS = {"aetta": 0.3, "infomax": 0.3, "agreement_view": 0.3, "agreement_company": 0.5}
"""Of the differences to the source in the estimated gain, designed on MNIST, see tests/measure/choices.py."""
SPREAD = 0.5
"""Standard deviation of the estimate, as a share of the images on which a candidate and the source differ."""
CLEAR = 0.95
"""What the probability of a gain must be at least."""
LEAST_GAIN = 0.005
"""And the estimated gain in accuracy."""


@dataclass(frozen=True)
class Decision:
    """The name of the chosen candidate, the probability that it is better than the source, and why in a sentence."""

    name: str
    confidence: float
    why: str


@dataclass(frozen=True)
class Gain:
    """Accuracy of a candidate less that of the source: a normal distribution."""

    mean: float
    spread: float

    @property
    def probability(self) -> float:
        """That it is above 0."""
        return 0.5 * (1 + math.erf(self.mean / max(self.spread, 1e-9) / math.sqrt(2)))


def gain_without_labels(scores: Scores, source: Scores) -> Gain:
    """What the scores say of the gain.

    A weighted sum of the differences to the source; it is at most the share d of images on which both differ, and its
    spread is a share of d, too: who agrees with the source cannot be far from its accuracy.
    """
    differ = 1 - scores["agreement_source"]
    mean = sum(weight * (scores[name] - source[name]) for name, weight in WEIGHTS.items() if name in scores)
    return Gain(min(max(mean, -differ), differ), SPREAD * differ)


def with_labels(gain: Gain, paired: float, labels: int, differ: float) -> Gain:
    """The posterior after n labels, of which the mean paired difference to the source is known.

    Each label gives 1 where the candidate alone is right, -1 where the source alone is, else 0; so its variance is at
    most the share d of images on which both differ. Normal prior, normal likelihood.
    """
    variance = max(differ, 1 / (labels + 2)) / labels
    prior = max(gain.spread, 1e-6) ** 2
    weight = prior / (prior + variance)
    return Gain((1 - weight) * gain.mean + weight * paired, math.sqrt(weight * variance))


def gains(scores: Mapping[str, Scores], labels: int = 0) -> dict[str, Gain]:
    """The gain of each candidate but the source, by name.

    Args:
        scores: By candidate, those of the source among them.
        labels: Images with labels.
    """
    source = scores[SOURCE]
    found = {}
    for name, own in scores.items():
        if name == SOURCE:
            continue
        found[name] = gain_without_labels(own, source)
        if labels:
            found[name] = with_labels(found[name], own["labels_gain"], labels, 1 - own["agreement_source"])
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
        return Decision(SOURCE, 1.0, "No candidate could run: stay with the source.")
    clear = {n: g for n, g in found.items() if g.probability >= CLEAR and g.mean >= LEAST_GAIN}
    evidence = f"{labels} labels and the scores" if labels else "the scores without labels"
    if not clear:
        best = max(found, key=lambda name: found[name].probability)
        chance = found[best].probability
        return Decision(
            SOURCE,
            1 - chance,
            f"None: stay with the source, as {evidence} are clear for no candidate; {best} is the nearest, with an "
            f"estimated probability of {chance:.2f} to be better.",
        )
    most = max(gain.mean for gain in clear.values())
    best = next(name for name, gain in clear.items() if gain.mean >= most - LEAST_GAIN)
    return Decision(
        best,
        clear[best].probability,
        f"{best}: by {evidence} it gains about {100 * clear[best].mean:.0f} points on the source, and is better with "
        f"an estimated probability of {clear[best].probability:.2f}.",
    )
