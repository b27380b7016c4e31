"""The rule: a posterior that is right, and a source that stays unless the evidence is clear."""

import math

import numpy as np
import pytest

from lightning_tta.choosing.rule import CLEAR, Gain, decide, gain_without_labels, gains, with_labels

NAMES = ("aetta", "aetta_end", "infomax", "snd", "entropy", "agreement_view", "agreement_company", "evenness")


def scores(level=0.5, agreement=1.0, **changed):
    return dict.fromkeys(NAMES, level) | {"agreement_company": 1.0, "agreement_source": agreement} | changed


def better(**changed):
    """What every score calls better than ``scores()``."""
    return scores(0.9, 0.6) | {"evenness": 1.0, "agreement_company": 1.0} | changed


@pytest.mark.parametrize(
    ("mean", "spread", "paired", "count", "differ"), [(0.1, 0.2, -0.05, 20, 0.3), (0, 0.05, 1, 3, 1)]
)
def test_labels_enter_as_a_likelihood(mean, spread, paired, count, differ):
    grid = np.linspace(-3, 3, 200_001)
    variance = max(differ, 1 / (count + 2)) / count
    density = np.exp(-((grid - mean) ** 2) / (2 * spread**2) - (paired - grid) ** 2 / (2 * variance))
    density /= density.sum()
    expected = (density * grid).sum()
    found = with_labels(Gain(mean, spread), paired, count, differ)
    assert found.mean == pytest.approx(expected, abs=1e-6)
    assert found.spread == pytest.approx(math.sqrt((density * (grid - expected) ** 2).sum()), rel=1e-4)
    above = density[grid > 0].sum() + density[grid == 0].sum() / 2
    assert found.probability == pytest.approx(above, abs=1e-4)


def test_the_gain_is_never_more_than_the_images_that_differ():
    for level in (0.0, 0.5, 1.0):
        for agreement in (0.2, 0.7, 0.95, 1.0):
            found = gain_without_labels(scores(level, agreement), scores())
            assert abs(found.mean) <= 1 - agreement + 1e-12
            assert found.spread <= 1 - agreement


def test_the_source_stays_where_nothing_speaks_for_another():
    alike = {"source": scores(), "tent": scores(agreement=0.9), "norm": scores(agreement=0.6)}
    decision = decide(alike)
    assert decision.name == "source"
    assert decision.why.startswith("None: stay with the source")
    assert decide({"source": scores()}).name == "source"
    worse = {"source": scores(0.9), "tent": scores(0.5, 0.5)}
    assert decide(worse).name == "source"
    assert decide(worse).confidence > 0.5


def test_a_candidate_for_which_everything_speaks_is_taken():
    given = {"source": scores(), "norm": better(), "tent": scores()}
    decision = decide(given)
    assert decision.name == "norm"
    assert decision.confidence >= CLEAR
    assert decision.why.startswith("norm: ")


def test_of_those_that_are_level_the_first_is_taken():
    given = {"source": scores(), "norm": better(), "tent": better(aetta=0.9 + 1e-4)}
    assert decide(given).name == "norm"
    assert decide({**given, "tent": better(aetta=1.0)}).name == "tent"


def test_who_never_differs_from_the_source_is_not_taken():
    assert decide({"source": scores(), "norm": better(agreement_source=1.0)}).name == "source"


@pytest.mark.parametrize("bad", [{"agreement_company": 0.3}, {"evenness": 0.2}])
def test_a_sign_of_harm_outweighs_the_rest(bad):
    assert decide({"source": scores(), "norm": better(**bad)}).name == "source"


def test_labels_decide_where_scores_do_not():
    given = {"source": scores(), "norm": scores(agreement=0.6, labels_gain=0.3)}
    assert decide(given).name == "source"
    assert decide(given, 100).name == "norm"
    assert gains(given, 1000)["norm"].mean == pytest.approx(0.3, abs=0.02)
    against = {"source": scores(), "norm": better(labels_gain=-0.3)}
    assert decide(against).name == "norm"
    assert decide(against, 100).name == "source"
