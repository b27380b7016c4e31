"""The rule: odds that are right, and a source that stays unless the evidence is clear."""

import numpy as np
import pytest

from lightning_tta.choosing.rule import (
    CLEAR,
    decide,
    evidence,
    gains,
    odds_of_labels,
    probability_of_scores,
)

NAMES = ("aetta", "infomax")


def scores(level=0.5, agreement=1.0, **changed):
    others = {"agreement_source": agreement, "steadiness": 1.0, "evenness": 1.0}
    return {**dict.fromkeys(NAMES, level), **others, **changed}


def better(**changed):
    """What every score calls better than ``scores()``."""
    return scores(0.8, 0.6) | changed


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 0), (5, 2), (12, 30)])
def test_labels_are_odds_of_a_beta_distribution(won, lost):
    grid = (np.arange(200_000) + 0.5) / 200_000
    density = grid**won * (1 - grid) ** lost
    expected = density[grid > 0.5].sum() / density[grid < 0.5].sum()
    assert odds_of_labels(won, lost) == pytest.approx(expected, rel=1e-4)


def test_evidence_by_hand():
    own = {"aetta": 0.7, "infomax": 0.6, "agreement_source": 0.6, "steadiness": 0.75, "evenness": 0.7}
    source = {"aetta": 0.5, "infomax": 0.5, "agreement_source": 1.0, "steadiness": 1.0, "evenness": 1.0}
    assert evidence(own, source) == pytest.approx((0.2 + 0.1) / 2 - 0.2 * 0.4 * 0.25 - 0.1)
    assert probability_of_scores(0.02, 0.4) == pytest.approx(0.8183, abs=1e-4)  # z = 0.02 / 0.022
    del own["aetta"]
    assert evidence(own | {"infomax": 1.0}, source) == 0
    assert evidence(better(steadiness=0.49), scores()) <= 0 < evidence(better(steadiness=0.5), scores())


def test_the_evidence_is_never_more_than_the_images_that_differ():
    for level in (0.0, 0.5, 1.0):
        for agreement in (0.2, 0.7, 0.95, 1.0):
            for steadiness in (0.0, 1.0):
                found = evidence(scores(level, agreement, steadiness=steadiness), scores())
                assert abs(found) <= 1 - agreement + 1e-12


def test_the_source_stays_where_nothing_speaks_for_another():
    alike = {"source": scores(), "tent": scores(agreement=0.9), "norm": scores(agreement=0.6)}
    decision = decide(alike)
    assert decision.name == "source"
    assert decision.why.startswith("None: stay with the source")
    assert decide({"source": scores()}).name == "source"
    worse = {"source": scores(0.9), "tent": scores(0.5, 0.5)}
    assert decide(worse).name == "source"
    assert decide(worse).confidence == 0.75  # no scores are surer of that


def test_a_candidate_for_which_everything_speaks_is_taken():
    decision = decide({"source": scores(), "norm": better(), "tent": scores()})
    assert decision.name == "norm"
    assert decision.confidence >= CLEAR
    assert decision.why.startswith("norm: ")


def test_of_those_that_are_level_the_first_is_taken():
    given = {"source": scores(), "norm": better(), "tent": better(aetta=0.8 + 1e-4)}
    assert decide(given).name == "norm"
    assert decide({**given, "tent": better(aetta=0.9)}).name == "tent"


def test_who_never_differs_from_the_source_is_not_taken():
    assert decide({"source": scores(), "norm": better(agreement_source=1.0)}).name == "source"


@pytest.mark.parametrize(
    "bad", [{"steadiness": 0.1, "aetta": 0.5}, {"evenness": 0.2}, {"aetta": 0.2}, {"infomax": 0.1}]
)
def test_a_sign_of_harm_outweighs_the_rest(bad):
    assert decide({"source": scores(), "norm": better(**bad)}).name == "source"


def test_labels_that_tell_nothing_apart_change_nothing():
    for level in np.linspace(0.5, 0.6, 21):
        given = {"source": scores(), "norm": scores(level, 0.8, labels_won=0.0, labels_lost=0.0)}
        alone, told = (gains(given, count)["norm"].probability for count in (0, 10))
        assert told == pytest.approx(alone)
        assert decide(given, 10).name in ("source", decide(given).name)


def test_labels_decide_where_scores_do_not():
    given = {"source": scores(), "norm": scores(agreement=0.6, labels_won=0.3, labels_lost=0.1)}
    assert decide(given).name == "source"
    assert decide(given, 50).name == "norm"
    assert gains(given, 1000)["norm"].estimate == pytest.approx(0.2, abs=0.01)
    against = {"source": scores(), "norm": better(labels_won=0.1, labels_lost=0.3)}
    assert decide(against).name == "norm"
    assert decide(against, 50).name == "source"
    for each in given, against:  # of few labels, fewer are clear
        before, after = (gains(each, count)["norm"].probability for count in (0, 10))
        assert abs(after - before) < 0.6
