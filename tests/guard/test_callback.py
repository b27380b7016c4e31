"""The callback Guard in whole predict runs, and batches that cannot be used."""

import csv
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import soak
from lightning_tta import ConfigError, Guard, InputError, TestTimeAdaptation, Watch, adapt
from lightning_tta.guard.watch import WatchSettings
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.methods import Source, Tent
from lightning_tta.report.terminal import print_report
from lightning_tta.run.batches import StreamInput
from nets import make_images, make_net
from runs import directory_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]
TENT = partial(Tent, lr=1e-2)


class Sick(Tent):
    """Loses its parameters at its fourth batch."""

    batches = 0
    synchronized = False

    def step(self, images):
        logits = super().step(images)
        self.batches += 1
        if self.batches == 4:
            with torch.no_grad():
                self.learned[0].fill_(float("nan"))
        return logits


def batches(count=8):
    return [
        {"image": make_images(4, seed=i), "label": torch.arange(4), "index": torch.arange(4) + 4 * i}
        for i in range(count)
    ]


def run(root, method=TENT, stream=None, guard=None, logger=False, on_bad_batch="raise", **options):
    module = TestTimeAdaptation(method, backbone=make_net("gn"), **options)
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[StreamInput(on_bad_batch), *([guard] if guard else [])],
    )
    loader = DataLoader(batches() if stream is None else stream, batch_size=None)
    outputs = trainer.predict(module, loader)
    return module, outputs


def report_of(root):
    return json.loads((directory_of(root) / "report.json").read_text())


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ConfigError, match="Guard is for one process"):
        run(tmp_path, guard=Guard(gather=1))
    assert not list(tmp_path.iterdir())


def test_a_run_without_guard_after_one_with_it(tmp_path):
    module, _ = run(tmp_path / "first", Sick, guard=Guard("stop", gather=1))
    assert module.run.method.stopped
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path / "second",
    )  # fmt: skip
    trainer.predict(module, DataLoader(batches(), batch_size=None))
    assert module.run.method is module.method
    report = report_of(tmp_path / "second")
    assert report.get("guard") is None
    assert report["backwards"] == 8


@pytest.mark.parametrize("action", ["warn", "reset", "rollback", "stop"])
def test_actions_in_a_run(tmp_path, action, capsys):
    module, outputs = run(tmp_path, Sick, guard=Guard(action, gather=1))
    report = report_of(tmp_path)
    events = report["guard"]["events"]
    assert report["guard"]["settings"]["action"] == action
    assert [event["batch"] for event in events] == (list(range(3, 8)) if action == "warn" else [3])
    assert {event["reason"] for event in events} == {"non_finite"}
    assert [json.loads(line) for line in (directory_of(tmp_path) / "guard.jsonl").read_text().splitlines()] == events
    rows = [json.loads(line) for line in (directory_of(tmp_path) / "batches.jsonl").read_text().splitlines()]
    assert [row["guard_alarms"] for row in rows][:4] == [0, 0, 0, 1]
    finite = all(torch.isfinite(tensor).all() for tensor in module.method.adaptable.values())
    assert finite == (action != "warn")
    if action != "warn":
        assert all(torch.isfinite(output["logits"]).all() for output in outputs)
    assert module.run.method.stopped == report["guard"]["stopped"] == (action == "stop")
    assert report["batches_not_adapted_on"] == (4 if action == "stop" else 0)
    print_report(report, tmp_path)
    printed = capsys.readouterr().out
    assert f"guard ({action}): {len(events)} alarms" in printed
    assert f"batch 3: non_finite, {action}" in printed


def test_a_healthy_run_is_the_same_with_and_without(tmp_path):
    _, plain = run(tmp_path / "a")
    _, guarded = run(tmp_path / "b", guard=Guard(probation=0, gather=1))
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(plain, guarded, strict=True))
    _, source = run(tmp_path / "c", method=Source)
    _, probed = run(tmp_path / "d", guard=Guard(window=2, gather=1))
    expected = [*source[:4], *plain[4:]]
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(expected, probed, strict=True))
    guard = report_of(tmp_path / "d")["guard"]
    assert (guard["on_probation"], guard["forwards"]) == (4, 8)
    without, watched = report_of(tmp_path / "a"), report_of(tmp_path / "b")
    assert without["guard"] is None
    assert watched["guard"]["events"] == []
    assert without["protocol"] == watched["protocol"]


def test_tensorboard(tmp_path):
    run(tmp_path, Sick, guard=Guard("rollback", gather=1), logger=TensorBoardLogger(tmp_path, name="run", version="x"))
    events = EventAccumulator(str(tmp_path / "run" / "x"))
    events.Reload()
    alarms = [scalar.value for scalar in events.Scalars("adapt/guard_alarms")]
    assert alarms == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_new_domain_starts_at_the_source(tmp_path):
    stream = [{**batch, "domain": torch.zeros(4, dtype=torch.int64)} for batch in batches(6)]
    module, _ = run(tmp_path, stream=stream, guard=Guard(gather=1), reset="batch")
    fresh = TENT(make_net("gn"))
    fresh(stream[-1]["image"])
    assert all(torch.equal(t, fresh.adaptable[n]) for n, t in module.method.adaptable.items())
    assert report_of(tmp_path)["resets"] == 5


def test_on_the_command_line():
    args = ["predict", "--config=configs/digits/predict.yaml", "--model.source_ckpt=none", "--model.method=Tent"]
    cli = run_lightning(
        [*args, "--trainer.callbacks+=lightning_tta.Guard", "--trainer.callbacks.init_args.action=stop"],
        parse_only=True,
    )
    callback = cli.config["predict"]["trainer"]["callbacks"][-1]
    assert callback["class_path"].endswith("Guard")
    assert callback["init_args"]["action"] == "stop"
    assert callback["init_args"]["window"] == 8  # documented once, known to the parser all the same


