"""Runs that were cut off go on as if they had not been: every method, in one process."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from contract import IMAGE_METHODS, VARIANTS
from lightning_tta import DigitsData, TestTimeAdaptation, adapt, available_methods
from lightning_tta.cli.main import main
from lightning_tta.data.images import StreamBatches
from lightning_tta.methods import Source, Tent
from lightning_tta.methods.base.capture import Capture
from lightning_tta.methods.base.host import recording
from lightning_tta.run.batches import show_source
from nets import kind_for, make_net
from replay import use_tape
from runs import callbacks_of, directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TENT = partial(Tent, lr=1e-2)
BATCHES = 6


class Crash(Exception):
    """The machine stops."""


class Crasher(Callback):
    """Stops a run before its batch number ``at``."""

    def __init__(self, at):
        self.at = at

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if pl_module.run.summary.batches == self.at:
            raise Crash


def make_data(**options):
    return DigitsData(**{"domains": ["gaussian_noise", "contrast"], "num_images": 40, "batch_size": 16, **options})


def run(root, method=TENT, *, crash=None, data=None, logger=False, callbacks=(), loader=None, **options):
    options = {"save_every": 2, "source_images": 64, **options}
    own = callbacks_of(options)
    net = make_net(kind_for(getattr(method, "func", method).__module__.rpartition(".")[2], "bn"), num_classes=10)
    module = TestTimeAdaptation(method, backbone=net, **options)
    callbacks = [*own, *callbacks, *([] if crash is None else [Crasher(crash)])]
    trainer = Trainer(
        accelerator="cpu", logger=logger, callbacks=callbacks, enable_progress_bar=False, default_root_dir=root
    )
    if crash is None:
        trainer.predict(module, loader, datamodule=None if loader else data or make_data())
    else:
        with pytest.raises(Crash):
            trainer.predict(module, loader, datamodule=None if loader else data or make_data())
    return module


def results(root):
    """What must not depend on interruptions: predictions as bytes; report and batches without timings."""
    root = directory_of(root)
    report = json.loads((root / "report.json").read_text())
    batches = [json.loads(line) for line in (root / "batches.jsonl").read_text().splitlines()]
    for entry in (report, *batches):
        for name in ("seconds", "seconds_per_batch", "wall_seconds", "environment", "peak_memory_mb", "peak_memory"):
            entry.pop(name, None)
    return (root / "predictions.csv").read_bytes(), report, batches


def partial_of(name):
    return partial(available_methods()[name], **VARIANTS.get(name, [{}])[-1])


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_every_method_goes_on_bit_by_bit(tmp_path, name):
    method = partial_of(name)
    whole = run(tmp_path / "whole", method, save_every=None)
    expected = results(tmp_path / "whole")
    for crash in (1, 3, 5):
        root = tmp_path / str(crash)
        run(root, method, crash=crash)
        resumed = run(root, method)
        assert results(root) == expected
        for key, tensor in whole.method.adaptable.items():
            assert torch.equal(tensor, resumed.method.adaptable[key])


@pytest.mark.parametrize("name", ["tent", "zerosiam"])
def test_captured_steps_go_on_bit_by_bit(tmp_path, name, monkeypatch):
    data = partial(make_data, num_images=96)
    run(tmp_path / "plain", partial_of(name), data=data(), capture=False)
    use_tape(monkeypatch)
    replay, replays = Capture.replay, []
    monkeypatch.setattr(Capture, "replay", lambda *args: (replays.append(args), replay(*args))[1])
    with recording():
        whole = run(tmp_path / "whole", partial_of(name), data=data(), reset_every=4)
        run(tmp_path / "a", partial_of(name), data=data(), crash=3, reset_every=4)
        resumed = run(tmp_path / "a", partial_of(name), data=data(), reset_every=4)
        run(tmp_path / "captured", partial_of(name), data=data())
    assert len(replays) > 20
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    for key, tensor in whole.method.adaptable.items():
        assert torch.equal(tensor, resumed.method.adaptable[key])
    assert results(tmp_path / "captured")[0] == results(tmp_path / "plain")[0]


def test_three_crashes_in_one_run_with_resets_and_pace(tmp_path):
    options = {"charge": "passes", "stream": "continual"}
    kept = {"method": TENT, "reset_every": 2}
    run(tmp_path / "whole", data=make_data(**options), **kept)
    for crash in (1, 3, 5):
        run(tmp_path / "a", data=make_data(**options), crash=crash, save_every=1, **kept)
    run(tmp_path / "a", data=make_data(**options), save_every=1, **kept)
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    report = results(tmp_path / "a")[1]
    assert report["resets"] > 0
    assert report["batches_not_adapted_on"] > 0


def test_blind_spots_are_those_of_the_source(tmp_path):
    data = {"stream": "blind_spot"}
    run(tmp_path / "whole", data=make_data(**data))
    run(tmp_path / "a", data=make_data(**data), crash=5)
    run(tmp_path / "a", data=make_data(**data))
    assert results(tmp_path / "a") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    "data",
    [
        {"stream": "recurring", "visits": 3, "num_images": 20},
        {"stream": "recurring", "visits": 2, "num_images": 20, "dirichlet": 0.1},
        {"stream": "markov", "num_images": 200, "class_correlation": 0.2},
        {"stream": "polluted", "polluters": "gaussian"},
    ],
    ids=lambda data: data["stream"],
)
def test_streams_with_visits_chains_and_pollution_go_on_bit_by_bit(tmp_path, data):
    whole = run(tmp_path / "whole", data=make_data(**data), save_every=None)
    for crash in (3, 7):  # in the first visit, and in a later one
        run(tmp_path / "a", data=make_data(**data), crash=crash, save_every=1)
    resumed = run(tmp_path / "a", data=make_data(**data), save_every=1)
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    for key, tensor in whole.method.adaptable.items():
        assert torch.equal(tensor, resumed.method.adaptable[key])


@pytest.mark.parametrize("more", [{}, {"statistics": "auto"}], ids=["batch", "auto"])
def test_a_reservoir_goes_on_bit_by_bit(tmp_path, more):
    data = {"stream": "recurring", "visits": 2, "num_images": 32}  # two batches of a domain
    more = {"reservoir": 4, **more}
    whole = run(tmp_path / "whole", data=make_data(**data), save_every=None, **more)
    for crash in (3, 6):  # a state is open, and is in use again
        run(tmp_path / "a", data=make_data(**data), crash=crash, save_every=1, **more)
    resumed = run(tmp_path / "a", data=make_data(**data), save_every=1, **more)
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    assert whole.method.value("memory.number") > 1
    state = resumed.method.state_dict()
    for key, tensor in whole.method.state_dict().items():
        assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor.nan_to_num(), state[key].nan_to_num()), key


def test_a_gate_goes_on_bit_by_bit(tmp_path):
    more = {"gate": {"kind": "poem", "patience": 24}}
    whole = run(tmp_path / "whole", save_every=None, **more)
    for crash in (3, 5):
        run(tmp_path / "a", crash=crash, save_every=1, **more)
    resumed = run(tmp_path / "a", save_every=1, **more)
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    assert torch.equal(whole.method.value("gate.state"), resumed.method.value("gate.state"))


def test_what_needs_held_out_images_sees_validation_images():
    net, data = make_net("gn", 10), make_data()
    for name, more, split in (("poem", {}, "val"), ("tent", {"gate": "poem"}, "val"), ("eata", {}, "train")):
        seen = []
        method = adapt(net, name, **more)
        method.prepare = lambda batches, seen=seen: seen.extend(batch["image"] for batch in batches)
        show_source(method, data, 40, torch.device("cpu"))
        (expected,) = data.source_batches(40, batch_size=64, split=split)
        (other,) = data.source_batches(40, batch_size=64, split={"val": "train", "train": "val"}[split])
        assert torch.equal(torch.cat(seen), expected["image"])
        assert not torch.equal(expected["image"], other["image"])


def test_a_source_of_a_few_images_is_said(monkeypatch, recwarn):
    method = adapt(make_net("gn", 10), "eata")
    method.prepare = list
    show_source(method, make_data(), 40, torch.device("cpu"))
    assert not recwarn.list
    monkeypatch.setattr("lightning_tta.run.batches.FEW_SOURCE_IMAGES", 100_000)
    with pytest.warns(UserWarning, match=r"has only \d+ images to show, of the 100000 that were asked for"):
        show_source(method, make_data(), 100_000, torch.device("cpu"))


def test_images_that_are_done_are_not_read(tmp_path, monkeypatch):
    run(tmp_path, crash=5)
    read = []
    get = StreamBatches.__getitems__

    def count(self, positions):
        read.append(len(positions))
        return get(self, positions)

    data = make_data()
    monkeypatch.setattr(StreamBatches, "__getitems__", count)
    run(tmp_path, data=data)
    assert read == [16, 8]  # batches 4 and 5
    read.clear()
    list(data.predict_dataloader())
    assert read == [16, 16, 8, 16, 16, 8]  # the data module itself starts at the beginning again


def test_loader_of_a_user_is_read_through(tmp_path):
    images = [{"image": batch["image"]} for batch in make_data().predict_dataloader()]
    loader = torch.utils.data.DataLoader(images, batch_size=None)
    run(tmp_path / "whole", loader=loader)
    run(tmp_path / "a", loader=loader, crash=5)
    module = run(tmp_path / "a", loader=loader)
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    assert module.run.summary.batches == BATCHES


class Draws(Source):
    """A user's method that draws from every global generator there is."""

    synchronized = False

    def step(self, images):
        number = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return super().step(images) * number


