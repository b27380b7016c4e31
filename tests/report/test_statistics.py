"""Intervals and tests of the report: printed tables, closed forms, and SciPy's own tests."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from lightning_tta.report.statistics import holm, interval, over_samples, over_seeds


@pytest.mark.parametrize(("count", "quantile"), [(3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042), (121, 1.980)])
def test_intervals_against_the_printed_table_of_students_t(count, quantile):
    values = np.random.default_rng(count).normal(0.5, 0.1, count)
    found = interval(values.tolist())
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx(quantile * values.std(ddof=1) / math.sqrt(count), rel=2.5e-4)  # three decimals
    assert interval([0.1]).half is None
    assert interval([0.1, 0.2]).half is None  # of two, an interval would say nothing
    assert interval([]) is None


def test_p_values_of_student_t_in_closed_form():
    for t in (0.3, 2.0, 15.0):
        spread = math.sqrt(3)
        three = over_seeds([-t - spread, -t, -t + spread])  # mean -t, standard error 1, two degrees of freedom
        assert three.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert over_seeds([-1.0, 0.0, 1.0]).p == 1.0


def test_paired_differences_against_scipy():
    source, method = np.random.default_rng(3).normal([[0.50], [0.53]], 0.03, (2, 6))
    found = over_seeds((method - source).tolist())
    expected = scipy.stats.ttest_rel(method, source)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.clear == (low > 0)
    assert over_seeds([0.1]).half is None
    assert over_seeds([0.1, 0.2]).p is None
    equal = over_seeds([0.3 - 0.2, 0.1, 0.1])
    assert equal.p is None  # no spread but rounding: not evidence
    assert not equal.clear


def test_differences_of_images_by_hand():
    # 50 better, 30 worse, 20 equal: mean 0.2, variance (80 - 100 * 0.04) / 99, z = 0.2 / sqrt(76 / 9900) = 2.2827
    found = over_samples([1] * 50 + [-1] * 30 + [0] * 20)
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(1.959964 * math.sqrt(76 / 9900), rel=1e-6)
    assert found.p == pytest.approx(0.0224505, rel=1e-5)
    assert found.clear
    assert over_samples([0] * 10).p is None  # none differs: nothing is tested
    assert over_samples([1]) is None


def test_an_image_under_several_corruptions_is_one_draw():
    """As by hand from the means of each image; and the same whatever is said three times."""
    generator = np.random.default_rng(0)
    by_image = generator.integers(-1, 2, 60)[:, None] * (generator.random((60, 3)) < 0.8)
    draws = np.arange(60)[:, None] + np.zeros((1, 3), dtype=int)
    order = generator.permutation(180)
    found = over_samples(by_image.ravel()[order], draws.ravel()[order])
    means = by_image.mean(1)
    assert (found.mean, found.count) == (pytest.approx(means.mean()), 60)
    error = means.std(ddof=1) / math.sqrt(60)
    assert found.half == pytest.approx(scipy.stats.norm.ppf(0.975) * error)
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(means.mean()) / error))
    assert found.half > 1.3 * over_samples(by_image.ravel()).half  # taken for draws of their own they were too narrow
    once = [1] * 7 + [-1] * 2 + [0] * 30
    thrice, found = over_samples(once * 3, np.tile(np.arange(39), 3)), over_samples(once)
    assert thrice.half == pytest.approx(found.half)
    assert dataclasses.replace(thrice, half=found.half) == found


def test_few_images_that_differ_are_tested_exactly():
    four = over_samples([1] * 4 + [0] * 76)  # all in one direction: 2 / 2**4; by the normal distribution 0.043
    assert four.p == 0.125
    assert not four.clear
    six = over_samples([1] * 6 + [0] * 74)
    assert six.p == 2 / 2**6
    assert six.clear
    alike = over_samples([-1] * 10)  # all of them: no spread, and yet ten tosses of a coin
    assert alike.p == 2 / 2**10
    assert alike.clear
    assert not over_samples([1] * 3).clear
    assert over_samples([1] * 40).p == pytest.approx(2 / 2**40)
    mixed = over_samples([1] * 9 + [-1] * 1 + [0] * 70)
    assert mixed.p == pytest.approx(scipy.stats.binomtest(1, 10).pvalue)
    assert over_samples([1] * 12 + [-1] * 12 + [0] * 70).p == 1.0


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
