"""The monitors ``poem`` and ``drift``: their interface, alarms, and state."""

import copy

import pytest
import torch

from lightning_tta.errors import ConfigError, DataError, NotPreparedError
from lightning_tta.evidence.betting import ShiftTest
from lightning_tta.evidence.drift import LabelDriftTest
from lightning_tta.guard.monitors.base import Seen
from lightning_tta.guard.monitors.kinds import make_monitors
from lightning_tta.losses import entropy

ALARMS = {"poem": "shift", "drift": "label_drift"}


def logits(number, seed=0, scale=4.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(number, 6, generator=generator)
    values[:, 0] += offset
    return values


def seen(values):
    return Seen(logits=torch.zeros_like(values), source=values)  # the answers are not looked at


def prepared(name, **options):
    (monitor,) = make_monitors({"kind": name, **options})
    monitor.prepare([Seen(logits=logits(200, 90)), Seen(logits=logits(300, 91))])
    return monitor


@pytest.mark.parametrize("name", ALARMS)
def test_one_alarm_in_a_stream_and_another_in_the_next(name):
    monitor = prepared(name)
    for _ in range(2):
        alarms = []
        for number in range(10):
            monitor.see(seen(logits(40, number)))
            alarms.append(monitor.alarm())
        for number in range(10):
            monitor.see(seen(logits(40, 50 + number, scale=1.5, offset=3.0)))
            monitor.forget()  # the method is another; the stream is the same
            alarms.append(monitor.alarm())
        assert alarms[:10] == [""] * 10
        assert [alarm for alarm in alarms if alarm] == [ALARMS[name]]
        assert monitor.values()[f"{name}_log_wealth"] > 3
        monitor.begin()
        assert monitor.values()[f"{name}_log_wealth"] == pytest.approx(0, abs=1e-12)


def test_they_are_the_tests_of_the_source_s_logits():
    poem, drift = prepared("poem", alpha=0.1, seed=3), prepared("drift", alpha=0.1, seed=3)
    calibration = torch.cat([logits(200, 90), logits(300, 91)]).double()
    shift = ShiftTest(entropy(calibration), alpha=0.1, seed=3)
    labels = LabelDriftTest(calibration.argmax(1), 6, alpha=0.1, seed=3)
    for number in range(4):
        values = logits(30, number)
        poem.see(seen(values))
        drift.see(seen(values))
        shift.see(entropy(values.double()))
        labels.see(values.argmax(1))
    assert poem.values() == {"poem_log_wealth": shift.log_wealth, "poem_epsilon": shift.bettor.epsilon}
    assert drift.values() == {"drift_log_wealth": labels.log_wealth}


@pytest.mark.parametrize("name", ALARMS)
def test_state_goes_on_bit_by_bit(name):
    monitor = prepared(name)
    monitor.see(seen(logits(33, 1)))
    (again,) = make_monitors(name)
    again.load_state_dict(copy.deepcopy(monitor.state_dict()))
    for each in (monitor, again):
        each.see(seen(logits(60, 2, scale=1.0, offset=9.0)))
    assert again.values() == monitor.values()
    assert again.alarm() == monitor.alarm() == ALARMS[name]
    again.load_state_dict(monitor.state_dict())
    again.see(seen(logits(60, 2, scale=1.0, offset=9.0)))
    assert again.alarm() == ""  # it was raised before


@pytest.mark.parametrize("name", ALARMS)
def test_single_images_equal_logits_and_missing_ones(name):
    monitor = prepared(name)
    for row in logits(50, 5).split(1):
        monitor.see(seen(row))
    whole = prepared(name)
    whole.see(seen(logits(50, 5)))
    key = f"{name}_log_wealth"
    assert monitor.values()[key] == pytest.approx(whole.values()[key], abs=1e-12)
    monitor.see(seen(torch.ones(200, 6)))
    monitor.see(seen(logits(4).fill_(float("nan"))))
    monitor.see(seen(logits(0)))
    assert monitor.values()[key] > whole.values()[key]


def test_drift_of_the_answers_needs_no_source():
    source, answers = prepared("drift"), prepared("drift", of="answers")
    assert source.wants == {"source"}
    assert answers.wants == set()
    source.see(seen(logits(60, 5)))
    answers.see(Seen(logits=logits(60, 5)))
    assert source.values() == answers.values()


@pytest.mark.parametrize("name", ALARMS)
def test_what_does_not_go_is_refused(name):
    (monitor,) = make_monitors(name)
    assert monitor.needs_source
    with pytest.raises(NotPreparedError, match="call prepare"):
        monitor.see(seen(logits(4)))
    with pytest.raises(DataError, match="10 held-out source images"):
        monitor.prepare([Seen(logits=logits(9))])
    with pytest.raises(DataError):
        monitor.prepare([])
    with pytest.raises(ConfigError, match="alpha"):
        make_monitors({"kind": name, "alpha": 0})
    with pytest.raises(NotPreparedError, match="source's logits"):
        prepared(name).see(Seen(logits=logits(4)))