def test_global_random_states_go_on(tmp_path):
    for root, crashes in (("whole", []), ("a", [3])):
        for crash in [*crashes, None]:
            if crash is not None or not crashes:
                torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
            run(tmp_path / root, Draws, crash=crash)
    assert results(tmp_path / "a") == results(tmp_path / "whole")


class Remembers(Callback):
    """Counts batches, and would lose count."""

    def __init__(self):
        self.batches = 0

    def on_predict_batch_end(self, *args):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches} if self.batches else {}

    def load_state_dict(self, state):
        self.batches = state["batches"]


def test_callbacks_of_users_are_kept(tmp_path):
    run(tmp_path, crash=3, callbacks=[Remembers()])
    again = Remembers()
    run(tmp_path, callbacks=[again])
    assert again.batches == BATCHES


def test_seconds_of_all_parts_count(tmp_path):
    run(tmp_path, crash=3)
    path = directory_of(tmp_path) / "state.pt"
    state = torch.load(path, weights_only=True)
    assert state["batches"] == 2
    state["summary"]["seconds"] += 1000
    state["wall_seconds"] += 2000
    torch.save(state, path)
    run(tmp_path)
    report = json.loads((directory_of(tmp_path) / "report.json").read_text())
    assert 1000 < report["seconds"] < 1100
    assert 2000 < report["wall_seconds"] < 2100


