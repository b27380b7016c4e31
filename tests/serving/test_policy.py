"""The default policy, fed with evidence by hand."""

import pytest

from lightning_tta import ConfigError
from lightning_tta.serving.labels import Counts
from lightning_tta.serving.policy import Evidence, Patience


def feed(policy, count, source=0.5, method=0.6, answering="source", images=16, **evidence):
    """The decisions on so many micro-batches; who answers follows them."""
    decisions = []
    for number in range(count):
        seen = Evidence(number, images, answering, {"a": source}, {"a": method}, **evidence)
        decisions.append(policy.decide(seen))
        answering = decisions[-1].answering
    return decisions


def switches_after(policy, **evidence):
    """Micro-batches until the method answers; ``None``: not after 100."""
    return next((n + 1 for n in range(100) if feed(policy, 1, **evidence)[0].answering == "method"), None)


def test_the_method_answers_after_patience_batches_that_hold_enough_images():
    assert switches_after(Patience(5, min_images=1)) == 5
    assert switches_after(Patience(5, min_images=160)) == 10
    assert switches_after(Patience(5, min_images=1), method=0.515) is None  # less than the margin
    assert switches_after(Patience(5, min_images=1, margin=0.01), method=0.515) == 5
    decision = feed(Patience(5, min_images=1), 5)[-1]
    assert decision.restore == ""
    assert decision.reason == "a: estimated accuracy 0.600 of the method, 0.500 of the source"


def test_in_a_row():
    policy = Patience(5, min_images=1)
    feed(policy, 4)
    feed(policy, 1, method=0.5)
    assert switches_after(policy) == 5


def test_no_estimate_no_evidence():
    policy = Patience(1, min_images=1)
    for source, method in (({}, {"a": 0.9}), ({"a": 0.1}, {}), ({"b": 0.1}, {"a": 0.9})):
        assert policy.decide(Evidence(0, 8, "source", source, method)).answering == "source"


def test_all_estimates_must_agree_or_those_that_are_named():
    both = {"a": 0.1, "b": 0.5}, {"a": 0.9, "b": 0.4}
    assert Patience(1, min_images=1).decide(Evidence(0, 8, "source", *both)).answering == "source"
    assert Patience(1, min_images=1, estimates=["a"]).decide(Evidence(0, 8, "source", *both)).answering == "method"
    assert Patience(1, min_images=1, estimates=["c"]).decide(Evidence(0, 8, "source", *both)).answering == "source"


@pytest.mark.parametrize("on_alarm", ["rollback", "reset"])
def test_an_alarm_brings_the_source_back_at_once_and_the_method_too(on_alarm):
    policy = Patience(5, min_images=1, on_alarm=on_alarm)
    (decision,) = feed(policy, 1, answering="method", alarms=["one_class"])
    assert (decision.answering, decision.restore, decision.reason) == ("source", on_alarm, "alarm one_class")
    (decision,) = feed(policy, 1, alarms=["one_class"])  # unseen
    assert (decision.answering, decision.restore) == ("source", on_alarm)


def test_an_alarm_of_the_stream_is_none_of_the_method():
    assert (
        feed(Patience(5), 1, answering="method", alarms=["shift", "label_drift", "low_accuracy"])[0].answering
        == "method"
    )
    assert feed(Patience(5, ignore=()), 1, answering="method", alarms=["shift"])[0].answering == "source"


def test_hysteresis():
    """Between the bounds nothing changes; below, after patience batches; each return doubles the patience."""
    policy = Patience(3, min_images=1, margin=0.05, leave=0.02)
    assert all(each.answering == "method" for each in feed(policy, 50, method=0.49, answering="method"))
    decisions = feed(policy, 3, method=0.47, answering="method")
    assert [each.answering for each in decisions] == ["method", "method", "source"]
    assert decisions[-1].restore == "reset"
    assert switches_after(policy) == 6
    for times in (12, 24, 24, 24):
        feed(policy, 1, answering="method", alarms=["no_entropy"])
        assert switches_after(policy) == times
    feed(policy, 24, answering="method")
    feed(policy, 1, answering="method", alarms=["no_entropy"])
    assert switches_after(policy) == 24  # halved once, doubled once
    feed(policy, 2 * 24, answering="method")
    assert policy.returns == 1
    assert feed(policy, 100, source=0.0, method=0.5)[5].answering == "method"


def test_labels_come_before_estimates():
    counts = Counts(labels=20, method_right=12, source_right=2)
    policy = Patience(5, min_images=1)
    (decision,) = feed(policy, 1, method=0.1, better="method", counts=counts)
    assert (decision.answering, decision.reason) == ("method", "labels: of 20 the method has 12 right, the source 2")
    assert feed(policy, 30, method=0.1, better="method", answering="method", counts=counts)[-1].answering == "method"
    (decision,) = feed(policy, 1, better="source", answering="method", counts=counts)
    assert (decision.answering, decision.restore) == ("source", "reset")
    assert switches_after(policy, better="source") is None


def test_its_state_goes_on():
    policy, other = Patience(5, min_images=1), Patience(5, min_images=1)
    feed(policy, 1, alarms=["one_class"])
    feed(policy, 7)
    other.load_state_dict(policy.state_dict())
    assert switches_after(other) == switches_after(policy) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 0},
        {"min_images": 0},
        {"margin": 2},
        {"leave": -1},
        {"on_alarm": "stop"},
        {"estimates": "a"},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Patience(**options)
