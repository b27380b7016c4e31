"""AETTA and the other estimates against small references in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_tta import ConfigError
from lightning_tta.draws import random_flags
from lightning_tta.errors import DataError
from lightning_tta.evidence import accuracy
from lightning_tta.evidence.accuracy import AETTA, aetta, aetta_error, dropout_rate

KEY = torch.tensor([3, 7])


def make(number=24, width=6, classes=5, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(classes, width, generator=generator))
        head.bias.copy_(torch.randn(classes, generator=generator))
    features = torch.rand(number, width, generator=generator)
    return features, head, head(features).argmax(1)


def by_hand(features, head, predictions, key, passes, rate):
    """Formula by formula in float64, pass by pass and sample by sample."""
    z, w, b = (t.detach().double().numpy() for t in (features, head.weight, head.bias))
    kept = random_flags(key, features.numel() * passes, 1 - rate).view(len(z), passes, -1).numpy()
    differ, mean = 0.0, np.zeros(len(b))
    for i in range(len(z)):
        for n in range(passes):
            u = w @ (z[i] * kept[i, n] / (1 - rate)) + b
            p = np.exp(u - u.max())
            mean += p / p.sum() / (len(z) * passes)
            differ += (int(u.argmax()) != int(predictions[i])) / (len(z) * passes)
    mean_entropy = -(mean * np.log(mean)).sum()
    error = differ / (mean_entropy / math.log(len(b))) ** 3
    return min(1 - 1 / len(b), max(0.0, error)), differ, mean_entropy


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_aetta_is_the_formula(rate):
    features, head, predictions = make()
    result = aetta(features, head, predictions, key=KEY, passes=10, rate=rate)
    assert result == pytest.approx(by_hand(features, head, predictions, KEY, 10, rate), abs=1e-6)
    assert aetta(features, head, head(features), key=KEY, passes=10, rate=rate) == result  # logits do as well


def test_draws_in_parts_are_those_at_once(monkeypatch):
    features, head, predictions = make(number=23, width=5)
    whole = aetta(features, head, predictions, key=KEY, passes=3, rate=0.4)
    monkeypatch.setattr(accuracy, "_ELEMENTS", 5 * 3 * 3)
    assert aetta(features, head, predictions, key=KEY, passes=3, rate=0.4) == pytest.approx(whole, abs=1e-6)


def test_rates_are_those_of_the_authors():
    assert [dropout_rate(k) for k in (2, 10, 11, 100, 101, 1000)] == [0.4, 0.4, 0.3, 0.3, 0.2, 0.2]
    features, head, predictions = make()
    assert aetta(features, head, predictions, key=KEY) == aetta(features, head, predictions, key=KEY, rate=0.4)


def test_without_dropout_nothing_differs():
    features, head, predictions = make()
    assert aetta(features, head, predictions, key=KEY, rate=0.0)[:2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("e", "evenness", "error"), [(0.1, 1.0, 0.1), (0.1, 0.5, 0.8), (0.1, 0.4, 0.9), (0.0, 0.5, 0.0), (0.0, 0.0, 0.9)]
)
def test_a_collapse_takes_agreement_back(e, evenness, error):
    """The exponent is 3, the clip 1 - 1/K; one sure class is the worst of all, though its passes agree."""
    assert aetta_error(e, evenness * math.log(10), 10) == pytest.approx(error)


def test_half_precision_and_gradients():
    features, head, predictions = make()
    result = aetta(features.half().requires_grad_(), head.half(), predictions, key=KEY)
    assert result == pytest.approx(aetta(features, head.float(), predictions, key=KEY), abs=0.05)


def test_the_average_is_that_of_the_authors():
    """It starts at the first batch's disagreement, before clip and exponent."""
    estimator, average = AETTA(images=1, seed=5), None
    for number in range(4):
        features, head, predictions = make(number=8, seed=number)
        assert estimator.update(features, head, predictions)
        key = torch.tensor([5, number])
        error, differ, _ = by_hand(features, head, predictions, key, 10, 0.4)
        average = 0.6 * (differ if average is None else average) + 0.4 * error
        assert estimator.estimate == pytest.approx(1 - average, abs=1e-6)
    assert estimator.updates == 4


def test_single_images_are_added_up():
    """64 batches of one image: one update, of their mean disagreement and mean prediction."""
    estimator, one_by_one = AETTA(seed=5), []
    features, head, predictions = make(number=64)
    for i in range(64):
        assert estimator.estimate is None
        part = slice(i, i + 1)
        key = torch.tensor([5, i])
        differ, mean = accuracy.dropout_votes(features[part], head, predictions[part], key, passes=10, rate=0.4)
        one_by_one.append((differ, mean))
        assert estimator.update(features[part], head, predictions[part]) == (i == 63)
    differ, mean = (torch.cat(each).mean(0).double() for each in zip(*one_by_one, strict=True))
    error = aetta_error(float(differ), float(-(mean * mean.log()).sum()), 5)
    assert estimator.estimate == pytest.approx(1 - (0.6 * float(differ) + 0.4 * error), abs=1e-5)
    assert not estimator.update(features[:0], head, predictions[:0])


def test_a_state_goes_on():
    features, head, predictions = make(number=40)
    one = AETTA(images=64)
    one.update(features, head, predictions)
    other = AETTA(images=64)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(4):
        assert one.update(features, head, predictions) == other.update(features, head, predictions)
        assert one.estimate == other.estimate
    assert one.updates == 2
    one.begin()
    assert (one.estimate, one.updates) == (None, 0)


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"rate": 1.0}, {"old": 1.5}, {"images": 0}, {"exponent": -1.0}])
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AETTA(**wrong)


def test_confidences():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0]])
    assert float(accuracy.average_confidence(logits)) == pytest.approx((0.75 + 0.9) / 2)
    assert float(accuracy.average_confidence(logits, 2.0)) == pytest.approx(
        (math.sqrt(3) / (1 + math.sqrt(3)) + 0.75) / 2
    )
    assert accuracy.difference_of_confidences(0.7, 0.9, 0.85) == pytest.approx(0.65)
    assert accuracy.difference_of_confidences(0.1, 0.99, 0.5) == 0
    assert accuracy.difference_of_confidences(1.0, 0.5, 0.9) == 1


def test_atc_gives_the_source_its_own_accuracy():
    """Also where scores of right and wrong ones are mixed: the threshold is one of shares alone."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, generator=generator)
    right = torch.rand(1000, generator=generator) < 0.7
    threshold = accuracy.atc_threshold(scores, right)
    assert float(accuracy.average_thresholded_confidence(scores, threshold)) == pytest.approx(
        float(right.double().mean())
    )
    assert float(accuracy.average_thresholded_confidence(scores, accuracy.atc_threshold(scores, right & False))) == 0
    assert float(accuracy.average_thresholded_confidence(scores, accuracy.atc_threshold(scores, right | True))) == 1
    with pytest.raises(DataError, match="held-out"):
        accuracy.atc_threshold(scores[:0], right[:0])


def test_temperature_is_where_the_cross_entropy_is_least():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)[:, 0]
    found = accuracy.fit_temperature(logits, labels)
    grid = np.geomspace(1, 4, 401)
    p = [float(nn.functional.cross_entropy(logits / t, labels)) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(p))], rel=4e-3)
    assert found == pytest.approx(2, rel=0.1)
    with pytest.raises(DataError, match="held-out"):
        accuracy.fit_temperature(logits[:0], labels[:0])
