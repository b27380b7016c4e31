"""A whole predict run through a real Trainer: what adapts, what is seen, what is written."""

import csv
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_tta import ConfigError, DigitsData, FinishedError, TestTimeAdaptation, WeightsError, adapt
from lightning_tta.methods import Source, Tent
from lightning_tta.run.batches import StreamInput
from nets import make_net
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
DOMAINS = ["gaussian_noise", "contrast"]
TENT = partial(Tent, lr=1e-2)


def data(**options):
    return DigitsData(**{"domains": DOMAINS, "num_images": 40, "batch_size": 16, **options})


def net():
    return make_net("bn", num_classes=10)


def run(root, method=TENT, *, module=None, data_options=None, trainer_options=None, logger=False):
    module = module or TestTimeAdaptation(method, backbone=net())
    options = {"accelerator": "cpu", "logger": logger, "enable_progress_bar": False, "default_root_dir": root}
    trainer = Trainer(**options, **(trainer_options or {}))
    outputs = trainer.predict(module, datamodule=data(**(data_options or {})))
    return module, outputs


def logits_of(outputs):
    return torch.cat([output["logits"] for output in outputs])


class Spy(Source):
    """Notes what it is given and when it is reset."""

    def __init__(self, model):
        super().__init__(model)
        self.seen, self.resets = [], 0

    def forward(self, images):
        self.seen.append(images)
        return super().forward(images)

    def reset(self):
        self.resets += 1
        super().reset()


def test_default_trainer_adapts_as_the_method_alone_does(tmp_path):
    module, outputs = run(tmp_path)  # inference_mode is on by default
    alone, expected, last = adapt(net(), "tent", lr=1e-2), [], 0
    stream = data()
    stream.setup("predict")
    for batch in stream.predict_dataloader():
        if int(batch["domain"][0]) != last:
            alone.reset()
        last = int(batch["domain"][0])
        expected.append(alone(batch["image"]))
    assert torch.equal(logits_of(outputs), torch.cat(expected))
    for name, tensor in module.method.adaptable.items():
        assert torch.equal(tensor, alone.adaptable[name])
        assert not torch.equal(tensor, module.method.source_value(name))
    _, again = run(tmp_path / "b", trainer_options={"inference_mode": False})
    assert torch.equal(logits_of(again), logits_of(outputs))


def test_shuffled_labels_change_no_logit(tmp_path, monkeypatch):
    _, outputs = run(tmp_path)
    step = TestTimeAdaptation.predict_step

    def shuffled(self, batch, batch_idx):
        return step(self, {**batch, "label": batch["label"].roll(3)}, batch_idx)

    monkeypatch.setattr(TestTimeAdaptation, "predict_step", shuffled)
    _, others = run(tmp_path / "b")
    assert torch.equal(logits_of(others), logits_of(outputs))
    assert not torch.equal(others[0]["label"], outputs[0]["label"])


def test_method_gets_images_only(tmp_path):
    module, _ = run(tmp_path, Spy)
    assert len(module.method.seen) == 6
    assert all(isinstance(images, torch.Tensor) and images.shape[1:] == (3, 32, 32) for images in module.method.seen)


@pytest.mark.parametrize(
    ("reset", "stream", "expected"),
    [
        ("never", "iid", 0),
        ("domain", "iid", 1),
        ("batch", "iid", 5),
        ("auto", "iid", 1),
        ("auto", "label_shift", 1),
        ("auto", "continual", 0),
        ("auto", "mixed", 0),
    ],
)
def test_reset_policies(tmp_path, reset, stream, expected):
    module = TestTimeAdaptation(Spy, backbone=net(), reset=reset)
    run(tmp_path, module=module, data_options={"stream": stream})
    assert module.method.resets == expected
    assert json.loads((directory_of(tmp_path) / "report.json").read_text())["resets"] == expected


