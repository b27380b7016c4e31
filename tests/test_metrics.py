import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from fake_gpu import DEVICE, OnTheDevice, fake_gpu
from lightning_tta.metrics import Calibration, LogitMeasures, class_counts, collapse_measures, compared_counts


def measures(rows, dtype=torch.float64):
    return {name: value.item() for name, value in collapse_measures(torch.tensor(rows, dtype=dtype)).items()}


def test_by_hand():
    values = measures([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0], [0.0, 8.0, 6.0], [0.0, 0.0, 2.0]])
    assert values["largest_class_share"] == 0.5
    assert values["logit_norm"] == pytest.approx((5 + 13 + 10 + 2) / 4)
    assert values["centre_dominance"] == pytest.approx(math.sqrt(0.75**2 + 4.25**2 + 5.0**2) / 7.5)
    expected = 0.0
    for row in ([3, 4, 0], [0, 5, 12], [0, 8, 6], [0, 0, 2]):
        p = [math.exp(v) / sum(map(math.exp, row)) for v in row]
        expected -= sum(v * math.log(v) for v in p) / 4
    assert values["entropy"] == pytest.approx(expected)


def test_collapse_and_its_opposite():
    collapsed = measures([[0.0, 50.0, 0.0, 0.0]] * 6)
    assert collapsed["largest_class_share"] == 1
    assert collapsed["centre_dominance"] == pytest.approx(1)
    assert collapsed["entropy"] == pytest.approx(0, abs=1e-9)
    balanced = measures([[1.0, -1.0], [-1.0, 1.0]])
    assert balanced["largest_class_share"] == 0.5
    assert balanced["centre_dominance"] == 0


def test_one_image_and_zero_logits():
    single = measures([[1.0, 2.0, 3.0]])
    assert single["largest_class_share"] == 1
    assert single["centre_dominance"] == pytest.approx(1)
    zeros = measures([[0.0] * 5] * 3)
    assert zeros["centre_dominance"] == zeros["logit_norm"] == 0
    assert zeros["entropy"] == pytest.approx(math.log(5))


def test_counts_are_the_same_on_every_device():
    predictions = torch.tensor([2, -1, 0, 2, 2, 4, -1])
    for count in (class_counts, compared_counts):
        assert count(predictions, 6).tolist() == [1, 0, 3, 0, 1, 0]


def test_no_measure_waits_for_the_device():
    with fake_gpu(), OnTheDevice():
        measures = LogitMeasures(torch.rand(4, 3, device=DEVICE))
        values = [*collapse_measures(measures.logits).values(), measures.confidence, measures.prediction]
        assert all(value.device.type == DEVICE for value in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scalars_without_a_graph(dtype):
    values = collapse_measures(torch.rand(4, 3, dtype=dtype, requires_grad=True))
    assert set(values) == {"entropy", "largest_class_share", "logit_norm", "centre_dominance"}
    for value in values.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert torch.isfinite(value)


@pytest.mark.parametrize("parts", [1, 7])
def test_calibration_is_torchmetrics_and_by_hand(parts):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 6, generator=generator)
    labels = torch.randint(6, (500,), generator=generator)
    labels[::3] = logits[::3].argmax(1)
    calibration = Calibration()
    for some, own in zip(logits.chunk(parts), labels.chunk(parts), strict=True):
        calibration.update(some, own)
    calibration.update(logits[:9], torch.full((9,), -1))  # labels that nobody knows
    result = calibration.result()
    expected = multiclass_calibration_error(logits.softmax(1), labels, num_classes=6, n_bins=15, norm="l1")
    assert result["ece"] == pytest.approx(float(expected), abs=1e-6)
    assert result["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-6)
    target = torch.nn.functional.one_hot(labels, 6)
    assert result["brier"] == pytest.approx(float(((logits.softmax(1) - target) ** 2).sum(1).mean()), abs=1e-6)
    count, confidence, right = (torch.tensor(row) for row in result["reliability"])
    assert count.sum() == 500
    assert right.sum() == (logits.argmax(1) == labels).sum()
    assert bool((confidence <= count).all())


def test_calibration_without_labels():
    calibration = Calibration()
    calibration.update(torch.zeros(3, 2), torch.full((3,), -1))
    assert set(calibration.result().values()) == {None}


def test_no_logits_are_no_prediction():
    nan = float("nan")
    values = LogitMeasures(torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [nan, 1.0, 2.0], [0.0, 3.0, math.inf]]))
    assert values.prediction.tolist() == [1, -1, -1, -1]
    assert values.counts.tolist() == [0, 1, 0]
