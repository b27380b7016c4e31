"""Ours beside theirs, by hand: means, intervals, verdicts, orders."""

import json

import numpy as np
import pytest
from scipy import stats

from lightning_tta.reproduce.claims import load
from lightning_tta.reproduce.comparing import compare
from lightning_tta.reproduce.planning import Settings
from lightning_tta.reproduce.rerun import Reproduction
from lightning_tta.reproduce.verdict import judge, measure, reversed_pairs

CELL = {"protocol_hash": "0123456789ab", "directory": "cells"}


def row(accuracies, images=100, **others):
    domains = {name: {"accuracy": value, "images": images} for name, value in accuracies.items()}
    mean = float(np.mean(list(accuracies.values())))
    return {"net": "n", "stream": "s", "method": "m", "accuracy": mean, "domains": domains, **others}


def test_one_cell_has_the_normal_interval_over_images():
    accuracies = {"fog": 0.5, "snow": 0.75, "frost": 0.25}
    ours = measure([row(accuracies, 400)], "accuracy", ["fog", "snow"])
    assert ours.value == pytest.approx(62.5)
    error = np.sqrt((0.5 * 0.5 + 0.75 * 0.25) / 400) / 2
    assert ours.half == pytest.approx(100 * stats.norm.ppf(0.975) * error)
    assert ours.over == "images"
    assert measure([row(accuracies, 400)], "error", ["fog", "snow"]).value == pytest.approx(37.5)


def test_three_seeds_have_students_interval():
    values = np.array([0.50, 0.56, 0.53])
    ours = measure([row({"fog": value}, seed=n) for n, value in enumerate(values)], "accuracy", ["fog"])
    assert (ours.value, ours.over) == (pytest.approx(53), "seeds")
    assert ours.half == pytest.approx(100 * stats.t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3))


def test_a_mean_over_nets_counts_each_once():
    rows = [row({"fog": 0.2}, net="a"), row({"fog": 0.4}, net="b"), row({"fog": 0.6}, net="b", seed=1)]
    ours = measure(rows, "accuracy", ["fog"])
    assert ours.value == pytest.approx(100 * (0.2 + 0.5) / 2)
    variance = (0.2 * 0.8 + (0.4 * 0.6 + 0.6 * 0.4) / 2) / 100
    assert ours.half == pytest.approx(100 * stats.norm.ppf(0.975) * np.sqrt(variance) / 2)


def test_streams_that_share_their_seeds_are_no_further_draws():
    """Twice the same stream says no more than once; and of two that differ the means of each seed count."""
    values = np.array([[0.50, 0.56, 0.53], [0.40, 0.47, 0.39]])

    def measured(first, second):
        streams = zip("st", (first, second), strict=True)
        rows = [row({"fog": x}, stream=name, seed=n) for name, each in streams for n, x in enumerate(each)]
        return measure(rows, "accuracy", ["fog"])

    once = measure([row({"fog": x}, seed=n) for n, x in enumerate(values[0])], "accuracy", ["fog"])
    assert measured(values[0], values[0]) == once
    ours, means = measured(*values), values.mean(0)
    assert (ours.value, ours.over) == (pytest.approx(100 * means.mean()), "seeds")
    assert ours.half == pytest.approx(100 * stats.t.ppf(0.975, 2) * means.std(ddof=1) / np.sqrt(3))


def write_cell(folder, right):
    """A run's files: whether each image was right, by domain; images are numbered through, as a run does."""
    folder.mkdir()
    sizes = [len(each) for each in right.values()]
    lines = [
        f"{first + place},{name},1,{int(value)}\n"
        for first, (name, each) in zip(np.cumsum([0, *sizes]), right.items(), strict=False)
        for place, value in reversed([*enumerate(each)])
    ]
    (folder / "predictions.csv").write_text("index,domain,label,prediction\n" + "".join(lines))
    protocol = {"domains": [*right], "images_per_domain": sizes}
    (folder / "report.json").write_text(json.dumps({"protocol": protocol}))
    return {name: float(np.mean(each)) for name, each in right.items()}