def test_mixed_stream_has_no_domain_boundaries(tmp_path):
    module = TestTimeAdaptation(Spy, backbone=net(), reset="domain")
    with pytest.raises(ConfigError, match="mixed"):
        run(tmp_path, module=module, data_options={"stream": "mixed"})


def test_files(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="x")
    _, outputs = run(tmp_path, logger=logger)
    directory = tmp_path / "run" / "x"
    report = json.loads((directory / "report.json").read_text())
    rows = list(csv.DictReader((directory / "predictions.csv").open()))
    assert sorted(int(row["index"]) for row in rows) == list(range(80))
    assert [int(row["prediction"]) for row in rows] == logits_of(outputs).argmax(1).tolist()
    for name in DOMAINS:
        here = [row for row in rows if row["domain"] == name]
        accuracy = sum(row["label"] == row["prediction"] for row in here) / len(here)
        assert report["domains"][name]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    accuracy = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert report["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert report["method"] == "tent"
    assert (report["forwards"], report["backwards"], report["batches"]) == (6, 6, 6)
    assert report["protocol"]["reset"] == "domain"
    assert len(report["protocol"]["hash"]) == 12
    assert report["seconds"] == pytest.approx(6 * report["seconds_per_batch"])
    batches = [json.loads(line) for line in (directory / "batches.jsonl").read_text().splitlines()]
    assert [batch["images_seen"] for batch in batches] == [16, 32, 40, 56, 72, 80]
    assert batches[-1]["accuracy_so_far"] == pytest.approx(accuracy)
    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()["scalars"]
    for measure in ("accuracy", "entropy", "loss", "largest_class_share", "logit_norm"):
        assert f"adapt/{measure}" in tags
    assert [scalar.step for scalar in events.Scalars("adapt/loss")] == [16, 32, 40, 56, 72, 80]


def test_same_protocol_for_every_method_and_another_for_another_order(tmp_path):
    hashes = []
    for number, (method, options) in enumerate([(TENT, {}), (Source, {}), (Source, {"order_seed": 1})]):
        module, _ = run(tmp_path / str(number), method, data_options=options)
        hashes.append(module.run.protocol.hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_finished_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = (directory_of(tmp_path) / "predictions.csv").read_text()
    with pytest.raises(FinishedError, match="is finished"):
        run(tmp_path)
    assert (directory_of(tmp_path) / "predictions.csv").read_text() == before


def test_broken_images_and_missing_labels(tmp_path, monkeypatch):
    step = TestTimeAdaptation.predict_step

    def broken(self, batch, batch_idx):
        image = batch["image"].clone()
        if batch_idx == 1:
            image[0, 0, 3, 3] = float("nan")
        if batch_idx == 2:
            image[:] = float("inf")
        return step(self, {"image": image, "index": batch["index"], "domain": batch["domain"]}, batch_idx)

    monkeypatch.setattr(TestTimeAdaptation, "predict_step", broken)
    module, outputs = run(tmp_path)
    report = json.loads((directory_of(tmp_path) / "report.json").read_text())
    assert report["nonfinite_images"] == 1 + 8
    rows = list(csv.DictReader((directory_of(tmp_path) / "predictions.csv").open()))
    assert [number for number, row in enumerate(rows) if row["prediction"] == "-1"] == [16, *range(32, 40)]
    assert report["images"] == len(rows)  # they count as images, and as right in no accuracy
    assert report["accuracy"] is None
    assert torch.isfinite(logits_of(outputs)).all()
    assert all(torch.isfinite(tensor).all() for tensor in module.method.adaptable.values())


def test_a_crash_leaves_what_was_predicted(tmp_path, monkeypatch):
    step = TestTimeAdaptation.predict_step

    def crash(self, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("camera unplugged")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TestTimeAdaptation, "predict_step", crash)
    with pytest.raises(RuntimeError, match="unplugged"):
        run(tmp_path)
    directory = directory_of(tmp_path)
    assert len(list(csv.DictReader((directory / "predictions.csv").open()))) == 40
    assert not (directory / "report.json").exists()


def test_bfloat16_autocast(tmp_path):
    _, plain = run(tmp_path)
    module, outputs = run(tmp_path / "b", trainer_options={"precision": "bf16-mixed"})
    logits = logits_of(outputs)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits_of(plain))
    assert torch.allclose(logits, logits_of(plain), atol=0.3)
    assert all(tensor.dtype == torch.float32 for tensor in module.method.adaptable.values())


@pytest.mark.parametrize("trainers", ["32-true", "bf16-mixed"])
def test_bf16_of_the_method_is_that_of_the_trainer(tmp_path, trainers):
    _, expected = run(tmp_path / "trainer", trainer_options={"precision": "bf16-mixed"})
    module = TestTimeAdaptation(TENT, backbone=net(), precision="bf16")
    module, outputs = run(tmp_path / "method", module=module, trainer_options={"precision": trainers})
    assert torch.equal(logits_of(outputs), logits_of(expected))
    report = json.loads((module.run.directory.path / "report.json").read_text())
    assert report["precision"] == "bf16"


@pytest.mark.parametrize(
    ("precision", "trainers", "goes"),
    [
        ("exact", "bf16-mixed", "32-true or 64-true"),
        ("tf32", "bf16-true", "32-true"),
        ("bf16", "bf16-true", "32-true or bf16-mixed"),
        ("bf16", "64-true", "32-true or bf16-mixed"),
    ],
)
def test_contradictory_precisions_are_refused(tmp_path, precision, trainers, goes):
    module = TestTimeAdaptation(TENT, backbone=net(), precision=precision)
    words = f"--model.precision {precision} and --trainer.precision {trainers} contradict.*precision {goes};"
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, module=module, trainer_options={"precision": trainers})
    assert not any(tmp_path.iterdir())


