"""Bets on ranks of entropies: references in float64, and the bound on false alarms by simulation."""

import bisect
import math

import pytest
import torch

from lightning_tta.errors import ConfigError, DataError, InputError
from lightning_tta.evidence.betting import (
    ConformalRanks,
    Martingale,
    MixtureMartingale,
    ShiftTest,
    SourceCDF,
    uniforms,
)


def draws(number, seed=0):
    return torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_uniform_draws_depend_on_their_position_alone_and_are_uniform():
    whole = uniforms(3, 0, 4000)
    assert torch.equal(torch.cat([uniforms(3, 0, 7), uniforms(3, 7, 93)]), whole[:100])
    assert not torch.equal(uniforms(4, 0, 100), whole[:100])
    assert ((whole >= 0) & (whole < 1)).all()
    counts = torch.histc(whole, 10, 0, 1)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi squared with 9 degrees of freedom, 0.1 %


# Ranks


def test_ranks_with_draws_count_smaller_and_equal_values():
    values = [0.1, 0.1, 0.1, 0.4, 0.5, 0.9, *(1 + 0.01 * i for i in range(20))]
    cdf = SourceCDF(torch.tensor(values).double())
    entropies = torch.tensor([0.05, 0.1, 0.45, 0.9, 5.0]).double()
    chance = torch.tensor([0.5, 0.25, 0.9, 0.0, 0.99]).double()
    expected = [0.5 / 27, (0 + 0.25 * 4) / 27, (4 + 0.9) / 27, 5 / 27, (26 + 0.99) / 27]
    assert cdf.ranks(entropies, chance).tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_interpolated_ranks(dtype):
    values = torch.cat([draws(200) ** 4, torch.full((5,), 0.3), torch.zeros(4)]).to(dtype)
    cdf = SourceCDF(values, largest=math.log(10))
    entropies = torch.cat([draws(500, 1) ** 4, values, torch.tensor([0.0, 2.0, math.log(10)], dtype=torch.float64)]).to(
        dtype
    )
    ranks = cdf.ranks(entropies)
    assert ((ranks >= 0) & (ranks <= 1)).all()
    torch.testing.assert_close(cdf.entropies(ranks), entropies, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    order = entropies.argsort()
    assert (ranks[order].diff() >= 0).all()
    middle = (bisect.bisect_left(values.sort().values.tolist(), float(values[200])) + 3) / (len(values) + 1)
    assert float(cdf.ranks(values[200:201])[0]) == pytest.approx(middle, abs=1e-6)  # the third of five equal ones


def test_too_few_entropies_are_refused():
    with pytest.raises(DataError, match="at least 10 held-out source images"):
        SourceCDF(torch.cat([torch.ones(9), torch.tensor([float("nan")])]))


def test_conformal_ranks_are_those_of_a_sorted_list():
    calibration = (draws(50) ** 3 * 32).floor() / 16  # on the grid of steps, with equal ones
    stream = (draws(120, 1) ** 3 * 32).floor() / 16
    chance = draws(120, 2)
    ranks = ConformalRanks(calibration)
    got = torch.cat([ranks.ranks(stream[:1], chance[:1]), ranks.ranks(stream[1:60], chance[1:60])])
    got = torch.cat([got, ranks.ranks(stream[60:], chance[60:])])
    seen, expected = sorted(calibration.tolist()), []
    for value, draw in zip(stream.tolist(), chance.tolist(), strict=True):
        below, up_to = bisect.bisect_left(seen, value), bisect.bisect_right(seen, value)
        expected.append((below + draw * (up_to - below + 1)) / (len(seen) + 1))
        bisect.insort(seen, value)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["conformal", "fixed"])