def test_guard_has_the_settings_of_watch():
    assert Guard().settings == Watch(adapt(make_net("gn"), "source")).settings == WatchSettings()
    assert Guard("stop", window=4).settings == WatchSettings("stop", window=4)
    with pytest.raises(ConfigError, match=r"Guard has no option 'windows'\. Did you mean window\?"):
        Guard(windows=4)


def test_a_watched_method_is_predicted_after_the_step(tmp_path):
    """On probation the source predicts, whatever is asked for; then the net after its step."""
    _, source = run(tmp_path / "source", method=Source)
    _, plain = run(tmp_path / "plain", predict="after")
    _, guarded = run(tmp_path / "guarded", predict="after", guard=Guard(window=2, gather=1))
    expected = [*source[:4], *plain[4:]]
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(expected, guarded, strict=True))


def test_alarms_have_the_numbers_of_the_stream(tmp_path):
    """Batches that were skipped count: an alarm's number is that of the line in batches.jsonl."""
    stream = [BAD["dimensions"], *batches()]
    run(tmp_path, Sick, stream, guard=Guard("rollback", gather=1), on_bad_batch="skip")
    assert [event["batch"] for event in report_of(tmp_path)["guard"]["events"]] == [4]


def test_guard_refuses():
    with pytest.raises(ConfigError, match="window"):
        Guard(window=1)
    with pytest.raises(ConfigError, match="LightningModule"):
        Guard().on_predict_start(None, LightningModule())
    with pytest.raises(ConfigError, match="on_bad_batch"):
        StreamInput(on_bad_batch="ignore")


# Bad batches -----------------------------------------------------------------------------------------------------

BAD = {
    "empty": {"image": torch.zeros(0, 3, 16, 16), "label": torch.zeros(0, dtype=torch.int64)},
    "channels": {"image": torch.rand(3, 1, 16, 16), "index": torch.tensor([90, 91, 92]), "label": torch.arange(3)},
    "size": {"image": torch.rand(2, 3, 4, 4), "label": torch.arange(2)},
    "0-255": {"image": 255 * torch.rand(2, 3, 16, 16)},
    "dimensions": {"image": torch.rand(3, 16, 16)},
    "no images": {"picture": torch.rand(2, 3, 16, 16)},
}


class Strict(Tent):
    """A net of fixed size, as a ViT: refuses other frames."""

    def __init__(self, model):
        model.register_forward_pre_hook(self.refuse)
        super().__init__(model, lr=1e-2)

    @staticmethod
    def refuse(net, given):
        assert given[0].shape[-2:] == (16, 16), "Input height doesn't match model (16)."


def test_bad_batches_are_skipped_and_counted(tmp_path):
    good = batches(6)
    stream = [x for pair in zip(good, BAD.values(), strict=True) for x in reversed(pair)]  # the first one is bad
    with pytest.warns(UserWarning, match="skipped"):
        module, outputs = run(tmp_path, Strict, stream, on_bad_batch="skip")
    plain, expected = run(tmp_path / "plain", Strict, good)
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(outputs[1::2], expected, strict=True))
    assert all(torch.equal(t, plain.method.adaptable[n]) for n, t in module.method.adaptable.items())
    report, clean = report_of(tmp_path), report_of(tmp_path / "plain")
    assert (report["skipped_batches"], report["skipped_images"]) == (6, 0 + 3 + 2 + 2 + 0 + 0)
    assert (clean["skipped_batches"], clean["skipped_images"]) == (0, 0)
    assert report["accuracy"] == clean["accuracy"]
    assert report["images"] == clean["images"] == 24
    assert report["batches"] == 12
    rows = list(csv.DictReader((directory_of(tmp_path) / "predictions.csv").open()))
    assert len(rows) == 24 + 7
    assert [row["index"] for row in rows if row["prediction"] == "-1"][:3] == ["90", "91", "92"]
    lines = [json.loads(line) for line in (directory_of(tmp_path) / "batches.jsonl").read_text().splitlines()]
    assert ["skipped" in line for line in lines] == [True, False] * 6
    assert "(3, 1, 16, 16)" in lines[2]["skipped"]


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_raise_by_default(tmp_path, name):
    with pytest.raises(InputError):
        run(tmp_path, Strict, [batches(1)[0], BAD[name]])


def test_other_errors_are_not_skipped(tmp_path):
    class Broken(Source):
        synchronized = False

        def step(self, images):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, Broken, on_bad_batch="skip")


def test_all_images_of_a_batch_nonfinite_under_guard(tmp_path):
    stream = batches()
    stream[3]["image"] = torch.full((4, 3, 16, 16), float("nan"))
    run(tmp_path, stream=stream, guard=Guard("stop", gather=1))
    assert report_of(tmp_path)["guard"]["events"] == []


@pytest.mark.slow
def test_soak(capsys):
    found = soak.main(["--batches", "400", "--broken", "0.1", "--methods", "tent", "zerosiam"])
    for clean, broken in found.values():
        assert clean["skipped_batches"] == clean["nonfinite_images"] == 0
        assert broken["batches"] - broken["good"] > 25
        assert broken["skipped_batches"] > 15
        assert broken["good"] == clean["good"] == 400
        assert abs(broken["accuracy"] - clean["accuracy"]) < 0.01
        assert clean["accuracy"] > 0.7
        assert len({state for _, _, state in broken["memory"]}) == 1
    assert "resident" in capsys.readouterr().out
