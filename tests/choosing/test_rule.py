"""The rule: a posterior that is right, and a source that stays unless the evidence is clear."""

import numpy as np
import pytest

from lightning_tta.choosing.rule import CLEAR, STEADY_AT, decide, evidence, gain_of, gains, runs_of


def scores(agreement=1.0, **changed):
    return {"agreement_source": agreement, "steadiness": STEADY_AT, "evenness": 0.6, "order": 0.0} | changed


def better(**changed):
    """What the scores call better than ``scores()``."""
    return scores(0.7, evenness=0.8, steadiness=0.9) | changed


def test_evidence_by_hand():
    source = scores(order=0.5)
    better_than_it = scores(0.6, evenness=0.7, steadiness=0.75, order=0.54)
    assert evidence(better_than_it, source, 0.5) == pytest.approx(
        0.53 * 0.1 * 0.75 + 1.1 * 0.5 * 0.04 + 0.5 * 0.4 * 0.2
    )
    worse_than_it = scores(0.6, evenness=0.5, steadiness=0.5, order=0.3)
    assert evidence(worse_than_it, source, 1.0) == pytest.approx(-0.53 * 0.1 - 1.1 * 0.2 - 0.5 * 0.4 * 0.05)
    # without runs the order says nothing
    assert evidence(scores(0.5, order=-0.2), scores(order=-0.1), 0.0) == 0


def test_the_stream_has_runs_where_one_candidate_sees_them():
    assert runs_of({"source": scores(order=0.01), "norm": scores(order=0.04)}) == pytest.approx(0.4)
    assert runs_of({"source": scores(order=0.0), "norm": scores(order=0.3)}) == 1
    assert runs_of({"source": scores(order=-0.02), "norm": scores(order=-0.3)}) == 0


def test_the_evidence_is_never_more_than_the_images_that_differ():
    for even in (0.0, 0.5, 1.0):
        for agreement in (0.2, 0.7, 0.95, 1.0):
            for order in (-0.5, 0.0, 0.9):
                for steady in (0.0, 1.0):
                    own = scores(agreement, evenness=even, order=order, steadiness=steady)
                    assert abs(evidence(own, scores(), 1.0)) <= 1 - agreement + 1e-12


@pytest.mark.parametrize(("won", "lost", "labels"), [(0, 0, 0), (0, 0, 10), (3, 0, 10), (5, 2, 50), (2, 9, 30)])
def test_the_gain_is_the_posterior_of_scores_and_labels(won, lost, labels):
    """Against both densities on a grid."""
    own = better(labels_won=won / max(labels, 1), labels_lost=lost / max(labels, 1))
    grid = np.linspace(-1, 1, 200_001)
    prior = 0.53 * 0.2 * 0.9 + 0.5 * 0.3 * 0.35
    log_density = -0.5 * ((grid - prior) / (0.008 + 0.12 * 0.3)) ** 2
    if labels:
        square = (won + lost + 4 * 0.31) / (labels + 4)
        log_density -= 0.5 * ((won - lost) / labels - grid) ** 2 * labels / square
    density = np.exp(log_density - log_density.max())
    found = gain_of(own, scores(), 0.0, labels)
    assert found.estimate == pytest.approx((grid * density).sum() / density.sum(), abs=1e-6)
    mean = (grid * density).sum() / density.sum()
    assert found.deviation == pytest.approx(
        ((grid - mean) ** 2 * density).sum() ** 0.5 / density.sum() ** 0.5, abs=1e-6
    )
    assert found.probability == pytest.approx(density[grid > 0].sum() / density.sum(), abs=1e-4)


def test_the_source_stays_where_nothing_speaks_for_another():
    alike = {"source": scores(), "tent": scores(0.9), "norm": scores(0.6)}
    decision = decide(alike)
    assert decision.name == "source"
    assert decision.why.startswith("None: stay with the source")
    assert decide({"source": scores()}).name == "source"
    worse = {"source": scores(), "tent": scores(0.5, evenness=0.3)}
    assert decide(worse).name == "source"
    assert decide(worse).confidence > 0.85


def test_a_candidate_for_which_the_scores_speak_is_taken():
    decision = decide({"source": scores(), "norm": better(), "tent": scores()})
    assert decision.name == "norm"
    assert decision.confidence >= CLEAR
    assert decision.why.startswith("norm: ")
    assert decide({"source": scores(), "norm": better()}, clear_at=0.99999).name == "source"


def test_runs_speak_for_and_against_where_the_stream_is_sorted():
    source = scores(order=0.7)
    assert decide({"source": source, "lame": scores(0.95, order=0.75)}).name == "lame"
    assert decide({"source": source, "norm": better(order=0.5)}).name == "source"
    assert decide({"source": scores(), "norm": better(order=-0.05)}).name == "norm"


def test_what_holds_in_other_company_is_believed():
    unsteady = scores(0.8, steadiness=0.3)
    assert decide({"source": scores(), "norm": unsteady}).name == "source"
    assert decide({"source": scores(), "norm": scores(0.8, steadiness=1.0)}).name == "norm"


def test_of_those_that_are_level_the_first_is_taken():
    given = {"source": scores(), "norm": better(), "tent": better(evenness=0.8 + 1e-3)}
    assert decide(given).name == "norm"
    assert decide({**given, "tent": better(evenness=0.9)}).name == "tent"


def test_of_two_estimates_the_surer_counts_unless_it_is_much_smaller():
    """Means 0.07 and 0.08 with deviations 0.02 and 0.08: less their deviations 0.05 and 0."""
    sure, unsure = scores(0.9, steadiness=1.0, evenness=0.69), scores(0.4, steadiness=0.65, evenness=0.75)
    found = gains({"source": scores(), "norm": unsure, "lame": sure})
    assert found["norm"].estimate > found["lame"].estimate
    assert found["norm"].probability > 0.8
    assert decide({"source": scores(), "norm": unsure, "lame": sure}, clear_at=0.8).name == "lame"
    far = scores(0.4, steadiness=0.9, evenness=0.9)
    assert decide({"source": scores(), "norm": far, "lame": sure}).name == "norm"


def test_who_never_differs_from_the_source_is_not_taken():
    assert decide({"source": scores(), "norm": better(agreement_source=1.0)}).name == "source"


@pytest.mark.parametrize("bad", [{"steadiness": 0.1}, {"evenness": 0.4}, {"order": -0.2}])
def test_a_sign_of_harm_outweighs_the_rest(bad):
    tent = scores(order=0.1)  # the stream has runs
    assert decide({"source": scores(), "tent": tent, "norm": better(evenness=0.7)}).name == "norm"
    assert decide({"source": scores(), "tent": tent, "norm": better(evenness=0.7) | bad}).name == "source"


def test_labels_decide_where_scores_do_not():
    given = {"source": scores(), "norm": scores(agreement=0.6, labels_won=0.3, labels_lost=0.1)}
    assert decide(given).name == "source"
    assert decide(given, 50).name == "norm"
    assert gains(given, 10_000)["norm"].estimate == pytest.approx(0.2, abs=0.01)
    against = {"source": scores(), "norm": better(labels_won=0.1, labels_lost=0.3)}
    assert decide(against).name == "norm"
    assert decide(against, 200).name == "source"


def test_labels_that_tell_nothing_apart_bring_no_gain():
    given = {"source": scores(), "norm": better(labels_won=0.0, labels_lost=0.0)}
    estimates = [gains(given, count)["norm"].estimate for count in (0, 10, 100, 1000)]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[-1] < 0.01
