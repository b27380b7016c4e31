"""Results as they lie about: below folders, damaged, changed, of several processes, with names that mean something."""

import json
import re

import pytest

from lightning_tta import ConfigError, DataError
from lightning_tta.cli.main import main
from lightning_tta.report import write_report
from lightning_tta.report.files import predictions_digest
from lightning_tta.report.runs import read
from lightning_tta.report.tables import difference, differences, overview
from lightning_tta.report.terminal import report
from runs import hits, page_of, protocol, write_benchmark, write_run


def labels(paths):
    return [{label: len(runs) for label, runs in group.methods.items()} for group in read(paths).groups]


def pair(root, **more):
    """Runs of the source and of tent."""
    return [write_run(root / m, m, hits(seed, 0.5), **more) for seed, m in enumerate(("source", "tent"))]


def test_a_folder_of_runs_and_benchmarks_at_any_depth(tmp_path, capsys):
    pair(tmp_path / "toy" / "predict")
    pair(tmp_path / "pacs" / "deep" / "predict", protocol_changes={"batch_size": 3})
    write_benchmark(tmp_path / "pacs" / "benchmark", {("source", 0): hits(0, 0.5), ("tent", 0): hits(1, 0.5)})
    (tmp_path / "pacs" / "loop").symlink_to(tmp_path, target_is_directory=True)
    report([tmp_path], output=tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 runs, 1 benchmark." in printed
    page = page_of([tmp_path / "out" / "report.html"])
    assert any("4 runs, 1 benchmark." in text for text in page.paragraphs)
    assert any("parts 1 and 2" in text and "not comparable: batch_size: 3 != 10" in text for text in page.paragraphs)
    assert labels([tmp_path]) == [{"source": 1, "tent": 1}] * 3
    with pytest.raises(ConfigError, match="batch_size: 10 != 3"):  # named side by side they are to be compared
        report([tmp_path / "toy" / "predict", tmp_path / "pacs" / "deep" / "predict"])


def test_five_runs_of_one_order_and_two_weight_files(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{m}-{w}", m, hits(n, 0.5), protocol_changes={"weights": f"net: {w}", "weights_digest": w}
        )
        for n, (m, w) in enumerate([("source", "aa"), ("tent", "aa"), ("norm", "aa"), ("source", "bb"), ("tent", "bb")])
    ]
    with pytest.raises(ConfigError, match="not comparable:\n  weights: net: aa != net: bb\n  weights_digest: aa != bb"):
        report(runs, output=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    found = read(runs)
    assert [list(group.methods) for group in found.groups] == [["source", "tent", "norm"], ["source", "tent"]]
    assert not any("Two seeds" in text for group in found.groups for text in group.warnings)
    assert "weights net: aa (aa)" in found.groups[0].title
    text = write_report(runs, tmp_path / "out")[0].read_text()
    assert "not comparable: weights: net: aa != net: bb" in text
    assert "Two seeds" not in text
    assert [row[1] for group in found.groups for row in overview(group).rows] == ["1"] * 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "report.json is empty"),
        ('{"method": "tent", "protocol"', "report.json cannot be read"),
        ("[1, 2]", "it holds a list"),
        ("{}", "neither protocol nor rows"),
        ('{"protocol": "iid"}', "protocol is no mapping"),
        ('{"protocol": {}, "accuracy": "high"}', "accuracy is 'high', no number"),
        ('{"protocol": {}, "accuracy": NaN}', "accuracy is nan, not within 0 to 1"),
        ('{"protocol": {}, "domains": {"fog": {"accuracy": 76.8}}}', "accuracy of fog is 76.8, not within"),
        ('{"protocol": {}, "domains": {"fog": 0.5}}', "domain fog is no mapping"),
        ('{"rows": [{"method": "tent"}]}', "row 0 has no net"),
        ('{"rows": 3}', "its rows are no list"),
    ],
)
def test_a_damaged_file_is_named_or_left_out_with_a_word(tmp_path, content, words):
    write_run(tmp_path / "runs" / "good", "tent", hits(0, 0.5))
    (tmp_path / "runs" / "bad").mkdir()
    path = tmp_path / "runs" / "bad" / "report.json"
    path.write_text(content)
    for given in (path, path.parent):
        with pytest.raises(DataError) as caught:
            report([given])
        assert str(path) in str(caught.value)
        assert words in str(caught.value)
    (line,) = read([path.parents[1]]).warnings
    assert line.startswith(f"Left out: {path}")
    assert labels([path.parents[1]]) == [{"tent": 1}]


