"""Studies: what varies, what its questions come to, by hand; and one from file to figure."""

import json
import math
from statistics import fmean, stdev

import pytest

from lightning_tta import ConfigError
from lightning_tta.benchmark.config import NetConfig, StreamConfig
from lightning_tta.benchmark.runner import Benchmark
from lightning_tta.benchmark.study import AskConfig, AxisConfig, Study, StudyConfig
from lightning_tta.report.studies import ruling, sentence, study_table, write_study


def sections():
    return {
        "nets": {"bn": {"fit": "a.yaml"}, "gn": {"fit": "b.yaml"}},
        "streams": {"iid": {"data": {"batch_size": 8}, "nets": ["bn"]}, "sorted": {"data": {}, "nets": None}},
        "methods": {
            "source": {"class_path": "Source"},
            "tent": {"class_path": "Tent", "init_args": {"lr": 0.1}, "streams": ["iid"]},
            "zerosiam": {"class_path": "ZeroSiam", "init_args": {"lr": 0.5}},
        },
    }


def study(vary=None, asks=(), given=None, axis="x", **options):
    given = sections() if given is None else given
    config = StudyConfig("Title", "A claim.", axis=axis, vary=vary, asks=list(asks), **options)
    return Study(config, given), given


def test_streams_methods_and_nets_vary_along_an_axis():
    _, given = study(AxisConfig("streams.data.batch_size", [1, 64], of=["iid"]))
    assert {label: entry["data"] for label, entry in given["streams"].items()} == {
        "sorted": {},
        "iid@1": {"batch_size": 1},
        "iid@64": {"batch_size": 64},
    }
    assert given["methods"]["tent"]["streams"] == ["iid@1", "iid@64"]
    _, given = study(AxisConfig("methods.init_args.lr", [0.1, 10], of=["tent", "zerosiam"], factor=True))
    rates = {label: entry.get("init_args", {}).get("lr") for label, entry in given["methods"].items()}
    assert rates == {
        "source": None,
        **{"tent@0.1": pytest.approx(0.01), "tent@10": 1.0, "zerosiam@0.1": pytest.approx(0.05), "zerosiam@10": 5.0},
    }
    _, given = study(AxisConfig("nets.options", {"few": {"epochs": 1}, "many": {"epochs": 9}}, of=["bn"]))
    assert given["nets"]["bn@many"] == {"fit": "a.yaml", "options": {"epochs": 9}}
    assert given["streams"]["iid"]["nets"] == ["bn@few", "bn@many"]
    nets = {"bn": {"fit": "a.yaml", "options": {"trainer.max_epochs": 3}}}
    _, given = study(AxisConfig("nets.options", {"no": {"model.meta": False}}), given={**sections(), "nets": nets})
    assert given["nets"]["bn@no"]["options"] == {"trainer.max_epochs": 3, "model.meta": False}
    nets = {"bn": {"fit": "a.yaml", "options": {"trainer.max_epochs": 3}}}
    _, given = study(AxisConfig("nets.options.model.lr", [1]), given={**sections(), "nets": nets})
    assert given["nets"]["bn@1"]["options"] == {"trainer.max_epochs": 3, "model.lr": 1}
    _, given = study(AxisConfig("methods.model.reset_every", [5], of=["tent"]))
    assert given["methods"]["tent@5"]["model"] == {"reset_every": 5}


def row(method, stream, seed, accuracy, net="bn"):
    return {"net": net, "stream": stream, "method": method, "seed": seed, "accuracy": accuracy, "protocol_hash": stream}


TENT = {("iid@1", 0): 0.20, ("iid@1", 1): 0.25, ("iid@1", 2): 0.3, ("iid@64", 0): 0.6, ("iid@64", 1): 0.6}
SIAM = {("iid@1", 0): 0.50, ("iid@1", 1): 0.57, ("iid@1", 2): 0.58, ("iid@64", 0): 0.5, ("iid@64", 1): 0.7}


def rows():
    by_method = {"tent": TENT, "zerosiam": SIAM}
    return [row(m, stream, seed, value) for m, cells in by_method.items() for (stream, seed), value in cells.items()]


