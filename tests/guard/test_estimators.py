"""Monitors that estimate accuracy: their averages against sums by hand, states, alarms, and what they need."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError
from lightning_tta.errors import DataError, NotPreparedError
from lightning_tta.evidence import accuracy, scores
from lightning_tta.guard.monitors.base import Seen
from lightning_tta.guard.monitors.estimator import Fall
from lightning_tta.guard.monitors.kinds import MONITORS, make_monitors

K, D = 4, 6
ESTIMATORS = ["aetta", "atc", "confidence", "consensus", "doc", "source_agreement", "view_agreement"]


def head():
    layer = nn.Linear(D, K)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.randn(K, D, generator=torch.Generator().manual_seed(1)))
        layer.bias.zero_()
    return layer


HEAD = head()


def seen_batch(number=32, seed=0, labels=None, first=0):
    """Features, their logits; a source that differs; a method that predicts images by their first pixels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(number, D, generator=generator)
    images = torch.rand(number, 3, 8, 8, generator=generator)
    logits = HEAD(features).detach()
    source = (logits + torch.randn(number, K, generator=generator)).detach()
    return Seen(
        logits,
        source=source,
        same_source=source,
        features=features,
        head=HEAD,
        predict=lambda x: x[:, 0, 0, :K],
        images=images,
        index=range(first, first + number),
        labels=labels,
    )


def made(name, **options):
    (monitor,) = make_monitors({"kind": name, **options})
    monitor.prepare([seen_batch(400, seed=99, labels=torch.arange(400) % K)])
    return monitor


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_state_goes_on(name):
    one = made(name)
    for seed in range(3):
        one.see(seen_batch(seed=seed))
    state = copy.deepcopy(one.state_dict())
    pickle.loads(pickle.dumps(state))
    (other,) = make_monitors(name)
    other.load_state_dict(state)
    for seed in range(3, 7):
        for each in (one, other):
            each.see(seen_batch(seed=seed))
        assert one.estimate() == other.estimate()
        assert one.values() == other.values()
        assert one.alarm() == other.alarm()
    assert 0 <= one.estimate() <= 1
    assert all(key.startswith(name) for key in one.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_new_stream_and_another_method(name):
    """Both begin a new average; what was prepared stays; a stream that comes again gives the same."""
    monitor = made(name)
    for again in (monitor.forget, monitor.begin):
        for seed in range(3):
            monitor.see(seen_batch(seed=seed))
        before = monitor.estimate()
        again()
        assert monitor.estimate() is None
        assert monitor.values() == {}
        assert monitor.alarm() == ""
    fresh = made(name)
    for seed in range(3):
        for each in (monitor, fresh):
            each.see(seen_batch(seed=seed))
    assert monitor.estimate() == fresh.estimate() == pytest.approx(before, abs=0.05)  # after forget: other draws


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_image_none_and_logits_all_alike(name):
    monitor = made(name)
    monitor.see(seen_batch(1))
    monitor.see(seen_batch(0))
    alike = Seen(torch.zeros(5, K), *[torch.zeros(5, K)] * 2, torch.zeros(5, D), HEAD, lambda x: torch.zeros(5, K))
    monitor.see(alike)
    for seed in range(3):
        monitor.see(seen_batch(64, seed=seed))
    assert 0 <= monitor.estimate() <= 1


@pytest.mark.parametrize("name", ["aetta", "consensus"])
def test_features_that_overflowed_leave_no_trace(name):
    monitor = made(name)
    monitor.see(seen_batch(64))
    before = monitor.estimate()
    seen = seen_batch(64, seed=1)
    seen.features[3] = float("inf")
    monitor.see(seen)
    assert monitor.estimate() == before


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in ("confidence", "doc", "atc")])
def test_without_what_it_wants_nothing_is_known(name):
    monitor = made(name)
    monitor.see(Seen(seen_batch().logits))
    assert monitor.estimate() is None
    assert MONITORS[name].wants


def test_the_average_counts_images_and_not_batches():
    """A batch of 64 is as four of 16 that are rated alike; by hand for batches of several sizes."""
    one, four = made("confidence", half_life=50), made("confidence", half_life=50)
    batches = [seen_batch(64, seed=seed).logits for seed in range(3)]
    weight = total = 0.0
    for logits in batches:
        rating = float(logits.double().softmax(1).amax(1).mean())
        one.see(Seen(logits))
        for _ in range(4):
            four.see(Seen(logits[:1].repeat(16, 1)))
        weight, total = weight * 0.5 ** (64 / 50) + 1, total * 0.5 ** (64 / 50) + rating
        assert one.estimate() == pytest.approx(total / weight, abs=1e-6)
    single = made("confidence", half_life=50)
    for logits in batches:
        single.see(Seen(logits[:1].repeat(64, 1)))
    assert four.estimate() == pytest.approx(single.estimate())


