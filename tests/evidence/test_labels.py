"""Late labels: what counts, and that the intervals hold what they promise."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_tta import ConfigError
from lightning_tta.errors import InputError
from lightning_tta.evidence.labels import LateLabels, anytime_interval, clopper_pearson


def fed(number=10, **options):
    late = LateLabels(**options)
    late.see(range(number), torch.arange(number) % 3)
    return late


def test_labels_in_any_order():
    late = fed()
    assert late.estimate()[1:] == (0.0, 1.0)
    assert math.isnan(late.estimate()[0])
    assert late.tell([7, 0, 3], [1, 0, 1]) == 3  # 1 is right, 0 is right, 0 is answered
    accuracy, low, high = late.estimate()
    assert accuracy == pytest.approx(2 / 3)
    assert (low, high) == anytime_interval(2, 3)
    assert low < accuracy < high


def test_unknown_and_repeated_labels_do_not_count():
    late = fed()
    late.tell([1, 99, "1"], [1, 0, 1])
    assert (late.number, late.right, late.unknown, late.repeated) == (1, 1, 2, 0)
    late.tell([1, 2], torch.tensor([0, 2]))
    assert (late.number, late.right, late.unknown, late.repeated) == (2, 2, 2, 1)
    assert late.tell([3], [-1]) == 0  # no label
    assert late.number == 2


def test_a_call_that_knows_none_warns():
    late = LateLabels()
    late.see(["a", "b"], [0, 1])
    with pytest.warns(UserWarning, match="same type"):
        late.tell([0, 1], [0, 1])
    late.tell(["a"], [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.tell([7], [0])


def test_labels_that_come_too_late():
    late = fed(10, waiting=4)
    assert late.tell([5, 6], [2, 0]) == 1
    assert late.unknown == 1
    assert len(late.state_dict()["waiting"]) == 4


def test_a_sample_that_comes_again():
    late = fed()
    late.see([1], [2])  # its first answer, 1, gets no label any more
    assert late.replaced == 1
    late.tell([1], [2])
    assert (late.number, late.right) == (1, 1)
    late.see([1], [0])
    assert late.replaced == 1
    late.tell([1], [2])
    assert (late.number, late.right, late.repeated) == (2, 1, 0)


def test_logits_and_images_that_were_left_out():
    late = LateLabels()
    late.see([0, 1, 2], torch.tensor([[0.0, 1.0], [0.0, 0.0], [float("nan"), 1.0]]))
    assert late.tell([0, 1, 2], [1, 0, 1]) == 1
    assert late.unknown == 2


def test_a_window_forgets():
    late = fed(10, window=3)
    late.tell(range(5), [0, 1, 2, 9, 9])
    assert late.estimate() == pytest.approx((1 / 3, *clopper_pearson(1, 3)))
    assert late.number == 3


@pytest.mark.parametrize("options", [{}, {"window": 3}])
def test_a_state_goes_on(options):
    late = fed(**options)
    late.tell(range(5), [0, 9, 2, 0, 1])
    other = LateLabels(**options)
    other.load_state_dict(copy.deepcopy(late.state_dict()))
    json.dumps(late.state_dict())
    for each in (late, other):
        each.tell(range(4, 8), [1, 2, 0, 1])
    assert late.state_dict() == other.state_dict()
    late.begin()
    assert late.number == 0
    late.tell([9], [0])  # of one that was forgotten, perhaps
    with pytest.warns(UserWarning, match="None of"):
        late.tell(range(20, 40), [0] * 20)


@pytest.mark.parametrize(
    ("index", "labels"), [([0, 1], [0]), ([0], [0.5]), ([0], [True]), ([0], [[0]]), (torch.arange(2), torch.arange(3))]
)
def test_what_is_no_label(index, labels):
    with pytest.raises(InputError, match=r"labels must be|same length"):
        fed().tell(index, labels)


@pytest.mark.parametrize("index", [0, "0", [0.0], [[0]], [None], torch.tensor(0), torch.zeros(1), np.zeros(1)])
def test_what_is_no_name(index):
    for take in (fed().tell, fed().see):
        with pytest.raises(InputError, match="index must be a list of whole numbers or texts"):
            take(index, [0])


@pytest.mark.parametrize("index", [range(2), (0, 1), np.arange(2), torch.arange(2), [np.int64(0), 1]])
def test_whatever_the_form_of_the_names(index):
    assert fed().tell(index, [0, 1]) == 2


@pytest.mark.parametrize("interval", [anytime_interval, clopper_pearson])
@pytest.mark.parametrize(("right", "number"), [(5, 3), (-1, 3), (0, -1), (1.5, 3)])
def test_counts_that_are_none(interval, right, number):
    with pytest.raises(ConfigError, match=r"right|number"):
        interval(right, number)


@pytest.mark.parametrize("wrong", [{"waiting": 0}, {"window": 0}, {"level": 0.3}, {"interval": "wald"}])
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LateLabels(**wrong)


@pytest.mark.parametrize(("right", "number"), [(0, 5), (5, 5), (3, 10), (80, 100)])
def test_clopper_pearson_ends_are_where_tails_are_small(right, number):
    low, high = clopper_pearson(right, number, 0.9)
    if right:
        assert stats.binom.sf(right - 1, number, low) == pytest.approx(0.05)
    if right < number:
        assert stats.binom.cdf(right, number, high) == pytest.approx(0.05)
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == number)


def test_anytime_interval_is_where_the_mixture_reaches_its_bound():
    """The mixture once more, term by term."""
    tilts = [sign * 0.02 * (6 / 0.02) ** (i / 23) for sign in (-1, 1) for i in range(24)]
    for right, number in ((17, 20), (300, 1000)):
        for mean in anytime_interval(right, number, 0.9):
            terms = [math.exp(tilt * right - number * math.log(1 - mean + mean * math.exp(tilt))) for tilt in tilts]
            assert sum(terms) / len(terms) == pytest.approx(10, rel=1e-6)
    assert anytime_interval(0, 0) == (0.0, 1.0)
    assert anytime_interval(30, 30)[1] == 1.0
    assert anytime_interval(0, 30)[0] == 0.0


@pytest.mark.parametrize("accuracy", [0.95, 0.5])
def test_intervals_hold_at_all_times(accuracy):
    """1,000 streams of 400 labels, looked at after each: the mixture at the true mean, as the interval is cut there.

    With the seed fixed, at most 5 % of the streams may ever miss; intervals for one look miss far more often.
    """
    generator = np.random.default_rng(0)
    sums = (generator.random((1000, 400)) < accuracy).cumsum(1)
    ever = _ever_missed(sums, accuracy * np.arange(1, 401))
    assert 0.0005 <= ever.mean() <= 0.05
    numbers = np.array([25, 50, 100, 200, 300, 400])
    low = stats.beta.ppf(0.025, sums[:, numbers - 1], numbers - sums[:, numbers - 1] + 1)
    high = stats.beta.ppf(0.975, sums[:, numbers - 1] + 1, numbers - sums[:, numbers - 1])
    missed = (np.nan_to_num(low, nan=0) > accuracy) | (np.nan_to_num(high, nan=1) < accuracy)
    assert missed.mean(0).max() <= 0.05  # each look alone
    assert missed.any(1).mean() > 0.06  # but not all


def test_intervals_hold_while_accuracy_changes():
    """The mean of accuracies that fall from 0.9 to 0.3, and depend on how often the net was right before."""
    generator = np.random.default_rng(1)
    right, mean = np.zeros(1000), np.zeros(1000)
    sums, means = [], []
    for step in range(400):
        accuracy = np.clip(0.9 - 0.6 * step / 400 + 0.3 * (right / max(1, step) - 0.6), 0.02, 0.98)
        right = right + (generator.random(1000) < accuracy)
        mean = mean + accuracy
        sums.append(right)
        means.append(mean)
    assert 0.0005 <= _ever_missed(np.stack(sums, 1), np.stack(means, 1)).mean() <= 0.05


def _ever_missed(sums, mean_sums):
    """Which streams ever have the true mean outside of their interval, by the code's own function where it is close."""
    numbers = np.arange(1, sums.shape[1] + 1)
    means = np.broadcast_to(mean_sums / numbers, sums.shape)
    looks = np.unique(np.geomspace(1, sums.shape[1], 30).astype(int))
    ever = np.zeros(len(sums), bool)
    for number in looks:
        shares = {}
        for row, right in enumerate(sums[:, number - 1].astype(int)):
            if right not in shares:
                shares[right] = anytime_interval(right, int(number))
            low, high = shares[right]
            ever[row] |= not low <= means[row, number - 1] <= high
    return ever
