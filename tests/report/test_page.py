"""The report's files: numbers against independent computations, and material that is missing, failed or unlike."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from lightning_tta import ConfigError, DataError
from lightning_tta.cli.main import main
from lightning_tta.data import Protocol
from lightning_tta.files import json_digest
from lightning_tta.report import figures, write_report
from lightning_tta.report.runs import read
from lightning_tta.report.terminal import report
from runs import Page, hits, page_of, protocol, row_of, write_benchmark, write_run

OVERVIEW, COST = 7, 7  # columns; the first and the second table of so many


def test_numbers_of_a_benchmark_in_all_three_places(tmp_path, capsys):
    cells = {
        (m, s): hits(10 * s + (m == "tent"), 0.5 + 0.3 * (m == "tent")) for m in ("source", "tent") for s in (0, 1, 2)
    }
    report([write_benchmark(tmp_path, cells)])
    files = [tmp_path / "report.html", tmp_path / "report.md"]
    page = page_of(files)

    accuracies = np.array([[cells[m, s].mean() for s in (0, 1, 2)] for m in ("source", "tent")])
    half = 100 * scipy.stats.sem(accuracies[1]) * scipy.stats.t.ppf(0.975, 2)
    test = scipy.stats.ttest_rel(accuracies[1], accuracies[0])
    gain = 100 * (accuracies[1] - accuracies[0]).mean()
    gain_half = gain - 100 * test.confidence_interval(0.95).low
    star = "*" if gain > gain_half else ""
    p = f"{test.pvalue:.3f}" if test.pvalue < 0.1 else f"{test.pvalue:.2f}"
    accuracy = f"{100 * accuracies[1].mean():.1f} ± {half:.1f}"
    overview = ["tent", "3", accuracy, f"{gain:+.1f} ± {gain_half:.1f}{star}", p, p, "30.0"]
    assert row_of(page, "tent", OVERVIEW) == overview
    fog = np.array([cells["tent", s][:40].mean() for s in (0, 1, 2)])
    fog_half = 100 * scipy.stats.sem(fog) * scipy.stats.t.ppf(0.975, 2)
    assert row_of(page, "fog", 3)[2] == f"{100 * fog.mean():.1f} ± {fog_half:.1f}"
    assert row_of(page, "tent", 4)[1:] == ["12.5 ± 0.0", "1.500 ± 0.000", "0.750 ± 0.000"]
    assert row_of(page, "tent", COST, 1)[1:] == ["0.5", "0.25", "125.0", "1.00", "6.25", "123"]

    printed, markdown = capsys.readouterr().out, files[1].read_text()
    assert " ".join(["tent (best)", *overview[1:]]) in " ".join(printed.split())
    escaped = " | ".join(overview[1:]).replace("*", "\\*")
    assert f"| **tent** (best) | {escaped} |" in markdown
    for wanted in ("paired by seed (3 pairs)", "n = 3 seeds ± half its 95 % confidence interval"):
        for text in (" ".join(printed.split()), *(" ".join(file.read_text().split()) for file in files)):
            assert wanted in text
    for wanted in ("toy CPU", protocol(order_seed=2)["hash"]):
        assert all(wanted in file.read_text() for file in files)


def test_one_seed_pairs_images_and_says_so(tmp_path):
    source, tent = hits(0, 0.5), hits(1, 0.8)
    files = write_report([write_benchmark(tmp_path, {("source", 0): source, ("tent", 0): tent})])
    difference = tent.astype(int) - source.astype(int)
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(len(difference))
    row = row_of(page_of(files), "tent", OVERVIEW)
    assert row[2:4] == [f"{100 * tent.mean():.1f}", f"{100 * difference.mean():+.1f} ± {100 * half:.1f}*"]
    text = files[0].read_text()
    assert "One seed: there is no spread over seeds" in text
    assert "paired by image" in text


@pytest.mark.parametrize("says", [True, False])  # reports of earlier versions do not
def test_blind_spots_are_not_among_the_paired_images(tmp_path, says):
    runs = [write_run(tmp_path / m, m, hits(seed, 0.5)) for seed, m in enumerate(("source", "tent"))]
    for run in runs:  # fog is adapted on only
        text = (run / "report.json").read_text().replace('"fog"', '"noise:blind_spots"')
        content = json.loads(text)
        if says:
            for name, part in content["domains"].items():
                part["counted"] = name == "noise"
        (run / "report.json").write_text(json.dumps(content))
        (run / "predictions.csv").write_text((run / "predictions.csv").read_text().replace("fog", "noise:blind_spots"))
    source, tent = (hits(seed, 0.5)[40:].astype(int) for seed in (0, 1))
    half = 1.959964 * (tent - source).std(ddof=1) / math.sqrt(40)
    row = row_of(page_of(write_report(runs, tmp_path)), "tent", OVERVIEW)
    assert row[3].rstrip("*") == f"{100 * (tent - source).mean():+.1f} ± {100 * half:.1f}"


def test_two_seeds_show_both_and_test_nothing(tmp_path):
    cells = {("source", 0): [1] * 20 + [0] * 60, ("source", 1): [1] * 60 + [0] * 20}
    cells |= {("tent", 0): [1] * 40 + [0] * 40, ("tent", 1): [1] * 64 + [0] * 16}
    row = row_of(page_of(write_report([write_benchmark(tmp_path, cells)])), "tent", OVERVIEW)
    assert row[2:6] == ["65.0 [50.0, 80.0]", "+15.0 [+5.0, +25.0]", "-", "-"]
    assert "Two seeds are too few" in (tmp_path / "report.md").read_text()


def test_page_needs_nothing_else(tmp_path):
    cells = {(m, s): hits(s, 0.5) for m in ("source", "a<b>&") for s in (0, 1)}
    text = write_report([write_benchmark(tmp_path, cells)])[0].read_text()
    page = Page(text)
    assert not re.search(r"https?:|@import|url\(", text)
    sources = [(tag, value) for tag, name, value in page.attributes if name in ("src", "href")]
    assert {value.split(",")[0] for tag, value in sources if tag == "img"} == {"data:image/svg+xml;base64"}
    assert len([tag for tag, _ in sources if tag == "img"]) == 7  # differences, curves, two reliabilities, three costs
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for tag, value in sources if tag == "a"} <= set(ids)
    assert all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")
    assert 'name="viewport"' in text
    assert row_of(page, "a<b>&", OVERVIEW)[1] == "2"


def test_missing_and_failed_cells(tmp_path, capsys):
    skipped = [
        {"cell": "net/iid/tent/seed1", "reason": "failed: RuntimeError: out of memory <GPU> [red]"},
        {"cell": "net/iid/sar/seed0", "reason": "unsupported: no norm layers"},
    ]
    cells = {
        ("source", 0): hits(0, 0.5),
        ("source", 1): hits(1, 0.5),
        ("tent", 0): hits(2, 0.6),
        ("norm", 1): hits(3, 0.6),
    }
    report([write_benchmark(tmp_path, cells, skipped)])
    page = page_of([tmp_path / "report.html"])
    missing = {row[0]: row[1] for row in page.rows if row and row[0].startswith("net/iid/")}
    assert missing["net/iid/tent/seed1"] == skipped[0]["reason"]
    assert missing["net/iid/sar/seed0"].startswith("unsupported")
    assert "no reason given" in missing["net/iid/norm/seed0"]
    assert row_of(page, "tent", OVERVIEW)[1] == "1"
    assert any("Cells without a result: 3" in text for text in page.paragraphs)
    assert f"left out: net/iid/tent/seed1: {skipped[0]['reason']}" in " ".join(capsys.readouterr().out.split())


def test_no_finished_cell_at_all(tmp_path):
    files = write_report([write_benchmark(tmp_path, {}, [{"cell": "net/iid/tent/seed1", "reason": "failed: x"}])])
    assert "no finished cell" in files[0].read_text()
    page_of(files)


def test_unlike_protocols(tmp_path, monkeypatch, capsys):
    unlike = {"tent": {"protocol_changes": {"batch_size": 3}}}
    cells = {(m, s): hits(s, 0.5) for m in ("source", "tent") for s in (0, 1)}
    files = write_report([write_benchmark(tmp_path / "benchmark", cells, **unlike)])
    page = page_of(files)
    warned = [text for text in page.paragraphs if "not comparable (" in text]
    assert len(warned) == 2
    assert all("batch_size: 10 != 3" in text for text in warned)
    assert row_of(page, "tent", OVERVIEW)[3] == "-"  # no difference under unlike protocols

    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "benchmark" / "cells" / name for name in ("source-0", "tent-0")]
    with pytest.raises(ConfigError, match="batch_size: 10 != 3"):
        report(runs)
    assert not (tmp_path / "report").exists()  # nothing was printed or written before
    assert capsys.readouterr().out == ""
    main(["report", *map(str, runs), "--allow_different", "true"])
    assert "Part 2: net, toy, iid" in capsys.readouterr().out
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert any("parts 1 and 2" in text and "batch_size: 10 != 3" in text for text in page.paragraphs)


def test_a_changed_protocol_is_noticed(tmp_path):
    runs = [write_run(tmp_path / method, method, hits(0, 0.5)) for method in ("source", "tent")]
    content = json.loads((runs[1] / "report.json").read_text())
    content["protocol"]["severity"] = 1
    (runs[1] / "report.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="changed"):
        report(runs, output=tmp_path)
    assert "changed after it was written" in write_report(runs[1:])[1].read_text()


def test_one_run_is_printed_by_domain(tmp_path, capsys):
    run = write_run(tmp_path / "run", "tent", [1] * 20 + [0] * 60, protocol_changes={"weights": "net: random"})
    main(["report", str(run), "--output", str(tmp_path / "there")])
    printed = " ".join(capsys.readouterr().out.split())
    for wanted in ("fog 40 50.0 30.0", "noise 40 0.0 30.0", "all 80 25.0", "4 forward and 2 backward", "randomly"):
        assert wanted in printed
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["report.html", "report.md"]


def test_nothing_is_cut_in_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    methods = ["source", *(f"a_method_with_a_long_name_{n}" for n in range(3))]
    report([write_benchmark(tmp_path, {(m, s): hits(s, 0.5) for m in methods for s in (0, 1)})])
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert all(method in printed for method in methods)


def test_reports_of_an_earlier_version(tmp_path):
    cells = {("source", 0): hits(0, 0.5), ("tent", 0): hits(1, 0.5)}
    root = write_benchmark(tmp_path, cells)
    newer = ("ece", "nll", "brier", "reliability", "peak_memory_mb", "environment", "net", "seconds", "options")
    for path in root.glob("cells/*/report.json"):
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in newer}
        fields = {k: v for k, v in content["protocol"].items() if k not in ("weights_digest", "hash")}
        content["protocol"] = {**fields, "hash": json_digest(fields)}
        path.write_text(json.dumps(content))
        (path.parent / "batches.jsonl").unlink()
        (path.parent / "predictions.csv").unlink()
    files = write_report([root])
    page, text = page_of(files), files[0].read_text()
    assert "There is no batches.jsonl beside some reports of source, tent." in text
    assert not any(title in text for title in ("Calibration", "Forgetting", "Versions"))
    assert row_of(page, "tent", OVERVIEW)[3] == f"{100 * (cells['tent', 0].mean() - cells['source', 0].mean()):+.1f}"
    for path in root.glob("cells/*/report.json"):
        path.unlink()
    assert "2 of 2 cells have no report.json" in write_report([root])[0].read_text()


def test_guard_and_forgetting(tmp_path):
    events = [{"batch": 7, "reason": "class share <0.9>", "action": "reset", "reference": None}]
    events[0]["values"] = {"largest_class_share": 0.93214, "logit_norm": 12.0}
    more = {
        "source": {"source_accuracy_after": 0.9},
        "tent": {
            "source_accuracy_after": 0.7,
            "guard": {"events": events, "stopped": False, "on_probation": 16, "forwards": 40},
        },
    }
    written = write_report([write_benchmark(tmp_path, {(m, 0): hits(0, 0.5) for m in more}, **more)])
    page = page_of(written)
    values = "values (largest class share 0.9321, logit norm 12)"
    assert row_of(page, "tent", 7, 2) == ["tent", "0", "7", "collapse", "class share <0.9>", "reset", values]
    assert (
        "1 events of the guard. tent, seed 0: the source predicted 16 batches on probation. 40 forward"
        in written[0].read_text()
    )
    assert row_of(page, "tent", 3) == ["tent", "70.0", "-20.0"]


@pytest.mark.parametrize(
    ("on_probation", "values", "why"),
    [
        (2, {}, "the source predicted all 2 batches, on probation"),
        (1, {}, "since the method began to answer"),
        (0, {"labels_told": 0.0}, "no label became known"),
    ],
)
def test_why_there_is_no_estimate(on_probation, values, why, tmp_path, capsys):
    monitors = {
        "collapse": {"values": {}, "estimates": False, "estimate": None},
        "one": {"values": values, "estimates": True, "estimate": None},
        "other": {"values": {}, "estimates": True, "estimate": 0.5},
    }
    estimates = {"other": {"estimate": 0.5, "accuracy": 0.75, "mean_absolute_error": 0.25, "domains": {}}}
    guard = {"settings": {"action": "stop"}, "events": [], "monitors": monitors, "on_probation": on_probation}
    run = write_run(tmp_path / "run", "tent", hits(0, 0.75), guard={**guard, "estimates": estimates}, batches=2)
    report([run])
    (sentence,) = read([run]).groups[0].runs[0].unestimated
    assert sentence.startswith(f"No estimate of 'one': {why}")
    assert sentence in " ".join((run / "report.md").read_text().split())
    assert sentence.removesuffix(".") in capsys.readouterr().out


def test_monitors_and_choice(tmp_path, capsys):
    """Alarms and estimates of a run with monitors, in figures, tables and terminal; the chooser's verdict beside it."""
    alarms = [
        {"batch": 1, "monitor": "poem", "reason": "shift", "values": {"poem_log_wealth": 3.5}, "action": "inform"},
        {"batch": 2, "monitor": "aetta", "reason": "low_accuracy", "values": {}, "action": "rollback"},
    ]
    parts = {name: {"estimate": 0.5, "accuracy": 0.75} for name in ("fog", "noise")}
    estimates = {"aetta": {"estimate": 0.5, "accuracy": 0.75, "mean_absolute_error": 0.25, "domains": parts}}
    guard = {"settings": {"action": "rollback"}, "events": alarms, "estimates": estimates, "forwards": 4}
    run = write_run(tmp_path / "run", "tent", hits(0, 0.75), guard=guard)
    rows = [json.loads(line) for line in (run / "batches.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row["aetta_accuracy"] = 0.5
    rows[0]["source_answered"] = 1.0
    (run / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [{"infomax": 1.25, "snd": 2.0}, {"infomax": 0.5}]
    names = ["tent lr=0.001", "source"]
    candidates = [{"name": n, "method": "m", "options": {}, "scores": s} for n, s in zip(names, scores, strict=True)]
    why = "It is surer <and> agrees."
    choice = {"choice": "tent lr=0.001", "confidence": 0.8, "why": why, "candidates": candidates}
    (run / "choice.json").write_text(json.dumps(choice))
    report([run])
    page, printed = page_of([run / "report.html"]), capsys.readouterr().out
    alarm = ["tent", "0 (abc)", "1", "poem", "shift", "inform", "values (poem log wealth 3.5)"]
    assert [row for row in page.rows if len(row) == 7 and row[3] in ("poem", "aetta")] == [
        alarm,
        ["tent", "0 (abc)", "2", "aetta", "low_accuracy", "rollback", "values (-)"],
    ]
    assert row_of(page, "tent", 6) == ["tent", "0 (abc)", "aetta", "50.0", "75.0", "25.0"]
    assert ["tent lr=0.001", "1.250", "2.000"] in page.rows
    assert ["source", "0.500", "-"] in page.rows
    text = (run / "report.md").read_text()
    verdict = "The chooser takes tent lr=0.001 (confidence 80 %). It is surer"
    assert verdict in text
    assert verdict in printed
    assert "batch 1: shift, inform (poem)" in printed
    assert "accuracy as 'aetta' estimates it: 50.0 %, in truth 75.0 %, mean error 25.0 points" in printed
    (run / "choice.json").write_text("{broken")
    report([run])
    assert "The chooser" not in capsys.readouterr().out
    (group,) = read([run]).groups
    with figures.drawing():
        figure = figures.estimates_figure(group, figures.looks(group.methods))
        curves = figures.curves_figure(group, figures.looks(group.methods))
    lines = {line.get_color(): line for line in figure.axes[0].lines if len(line.get_xdata()) == len(rows)}
    estimate = lines[figures.COLORS[0]].get_ydata()
    assert list(estimate[1:]) == [50.0] * (len(rows) - 1)
    assert estimate[0] != estimate[0]  # the source answered
    hollow, filled = rows[1]["images_seen"], rows[2]["images_seen"]
    for drawn in (figure, curves):
        axes = drawn.axes[0]
        drawn.draw_without_rendering()
        assert axes.get_position().height > 0.25  # the marks take no room
        marks = [line for line in axes.lines if line.get_marker() == "v" and line.get_linestyle() == "None"]
        assert {tuple(m.get_xdata()) for m in marks if m.get_markerfacecolor() == "none"} == {(hollow,)}
        assert {tuple(m.get_xdata()) for m in marks if m.get_markerfacecolor() != "none"} == {(filled,)}


def labels(runs):
    return [{method: len(found) for method, found in group.methods.items()} for group in read(runs).groups]


def test_sets_of_single_runs(tmp_path):
    runs = []
    for method in ("source", "tent"):
        for seed in (0, 1):
            right = hits(seed + 5 * (method == "tent"), 0.6)
            runs.append(write_run(tmp_path / "all" / f"{method}{seed}", method, right, seed=seed))
    assert labels([tmp_path / "all"]) == labels(runs) == [{"source": 2, "tent": 2}]  # a directory of runs
    runs.append(write_run(tmp_path / "again", "tent", hits(9, 0.6), seed=0))
    assert labels(runs) == [{"source": 2, "tent (tent0)": 1, "tent": 1, "tent (again)": 1}]
    page = page_of(write_report(runs[:4], tmp_path / "out"))
    assert row_of(page, "tent", OVERVIEW)[1] == "2"
    with pytest.raises(ConfigError, match=r"order_seed: 0 != 1\n.*--allow_different true to see means over the seeds"):
        report(runs[:4])


def test_options_tell_runs_of_one_method_apart(tmp_path):
    rates = [{"lr": 0.01, "steps": 1}, {"lr": 0.1, "steps": 1}]
    runs = [write_run(tmp_path / f"{n}", "tent", hits(n, 0.6), options=o) for n, o in enumerate(rates)]
    runs.append(write_run(tmp_path / "old", "tent", hits(2, 0.6)))
    assert labels(runs) == [{"tent (lr=0.01, steps=1)": 1, "tent (lr=0.1, steps=1)": 1, "tent": 1}]
    assert labels(runs[:2]) == [{"tent (lr=0.01)": 1, "tent (lr=0.1)": 1}]


def test_kinds_and_resets_tell_runs_of_one_method_apart(tmp_path):
    kinds = [{"statistics": "auto"}, {"statistics": {"kind": "ema", "momentum": 0.02}}, {"reservoir": {"members": 4}}]
    runs = [write_run(tmp_path / f"{n}", "tent", hits(n, 0.6), options=o) for n, o in enumerate([{}, *kinds])]
    assert labels(runs) == [
        dict.fromkeys(
            ["tent", "tent (statistics=auto)", "tent (statistics=ema(momentum=0.02))", "tent (reservoir=(members=4))"],
            1,
        )
    ]
    every = write_run(tmp_path / "every", "tent", hits(1, 0.6), options={})
    path = every / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reset_every": 5}))
    assert labels([runs[0], every]) == [{"tent": 1, "tent (reset_every=5)": 1}]


def test_a_page_says_what_labels_stand_for(tmp_path, capsys):
    runs = [write_run(tmp_path / f"{n}", "tent", hits(n, 0.6), options=o) for n, o in enumerate([{}, {"prior": "em"}])]
    text = write_report(runs, tmp_path / "out")[1].read_text()
    assert "| tent | tent | - |" in text.partition("## Options")[2]
    assert "| tent (prior=em) | tent | prior=em" in text.partition("## Options")[2]
    report(runs[1:])
    assert "options: prior=em" in capsys.readouterr().out


def test_other_weights_are_no_seeds_of_one_order(tmp_path):
    def run(name, seed, digest):
        changes = {"weights_digest": digest}
        return write_run(tmp_path / name, "source", hits(seed, 0.6), seed=seed, protocol_changes=changes)

    one = [run("a0", 0, "aaa"), run("b1", 1, "bbb")]
    assert labels(one) == [{"source": 2}]  # a source training and an order for each seed
    assert "source weights of its own: weights net: best.ckpt (aaa); " in read(one).groups[0].warnings[0]
    assert labels([*one, run("b0", 0, "bbb")]) == [{"source": 1}, {"source": 2}]
    (warning,) = read([*one, tmp_path / "b0"]).warnings
    assert "weights_digest: aaa != bbb" in warning


def test_a_protocol_is_checked_by_the_rule_it_was_written_by(tmp_path):
    fields = protocol(severity=5, preprocessing={"mean": (0.1, 0.25)}, interval=0.5, charge="passes")
    assert json_digest({k: v for k, v in fields.items() if k != "hash"}) == Protocol.from_dict(fields).hash


def test_markdown_tables_have_equal_rows(tmp_path):
    cells = {(m, s): hits(s, 0.5) for m in ("source", "a|b") for s in (0, 1)}
    text = write_report([write_benchmark(tmp_path, cells)])[1].read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 4
    for part in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1


def test_what_is_gone_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--latex", "true"])
    assert "pandoc" in capsys.readouterr().err


def test_a_report_imports_no_torch(tmp_path):
    write_benchmark(tmp_path, {(m, 0): hits(0, 0.5) for m in ("source", "tent")})
    code = (
        "import sys, pathlib; from lightning_tta.report.terminal import report; report([pathlib.Path(sys.argv[1])]); "
        "print([name for name in ('torch', 'torchvision', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
