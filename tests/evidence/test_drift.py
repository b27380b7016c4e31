"""A bet on predicted labels: the equations once more, and the bound on false alarms by simulation."""

import math

import pytest
import torch

from lightning_tta.errors import ConfigError, DataError
from lightning_tta.evidence.betting import uniforms
from lightning_tta.evidence.drift import LabelDriftTest

SHARES = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])


def labels(number, seed=0, shares=SHARES):
    return torch.multinomial(
        torch.as_tensor(shares).double(), number, True, generator=torch.Generator().manual_seed(seed)
    )


def reference(calibration, stream, seed, classes):
    """The docstring's equations, one sample after another, in plain numbers; the wealth after each."""
    counts = [calibration.tolist().count(k) for k in range(classes)]
    fallen, wealths, path = [0] * classes, {a: 1.0 for a in (3, 30, 300, 3000)}, []
    draws = uniforms(seed, 0, len(stream)).tolist()
    for y, draw in zip(stream.tolist(), draws, strict=True):
        total = sum(counts)
        u = (sum(counts[:y]) + draw * (counts[y] + 1)) / (total + 1)
        p = [count / total for count in counts]
        k = next(k for k in range(classes) if u < sum(counts[: k + 1]) / total)
        for a in wealths:
            wealths[a] *= (fallen[k] + a * p[k]) / (sum(fallen) + a) / p[k]
        fallen[k] += 1
        counts[y] += 1
        path.append(sum(wealths.values()) / 4)
    return path


@pytest.mark.parametrize("never", [False, True])
def test_the_wealth_is_that_of_the_equations(never):
    """In whatever batches it comes, and with a class that the calibration has not."""
    calibration = labels(60)
    calibration = calibration[calibration != 2] if never else calibration
    stream = torch.cat([labels(40, 1), torch.full((12,), 2), labels(300, 2)])
    path = reference(calibration, stream, 5, 7)
    test, start = LabelDriftTest(calibration, 7, seed=5), 0
    for end in (1, 30, 30, 352):
        test.see(torch.cat([stream[start:end], torch.tensor([-1])]))  # none
        start = end
        assert test.log_wealth == pytest.approx(math.log(path[end - 1]), abs=1e-9)
        test = LabelDriftTest.from_state(test.state_dict())
    assert test.largest == pytest.approx(math.log(max(1, *path)), abs=1e-9)


def test_false_alarms_are_below_alpha_on_streams_of_ten_times_the_calibration():
    """200 streams, 5 %: more than 18 alarms with a probability of 1 %."""
    alarms = 0
    for number in range(200):
        drawn = labels(660, number)
        test = LabelDriftTest(drawn[:60], 7, seed=number)
        test.see(drawn[60:])
        alarms += test.alarmed
    assert alarms <= 18


@pytest.mark.parametrize(
    ("shares", "most"), [([0, 0, 0, 1, 0, 0, 0], 60), ([0.1, 0.1, 0.1, 0.1, 0.1, 0.25, 0.25], 300)]
)
def test_other_labels_are_found_soon(shares, most):
    test = LabelDriftTest(labels(1000), 7)
    test.see(labels(500, 1))
    assert not test.alarmed
    stream = labels(most, 2, shares)
    test.see(stream)
    assert test.alarmed
    test.restart()
    assert not test.alarmed
    assert test.log_wealth == pytest.approx(0, abs=1e-12)


def test_a_stream_sorted_by_class_alarms_though_its_shares_are_the_source_s():
    shuffled, ordered = (LabelDriftTest(labels(500), 7) for _ in range(2))
    shuffled.see(labels(500, 3))
    ordered.see(labels(500, 3).sort().values)
    assert ordered.alarmed
    assert not shuffled.alarmed


def test_what_does_not_go_is_refused():
    with pytest.raises(DataError, match="at least 10 held-out source images"):
        LabelDriftTest(torch.cat([labels(9), torch.tensor([-1])]), 7)
    with pytest.raises(ConfigError, match="alpha"):
        LabelDriftTest(labels(30), 7, alpha=0.9)
