"""The page of pixels and values is made of the runs' files: means, spreads, differences, what is missing."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from lightning_tta.errors import DataError

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("dense_page", DOCS / "dense.py")
script = sys.modules["dense_page"] = importlib.util.module_from_spec(spec)  # dataclasses look there
spec.loader.exec_module(script)


def write(root, method, seed, noise, fog, stream="iid", name="aaaaaaaa", background=0.9, digest=None):
    directory = root / "shapes/benchmark/cells/unet" / stream / f"{method}-seed{seed}-{name}"
    directory.mkdir(parents=True)
    domains = {"noise": noise, "fog": fog} if stream == "iid" else {"clean": noise}
    mean = sum(domains.values()) / len(domains)
    protocol = {"hash": digest or f"{stream}{seed}", "severity": 3 if stream == "iid" else None}
    report = {
        "method": method,
        "protocol": {**protocol, "images_per_domain": [40] * len(domains), "batch_size": 8},
        "environment": {"torch": "2.0"},
        "domains": {key: {"mean_iou": value} for key, value in domains.items()},
        "mean_iou": mean,
        "accuracy": 0.5 + mean / 2,
        "class_iou": [background, mean],
        "class_names": ["background", "disk"],
    }
    (directory / "report.json").write_text(json.dumps(report))
    return directory


VALUES = {"source": [(0.4, 0.6), (0.5, 0.5), (0.3, 0.7)], "norm": [(0.7, 0.62), (0.8, 0.5), (0.6, 0.68)]}


def make(root):
    for method, several in VALUES.items():
        for seed, (noise, fog) in enumerate(several):
            write(root, method, seed, noise, fog)
            write(root, method, seed, 0.9, 0, "clean")
    for seed in range(3):
        write(root, "neo_raw", seed, 0.3, 0.5 + seed / 10)
        write(root, "neo_raw", seed, 0.8, 0, "clean", background=(0.7, 0.8, 0.9)[seed])
        write(root, "neo", seed, 0.5, 0.6)
        write(root, "neo", seed, 0.9 + seed / 1000, 0, "clean")


def test_each_number_is_that_of_the_reports(tmp_path):
    make(tmp_path)
    text = script.main([str(tmp_path), "--hardware", "an abacus", "--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {line[0]: [cell.strip() for cell in line[1:]] for line in lines}
    norm = [100 * (noise + fog) / 2 for noise, fog in VALUES["norm"]]
    mean = sum(norm) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in norm) / 2)
    assert rows["`norm`"][0] == f"{mean:.1f} ± {spread:.1f}"
    gains = [value - 50 for value in norm]  # of the source in each seed
    half = 4.302653 * spread / math.sqrt(3)
    assert sum(gains) / 3 > half  # so that it is bold
    assert rows["`norm`"][1] == f"**{sum(gains) / 3:+.1f} ± {half:.1f}**"
    assert rows["`norm`"][3] == f"{50 + mean / 2:.1f} ± {spread / 2:.1f}"
    assert rows["`norm`"][4] == "90.0 ± 0.0"
    assert rows["noise"] == ["40.0", "70.0", "50.0", "30.0"]  # in the order of the configuration
    assert "`norm` is worse than the source, in the mean over seeds, under: none." in text
    assert "(90.0 to 70.0; 90.0 to 80.0; 90.0 to 90.0)" not in text  # it does not fall in every seed
    for words in ("an abacus", "torch 2.0", "severity 3", "3 seeds.", "40 scenes of each domain in batches of 8"):
        assert words in text
    assert "No result yet: `configs/angles/benchmark.yaml`." in text
    assert "`tent` (iid, seed 0)" in text.partition("Not run yet")[2]
    assert "`neo_raw`" not in text.partition("Not run yet")[2].splitlines()[0]


def test_why_neo_loses_is_said_where_it_is_so(tmp_path):
    make(tmp_path)
    for report in tmp_path.rglob("clean/neo_raw-seed2*/report.json"):
        content = json.loads(report.read_text())
        report.write_text(json.dumps({**content, "class_iou": [0.85, 0.0]}))
    (source,) = tmp_path.rglob("clean/source-seed1*/report.json")
    source.write_text(json.dumps({**json.loads(source.read_text()), "class_iou": [0.9, 0.0]}))
    text = script.page(script.read_runs([tmp_path]), "none")
    assert "(90.0 to 70.0; 90.0 to 80.0; 90.0 to 85.0)" in text
    assert "change by 0.2 points at most" in text
    assert "had not found them: `disk` (seed 1)" in text


def test_a_page_of_runs_that_are_not_finished(tmp_path):
    """NEO's raw form was run and `neo` not yet; of `norm` under noise a seed that its source lacks says nothing."""
    make(tmp_path)
    for folder in [*tmp_path.rglob("neo-seed*"), *tmp_path.rglob("iid/source-seed2*")]:
        shutil.rmtree(folder)
    for report in [*tmp_path.rglob("clean/neo_raw-seed*/report.json")]:
        report.write_text(json.dumps({**json.loads(report.read_text()), "class_iou": [0.5, 0.0]}))
    (norm,) = tmp_path.rglob("iid/norm-seed2*/report.json")
    content = json.loads(norm.read_text())
    norm.write_text(json.dumps({**content, "domains": {"noise": {"mean_iou": 0.0}, "fog": {"mean_iou": 0.99}}}))
    for seed in range(2):
        (report,) = tmp_path.rglob(f"iid/norm-seed{seed}*/report.json")
        content = json.loads(report.read_text())
        content["domains"]["fog"]["mean_iou"] = 0.45
        report.write_text(json.dumps(content))
    text = script.page(script.read_runs([tmp_path]), "none")
    assert "(90.0 to 50.0; 90.0 to 50.0; 90.0 to 50.0)" in text
    assert "points at most" not in text
    assert "in the mean over seeds, under: fog." in text


