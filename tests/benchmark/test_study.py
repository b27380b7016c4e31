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
    ]
    made, _ = study(AxisConfig("streams.data.batch_size", [1, 64], of=["iid"]), asks)
    result = made.result(rows(), [{"cell": "bn/iid@1/source/seed0", "reason": "failed: x"}])
    differences = [30, 32, 28]
    half = 4.302653 * stdev(differences) / math.sqrt(3)
    first, by_60, backwards, two, none = result["answers"]
    assert (first["verdict"], by_60["verdict"], backwards["verdict"]) == ("holds", "fails", "fails")
    assert first["mean"] == pytest.approx(fmean(differences))
    assert first["half"] == pytest.approx(half, rel=1e-5)
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
    assert study_table({**result, "environment": {}}).splitlines()[-1] == "| zerosiam | 45.0 | 40.0 |"


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
    assert "| source | 30.0 | 30.0 |" in (tmp_path / "study.md").read_text()


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