def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert f"{tmp_path / 'report.json'} cannot be read" in capsys.readouterr().err


def test_a_damaged_cell_of_a_benchmark(tmp_path):
    root = write_benchmark(tmp_path, {("source", 0): hits(0, 0.5), ("tent", 0): hits(1, 0.5)})
    (root / "cells" / "tent-0" / "report.json").write_text("")
    found = read([root])
    assert labels([root]) == [{"source": 1, "tent": 1}]  # with the numbers of benchmark.json
    assert "tent-0/report.json is empty" in found.warnings[0]
    write_report([root])


def test_with_one_seed_an_image_counts_once_whatever_it_gives_in_two_domains(tmp_path):
    changes = {"protocol_changes": {"images": 80, "images_per_domain": (40, 40)}}
    gain = difference(read(pair(tmp_path, **changes)).groups[0], "tent")
    means = (hits(1, 0.5).astype(float) - hits(0, 0.5)).reshape(2, 40).mean(0)
    assert gain.mean == pytest.approx(means.mean())
    assert gain.half == pytest.approx(1.959964 * means.std(ddof=1) / 40**0.5, rel=1e-6)
    unlike = {"protocol_changes": {"images": 80, "images_per_domain": (30, 50)}}  # not how they are numbered
    other = difference(read(pair(tmp_path / "unlike", **unlike)).groups[0], "tent")
    assert (gain.count, other.count) == (40, 80)


def test_a_changed_digit_among_the_predictions(tmp_path):
    source, tent = pair(tmp_path)
    assert next(iter(differences(read([source, tent]).groups[0]).values())).over == "samples"
    path = tent / "predictions.csv"
    lines = path.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if ",1,0," in line)
    path.write_text("\n".join([*lines[:first], lines[first].replace(",1,0,", ",1,1,"), *lines[first + 1 :]]) + "\n")
    (group,) = read([source, tent]).groups
    (said,) = (text for text in group.warnings if "disagree" in text)
    right = hits(1, 0.5)[:40].mean()
    assert f"the accuracy of fog is {100 * right + 2.5:.2f} % by the images, {100 * right:.2f} % in the report" in said
    assert differences(group)["tent"].over == "seeds"  # its images are not used


def test_a_changed_digit_that_no_accuracy_shows(tmp_path):
    source, tent = pair(tmp_path)
    path = tent / "predictions.csv"
    content = json.loads((tent / "report.json").read_text())
    (tent / "report.json").write_text(
        json.dumps({**content, "predictions_digest": predictions_digest(path.read_bytes())})
    )
    assert read([source, tent]).groups[0].runs[1].predictions
    path.write_text(path.read_text().replace("0.5", "0.6", 1))
    assert any("checksum" in text for text in read([source, tent]).groups[0].warnings)


@pytest.mark.parametrize("line", ["", "0,fog", "a,fog,1,1,0.5,0.5", '0,"fog\n'])
def test_predictions_that_cannot_be_read_are_not_used(tmp_path, line):
    source, tent = pair(tmp_path)
    head = (tent / "predictions.csv").read_text().splitlines()[0]
    (tent / "predictions.csv").write_text(f"{head}\n{line}" if line else "")
    assert any("predictions.csv" in text for text in read([source, tent]).groups[0].warnings)
    write_report([source, tent], tmp_path)


@pytest.mark.parametrize("counted", [True, False])
def test_images_without_a_prediction_count_as_in_the_report(tmp_path, counted):
    """Two images of 40 have none: wrong where their pixels were not finite, left out where their batch was refused."""
    runs = pair(tmp_path)
    for run, right in zip(runs, (hits(0, 0.5), hits(1, 0.5)), strict=True):
        lines = (run / "predictions.csv").read_text().splitlines()
        for n in (1, 2):
            lines[n] = re.sub(r",1,\d,", ",1,-1,", lines[n])
        (run / "predictions.csv").write_text("\n".join(lines) + "\n")
        content = json.loads((run / "report.json").read_text())
        fog = {"accuracy": float(right[2:40].sum() / (40 if counted else 38)), "images": 40 if counted else 38}
        content["domains"]["fog"] |= fog
        (run / "report.json").write_text(json.dumps(content))
    (group,) = read(runs).groups
    assert not any("predictions.csv" in text for text in group.warnings)
    fog = difference(group, "tent", "fog")
    assert fog.count == (40 if counted else 38)
    assert fog.mean == pytest.approx(group.runs[1].accuracy("fog") - group.runs[0].accuracy("fog"))


