"""Files that cannot be read in a run: one image each, by name; and what the files of a run say of images."""

import csv
import json
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from data.test_image_files import broken_files
from data.test_unlabelled import write
from lightning_tta import (
    ConfigError,
    DataError,
    FolderData,
    ImageFolderData,
    StateKeeper,
    StreamInput,
    StreamReport,
    TestTimeAdaptation,
)
from lightning_tta.methods import Tent
from lightning_tta.report.terminal import print_report


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def run(root, data, skip=True, **options):
    module = TestTimeAdaptation(lambda model: Tent(model, lr=0.1), backbone=net(), **options)
    callbacks = [StreamInput("skip" if skip else "raise"), StateKeeper(resume="restart")]
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "callbacks": callbacks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(default_root_dir=root, **quiet).predict(module, datamodule=data)
    return results(root)


def results(root):
    (table,) = root.glob("*/predictions.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    report = table.with_name("report.json")
    return rows, json.loads(report.read_text()) if report.exists() else None


@pytest.fixture
def photos(tmp_path):
    for number in range(6):
        write(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.mark.parametrize("corrupted", [False, True])
def test_each_broken_file_is_one_skipped_image(photos, tmp_path, corrupted):
    options = {"batch_size": 4, "image_size": 32, "domains": ["images", "haze"] if corrupted else None}
    whole, _ = run(tmp_path / "whole", ImageFolderData(str(photos), **options))
    broken = set(broken_files(photos)) - {"gone.webp"}
    rows, report = run(tmp_path / "some", ImageFolderData(str(photos), **options))
    domains = 2 if corrupted else 1
    assert len(rows) == domains * (6 + len(broken))
    skipped = [row["file"] for row in rows if row["prediction"] == "-1"]
    assert sorted(skipped) == sorted([*broken] * domains)
    assert (report["images"], report["skipped_images"], report["accuracy"]) == (6 * domains, len(skipped), None)
    assert all(0 <= int(row["prediction"]) < 3 for row in rows if row["file"] not in broken)
    first = [row for row in rows[:4] if row["prediction"] != "-1"]
    assert [row["entropy"] for row in first] == [row["entropy"] for row in whole[: len(first)]]  # tent: before its step


def test_the_rest_of_its_batch_adapts_as_without_it(photos, tmp_path):
    whole, _ = run(tmp_path / "whole", ImageFolderData([str(photos / f"{n}.png") for n in (0, 1, 3, 4)], batch_size=2))
    (photos / "2.png").write_bytes(b"broken")
    names = [str(photos / f"{n}.png") for n in (0, 1, 2, 3, 4)]
    rows, report = run(tmp_path / "some", ImageFolderData(names, batch_size=5))
    alone, _ = run(tmp_path / "alone", ImageFolderData([*names[:2], *names[3:]], batch_size=5))
    keys = ("prediction", "confidence", "entropy", "file")
    kept = [[row[key] for key in keys] for row in rows if row["file"] != "2.png"]
    assert kept == [[row[key] for key in keys] for row in alone]
    assert [rows[2][key] for key in keys] == ["-1", "0", "0", "2.png"]
    assert (report["batches"], report["skipped_batches"], report["skipped_images"]) == (1, 0, 1)
    assert report["domains"]["images"]["images"] == 4
    assert len(whole) == 4


def test_a_batch_of_broken_files_is_a_skipped_batch(photos, tmp_path):
    for number in (2, 3):
        (photos / f"{number}.png").write_bytes(b"")
    rows, report = run(tmp_path / "run", ImageFolderData(str(photos), batch_size=2))
    assert [row["file"] for row in rows if row["prediction"] == "-1"] == ["2.png", "3.png"]
    assert (report["skipped_batches"], report["skipped_images"], report["images"]) == (1, 2, 4)


def test_without_skip_the_error_names_the_file_and_what_came_before_is_kept(photos, tmp_path):
    (photos / "3.png").unlink()
    (photos / "3.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"3\.png: it is a broken link.*--input.on_bad_batch skip"):
        run(tmp_path / "run", ImageFolderData(str(photos), batch_size=2), skip=False)
    rows, report = results(tmp_path / "run")
    assert [row["file"] for row in rows] == ["0.png", "1.png"]
    assert report is None


@pytest.mark.parametrize("domains", [None, ["clean", "contrast"]])
def test_folders_with_classes_too(tmp_path, domains):
    for number in range(6):
        write(tmp_path / "data" / "test" / ("cat", "ant")[number % 2] / f"{number}.png", number)
    (tmp_path / "data" / "test" / "cat" / "2.png").write_bytes(b"broken")
    write(tmp_path / "data" / "test" / "ant" / "3.png", 3, size=(40, 40))  # of another size
    (tmp_path / "data" / "test" / "cat" / 'two\nlines, "x".png').write_bytes(b"")
    options = {"batch_size": 4, "domains": domains}
    rows, report = run(tmp_path / "run", FolderData(str(tmp_path / "data"), **options))
    skipped = {row["file"] for row in rows if row["prediction"] == "-1"}
    assert skipped == {"test/cat/2.png", "test/ant/3.png", 'test/cat/two\\nlines, "x".png'}
    assert report["skipped_images"] == 3 * (2 if domains else 1)
    names = {row["class"] for row in rows if row["prediction"] != "-1"}
    assert names <= {"ant", "cat", ""}
    assert 0 <= report["accuracy"] <= 1
    with pytest.raises(DataError, match=r"(2|3|x).*png.*--input.on_bad_batch skip"):
        run(tmp_path / "strict", FolderData(str(tmp_path / "data"), **options), skip=False)
    assert not list((tmp_path / "strict").rglob("predictions.csv"))  # read before the stream: nothing is written


def test_class_names_and_old_columns(photos, tmp_path):
    rows, _ = run(tmp_path / "run", ImageFolderData(str(photos), class_names=["cat", "dog", "emu"]))
    assert list(rows[0]) == ["index", "domain", "label", "prediction", "confidence", "entropy", "file", "class"]
    assert all(row["class"] == ["cat", "dog", "emu"][int(row["prediction"])] for row in rows)
    model = net()
    model.class_names = ["x", "y", "z"]  # a net may know them too
    module = TestTimeAdaptation(lambda model: Tent(model, lr=0.1), backbone=model, classes=[2, 0])
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
    Trainer(default_root_dir=tmp_path / "cut", **quiet).predict(module, datamodule=ImageFolderData(str(photos)))
    assert {row["class"] for row in results(tmp_path / "cut")[0]} <= {"z", "x"}
    trainer = Trainer(callbacks=[StreamReport(measure_forgetting=True)], **quiet)
    with pytest.raises(ConfigError, match="measure_forgetting needs clean source test images with labels"):
        trainer.predict(module, datamodule=ImageFolderData(str(photos)))


def test_accuracy_over_some_images_says_so(photos, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("0.png,a\n3.png,b\n")
    data = {"image_size": 32, "class_names": ["a", "b", "c"], "labels": str(tmp_path / "labels.csv")}
    rows, report = run(tmp_path / "run", ImageFolderData(str(photos), **data))
    right = [row["prediction"] == row["label"] for row in rows if row["label"] != "-1"]
    assert (report["labelled_images"], report["images"]) == (2, 6)
    assert report["accuracy"] == sum(right) / 2
    print_report(report, tmp_path)
    assert "accuracy: of the 2 images with labels, among 6" in capsys.readouterr().out