def test_command_line(tmp_path, capsys, monkeypatch):
    args = ["predict", "--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.method=Tent"]
    args += ["--data=DigitsData", "--data.domains=[contrast]", "--data.num_images=20", "--data.batch_size=4"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    resume = ["--state.save_every=1", f"--trainer.default_root_dir={tmp_path / 'a'}"]
    main([*args, f"--trainer.default_root_dir={tmp_path / 'whole'}"])
    with monkeypatch.context() as patch:
        step, seen = TestTimeAdaptation.predict_step, []

        def crash(self, batch, batch_idx):
            seen.append(batch_idx)
            if len(seen) == 4:
                raise Crash
            return step(self, batch, batch_idx)

        patch.setattr(TestTimeAdaptation, "predict_step", crash)
        with pytest.raises(Crash):
            main([*args, *resume])
    main([*args, *resume])
    (directory,) = (tmp_path / "a" / "lightning_logs").iterdir()
    (whole,) = (tmp_path / "whole" / "lightning_logs").iterdir()
    assert results(directory) == results(whole)
    capsys.readouterr()
    main([*args, *resume])  # no error: a supervisor may start it again and again
    assert f"{directory} is finished" in capsys.readouterr().out
    assert directory.name == whole.name
    assert list((tmp_path / "a" / "lightning_logs").iterdir()) == [directory]
