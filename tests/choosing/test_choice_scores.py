"""Scores, counted by hand."""

import numpy as np
import pytest
import torch

from lightning_tta.choosing.scores import evenness, mean_order, score
from lightning_tta.choosing.trial import Record
from lightning_tta.evidence.accuracy import aetta


def record(seed, images=30, classes=4, width=6):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(classes, width, generator=generator), torch.randn(classes, generator=generator)
    features = torch.randn(images, width, generator=generator)
    answers = features @ weight.T + bias
    final, view = (answers + torch.randn(answers.shape, generator=generator) for _ in range(2))
    return Record(answers, final, view, features, features, weight, bias, [12, 11, 7])


def classes_of(logits):
    return np.array(logits.tolist()).argmax(1)


def test_against_counts():
    own, source = record(0), record(1)
    labels = {3: 1, 7: 0, 29: 2}
    found = score(own, source, labels)
    answers, final, view = (classes_of(x) for x in (own.answers, own.final, own.view))
    source_answers = classes_of(source.answers)
    assert found["agreement_view"] == pytest.approx(np.mean(final == view))
    assert found["agreement_company"] == pytest.approx(np.mean(answers == final))
    assert found["agreement_source"] == pytest.approx(np.mean(answers == source_answers))
    right = np.mean([answers[n] == label for n, label in labels.items()])
    source_right = np.mean([source_answers[n] == label for n, label in labels.items()])
    assert found["labels"] == pytest.approx(right)
    assert found["labels_won"] - found["labels_lost"] == pytest.approx(right - source_right)
    won = np.mean([answers[n] == label != source_answers[n] for n, label in labels.items()])
    assert found["labels_won"] == pytest.approx(won)
    differs = answers != source_answers
    assert found["steadiness"] == pytest.approx(np.mean((answers == final)[differs]))

    shares = np.unique(answers, return_counts=True)[1] / len(answers)
    assert found["evenness"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(4))
    surplus = 0.0
    for batch in (answers[:12], answers[12:23], answers[23:]):
        pairs = [batch[one] == batch[other] for one in range(len(batch)) for other in range(one)]
        neighbors = [batch[place] == batch[place + 1] for place in range(len(batch) - 1)]
        surplus += (np.mean(neighbors) - np.mean(pairs)) * len(neighbors)
    assert found["order"] == pytest.approx(surplus / 27)
    assert not {name for name in score(own, source) if name.startswith("labels")}


def test_aetta_is_of_all_answers_together():
    own = record(0)
    head = torch.nn.Linear(6, 4)
    head.load_state_dict({"weight": own.weight, "bias": own.bias})
    expected = 1 - aetta(own.features, head, own.answers)[0]
    assert score(own, own)["aetta"] == pytest.approx(expected)
    assert score(own, own)["aetta_end"] == pytest.approx(1 - aetta(own.features, head, own.final)[0])
    for lost in ({"features": None}, {"weight": None}):
        assert "aetta" not in score(Record(**{**vars(own), **lost}), own)


def test_images_that_were_left_out_do_not_count():
    own, source = record(0), record(1)
    before = score(own, source)
    for each in (own, source):
        for name in ("answers", "final", "view"):
            first, second, third = getattr(each, name).split(each.sizes)
            setattr(each, name, torch.cat([first, second, torch.zeros(5, 4), third]))
        features, last = each.features.split([23, 7])
        each.features = each.final_features = torch.cat([features, torch.full((5, 6), torch.nan), last])
        each.sizes = [12, 16, 7]
    assert score(own, source, {3: 1, 25: 0}) == pytest.approx({**before, **_labels_of_one(own, source, 3, 1)})


def _labels_of_one(own, source, place, label):
    right, source_right = (float(each.answers[place].argmax() == label) for each in (own, source))
    return {
        "labels": right,
        "labels_won": float(right > source_right),
        "labels_lost": float(source_right > right),
    }


def test_the_source_agrees_with_itself():
    own = record(0)
    found = score(own, own)
    assert found["agreement_source"] == found["steadiness"] == 1


def test_evenness_and_order_at_their_ends():
    each_once, sorted_by_class = torch.eye(4), torch.eye(4).repeat_interleave(50, 0)
    assert float(evenness(each_once)) == pytest.approx(1)
    assert float(evenness(sorted_by_class)) == pytest.approx(1)
    assert float(evenness(torch.eye(100)[:5])) == pytest.approx(1)  # no more can be predicted of five images
    assert float(evenness(torch.ones(5, 4))) == float(mean_order(torch.ones(5, 4), [5])) == 0
    assert float(mean_order(sorted_by_class, [200])) == pytest.approx(196 / 199 - 49 / 199)
    assert float(mean_order(torch.eye(4)[:1], [1])) == 0


def test_order_sees_runs_of_classes_and_no_change_of_domain():
    """Of classes at random, that are few in one half and others in the other: chance, by simulation."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randint(low, low + 3, (300, 100), generator=generator) for low in (0, 5)]
    streams = torch.cat(halves, 1)
    by_batch = [float(mean_order(torch.nn.functional.one_hot(each, 10), [50] * 4)) for each in streams]
    at_once = [float(mean_order(torch.nn.functional.one_hot(each, 10), [200])) for each in streams]
    assert abs(np.mean(by_batch)) < 0.01
    assert np.mean(at_once) > 0.1
    in_runs = streams[0].view(4, 50).sort(1).values.flatten()
    assert float(mean_order(torch.nn.functional.one_hot(in_runs, 10), [50] * 4)) > 0.5
