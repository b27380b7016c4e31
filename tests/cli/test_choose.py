"""``lightning-tta choose``: what it writes can be run, and what is wrong is said before anything runs."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_tta.choosing.choice import Choice
from lightning_tta.cli.choose import of_predict, read_candidates, read_labels, table
from lightning_tta.cli.main import main
from lightning_tta.errors import ConfigError, DataError
from lightning_tta.launch.lightning import check_configurations

CONFIG = Path(__file__).parents[2] / "configs/digits/predict.yaml"


@pytest.mark.usefixtures("one_thread")
def test_writes_what_predict_takes(digits_source, tmp_path, capsys):
    output = tmp_path / "new/choice"
    given = [
        f"--config={CONFIG}",
        f"--model.source_ckpt={digits_source}",
        "--data.batch_size=16",
        "--data.num_images=64",
        "--trainer.accelerator=cpu",
    ]
    candidates = "--candidates=[{method: tent, lr: 1e-3, statistics: auto, reset_every: 5}, eata]"
    main(["choose", *given, candidates, "--labels=20", f"--output={output}"])
    said = capsys.readouterr().out
    content = json.loads((output / "choice.json").read_text())
    assert content["why"] in said
    assert f"predict --config {output}/predict.yaml" in said
    names = [each["name"] for each in content["candidates"]]
    assert names == ["source", "tent (lr 0.001, statistics auto, reset_every 5)", "eata"]
    assert not any(each["problem"] for each in content["candidates"])  # EATA was shown the data's training images
    assert all("labels_won" in each["scores"] for each in content["candidates"])
    written = yaml.safe_load((output / "predict.yaml").read_text())
    method = written["model"]["init_args"]["method"]
    assert method == yaml.safe_load((output / "method.yaml").read_text())
    assert method["class_path"].rpartition(".")[0].endswith(f".{content['method']}")
    (config,) = check_configurations([["predict", f"--config={output / 'predict.yaml'}"]])
    assert config.data.init_args.batch_size == 16
    other = ["predict", *given, f"--model.method={output / 'method.yaml'}"]
    (config,) = check_configurations([other])
    assert config.model.init_args.method.class_path.rpartition(".")[2] == method["class_path"].rpartition(".")[2]

    with pytest.raises(SystemExit):
        main(["choose", *given, f"--output={output}"])
    assert "has a choice already" in capsys.readouterr().err


def test_options_go_where_predict_has_them():
    options = {"lr": 0.001, "statistics": {"kind": "ema", "momentum": 0.1}, "reset_every": 5}
    method, further = of_predict(Choice("tent", "tent", options, 1.0, "", [], 0, 0, []))
    assert method == {"class_path": "lightning_tta.methods.tent.Tent", "init_args": {"lr": 0.001}}
    assert further == {"statistics": {"kind": "ema", "momentum": 0.1}, "reset_every": 5}
    flags = ["--model.source_ckpt=none", "--model.backbone=timm/test_resnet", "--data=DigitsData"]
    flags += [f"--model.{name}={json.dumps(value)}" for name, value in further.items()]
    (config,) = check_configurations([["predict", "--model.method=tent", *flags]])
    assert config.model.init_args.reset_every == 5


def test_candidates_and_labels_are_read(tmp_path):
    assert read_candidates("default") == ["default"]
    assert read_candidates("tent, zerosiam") == ["tent", "zerosiam"]
    listed = "[tent, {method: eta, lr: 1e-3, statistics: {kind: ema, momentum: 5e-2}}]"
    expected = ["tent", {"method": "eta", "lr": 0.001, "statistics": {"kind": "ema", "momentum": 0.05}}]
    assert read_candidates(listed) == expected
    (tmp_path / "c.yaml").write_text(listed)
    assert read_candidates(str(tmp_path / "c.yaml")) == expected
    with pytest.raises(ConfigError, match="no YAML"):
        read_candidates("[tent")
    (tmp_path / "l.csv").write_text("index,label\n4,2\n7,0\n")
    assert read_labels(str(tmp_path / "l.csv")) == {4: 2, 7: 0}
    assert (read_labels(None), read_labels("50")) == (None, 50)
    with pytest.raises(ConfigError, match="neither"):
        read_labels("some")
    (tmp_path / "l.csv").write_text("image,label\n4,2\n")
    with pytest.raises(DataError, match="index and label"):
        read_labels(str(tmp_path / "l.csv"))
    (tmp_path / "l.csv").write_text("index,label\n4,2\n7,0\n4,3\n")
    with pytest.raises(DataError, match="index 4 is there more than once"):
        read_labels(str(tmp_path / "l.csv"))


def test_the_table_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    score = {"evenness": 0.8, "steadiness": 1.0, "order": 0.0, "agreement_source": 1.0, "aetta": 0.5}
    name = "tent (lr 0.001, statistics auto, reset_every 50)"
    rows = [{"name": name, "scores": score, "problem": "", "passes": 9}]
    rows += [{"name": "eata", "scores": {}, "problem": "needs source images", "passes": 0}]
    lines = table(Choice(name, "tent", {}, 1.0, "", rows, 0, 0, ["the budget lasts for 4 of 8 batches"])).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["passes", "evenness", "steadiness", "order", "agreement_source", "candidate"]
    assert lines[1].split()[:7] == ["9", "0.800", "1.000", "0.000", "1.000", "*", "tent"]
    assert " ".join(" ".join(lines).split()).endswith(
        "0 eata: needs source images ! the budget lasts for 4 of 8 batches"
    )


def test_what_is_wrong_is_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for args, words in (
        ([], "--data"),
        (["--data=DigitsData"], "No source weights"),
        (["--budget=some"], "--budget"),
        (["--labels=some", "--data=DigitsData"], "--labels"),
        (["--candidates=none.yaml", "--data=DigitsData"], "it cannot be read"),
        (["--candidates=.yaml/c.yaml", "--data=DigitsData"], "it cannot be read"),
        (["--output=file", "--data=DigitsData"], "is a file"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["choose", *args])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    main(["choose", "--help"])
    assert "--candidates" in capsys.readouterr().out