REPLICAS = {"world_size": 2, "mode": "replicas"}
SYNCHRONISED = {"world_size": 2, "mode": "synchronised"}


def test_replicas_compare_with_one_process(tmp_path):
    source = write_run(tmp_path / "source", "source", hits(0, 0.5))
    tent = write_run(tmp_path / "tent", "tent", hits(1, 0.8), protocol_changes=REPLICAS)
    report([source, tent], output=tmp_path)
    (group,) = read([source, tent]).groups
    assert differences(group)["tent"].over == "samples"
    assert group.runs[0].hash != group.runs[1].hash  # the protocols say what was run
    assert "single; replicas" in (tmp_path / "report.html").read_text()
    other = write_run(tmp_path / "other", "norm", hits(2, 0.8), protocol_changes={**REPLICAS, "batch_size": 3})
    with pytest.raises(ConfigError, match="batch_size: 10 != 3"):
        report([source, tent, other])


def test_synchronised_processes_compare_where_their_predictions_are_those_of_one(tmp_path):
    one = write_run(tmp_path / "one", "tent", hits(1, 0.5))
    equal = write_run(tmp_path / "equal", "tent", hits(1, 0.5), protocol_changes=SYNCHRONISED)
    assert labels([one, equal]) == [{"tent": 1, "tent (processes=2 synchronised)": 1}]
    report([one, equal], output=tmp_path)
    unlike = write_run(tmp_path / "unlike", "tent", hits(2, 0.5), protocol_changes=SYNCHRONISED)
    with pytest.raises(ConfigError, match="world_size: 1 != 2"):
        report([one, unlike])


def test_two_runs_of_the_source_leave_it_the_source(tmp_path):
    source, tent = pair(tmp_path / "a")
    again = write_run(tmp_path / "b" / "source", "source", hits(0, 0.5))
    (group,) = read([source, tent, again]).groups
    assert list(group.methods) == ["source (a/source)", "source (b/source)", "tent"]
    assert group.source == "source (a/source)"
    assert differences(group)["tent"].over == "samples"


def test_what_no_option_says_tells_runs_apart_too(tmp_path):
    guarded = {"guard": {"settings": {"action": "stop"}, "events": [], "stopped": False}}
    runs = [
        write_run(tmp_path / "plain", "tent", hits(0, 0.5), precision="32-true"),
        write_run(tmp_path / "half", "tent", hits(1, 0.5), precision="bf16-mixed"),
        write_run(tmp_path / "guarded", "tent", hits(2, 0.5), precision="32-true", **guarded),
    ]
    assert labels(runs) == [
        {"tent (precision=32-true)": 1, "tent (precision=bf16-mixed)": 1, "tent (precision=32-true, guard=stop)": 1}
    ]


@pytest.mark.parametrize("name", ["[/red]", "[bold]a|b", "$x$ \\frac{", "<b>&amp;", "_x_ *y*", "](http://z)", "a\nb"])
def test_names_mean_nothing_to_any_writer(tmp_path, capsys, name):
    """As domain and as method."""
    runs = []
    for n, method in enumerate(("source", name)):
        run = write_run(tmp_path / str(n), method, hits(n, 0.5))
        content = json.loads((run / "report.json").read_text())
        content["domains"] = {name: content["domains"].pop("fog"), **content["domains"]}
        content["protocol"] = protocol(domains=(name, "noise"))
        (run / "report.json").write_text(json.dumps(content))
        quoted = f'"{name}"' if "\n" in name else name
        (run / "predictions.csv").write_text((run / "predictions.csv").read_text().replace("fog", quoted))
        batches = (run / "batches.jsonl").read_text().replace('"fog"', json.dumps(name))
        (run / "batches.jsonl").write_text(batches)
        runs.append(run)
    report(runs, output=tmp_path)
    printed = capsys.readouterr().out
    assert all(part in printed for part in name.split("\n"))
    page, markdown = page_of([tmp_path / "report.html"]), (tmp_path / "report.md").read_text()
    assert name in {row[0] for row in page.rows}
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert all(len({line.replace("\\|", "").count("|") for line in block}) == 1 for block in tables)
    assert not re.search(r"(?<!\\)\]\(http", markdown)  # no link
    assert differences(read(runs).groups[0])[name].over == "samples"
    report(runs[:1], output=tmp_path)