def test_what_each_rates():
    seen = seen_batch(labels=None)
    ratings = {
        "confidence": accuracy.average_confidence(seen.logits),
        "source_agreement": scores.agreement(seen.logits, seen.source),
        "view_agreement": scores.agreement(seen.logits, seen.images.flip(-1)[:, 0, 0, :K]),
    }
    source = seen_batch(400, seed=99)
    right = source.logits.argmax(1) == torch.arange(400) % K
    confidence = source.logits.softmax(1).amax(1)
    fall = confidence.mean() - seen.logits.softmax(1).amax(1).mean()
    ratings["doc"] = right.float().mean() - fall
    limit = accuracy.negative_entropy(source.logits).sort().values[int((~right).sum())]
    ratings["atc"] = (accuracy.negative_entropy(seen.logits) >= limit).float().mean()
    for name, rating in ratings.items():
        monitor = made(name)
        monitor.see(seen)
        assert monitor.estimate() == pytest.approx(float(rating), abs=1e-6), name


def test_consensus_is_anchored_at_the_source():
    """On the source's own images the estimate is its accuracy, whatever the weights."""
    source = seen_batch(400, seed=99, labels=torch.arange(400) % K)
    monitor = MONITORS["consensus"](half_life=1)
    monitor.prepare([source])
    monitor.see(source)
    right = float((source.logits.argmax(1) == source.labels).double().mean())
    thought = {name: monitor.values()[f"consensus_{name}"] for name in ("source", "same_source", "dropout")}
    assert thought == pytest.approx({name: monitor.anchor[name] for name in thought}, abs=1e-6)
    evenness = []
    for z in (None, source.source):
        if z is None:
            _, p = accuracy.dropout_votes(
                source.features, HEAD, source.logits.argmax(1), torch.tensor([0, 0]), rate=0.4
            )
        else:
            p = (z / monitor.anchor["temperature"]).softmax(1)
        p = p.double().mean(0)
        evenness.append(float(-(p * p.log()).sum()))
    expected = right / (right + (1 - right) * (evenness[1] / evenness[0]) ** 1.25)
    assert monitor.estimate() == pytest.approx(expected, abs=1e-6)


def test_consensus_is_the_formula():
    """In float64, over several batches with decay."""
    source = seen_batch(400, seed=99, labels=torch.arange(400) % K)
    monitor = made("consensus", half_life=40)
    anchor, sums, weight = monitor.anchor, 0.0, 0.0
    for number, size in enumerate((8, 30, 17)):
        seen = seen_batch(size, seed=number)
        monitor.see(seen)
        u = (seen.source.double() / anchor["temperature"]).softmax(1)
        y = seen.logits.argmax(1)
        differ, mean = accuracy.dropout_votes(seen.features, HEAD, y, torch.tensor([0, number]), rate=0.4)
        row = torch.stack([u[range(size), y].mean(), 1 - differ.double().mean()])
        row = torch.cat([row, mean.double().mean(0), u.mean(0)])
        old = 0.5 ** (size / 40)
        sums, weight = old * sums + (1 - old) * row, old * weight + 1 - old
    m = sums / weight
    odds = m[:2].logit() - torch.tensor([anchor["source"], anchor["dropout"]]).double().logit()
    even = [-(p * p.log()).sum() for p in (m[2 : 2 + K], m[2 + K :])]
    total = torch.tensor(anchor["accuracy"]).double().logit() + 0.85 * odds[0] + odds[1]
    total += 1.25 * (even[0] / even[1]).log()
    assert monitor.estimate() == pytest.approx(float(total.sigmoid()), abs=1e-6)
    assert anchor["accuracy"] == float((source.logits.argmax(1) == source.labels).double().mean())


def test_consensus_falls_where_the_net_gives_up_classes_that_the_source_sees():
    """One class of a source that sees it alone is no collapse."""
    one_class, several = made("consensus"), made("consensus")
    push = torch.tensor([30.0, 0, 0, 0])
    layer = copy.deepcopy(HEAD)
    with torch.no_grad():
        layer.bias.add_(push)
    for seed in range(4):
        seen = seen_batch(64, seed=seed)
        logits = layer(seen.features).detach()
        several.see(Seen(logits, seen.source, seen.source, seen.features, layer))
        one_class.see(Seen(logits, seen.source + push, seen.source + push, seen.features, layer))
    assert several.estimate() < 0.25
    assert one_class.estimate() > several.estimate() + 0.1