def test_predict_after_the_step(tmp_path):
    module = TestTimeAdaptation(TENT, backbone=net(), predict="after")
    _, outputs = run(tmp_path, module=module)
    alone = adapt(net(), "tent", lr=1e-2)
    stream = data()
    stream.setup("predict")
    batch = next(iter(stream.predict_dataloader()))
    before = alone(batch["image"])
    assert torch.equal(outputs[0]["logits"], alone.predict(batch["image"], statistics="batch"))
    assert not torch.equal(outputs[0]["logits"], before)


def test_channels_last_reaches_the_net(tmp_path):
    seen = []
    module = TestTimeAdaptation(TENT, backbone=net())
    module.method.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    _, outputs = run(tmp_path, module=module, trainer_options={"callbacks": [StreamInput(channels_last=True)]})
    assert all(stride[1] == 1 for stride in seen)
    _, plain = run(tmp_path / "plain")
    assert torch.allclose(logits_of(outputs), logits_of(plain), atol=1e-3)


def test_weights_are_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="source_ckpt"):
        TestTimeAdaptation(TENT, backbone="cifar/resnet20")
    with pytest.raises(WeightsError, match="does not exist"):
        TestTimeAdaptation(TENT, source_ckpt=str(tmp_path / "none.ckpt"))
    with pytest.raises(WeightsError, match=r"no best\.ckpt"):
        TestTimeAdaptation(TENT, source_ckpt=str(tmp_path))
    with pytest.raises(ConfigError, match="reset"):
        TestTimeAdaptation(TENT, backbone=net(), reset="sometimes")


def test_corrections_of_the_predictions_are_options_of_the_run(tmp_path):
    prior = {"kind": "em", "window": 20}
    module = TestTimeAdaptation(Tent, backbone=net(), prior=prior, refine="cofa")
    _, outputs = run(tmp_path, module=module)
    report = json.loads((directory_of(tmp_path) / "report.json").read_text())
    assert (report["options"]["prior"], report["options"]["refine"]) == (prior, "cofa")
    plain = TestTimeAdaptation(Tent, backbone=net())
    assert not torch.equal(logits_of(run(tmp_path / "plain", module=plain)[1]), logits_of(outputs))