def test_an_image_in_several_domains_nets_and_seeds_is_one_draw(tmp_path):
    """As by hand: each image's mean over all it comes in, weighed as the figure weighs it, and the spread of these."""
    generator = np.random.default_rng(0)
    easy = generator.random(50)  # images differ, so that an image is right in both domains, or in none
    made, parts = [], []
    for net, seed, weight in (("a", 0, 1.0), ("b", 0, 0.5), ("b", 1, 0.5)):
        right = {name: generator.random(50) < easy for name in ("fog", "snow")}
        accuracies = write_cell(tmp_path / f"{net}{seed}", right)
        made.append(row(accuracies, 50, net=net, seed=seed, folder=tmp_path / f"{net}{seed}"))
        parts.append(weight / 2 * (right["fog"].astype(float) + right["snow"]) / 2)
    by_image = np.sum(parts, 0)
    ours = measure(made, "accuracy", ["fog", "snow"])
    assert ours.value == pytest.approx(100 * by_image.mean())
    assert ours.half == pytest.approx(100 * stats.norm.ppf(0.975) * by_image.std() / np.sqrt(50))
    apart = measure([{**each, "folder": None} for each in made], "accuracy", ["fog", "snow"])
    assert ours.value == apart.value
    assert ours.half > 1.2 * apart.half  # taken for draws of their own they were too narrow
    one = measure(made[:1], "accuracy", ["fog"])  # here each prediction is a draw of its own
    assert one.half == pytest.approx(measure([{**made[0], "folder": None}], "accuracy", ["fog"]).half)
    whole = row({"all": made[0]["accuracy"]}, 100, net="a", seed=0, folder=made[0]["folder"])
    assert measure([whole], "accuracy", ["all"]).half == pytest.approx(
        measure(made[:1], "accuracy", ["fog", "snow"]).half
    )


@pytest.mark.parametrize(
    "report",
    [
        {"predictions_digest": "0"},  # changed since
        {"protocol": {"domains": ["fog", "snow"], "images_per_domain": [1, 3]}},  # numbered otherwise
        {"protocol": {"domains": ["fog", "snow"], "images_per_domain": [2, 3]}},  # not the same images
        {},
    ],
)
def test_predictions_that_are_not_known_are_not_used(tmp_path, report):
    accuracies = write_cell(tmp_path / "a", {"fog": np.array([True, False]), "snow": np.array([True, False])})
    made = row(accuracies, 2, folder=tmp_path / "a")
    assert (
        measure([made], "accuracy", [*accuracies]).half
        > measure([{**made, "folder": None}], "accuracy", [*accuracies]).half
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b/predictions.csv").write_bytes((tmp_path / "a/predictions.csv").read_bytes())
    (tmp_path / "b/report.json").write_text(json.dumps(report))
    other = {**made, "folder": tmp_path / "b"}
    assert measure([other], "accuracy", [*accuracies]) == measure([{**made, "folder": None}], "accuracy", [*accuracies])


def test_images_with_other_labels_at_the_same_place_are_others(tmp_path):
    """As where one image of a folder is missing, and all that come after it move up."""
    accuracies = write_cell(tmp_path / "a", {"fog": np.array([True, False]), "snow": np.array([True, False])})
    path = tmp_path / "a/predictions.csv"
    path.write_text(path.read_text().replace("3,snow,1,0", "3,snow,5,0"))
    made = row(accuracies, 2, folder=tmp_path / "a")
    assert measure([made], "accuracy", [*accuracies]) == measure([{**made, "folder": None}], "accuracy", [*accuracies])


def test_a_domain_that_is_not_there_has_no_mean():
    assert measure([row({"fog": 0.2})], "accuracy", ["fog", "snow"]) is None
    assert measure([], "accuracy", ["fog"]) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "changed", "verdict"),
    [
        (18.6, 18.9, False, "within tolerance"),
        (18.6, 18.3, False, "within tolerance"),
        (18.6, 18.91, False, "outside"),
        (18.6, 18.29, False, "outside"),
        (18.6, 18.6, True, "no reproduction"),
        (None, 18.6, False, "no figure"),
        (18.6, None, False, "not run: weights missing"),
        (18.6, None, True, "not run: weights missing"),
    ],
)
def test_verdicts(theirs, ours, changed, verdict):
    assert judge(theirs, ours, 0.3, changed=changed, why="weights missing") == verdict


def test_an_order_counts_pairs_that_lie_apart():
    theirs = {"a": 10, "b": 11, "c": 20, "d": 30}
    ours = {"a": 12, "b": 10, "c": 31, "d": 30}
    assert reversed_pairs(theirs, ours, 1) == ([("c", "d")], 5)  # a and b lie within twice the tolerance
    assert reversed_pairs(theirs, theirs, 1) == ([], 5)
    assert reversed_pairs(theirs, {"a": 1}, 1) == ([], 0)