def test_views_are_counted():
    monitor = made("view_agreement")
    for _ in range(3):
        monitor.see(seen_batch())
    assert monitor.passes == 3


def test_aetta_is_fed_with_the_batch():
    monitor, estimator = made("aetta", seed=4, images=40), accuracy.AETTA(seed=4, images=40)
    for seed in range(4):
        seen = seen_batch(seed=seed)
        monitor.see(seen)
        estimator.update(seen.features, HEAD, seen.logits)
    assert monitor.estimate() == estimator.estimate
    assert estimator.updates == 2
    assert monitor.values()["aetta_disagreement"] == estimator.last[1]


@pytest.mark.parametrize("name", ["doc", "atc", "consensus"])
def test_labels_of_the_source_are_needed(name):
    (monitor,) = make_monitors(name)
    assert monitor.needs_source
    with pytest.raises(NotPreparedError, match="labels"):
        monitor.see(seen_batch())
    for labels in (None, torch.full((32,), -1)):
        with pytest.raises(DataError, match="held-out"):
            monitor.prepare([seen_batch(labels=labels)])
    monitor.prepare([seen_batch(0), seen_batch(labels=torch.where(torch.arange(32) < 16, torch.arange(32) % K, -1))])
    monitor.see(seen_batch())


@pytest.mark.parametrize(
    ("estimates", "alarms"),
    [
        ([0.6] * 5 + [0.57] * 5, [9]),  # five and five, 3 points lower
        ([0.6] * 5 + [0.59] * 20, []),
        ([0.6] * 3 + [0.1] + [0.6] * 9, [3]),  # below the floor: at once, and a new beginning
        ([0.1] * 3, [0, 1, 2]),
        ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8], []),
        ([0.6] * 4 + [0.57] * 5, []),  # not yet ten
    ],
)
def test_the_authors_rule(estimates, alarms):
    rule = Fall(0.2, 0.02)
    assert [i for i, estimate in enumerate(estimates) if rule(estimate)] == alarms
    never = Fall(None, None)
    assert not any(never(estimate) for estimate in estimates)


def test_a_collapse_raises_low_accuracy():
    """One class, surer and surer: AETTA falls though its passes agree; confidence rises."""
    monitor, confidence = made("aetta"), made("confidence", floor=0.2, fall=0.02)
    alarms = []
    for step in range(12):
        seen = seen_batch(64, seed=step)
        push = torch.zeros(K)
        push[0] = 3.0 * max(0, step - 4)
        layer = copy.deepcopy(HEAD)
        with torch.no_grad():
            layer.bias.add_(push)
        now = Seen(layer(seen.features).detach(), features=seen.features, head=layer)
        monitor.see(now)
        confidence.see(now)
        alarms.append(monitor.alarm())
        assert confidence.alarm() == ""
    assert "low_accuracy" in alarms
    assert set(alarms[:5]) == {""}
    assert monitor.estimate() < 0.5
    assert confidence.estimate() > 0.9


def test_labels_come_late():
    (monitor,) = make_monitors({"kind": "labels", "floor": 0.4})
    assert monitor.values()["labels_high"] == 1.0
    for step in range(3):
        monitor.see(seen_batch(seed=step, first=32 * step))
    predictions = torch.cat([seen_batch(seed=step).logits.argmax(1) for step in range(3)])
    labels = torch.where(torch.arange(96) % 8 == 0, predictions, (predictions + 1) % K)
    assert monitor.tell(range(10, 90), labels[10:90]) == 80
    assert monitor.estimate() == pytest.approx(10 / 80)
    assert monitor.alarm() == ""
    other = copy.deepcopy(monitor)
    other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    for each in (monitor, other):
        each.see(seen_batch(seed=5, first=96))
        assert each.alarm() == "low_accuracy"
        each.see(seen_batch(seed=6, first=128))
        assert each.alarm() == ""  # once
    assert monitor.values()["labels_high"] < 0.4
    monitor.forget()
    assert monitor.estimate() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.tell([130], [0]) == 0  # it was answered before
    with pytest.warns(UserWarning, match="None of"):
        assert monitor.tell(map(str, range(200)), [0] * 200) == 0


def test_labels_need_an_index():
    (monitor,) = make_monitors("labels")
    with pytest.raises(ConfigError, match="index="):
        monitor.see(Seen(torch.eye(K)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "aetta", "floor": 2.0},
        {"kind": "aetta", "passes": 0},
        {"kind": "confidence", "temperature": 0.0},
        {"kind": "atc", "half_life": 0},
        {"kind": "labels", "floor": -1.0},
        {"kind": "doc", "passes": 3},
    ],
)
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=list(wrong)[1]):
        make_monitors(wrong)