def test_answers_are_paired_by_seed():
    asks = [
        AskConfig("at one", "zerosiam", "tent", at=1),
        AskConfig("by 60", "zerosiam", "tent", at=1, margin=60),
        AskConfig("backwards", "tent", "zerosiam", at="first"),
        AskConfig("two seeds", "zerosiam", "tent", at="last"),
        AskConfig("no cells", "zerosiam", "source", at="mean"),
        AskConfig("larger batches help", "zerosiam", "zerosiam", at=64, than_at=1),
    ]
    made, _ = study(AxisConfig("streams.data.batch_size", [1, 64], of=["iid"]), asks)
    result = made.result(rows(), [{"cell": "bn/iid@1/source/seed0", "reason": "failed: x"}])
    differences = [30, 32, 28]
    half = 4.302653 * stdev(differences) / math.sqrt(3)
    first, by_60, backwards, two, none, larger = result["answers"]
    assert (first["verdict"], by_60["verdict"], backwards["verdict"]) == ("holds", "fails", "fails")
    assert first["mean"] == pytest.approx(fmean(differences))
    assert first["half"] == pytest.approx(half, rel=1e-5)
    assert (larger["seeds"], larger["mean"]) == (2, pytest.approx(((50 - 50) + (70 - 57)) / 2))
    assert (two["verdict"], two["half"], two["seeds"]) == ("unclear", None, 2)
    assert two["mean"] == pytest.approx(0)
    assert "holds here (+30.0 ± 5.0 points of accuracy, 3 seeds)" in sentence(first)
    assert "against a margin of 60.0" in sentence(by_60)
    assert sentence(none) == "no cells: not measured (no cells of both 'zerosiam' and 'source' at mean)."
    assert result["missing"] == ["bn/iid@1/source/seed0: failed: x"]
    tent = next(each for each in result["series"] if each["method"] == "tent")
    assert tent["points"] == [
        {"x": 1, "mean": pytest.approx(25), "low": 20, "high": pytest.approx(30)},
        {"x": 64, "mean": pytest.approx(60), "low": 60, "high": 60},
    ]
    assert study_table({**result, "environment": {}}).splitlines()[-1] == "| zerosiam | 45.0 | 40.0 | 43.2 |"