def rows_like(part, method, shift=0.0):
    """What a benchmark would have measured if we had their figures, plus a shift in points."""
    (published,) = part.published
    errors = published.domains["wrn_28_10"][method]
    names = part.data["init_args"]["domains"]
    accuracies = {name: 1 - (error + shift) / 100 for name, error in zip(names, errors, strict=True)}
    return row(accuracies, 10_000, net="wrn_28_10", stream="ordered", method=method, seed=0, **CELL)


def planned(tmp_path, **settings):
    reproduction = Reproduction(load("tent"), Settings(root=tmp_path, only=["cifar10_c"], **settings))
    plan = reproduction.plans["cifar10_c"]
    plan.missing.clear()
    plan.weights.clear()
    return plan


def test_their_own_numbers_are_within_the_tolerance_and_shifted_ones_are_not(tmp_path):
    plan = planned(tmp_path)
    rows = [rows_like(plan.part, "source"), rows_like(plan.part, "norm", 0.15), rows_like(plan.part, "tent", -0.45)]
    comparisons, _ = compare("cifar10_c", plan, rows, False, {})
    assert len(comparisons) == 3 * 16
    for each in comparisons:
        assert each.verdict == ("outside" if each.method == "tent" else "within tolerance"), each
        if each.domain is not None:
            shift = {"source": 0, "norm": 0.15, "tent": -0.45}[each.method]
            assert each.difference == pytest.approx(shift, abs=1e-6)
    (mean,) = (each for each in comparisons if each.method == "tent" and each.domain is None)
    assert (mean.theirs, mean.ours) == (18.6, pytest.approx(18.15, abs=0.06))


def test_what_was_not_run_says_why(tmp_path):
    plan = planned(tmp_path)
    plan.absent["fog"] = "fog.npy is not there"
    rows = [rows_like(plan.part, "tent")]
    del rows[0]["domains"]["fog"]
    skipped = {"wrn_28_10/ordered/norm/seed0": "failed: DataError: broken"}
    comparisons, _ = compare("cifar10_c", plan, rows, False, skipped)
    verdicts = {(each.method, each.domain): each.verdict for each in comparisons}
    assert verdicts["tent", "fog"] == verdicts["tent", None] == "not run: fog missing"
    assert verdicts["tent", "snow"] == "within tolerance"
    assert verdicts["norm", "snow"] == "not run: failed: DataError: broken"
    assert verdicts["source", "snow"] == "not run"


def test_a_result_between_two_parts_says_what_is_to_come(tmp_path):
    reproduction = Reproduction(load("tent"), Settings(root=tmp_path, only=["cifar10_c", "imagenet_c"]))
    for plan in reproduction.plans.values():
        plan.missing.clear()
        plan.weights.clear()
    part = reproduction.plans["cifar10_c"].part
    result = reproduction.result({"cifar10_c": {"rows": [rows_like(part, "tent")], "skipped": []}})
    first, second = (result["parts"][label]["comparisons"] for label in ("cifar10_c", "imagenet_c"))
    assert {each["verdict"] for each in first if each["method"] == "tent"} == {"within tolerance"}
    assert {each["verdict"] for each in second} == {"not run: not reached yet"}


def test_the_interval_of_a_result_is_over_the_images_that_its_cells_have_written(tmp_path):
    reproduction = Reproduction(load("tent"), Settings(root=tmp_path, only=["cifar10_c"], output=tmp_path))
    plan = reproduction.plans["cifar10_c"]
    plan.missing.clear()
    plan.weights.clear()
    made = rows_like(plan.part, "tent")
    (tmp_path / "tent/cifar10_c").mkdir(parents=True)
    right = np.arange(100) % 10 > 2
    accuracies = write_cell(tmp_path / "tent/cifar10_c/cells", dict.fromkeys(made["domains"], right))
    made = {**made, **row(accuracies), **{name: made[name] for name in ("net", "stream", "method")}}
    result = reproduction.result({"cifar10_c": {"rows": [made], "skipped": []}})
    (mean,) = (
        each
        for each in result["parts"]["cifar10_c"]["comparisons"]
        if (each["method"], each["domain"]) == ("tent", None)
    )
    assert mean["half"] == pytest.approx(100 * stats.norm.ppf(0.975) * right.std() / 10)  # fifteen times the same
