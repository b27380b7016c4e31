"""``lightning-tta doctor``: what it writes can be run, and is short."""

from pathlib import Path

import pytest
import yaml

from data.test_unlabelled import write
from lightning_tta import ImageFolderData, TestTimeAdaptation
from lightning_tta.cli.doctor import diagnose
from lightning_tta.cli.main import main
from lightning_tta.launch.lightning import check_configurations
from lightning_tta.methods import Source

CONFIG = Path(__file__).parents[2] / "configs/digits/predict.yaml"


def test_writes_a_configuration_that_predict_takes(digits_source, tmp_path, capsys):
    output = tmp_path / "new/start.yaml"
    given = [
        f"--config={CONFIG}",
        f"--model.source_ckpt={digits_source}",
        "--data.batch_size=32",
        "--state.save_every=7",
    ]
    main(["doctor", *given, f"--output={output}"])
    said = capsys.readouterr().out
    assert "BatchNorm2d" in said
    assert f"predict --config {output}" in said
    written = yaml.safe_load(output.read_text())
    assert written["model"]["init_args"] == {
        "source_ckpt": str(digits_source),
        "method": {"class_path": "lightning_tta.methods.eta.ETA"},
    }
    assert written["data"] == {"class_path": "lightning_tta.DigitsData", "init_args": {"batch_size": 32}}
    assert written["state"] == {"save_every": 7}
    assert written["trainer"]["logger"]["init_args"] == {"save_dir": "runs/digits", "name": "predict"}
    (config,) = check_configurations([["predict", f"--config={output}"]])
    assert config.data.init_args.batch_size == 32

    with pytest.raises(SystemExit):
        main(["doctor", *given, f"--output={output}"])
    assert "exists" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.png", number)
    (tmp_path / "1.png").write_bytes(b"no image")
    data = ImageFolderData(str(tmp_path), image_size=32)
    module = TestTimeAdaptation(Source, backbone="timm/test_resnet", num_classes=5, source_ckpt="none")
    assert diagnose(module, data).facts["images"].startswith("2 of 3x32x32")


def test_what_is_wrong_is_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, words in (
        ([], "--data"),
        (["--data=DigitsData"], "No source weights"),
        (["--data.batch_size=x"], "error"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["doctor", *args])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    main(["doctor", "--help"])
    assert "--output" in capsys.readouterr().out