def test_ranks_of_entropies_that_are_all_equal_are_uniform(kind):
    test = ShiftTest(torch.zeros(500), ranks=kind)
    seen = []
    test.bettor.bet = seen.append
    for _ in range(20):
        test.see(torch.zeros(100))
    counts = torch.histc(torch.cat(seen), 10, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9


# Martingales


def reference_sf_ogd(ranks, margin):
    """The docstring's equations, with all gradients kept."""
    epsilon, wealth, gradients, largest = 0.0, 1.0, [], 1.0
    limit = min(1.8, 0.9 / (0.5 + margin))
    for u in ranks:
        v = u - 0.5
        factor = 1 + epsilon * v - margin * abs(epsilon)
        wealth *= factor
        largest = max(largest, wealth)
        if epsilon == 0:
            g = math.copysign(max(abs(v) - margin, 0), v)
        else:
            g = (v - (margin if epsilon > 0 else -margin)) / factor
        if (epsilon == limit and g > 0) or (epsilon == -limit and g < 0):
            g = 0.0
        gradients.append(g)
        if any(gradients):
            epsilon += 2 / math.sqrt(3) * g / math.sqrt(sum(x * x for x in gradients))
        epsilon = min(max(epsilon, -limit), limit)
    return wealth, largest, epsilon


def reference_mixture(ranks, margin):
    """Each fixed bet's wealth in plain numbers, a share of the sum dealt out anew after each 50 samples."""
    sizes = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    bets = [0.0] + [s * size for size in sizes if size * (0.5 + margin) < 1 for s in (1, -1)]
    start = [0.25] + [0.75 / (len(bets) - 1)] * (len(bets) - 1)
    wealths, largest = list(start), 1.0
    for number, u in enumerate(ranks, 1):
        wealths = [w * (1 + e * (u - 0.5) - margin * abs(e)) for w, e in zip(wealths, bets, strict=True)]
        largest = max(largest, sum(wealths))
        if number % 50 == 0:
            rate, total = 1 / (number / 50 + 1), sum(wealths)
            wealths = [(1 - rate) * w + rate * total * s for w, s in zip(wealths, start, strict=True)]
    total = sum(wealths)
    return total, largest, sum(w * e for w, e in zip(wealths, bets, strict=True)) / total


@pytest.mark.parametrize("margin", [0.0, 0.03])
@pytest.mark.parametrize(
    ("kind", "reference"), [(Martingale, reference_sf_ogd), (MixtureMartingale, reference_mixture)]
)
def test_wealth_and_bet_are_those_of_the_equations(kind, reference, margin):
    ranks = torch.cat([draws(170), draws(130, 1) ** 0.4, torch.ones(9), draws(120, 2) ** 3])
    bettor = kind(margin)
    for part in (ranks[:1], ranks[1:60], ranks[60:60], ranks[60:]):  # however they come
        bettor.bet(part)
    wealth, largest, epsilon = reference(ranks.tolist(), margin)
    assert bettor.log_wealth == pytest.approx(math.log(wealth), rel=1e-10)
    assert bettor.largest == pytest.approx(math.log(largest), rel=1e-10)
    assert bettor.epsilon == pytest.approx(epsilon, rel=1e-9)
    again = kind(margin)
    again.load_state_dict(bettor.state_dict())
    for each in (bettor, again):
        each.bet([0.1, 0.7])
    assert again.state_dict().keys() == bettor.state_dict().keys()
    assert (again.log_wealth, again.largest, again.epsilon) == (bettor.log_wealth, bettor.largest, bettor.epsilon)


@pytest.mark.parametrize("kind", [Martingale, MixtureMartingale])
def test_the_expected_factor_is_one_for_every_bet(kind):
    """Over u in {1/4, 3/4} with equal chance the wealth's mean stays 1: all 2^10 streams."""
    total = 0.0
    for number in range(2**10):
        bettor = kind()
        bettor.bet([0.25 + 0.5 * (number >> place & 1) for place in range(10)])
        total += math.exp(bettor.log_wealth) / 2**10
    assert total == pytest.approx(1, abs=1e-12)


def test_a_bet_never_loses_all():
    for kind in (Martingale, MixtureMartingale):
        for margin in (0.0, 0.1, 0.4):
            bettor = kind(margin)
            bettor.bet([1.0] * 50 + [0.0] * 50 + [1.0] * 50)
            assert math.isfinite(bettor.log_wealth)


# The test of a shift


def false_alarms(kind, bets, calibration, stream, streams, seed=0):
    """The share of streams like the source with an alarm; ranks are uniform, so entropies may be, too."""
    source = torch.Generator().manual_seed(seed)
    alarms = 0
    for number in range(streams):
        values = torch.rand(calibration + stream, dtype=torch.float64, generator=source)
        test = ShiftTest(values[:calibration], ranks=kind, bets=bets, seed=number)
        test.see(values[calibration:])
        alarms += test.alarmed
    return alarms / streams


def test_false_alarms_of_exact_ranks_are_below_alpha_on_long_streams():
    """Five times as long as the calibration. 200 streams, 5 %: above 18 with a probability of 1 %."""
    assert false_alarms("conformal", "mixture", 100, 500, 200) <= 18 / 200
    assert false_alarms("margin", "mixture", 100, 500, 200) <= 18 / 200


def test_false_alarms_of_a_fixed_distribution_are_many_on_long_streams():
    """So that the test above can fail: the paper's form, whose calibration is wrong by 1 / sqrt(12 n)."""
    assert false_alarms("fixed", "mixture", 100, 1000, 100) > 0.2


def test_the_margin_covers_the_mean_rank_in_a_calibration():
    """c is the two-sided quantile of the mean of n uniform numbers, or above it; n = 10 is the smallest."""
    generator = torch.Generator().manual_seed(0)
    for n in (10, 200):
        test = ShiftTest(torch.rand(n, generator=generator), alpha=0.1, ranks="margin")
        means = torch.rand(40_000, n, generator=generator).mean(1)
        assert float(((means - 0.5).abs() > test.margin).double().mean()) <= 0.05 + 3 * math.sqrt(0.05 / 40_000)
        assert test.threshold == pytest.approx(-math.log(0.05))


@pytest.mark.parametrize("kind", ["conformal", "margin", "fixed"])
@pytest.mark.parametrize("bets", ["mixture", "sf_ogd"])
def test_a_shift_is_found_soon_also_after_a_long_time_without(kind, bets):
    values = draws(4000)
    test = ShiftTest(values[:1000], ranks=kind, bets=bets)
    test.see(values[1000:])
    assert not test.alarmed
    shifted = draws(1000, 1) ** 0.5  # mean rank 2/3
    while not test.alarmed and len(shifted):
        test.see(shifted[:10])
        shifted = shifted[10:]
    needed = 1000 - len(shifted)
    assert needed <= {"mixture": 150, "sf_ogd": 600}[bets]
    assert test.bettor.epsilon > 0
    test.restart()
    assert not test.alarmed
    assert test.log_wealth == pytest.approx(0)


@pytest.mark.parametrize("kind", ["conformal", "margin"])
@pytest.mark.parametrize("bets", ["mixture", "sf_ogd"])
def test_state_goes_on_bit_by_bit_and_batches_do_not_matter(kind, bets):
    values = draws(1500)
    whole, parts = (ShiftTest(values[:500], ranks=kind, bets=bets, seed=7) for _ in range(2))
    whole.see(values[500:])
    parts.see(values[500:733])
    parts = ShiftTest.from_state(parts.state_dict())
    for start in range(733, 1500, 13):
        parts.see(torch.cat([values[start : start + 13], torch.tensor([math.nan])]))  # left out
    assert parts.bettor.epsilon == pytest.approx(whole.bettor.epsilon, abs=1e-12)
    assert parts.log_wealth == pytest.approx(whole.log_wealth, abs=1e-12)
    assert parts.bettor.largest == pytest.approx(whole.bettor.largest, abs=1e-12)


@pytest.mark.parametrize("entropies", [[0.1] * 30, torch.rand(30, 5), torch.tensor(0.1)])
def test_what_are_no_entropies(entropies):
    with pytest.raises(InputError, match=r"tensor \(B,\), one number a sample"):
        ShiftTest(entropies)
    with pytest.raises(InputError, match=r"tensor \(B,\), one number a sample"):
        ShiftTest(torch.rand(30)).see(entropies)


def test_wrong_settings_are_refused():
    for options in ({"alpha": 0}, {"alpha": 0.7}, {"ranks": "exact"}, {"bets": "kelly"}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ShiftTest(torch.rand(30), **options)
