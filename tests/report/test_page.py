"""The report's files: numbers against independent computations, and material that is missing, failed or unlike."""

import json
import math
import re

import numpy as np
import pytest
import scipy.stats

from lightning_tta import ConfigError
from lightning_tta.cli.main import main
from lightning_tta.report import write_report
from lightning_tta.report.runs import read
from lightning_tta.report.terminal import report
from runs import Page, hits, page_of, protocol, row_of, write_benchmark, write_run


def test_numbers_of_a_benchmark(tmp_path):
    cells = {
        (m, s): hits(10 * s + (m == "tent"), 0.5 + 0.3 * (m == "tent")) for m in ("source", "tent") for s in (0, 1, 2)
    }
    files = write_report([write_benchmark(tmp_path, cells)], as_latex=True)
    assert [file.name for file in files] == ["report.html", "report.md", "report.tex"]
    assert {file.parent for file in files} == {tmp_path}
    page = page_of(files)

    accuracies = np.array([[cells[m, s].mean() for s in (0, 1, 2)] for m in ("source", "tent")])
    half = 100 * scipy.stats.sem(accuracies[1]) * scipy.stats.t.ppf(0.975, 2)
    test = scipy.stats.ttest_rel(accuracies[1], accuracies[0])
    gain = 100 * (accuracies[1] - accuracies[0]).mean()
    gain_half = gain - 100 * test.confidence_interval(0.95).low
    star = "*" if gain > gain_half else ""
    row = row_of(page, "tent", 8)
    assert row[1:5] == [
        "3",
        f"{100 * accuracies[1].mean():.1f} ± {half:.1f}",
        f"{100 - 100 * accuracies[1].mean():.1f} ± {half:.1f}",
        f"{gain:+.1f} ± {gain_half:.1f}{star}",
    ]
    assert row[5] == row[6] == (f"{test.pvalue:.3f}" if test.pvalue < 0.1 else f"{test.pvalue:.2f}")
    fog = np.array([cells["tent", s][:40].mean() for s in (0, 1, 2)])
    fog_half = 100 * scipy.stats.sem(fog) * scipy.stats.t.ppf(0.975, 2)
    assert row_of(page, "fog", 3)[2] == f"{100 * fog.mean():.1f} ± {fog_half:.1f}"
    assert row_of(page, "tent", 4)[1:] == ["12.5 ± 0.0", "1.500 ± 0.000", "0.750 ± 0.000"]
    assert row_of(page, "tent", 7)[2:] == ["0.5", "0.25", "125.0", "6.25", "123"]
    for wanted in ("paired by seed (3 pairs", "toy CPU", protocol(order_seed=2)["hash"]):
        assert wanted in files[0].read_text()
        assert wanted in files[1].read_text()


def test_one_seed_pairs_images_and_says_so(tmp_path):
    source, tent = hits(0, 0.5), hits(1, 0.8)
    files = write_report([write_benchmark(tmp_path, {("source", 0): source, ("tent", 0): tent})])
    difference = tent.astype(int) - source.astype(int)
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(len(difference))
    row = row_of(page_of(files), "tent", 8)
    assert row[2] == f"{100 * tent.mean():.1f}"
    assert row[4] == f"{100 * difference.mean():+.1f} ± {100 * half:.1f}*"
    text = files[0].read_text()
    assert "One seed: there is no spread over seeds" in text
    assert "paired by image" in text


def test_self_contained_light_and_dark(tmp_path):
    cells = {(m, s): hits(s, 0.5) for m in ("source", "tent") for s in (0, 1)}
    text = write_report([write_benchmark(tmp_path, cells)])[0].read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    page = Page(text)
    sources = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for _, _, value in sources)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    styles, body = text.split("</style>")
    assert styles.count("--ink:") == 2
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert {"ink", "muted", "c2"} <= used
    assert all(f"--{name}:" in styles for name in used)
    assert not re.findall(r"(?:fill|stroke): ?#", body)  # nothing in a figure has a colour of its own


def test_missing_and_failed_cells(tmp_path):
    skipped = [
        {"cell": "net/iid/tent/seed1", "reason": "failed: RuntimeError: out of memory <GPU>"},
        {"cell": "net/iid/sar/seed0", "reason": "unsupported: no norm layers"},
    ]
    cells = {
        ("source", 0): hits(0, 0.5),
        ("source", 1): hits(1, 0.5),
        ("tent", 0): hits(2, 0.6),
        ("norm", 1): hits(3, 0.6),
    }
    files = write_report([write_benchmark(tmp_path, cells, skipped)])
    page = page_of(files)
    missing = {row[0]: row[1] for row in page.rows if row and row[0].startswith("net/iid/")}
    assert missing["net/iid/tent/seed1"] == "failed: RuntimeError: out of memory <GPU>"
    assert missing["net/iid/sar/seed0"].startswith("unsupported")
    assert "no reason given" in missing["net/iid/norm/seed0"]
    assert row_of(page, "tent", 8)[1] == "1"
    assert any("Cells without a result: 3" in text for text in page.paragraphs)