def test_what_the_page_cannot_be_made_of(tmp_path):
    with pytest.raises(DataError, match="No finished run"):
        script.read_runs([tmp_path])
    write(tmp_path, "source", 0, 0.5, 0.5)
    write(tmp_path / "again", "source", 0, 0.5, 0.5, name="bbbbbbbb")
    with pytest.raises(DataError, match="has two results"):
        script.read_runs([tmp_path])
    write(tmp_path / "b", "tent", 0, 0.5, 0.5, digest="other")
    with pytest.raises(DataError, match="another protocol"):
        script.read_runs([tmp_path / "shapes", tmp_path / "b"])
    write(tmp_path / "c", "memo", 0, 0.5, 0.5)
    with pytest.raises(DataError, match="no such method or stream"):
        script.read_runs([tmp_path / "c"])
    other = write(tmp_path / "d", "source", 0, 0.5, 0.5)
    other.rename(other.parent / "mine")
    with pytest.raises(DataError, match="no cell of configs/shapes"):
        script.read_runs([tmp_path / "d"])


def test_a_regression_has_errors_and_no_classes(tmp_path):
    for seed in range(2):
        for method, error in (("source", 13.0 + seed), ("norm", 15.0 + seed)):
            for stream in ("iid", "clean"):
                directory = tmp_path / "angles/benchmark/cells/resnet" / stream / f"{method}-seed{seed}-aaaaaaaa"
                directory.mkdir(parents=True)
                protocol = {"hash": f"{stream}{seed}", "severity": 3, "images_per_domain": [54], "batch_size": 64}
                report = {
                    "method": method,
                    "protocol": protocol,
                    "environment": {"torch": "2.0"},
                    "domains": {"noise": {"mean_absolute_error": error}},
                    "mean_absolute_error": error,
                    "r2": 0.5,
                }
                (directory / "report.json").write_text(json.dumps(report))
    text = script.main([str(tmp_path), "--hardware", "an abacus", "--out", str(tmp_path / "page.md")])
    assert "| `source` | 13.50 ± 0.71 |" in text
    assert "`norm` is worse than the source, in the mean over seeds, under: noise." in text