def test_other_nets_and_streams_are_compared_by_seed():
    asks = [
        AskConfig("nets", "tent", "tent", net="gn", than_net="bn", stream="iid"),
        AskConfig("streams", "tent", "source", net="bn", stream="sorted", than_stream="iid"),
    ]
    made, _ = study(None, asks, axis="")
    cells = [row("tent", "iid", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    cells += [row("tent", "iid", seed, 0.6 + 0.05 * seed, "gn") for seed in range(3)]
    cells += [row("tent", "sorted", seed, 0.3) for seed in range(3)]
    cells += [row("source", "iid", seed, 0.2 + 0.1 * seed) for seed in range(2)]
    with pytest.raises(ConfigError, match="nothing varies in this study"):
        study(None, [AskConfig("x", "tent", at=2)], axis="")
    nets, streams = made.result(cells)["answers"]
    assert (nets["seeds"], nets["mean"]) == (3, pytest.approx(fmean([10, 5, 0])))
    assert (streams["seeds"], streams["mean"]) == (2, pytest.approx(fmean([10, 0])))


def test_a_seed_that_lacks_one_of_the_nets_is_left_out():
    """Else its difference would be the mean over other nets than those of the other seeds."""
    made, _ = study(None, [AskConfig("both nets", "tent", "source")], axis="")
    gains = {"bn": (0.1, 0.2, 0.3, 0.4), "gn": (0.5, 0.5, 0.5)}
    cells = [row("source", "iid", seed, 0.2, net) for net in gains for seed in range(4)]
    cells += [
        row("tent", "iid", seed, 0.2 + gain, net) for net, each in gains.items() for seed, gain in enumerate(each)
    ]
    (answer,) = made.result(cells)["answers"]
    assert (answer["seeds"], answer["mean"]) == (3, pytest.approx(fmean([30, 35, 40])))
    assert answer["half"] == pytest.approx(4.302653 * 5 / math.sqrt(3), rel=1e-5)


def test_the_area_is_that_under_the_curve_as_it_is_drawn(tmp_path):
    """On a logarithmic axis 1, 10, 1000 the first step is half as long as the second."""
    vary = AxisConfig("methods.init_args.lr", [1, 10, 1000], of=["tent"])
    asks = [AskConfig("area", "tent", "source", at="area"), AskConfig("mean", "tent", "source")]
    made, _ = study(vary, asks, scale="log")
    accuracies = {1: 0.2, 10: 0.8, 1000: 0.4}
    cells = [row(f"tent@{x}", "iid", seed, value + 0.01 * seed) for x, value in accuracies.items() for seed in range(3)]
    cells += [row("source", "iid", seed, 0.5) for seed in range(3)]
    result = made.result(cells)
    area = (1 * (20 + 80) / 2 + 2 * (80 + 40) / 2) / 3
    assert result["answers"][0]["mean"] == pytest.approx(area + 1 - 50)
    assert result["answers"][1]["mean"] == pytest.approx(fmean([20, 80, 40]) + 1 - 50)
    areas = {each["method"]: each["area"] for each in result["series"]}
    assert areas["tent"] == {
        "mean": pytest.approx(area + 1),
        "low": pytest.approx(area),
        "high": pytest.approx(area + 2),
    }
    assert areas["source"]["mean"] == pytest.approx(50)
    assert study_table(result).splitlines()[-1] == f"| tent | 79.0 | 19.0 | 59.0 | {100 - area - 1:.1f} |"
    write_study({**result, "environment": {}, "command": "c", "data": "digits"}, tmp_path)
    linear, _ = study(AxisConfig("methods.init_args.lr", [1, 10, 1000], of=["tent"]), asks)
    expected = (9 * (20 + 80) / 2 + 990 * (80 + 40) / 2) / 999
    assert linear.result(cells)["answers"][0]["mean"] == pytest.approx(expected + 1 - 50)
    cells = [cell for cell in cells if (cell["method"], cell["seed"]) != ("tent@10", 2)]
    assert made.result(cells)["answers"][0]["seeds"] == 2  # a seed with a hole has no area


def test_another_measure_on_the_axis(tmp_path):
    vary = AxisConfig("methods.init_args.steps", {"one": 1, "two": 2}, of=["tent"])
    made, _ = study(vary, against="milliseconds_per_image", scale="log")
    times = {"source": 1.0, "tent@one": 3.0, "tent@two": 6.0}
    cells = [
        {**row(method, "iid", seed, 0.5), "milliseconds_per_image": time + seed}
        for method, time in times.items()
        for seed in range(2)
    ]
    result = made.result(cells)
    places = {each["method"]: [point["place"] for point in each["points"]] for each in result["series"]}
    assert places == {"source": [1.5], "tent": [3.5, 6.5]}
    assert study_table(result).splitlines()[-1] == "| tent | 50.0 (3.5) | 50.0 (6.5) |"
    write_study({**result, "environment": {}, "command": "c", "data": "digits"}, tmp_path)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([5.0, 5.1, 4.9], "holds"), ([-5.0, -5.1, -4.9], "fails"), ([5.0, -5.0, 1.0], "unclear"), ([5.0], "unclear")],
)
def test_a_ruling_needs_an_interval_on_one_side(differences, verdict):
    assert ruling(differences)[0] == verdict
    assert ruling([])[1] is None


def test_methods_that_do_not_vary_are_compared_at_each_value(tmp_path):
    vary = AxisConfig("methods.init_args.lr", [0.1, 1.0], of=["tent"])
    made, _ = study(vary, [AskConfig("source at the last", "source", "tent", at="last")], scale="log")
    cells = [row("source", "iid", seed, 0.7) for seed in range(3)]
    cells += [row(f"tent@{x}", "iid", seed, 0.4 + 0.1 * x + 0.01 * seed) for x in (0.1, 1.0) for seed in range(3)]
    result = made.result(cells)
    assert [each["level"] for each in result["series"]] == [True, False]
    assert result["answers"][0]["mean"] == pytest.approx(100 * (0.7 - 0.51))
    whole = {**result, "environment": {"device": "a CPU"}, "command": "c", "data": "digits"}
    write_study(whole, tmp_path)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "| source | 30.0 | 30.0 | 30.0 |" in (tmp_path / "study.md").read_text()