def test_no_finished_cell_at_all(tmp_path):
    files = write_report([write_benchmark(tmp_path, {}, [{"cell": "net/iid/tent/seed1", "reason": "failed: x"}])])
    assert "no finished cell" in files[0].read_text()
    page_of(files)


def test_unlike_protocols(tmp_path, monkeypatch, capsys):
    unlike = {"tent": {"protocol_changes": {"batch_size": 3}}}
    cells = {(m, s): hits(s, 0.5) for m in ("source", "tent") for s in (0, 1)}
    files = write_report([write_benchmark(tmp_path / "benchmark", cells, **unlike)])
    page = page_of(files)
    said = [text for text in page.paragraphs if "not comparable" in text]
    assert len(said) == 2
    assert all("batch_size: 10 != 3" in text for text in said)
    assert row_of(page, "tent", 8)[4] == "-"  # no difference under unlike protocols

    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "benchmark" / "cells" / name for name in ("source-0", "tent-0")]
    with pytest.raises(ConfigError, match="batch_size"):
        report(runs)
    page = Page((tmp_path / "report" / "report.html").read_text())  # the page says so, and renders
    assert any("parts 1 and 2" in text and "batch_size: 10 != 3" in text for text in page.paragraphs)
    main(["report", str(runs[0]), "--output", str(tmp_path / "there"), "--latex", "true"])
    assert "report.tex" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["report.html", "report.md", "report.tex"]


def test_reports_of_an_earlier_version(tmp_path):
    cells = {("source", 0): hits(0, 0.5), ("tent", 0): hits(1, 0.5)}
    root = write_benchmark(tmp_path, cells)
    newer = ("ece", "nll", "brier", "reliability", "peak_memory_mb", "environment", "net", "seconds")
    for path in root.glob("cells/*/report.json"):
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in newer}
        content["protocol"].pop("weights_digest")
        path.write_text(json.dumps(content))
        (path.parent / "batches.jsonl").unlink()
        (path.parent / "predictions.csv").unlink()
    files = write_report([root])
    text = files[0].read_text()
    page_of(files)
    for said in ("No calibration", "There is no batches.jsonl", "not a protocol of this version", "Not measured"):
        assert said.lower() in text.lower()
    assert row_of(page_of(files), "tent", 8)[4] == f"{100 * (cells['tent', 0].mean() - cells['source', 0].mean()):+.1f}"
    for path in root.glob("cells/*/report.json"):
        path.unlink()
    text = write_report([root])[0].read_text()
    assert "2 of 2 cells have no report.json" in text


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
    said = "values (largest class share 0.932, logit norm 12)"
    assert row_of(page, "tent", 6) == ["tent", "0", "7", "class share <0.9>", "reset", said]
    assert (
        "1 events of the guard. tent, seed 0: the source predicted 16 batches on probation. 40 forward"
        in written[0].read_text()
    )
    assert row_of(page, "tent", 3) == ["tent", "70.0", "-20.0"]


def test_sets_of_single_runs(tmp_path):
    runs = []
    for method in ("source", "tent"):
        for seed in (0, 1):
            right = hits(seed + 5 * (method == "tent"), 0.6)
            runs.append(write_run(tmp_path / f"{method}{seed}", method, right, seed=seed))
    runs.append(write_run(tmp_path / "again", "tent", hits(9, 0.6), seed=0))
    (group,) = read(runs).groups
    assert {m: len(r) for m, r in group.methods.items()} == {
        "source": 2,
        "tent (tent0)": 1,
        "tent": 1,
        "tent (again)": 1,
    }
    page = page_of(write_report(runs[:4], tmp_path / "out"))
    assert row_of(page, "tent", 8)[1] == "2"


def test_latex_is_balanced(tmp_path):
    cells = {(m, s): hits(s, 0.5) for m in ("source", "tent_50%&x") for s in (0, 1)}
    text = write_report([write_benchmark(tmp_path, cells)], as_latex=True)[2].read_text()
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert sorted(opened) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    assert opened.count("tabular") >= 4
    plain = re.sub(r"\\[{}$%&_#]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "%" not in plain
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table[0]) - 1}
    assert r"tent\_50\%\&x" in text
    assert all(text.count(rule) == opened.count("tabular") for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_markdown_tables_have_equal_rows(tmp_path):
    cells = {(m, s): hits(s, 0.5) for m in ("source", "a|b") for s in (0, 1)}
    text = write_report([write_benchmark(tmp_path, cells)])[1].read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 4
    for part in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1
