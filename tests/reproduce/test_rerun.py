"""Claims from end to end, on files in the published layouts."""

import json

import pytest
import torch

import published
from lightning_tta import create_backbone
from lightning_tta.benchmark.runner import Benchmark
from lightning_tta.cli.main import main
from lightning_tta.errors import WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--net=timm/test_resnet", "--images=8", "--workers=0", "--trainer={accelerator: cpu}"]


def run(name, tmp_path, *args):
    main(["reproduce", name, f"--root={tmp_path / 'data'}", f"--output={tmp_path / 'runs'}", *args])
    return json.loads((tmp_path / "runs" / name / "reproduce.json").read_text())


def test_the_list_and_what_one_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # from any directory
    main(["reproduce"])
    assert "zerosiam" in (text := capsys.readouterr().out)
    assert "label_shift, label_shift_eata" in text
    main(["reproduce", "tent", f"--root={tmp_path}", "--check=true", "--rows=tent"])
    text = capsys.readouterr().out
    assert "0 of 1 rows can run" in text
    assert "56bf5dcef84df0e2308c6dcbcbbd8499" in text  # of CIFAR-10-C
    assert "--weights.wrn_28_10 FILE" in text
    assert not (tmp_path / "runs").exists()


def test_where_nothing_is_there_each_part_is_a_line(tmp_path, capsys):
    result = run("eata", tmp_path)
    text = capsys.readouterr().out
    assert f"CIFAR-10-C: {tmp_path / 'data'}/CIFAR-10-C/labels.npy is not there" in text
    assert "  missing, as above: ImageNet-C (" in text or "  missing, as above: ImageNet-C, ImageNet (" in text
    figures = sum(each["theirs"] is not None for each in result["parts"]["imagenet_c"]["comparisons"])
    assert f"imagenet_c: nothing ran: ImageNet-C, ImageNet (ILSVRC 2012) missing; its {figures} published" in text
    assert "theirs" not in text  # no table of dashes
    assert "| theirs |" in (tmp_path / "runs/eata/reproduce.md").read_text()


def test_tent_on_the_corruptions_that_are_there(tmp_path, capsys):
    published.cifar10_c(tmp_path / "data", ["fog", "frost"], 8)
    args = [*SMALL, "--only=cifar10_c", "--rows=source,tent"]
    result = run("tent", tmp_path, *args)
    assert "This is no reproduction" in capsys.readouterr().out
    assert (result["reproduction"], result["changed"]) == (False, {"net": "timm/test_resnet", "images": 8})
    assert list(result["parts"]) == ["cifar10_c"]
    part = result["parts"]["cifar10_c"]
    assert [(cell["method"], cell["stream"]) for cell in part["cells"]] == [("source", "ordered"), ("tent", "ordered")]
    verdicts = {(each["method"], each["domain"]): each for each in part["comparisons"]}
    assert len(verdicts) == 2 * 16
    assert verdicts["tent", "fog"]["verdict"] == "no reproduction"
    assert verdicts["tent", "fog"]["theirs"] == 13.7
    assert 0 <= verdicts["tent", "fog"]["ours"] <= 100
    assert verdicts["tent", "snow"]["verdict"] == "not run: snow missing"
    assert verdicts["tent", None]["verdict"].startswith("not run: gaussian_noise, shot_noise, impulse_noise and others")
    assert any("CIFAR-10-C/snow.npy is not there" in how for how in part["missing"].values())
    assert "**This is no reproduction" in (text := (tmp_path / "runs/tent/reproduce.md").read_text())
    assert "| wrn_28_10 | tent | fog | 13.70 |" in text
    assert "lightning-tta reproduce tent" in text

    reports = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("report.json")}
    assert len(reports) == 2
    again = run("tent", tmp_path, *args)  # nothing runs twice
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("report.json")} == reports
    assert again["parts"]["cifar10_c"]["comparisons"] == part["comparisons"]