@pytest.mark.parametrize(
    ("vary", "asks", "options", "words"),
    [
        (AxisConfig("data.batch_size", [1]), (), {}, "must begin with nets, streams, methods"),
        (AxisConfig("streams.data.batch_size", []), (), {}, "values is empty"),
        (AxisConfig("streams.data.batch_size", [1], of=["idd"]), (), {}, "idd"),
        (AxisConfig("methods.init_args.lr", [2.0], factor=True), (), {}, "'source' does not give as a number"),
        (AxisConfig("streams.kind.x", [1], of=["iid"]), (), {"kind": "iid"}, "'kind' of 'iid' is 'iid'"),
        (None, (), {}, "vary and axis go together"),
        (AxisConfig("streams.data.batch_size", [1]), [AskConfig("x", "tend")], {}, "tend"),
        (AxisConfig("streams.data.batch_size", [1]), [AskConfig("x", "tent", at=2)], {}, "first, last, mean, 1; got 2"),
        (AxisConfig("streams.data.batch_size", {"a": 1}), [AskConfig("x", "tent", at="area")], {}, "area"),
        (AxisConfig("streams.data.batch_size", [1]), [AskConfig("x", "tent", net="cn")], {}, "cn"),
    ],
)
def test_what_a_study_cannot_be_is_refused(vary, asks, options, words):
    given = sections()
    given["streams"]["iid"].update(options)
    with pytest.raises(ConfigError, match=words):
        study(vary, asks, given)


@pytest.mark.usefixtures("one_thread")
def test_a_study_from_file_to_figure(tmp_path, capsys):
    def made():
        return Benchmark(
            output=str(tmp_path),
            data={"class_path": "DigitsData", "init_args": {"domains": ["haze"], "num_images": 12}},
            nets={"bn": NetConfig(source_ckpt="none", backbone="timm/test_resnet", num_classes=10)},
            streams={"iid": StreamConfig(kind="iid")},
            methods={"source": {"class_path": "Source"}, "norm": {"class_path": "Norm"}},
            trainer={"accelerator": "cpu"},
            study=StudyConfig(
                "Batch size",
                "Statistics of a batch need a batch.",
                axis="batch size",
                vary=AxisConfig("streams.data.batch_size", [2, 6]),
                asks=[AskConfig("norm is better at 2", "norm", "source", at=2)],
            ),
        )

    made().run()
    result = json.loads((tmp_path / "study.json").read_text())
    assert [each["method"] for each in result["series"]] == ["source", "norm"]
    assert len(result["protocols"]) == 2
    assert result["answers"][0]["seeds"] == 1
    assert "norm is better at 2: unclear" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "study.png").exists()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("report.json")}
    assert len(times) == 4
    made().run()  # goes on: nothing is run again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("report.json")} == times


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "acuracy"}, "study.measure must be one of 'accuracy', .*got 'acuracy'"),
        ({"against": "seconds"}, "study.against must be one of .*milliseconds_per_image"),
    ],
)
def test_a_measure_that_no_cell_has_is_refused_before_anything_runs(options, words):
    with pytest.raises(ConfigError, match=words):
        Benchmark(
            "x",
            {"class_path": "DigitsData"},
            {"bn": NetConfig(source_ckpt="none", backbone="timm/test_resnet")},
            {"iid": StreamConfig()},
            {"source": {"class_path": "Source"}},
            study=StudyConfig("Title", "A claim.", **options),
        )


def test_a_domain_that_no_cell_has_is_said():
    made, _ = study(asks=[AskConfig("Tent gains", "tent")], axis="", measure="domains.clear.accuracy")
    row = {"net": "bn", "stream": "iid", "method": "tent", "seed": 0, "domains": {"clean": {"accuracy": 0.5}}}
    (answer,) = made.result([row])["answers"]
    assert answer["missing"] == "no cell has the measure 'domains.clear.accuracy'"
