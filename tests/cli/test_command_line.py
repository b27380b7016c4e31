"""The command line as users run it, in this process."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_tta.cli.main import main
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.methods import Tent, find

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DATA = ["--data", "DigitsData", "--data.domains", "[gaussian_noise]", "--data.num_images", "20"]
PREDICT = ["predict", "--model", "TestTimeAdaptation", *DATA]


def fails(capsys, args, *words):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_fit_leaves_best_last_and_curves(digits_source):
    names = {path.name for path in digits_source.rglob("*") if path.is_file()}
    assert {"best.ckpt", "last.ckpt", "config.yaml"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    (directory,) = (path.parent for path in digits_source.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(directory))
    events.Reload()
    accuracies = [event.value for event in events.Scalars("source/val_accuracy")]
    assert [event.value for event in events.Scalars("hp_metric")] == pytest.approx(
        accuracies[-1:]
    )  # and no placeholder
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    said = HParamsPluginData.FromString(start).session_start_info.hparams
    assert {"data", "backbone", "optimizer", "lr", "weight_decay"} <= set(said)
    assert not any(name.startswith("_") for name in said)


@pytest.mark.parametrize("method", ["Tent", str(CONFIGS / "methods/zerosiam.yaml")])
def test_predict(digits_source, tmp_path, method):
    main(
        [
            *PREDICT,
            f"--model.source_ckpt={digits_source}",
            f"--model.method={method}",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    (report,) = tmp_path.rglob("report.json")
    content = json.loads(report.read_text())
    assert content["images"] == 20
    assert content["method"] in ("tent", "zerosiam")
    resolved = yaml.safe_load((report.parent / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["method"]["class_path"].endswith(("Tent", "ZeroSiam"))


def test_test_command_restores_the_checkpoint(digits_source, capsys):
    (checkpoint,) = digits_source.rglob("best.ckpt")
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["test", "--config", str(CONFIGS / "digits/source.yaml"), f"--ckpt_path={checkpoint}", *quiet])
    assert "source/test_accuracy" in capsys.readouterr().out


def test_ckpt_path_of_another_class_is_refused(digits_source, capsys):
    (checkpoint,) = digits_source.rglob("best.ckpt")
    args = [*PREDICT, "--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.method=Tent"]
    fails(capsys, [*args, f"--ckpt_path={checkpoint}"], "SourceClassifier", "--model.source_ckpt")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.method=Tnet"], ["Tnet"]),
        (["--model.method=Tent", "--model.method.lr=-1"], ["lr", "-1"]),
        (["--model.method=Tent", "--model.method.rate=1"], ["rate"]),
        (["--model.method=Tent", "--model.source_ckpt=nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--model.method=Tent", "--model.reset=often"], ["often"]),
        (["--model.method=Tent", "--model.backbone=cifar/resnet21"], ["resnet21", "resnet20"]),
        (["--model.method=Tent", "--data.severity=9"], ["severity", "9"]),
        (["--model.method=Tent", "--data.stream=sorted"], ["sorted"]),
        (["--model.method=Tent", "--data.domains=[fog9]"], ["fog9"]),
        (["--model.method=Tent", "--data.colour=1"], ["colour"]),
    ],
)
def test_wrong_configuration_fails_before_data_is_read(monkeypatch, capsys, args, words):
    def read(size):
        raise AssertionError("data was read")

    monkeypatch.setattr("lightning_tta.data.sets.digits._load", read)
    fails(capsys, [*PREDICT, "--model.source_ckpt=none", "--model.backbone=cifar/resnet20", *args], *words)


@pytest.mark.slow
def test_meta_training_on_domain_folders_and_adaptation_to_the_one_left_out(tmp_path):
    for number, domain in enumerate(("art", "photo", "sketch")):
        for label in range(7):
            folder = tmp_path / "pacs" / domain / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 36), (90 * number, 30 * label, 40 * i)).save(folder / f"{i}.png")
    data = [f"--data.root={tmp_path / 'pacs'}", "--data.image_size=32", "--data.num_workers=0"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]

    def save(name):
        return [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.logger.init_args.name={name}"]

    short = ["--trainer.max_epochs=1", "--data.train_batch_size=8", *data, *quiet]
    tiny = ["--model.backbone=timm/test_resnet", "--model.pretrained=false"]
    main(["fit", f"--config={CONFIGS / 'pacs/source.yaml'}", *short, *tiny, *save("source")])
    start = f"--model.source_ckpt={tmp_path / 'source'}"
    main(["fit", f"--config={CONFIGS / 'pacs/meta_ttt.yaml'}", start, *short, *save("meta")])
    (checkpoint,) = (tmp_path / "meta").rglob("best.ckpt")
    resumed = [f"--config={CONFIGS / 'pacs/meta_ttt.yaml'}", start, *short, *save("again"), f"--ckpt_path={checkpoint}"]
    for command in ("validate", "test", "fit"):
        main([command, *resumed, *(["--trainer.max_epochs=2"] if command == "fit" else [])])
    predict = ["predict", f"--config={CONFIGS / 'pacs/predict.yaml'}", *data, *quiet, *save("predict")]
    main([*predict, f"--model.source_ckpt={tmp_path / 'meta'}", "--model.method=MetaTTT"])
    (report,) = (tmp_path / "predict").rglob("report.json")
    content = json.loads(report.read_text())
    assert list(content["domains"]) == ["sketch"]
    assert content["images"] == 28
    assert content["backwards"] == 2


def test_random_weights_are_said_aloud(tmp_path, capsys):
    place = ["--trainer.enable_progress_bar=true", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    small = ["--data.domains=[clean]", "--data.num_images=4", "--trainer.accelerator=cpu"]
    net = ["--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.num_classes=10"]
    with pytest.warns(UserWarning, match="randomly initialised"):
        main([*PREDICT, "--model.method=Source", *net, *small, *place])
    text = capsys.readouterr().out
    assert "randomly initialised" in text
    assert "batch size" in text  # the protocol


WRITTEN = {  # a method by its short name, with options, as people and benchmarks write it
    "flow": "{class_path: Tent, init_args: {lr: 0.25}}",
    "json": '{"class_path": "Tent", "init_args": {"lr": 0.25}}',
    "dict": {"class_path": "Tent", "init_args": {"lr": 0.25}},
}


@pytest.mark.parametrize("method", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(
    ("model", "data"), [("TestTimeAdaptation", "DigitsData"), ("LanguageAdaptation", "PromptData")]
)
def test_a_method_with_options_may_have_its_short_name(model, data, method):
    if isinstance(method, dict):
        options = {"source_ckpt": "none", "method": method}
        classes = {
            "model": {"class_path": f"lightning_tta.{model}", "init_args": options},
            "data": {"class_path": data},
        }
        args = {"subcommand": "predict", "predict": classes}
    else:
        args = ["predict", f"--model={model}", "--model.source_ckpt=none", f"--data={data}", f"--model.method={method}"]
    given = run_lightning(args, parse_only=True).config["predict"]["model"]["init_args"]["method"]
    assert find(given["class_path"].rpartition(".")[2]) is Tent
    assert given["init_args"]["lr"] == 0.25
