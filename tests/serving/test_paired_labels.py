"""Late labels: counts against plain ones, and the guarantee of the bets by simulation."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from lightning_tta import ConfigError, InputError
from lightning_tta.serving.labels import Counts, PairedLabels, log_wealth


def test_wealth_is_the_mean_over_bets_played_one_by_one():
    outcomes = [1, 1, -1, 1, 1, 1, -1, 1]
    fortunes = [1.0] * 19
    for outcome in outcomes:
        fortunes = [fortune * (1 + outcome * (k + 1) / 20) for k, fortune in enumerate(fortunes)]
    assert log_wealth(6, 2) == pytest.approx(math.log(sum(fortunes) / 19), abs=1e-12)
    assert log_wealth(0, 0) == 0
    assert math.isfinite(log_wealth(10**6, 10))


def test_equal_ones_are_rarely_called_better_however_often_one_looks():
    """Of 400 pairs of equals looked at after each of 200 disagreements, at most alpha are called better."""
    wins = np.random.default_rng(0).random((400, 200)) < 0.5
    bets = np.arange(1, 20)[:, None, None] / 20
    logs = np.where(wins, np.log1p(bets), np.log1p(-bets)).cumsum(2)  # the same, in another way
    called = (np.log(np.exp(logs).mean(0)) >= math.log(20)).any(1).mean()
    assert 0.002 < called <= 0.05
    better = np.random.default_rng(0).random((400, 200)) < 0.7
    logs = np.where(better, np.log1p(bets), np.log1p(-bets)).cumsum(2)
    assert (np.log(np.exp(logs).mean(0)) >= math.log(20)).any(1).mean() > 0.99
    count = int(wins[0].sum())
    assert log_wealth(count, 200 - count) == pytest.approx(
        float(np.log(np.exp(np.where(wins[:1], np.log1p(bets), np.log1p(-bets)).sum(2)).mean(0))[0])
    )


def filled(number=40, **options):
    """Answers "0", "1", ...: the source always says 0, the method 1, and the source's went out."""
    labels = PairedLabels(**options)
    ids = [str(n) for n in range(number)]
    labels.answer(ids, [0] * number)
    labels.predict(ids, [0] * number, [1] * number)
    return labels, ids


def test_labels_by_id_in_any_order_count_once():
    labels, ids = filled()
    assert labels.tell(["7", "3", "none"], [1, 0, 1]) == 2
    assert labels.tell(["7"], [1]) == 0
    counts = labels.counts
    assert (counts.labels, counts.source_right, counts.method_right) == (2, 1, 1)
    assert (counts.only_source, counts.only_method, counts.answers, counts.answers_right) == (1, 1, 2, 1)
    assert labels.better == ""
    labels.tell(ids[10:30], [1] * 20)
    assert labels.better == "method"
    labels.tell([*ids[:10], *ids[30:]], [0] * 20)
    assert labels.better == ""


@pytest.mark.parametrize(("label", "better"), [(1, "method"), (0, "source"), (2, "")])
def test_who_is_better(label, better):
    labels, ids = filled()
    labels.tell(ids[:6], [label] * 6)
    assert labels.better == ""  # (1 + b)^6 has a mean of 15 or so: six in a row may be chance at 0.05
    labels.tell(ids[6:9], [label] * 3)
    assert labels.better == better


def test_a_label_that_comes_before_the_method_has_predicted():
    labels = PairedLabels()
    labels.answer(["a", "b"], [0, 0])
    assert labels.tell(["a"], [1]) == 1
    assert labels.tell(["a"], [1]) == 0
    assert (labels.counts.labels, labels.counts.answers, labels.counts.answers_right) == (0, 1, 0)
    again = PairedLabels()
    again.load_state_dict(labels.state_dict())
    for each in (labels, again):
        each.predict(["a", "b"], [0, 0], [1, 1])
        assert (each.counts.labels, each.counts.method_right) == (1, 1)
        assert each.tell(["b"], [0]) == 1


def test_another_method_begins_anew_but_what_went_out_counts():
    labels, ids = filled()
    labels.tell(ids[:20], [1] * 20)
    labels.forget()
    assert labels.better == ""
    assert labels.tell(ids[20:], [1] * 20) == 20
    assert (labels.counts.labels, labels.counts.answers) == (0, 40)


def test_memory_is_bounded():
    labels, _ = filled(40, keep=10)
    assert labels.tell(["29", "30"], [0, 0]) == 1


def test_counts_are_those_of_one_moment():
    """Another thread is in the middle of counting a label."""
    counting, go_on = threading.Event(), threading.Event()

    class Slow(Counts):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "labels" and value:
                counting.set()
                go_on.wait(10)

    labels, ids = filled(2)
    labels.counts = Slow()
    with ThreadPoolExecutor(2) as threads:
        threads.submit(labels.tell, ids[:1], [0])
        assert counting.wait(10)
        read = threads.submit(labels.known)
        wait([read], 0.05)  # in which it would be read half written
        go_on.set()
        assert (read.result(10).labels, read.result(10).source_right) == (1, 1)


@pytest.mark.parametrize("alpha", [0, 0.6, 1])
def test_wrong_levels(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        PairedLabels(alpha=alpha)


@pytest.mark.parametrize(("ids", "told"), [(["0"], [1, 2]), (["0"], [1.5]), (["0"], [True]), ("0", [1])])
def test_wrong_labels(ids, told):
    with pytest.raises(InputError, match="a label for each, a whole number from 0"):
        filled()[0].tell(ids, told)