def test_zerosiam_with_the_rates_of_its_net(tmp_path):
    published.imagenet_c(tmp_path / "data", ["contrast"], classes=2)
    result = run("zerosiam", tmp_path, *SMALL, "--rows=label_shift/resnet50_gn/zerosiam")
    (cell,) = result["parts"]["label_shift"]["cells"]
    report = json.loads((tmp_path / "runs/zerosiam/label_shift" / cell["directory"] / "report.json").read_text())
    assert (report["options"]["lr"], report["options"]["predictor_lr"]) == (2.5e-3, 2.5e-2)
    protocol = report["protocol"]
    assert (protocol["stream"], protocol["reset"], protocol["batch_size"]) == ("label_shift", "domain", 64)
    assert (protocol["severity"], protocol["function_set"], protocol["domains"]) == (5, "published", ["contrast"])
    (comparison,) = result["parts"]["label_shift"]["comparisons"]
    assert (comparison["theirs"], comparison["method"]) == (51.1, "zerosiam")
    assert comparison["verdict"].startswith("not run: gaussian_noise")  # its figure is a mean of fifteen


def test_a_run_that_changes_nothing_is_judged(tmp_path, monkeypatch, capsys):
    published.cifar10(tmp_path / "data", monkeypatch.setattr)
    torch.save(create_backbone("cifar/resnet26_gn").net.state_dict(), tmp_path / "weights.pth")
    args = ["--only=cifar10", "--rows=source", "--workers=0", "--trainer={accelerator: cpu}"]
    result = run("memo", tmp_path, *args, f"--weights.resnet26_gn={tmp_path / 'weights.pth'}")
    assert "no reproduction" not in capsys.readouterr().out
    assert result["reproduction"]
    (comparison,) = result["parts"]["cifar10"]["comparisons"]
    assert comparison["verdict"] == "outside"  # random weights
    assert comparison["difference"] == pytest.approx(comparison["ours"] - 9.17)
    assert comparison["over"] == "images"


def test_a_folder_that_is_no_class_is_found_before_anything_runs(tmp_path, capsys):
    published.imagenet_a(tmp_path / "data")
    next((tmp_path / "data/imagenet-a").iterdir()).rename(tmp_path / "data/imagenet-a/n99999999")
    run("cr_memo", tmp_path, *SMALL, "--only=imagenet_a")
    text = capsys.readouterr().out
    assert "damaged: ImageNet-A: " in text
    assert "n99999999" in text
    assert "nothing ran: ImageNet-A damaged" in text


def test_a_cell_that_fails_is_named_and_the_others_stay(tmp_path, capsys):
    published.imagenet_a(tmp_path / "data")
    *_, broken = sorted((tmp_path / "data/imagenet-a").rglob("*.JPEG"))
    broken.write_bytes(b"no image")  # the first would be found before anything runs
    with pytest.raises(SystemExit):
        run("cr_memo", tmp_path, *SMALL, "--only=imagenet_a", "--rows=*/resnet50/baseline")
    assert "failed" in (text := capsys.readouterr().err)
    assert broken.name in text
    assert "1 of 1 cells failed. The first" in text
    assert "Cells that did not run" in (tmp_path / "runs/cr_memo/reproduce.md").read_text()


def test_a_training_that_fails_is_said_and_the_other_parts_run(tmp_path, capsys, monkeypatch):
    def fails(self, source):
        raise WeightsError(f"no checkpoint of {source[0]}")

    monkeypatch.setattr(Benchmark, "_train", fails)
    published.pacs(tmp_path / "data")
    published.office_home(tmp_path / "data")
    with pytest.raises(SystemExit):
        run("meta_ttt", tmp_path, *SMALL, "--only=[pacs, office_home]", "--rows=*art*/source")
    said = capsys.readouterr()
    assert "failed: WeightsError: no checkpoint of source_art" in said.err
    result = json.loads((tmp_path / "runs/meta_ttt/reproduce.json").read_text())
    assert all(part["run"] and "no checkpoint" in part["skipped"][0]["reason"] for part in result["parts"].values())
