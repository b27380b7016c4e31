"""Batches that are accounted for while the device is at work on the next one: the same results, and none lost.

A CPU stands in for the device that works on while the host goes on.
"""

import csv
import json
import signal
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_kill import counting_lines, in_a_child
from test_resume import make_data, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from contract import VARIANTS
from lightning_tta import Guard, TestTimeAdaptation, available_methods
from lightning_tta.errors import Interrupted
from lightning_tta.methods import Tent
from lightning_tta.run import growing, readback, stream_run
from lightning_tta.run.interrupts import ask
from lightning_tta.run.readback import Moment, Readback, Transfer
from lightning_tta.run.stream_run import StreamRun
from nets import make_images, make_net
from runs import callbacks_of, directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TENT = partial(Tent, lr=1e-2)
BATCHES = 6


@pytest.fixture
def deferring(monkeypatch):
    """From now on runs defer where they may; lists what was launched (+) and accounted for (-)."""
    monkeypatch.setattr(stream_run, "is_asynchronous", lambda device: True)
    done, step, account = [], TestTimeAdaptation._step, StreamRun.account

    def launched(self, run, *args):
        record = step(self, run, *args)
        done.append(f"+{run.batches}")
        return record

    def accounted(self, record):
        done.append(f"-{self.summary.batches}")
        return account(self, record)

    monkeypatch.setattr(TestTimeAdaptation, "_step", launched)
    monkeypatch.setattr(StreamRun, "account", accounted)
    return done


def run(root, method=TENT, *, data=None, loader=None, callbacks=(), returns=False, logger=False, **options):
    own = callbacks_of(options := {"source_images": 64, **options})
    module = TestTimeAdaptation(method, backbone=make_net("bn", num_classes=10), **options)
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[*own, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    data = None if loader else data or make_data()
    return trainer.predict(module, loader, datamodule=data, return_predictions=returns)


@pytest.mark.parametrize("name", ["tent", "cotta", "t3a", "source"])
def test_results_are_the_same_and_come_one_batch_later(tmp_path, deferring, monkeypatch, name):
    method = partial(available_methods()[name], **VARIANTS.get(name, [{}])[-1])
    run(tmp_path / "late", method, save_every=4)
    assert deferring == ["+0", "+1", "-0", "+2", "-1", "+3", "-2", "-3", "+4", "+5", "-4", "-5"]  # saved after 4
    monkeypatch.undo()
    run(tmp_path / "now", method, save_every=4)
    assert results(tmp_path / "late") == results(tmp_path / "now")


def test_images_without_numbers_are_counted(tmp_path, deferring, monkeypatch):
    """The number of an image is that of those before, also of a batch that is not accounted for yet."""
    stream = [{"image": make_images(size, seed=size)} for size in (3, 5, 2, 4)]
    stream.insert(2, {"image": torch.rand(2, 1, 16, 16)})  # refused
    loader = DataLoader(stream, batch_size=None)
    with pytest.warns(UserWarning, match="skipped"):
        run(tmp_path / "late", loader=loader, on_bad_batch="skip")
    assert deferring == ["+0", "+1", "-0", "-1", "-2", "+3", "+4", "-3", "-4"]
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="skipped"):
        run(tmp_path / "now", loader=loader, on_bad_batch="skip")
    assert results(tmp_path / "late") == results(tmp_path / "now")
    rows = csv.DictReader((directory_of(tmp_path / "late") / "predictions.csv").open())
    assert [int(row["index"]) for row in rows] == list(range(16))


class Looks(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, *args):
        assert len(outputs["prediction"])


@pytest.mark.parametrize(
    "options",
    [
        {"returns": True},
        {"data": partial(make_data, charge="passes")},
        {"callbacks": [Looks]},
        {"callbacks": [partial(Guard, "warn")]},
    ],
    ids=["returned", "timed", "looked at", "guarded"],
)
def test_who_asks_gets_it_at_once(tmp_path, deferring, options):
    made = {name: value for name, value in options.items() if name == "returns"}
    made |= {"data": options["data"]()} if "data" in options else {}
    run(tmp_path, callbacks=[kind() for kind in options.get("callbacks", ())], **made)
    assert deferring == [f"{sign}{number}" for number in range(BATCHES) for sign in "+-"]


@pytest.mark.filterwarnings("error:You have overridden")
def test_a_cpu_defers_nothing(tmp_path):
    module = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10))
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path).predict(
        module, datamodule=make_data(), return_predictions=False
    )
    assert module.run.defers is False


def test_only_images_go_to_the_device():
    module, batch = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10)), next(iter(make_loader()))
    device = torch.device("meta")
    moved = module.transfer_batch_to_device(batch, device, 0)
    assert {name: value.device.type for name, value in moved.items()} == {
        name: "meta" if name == "image" else "cpu" for name in batch
    }
    assert module.transfer_batch_to_device([batch["label"]], device, 0)[0].device == device  # nothing of ours


def make_loader():
    data = make_data()
    data.setup("predict")
    return data.predict_dataloader()


def test_what_was_predicted_before_a_crash_is_in_the_files(tmp_path, deferring, monkeypatch):
    step = TestTimeAdaptation.predict_step

    def crash(self, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("camera unplugged")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TestTimeAdaptation, "predict_step", crash)
    with pytest.raises(RuntimeError, match="unplugged"):
        run(tmp_path)
    assert deferring == ["+0", "+1", "-0", "+2", "-1", "-2"]
    directory = directory_of(tmp_path)
    assert len(list(csv.DictReader((directory / "predictions.csv").open()))) == 40
    assert [json.loads(line)["batch"] for line in (directory / "batches.jsonl").open()] == [0, 1, 2]


def test_the_first_error_is_the_one_that_is_told(tmp_path, deferring, monkeypatch):
    """A device that has failed cannot be read either."""

    def fail(self):
        raise RuntimeError("illegal memory access")

    def crash(self, *args):
        monkeypatch.setattr(readback.UnreadBatch, "record", fail)
        raise KeyError("first")

    step = TestTimeAdaptation._step
    monkeypatch.setattr(
        TestTimeAdaptation, "_step", lambda self, run, *args: (crash if run.batches else step)(self, run, *args)
    )
    with pytest.raises(KeyError, match="first"):
        run(tmp_path)


@pytest.mark.parametrize("save_every", [None, 4])
def test_a_signal_saves_the_batch_that_was_deferred(tmp_path, deferring, monkeypatch, save_every):
    run(tmp_path / "whole")
    step = TestTimeAdaptation.predict_step

    def signalled(self, batch, batch_idx):
        if self.run.batches == 2:
            ask(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TestTimeAdaptation, "predict_step", signalled)
        with pytest.raises(Interrupted, match=f"after batch 3 of {BATCHES}"):
            run(tmp_path / "a", save_every=save_every)
    state = torch.load(directory_of(tmp_path / "a") / "state.pt", weights_only=True)
    assert state["batches"] == 3
    run(tmp_path / "a", save_every=save_every)
    assert results(tmp_path / "a") == results(tmp_path / "whole")


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_line_nothing_is_lost_that_a_state_counts(tmp_path, seed):
    import random

    rng, again = random.Random(seed), partial(run, tmp_path / "a", save_every=2)
    lines = counting_lines(partial(run, tmp_path / "whole", save_every=2))
    killed = 0
    while not list((tmp_path / "a").glob("*/report.json")):
        limit = rng.randrange(lines // 2, lines) if killed < 3 else None
        status = in_a_child(lambda limit=limit: counting_lines(again, limit))
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
    assert killed
    assert results(tmp_path / "a") == results(tmp_path / "whole")


# Files -----------------------------------------------------------------------------------------------------------


def test_lines_are_gathered_and_written_now_and_then(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(growing.time, "monotonic", lambda: now[0])
    path = tmp_path / "lines"
    file = growing.GrowingFile(path.open("w"))
    assert file.is_empty
    file.write("a\n")
    assert not file.is_empty
    assert path.read_text() == ""
    now[0] += growing.PATIENCE
    file.write("b\n")
    assert path.read_text() == "a\nb\n"
    file.write("c\n")
    assert path.read_text() == "a\nb\n"
    file.flush()
    assert path.read_text() == "a\nb\nc\n"
    file.write("d\n")
    file.close()
    assert path.read_text() == "a\nb\nc\nd\n"


# The device ------------------------------------------------------------------------------------------------------


def test_what_is_read_later_is_what_was_there():
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
    tensors = {str(kind): (torch.arange(12).view(3, 4) % 5).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(0.1), "odd": torch.arange(3, dtype=torch.uint8), "none": torch.zeros(0, 3)}
    tensors["turned"] = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).T
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for pack in (True, False):
        parcel = Readback(tensors, pack=pack)
        if pack:
            for tensor in tensors.values():
                tensor.zero_()
        arrived = parcel.read()
        assert arrived is parcel.read()
        for name, tensor in before.items():
            assert arrived[name].dtype == tensor.dtype
            assert torch.equal(arrived[name], tensor)
            tensors[name].copy_(tensor)


class Chip:
    """Stands in for ``torch.cuda``: notes what is asked of it."""

    def __init__(self):
        self.asked = []

    def Event(self, enable_timing=False):
        return Happening(self, len(self.asked))

    def Stream(self, device):
        self.asked.append("new stream")
        return type("Stream", (), {"device": device})()

    def stream(self, stream):
        self.asked.append("beside")
        return nullcontext()

    def current_stream(self, device):
        waits = type("Current", (), {"wait_stream": lambda _, other: self.asked.append("wait")})
        return waits()


class Happening:
    def __init__(self, chip, number):
        self.chip, self.number = chip, number

    def record(self, stream):
        self.chip.asked.append("record")

    def synchronize(self):
        self.chip.asked.append("synchronize")

    def elapsed_time(self, later):
        return 1500.0 * (later.number - self.number)


def test_on_cuda_the_host_waits_once_and_late(monkeypatch):
    chip = Chip()
    for name in ("Event", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(chip, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *args: chip.asked.append("keep"))
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        transfer = Transfer()
        images = [transfer(torch.rand(2, 3, 4, 4), device) for _ in range(2)]
        assert {image.device for image in images} == {device}
        assert chip.asked == ["new stream", *["beside", "wait", "keep"] * 2]
        chip.asked.clear()
        assert transfer(images[0], device) is images[0]  # it is there
        start = Moment(device)
        logits, loss = torch.rand(2, 10, device=device), torch.rand((), device=device)
        end = Moment(device)
        rest = {"index": torch.arange(2), "domain": torch.zeros(2), "label": torch.zeros(2)}
        unread = readback.UnreadBatch({"logits": logits}, {"loss": loss, "forwards": 1}, (start, end), rest)
        assert chip.asked == ["record"] * 3
        assert unread._readback.read()["logits"].shape == (2, 10)
        assert unread._readback.read()["stats/loss"].device.type == "cpu"
        assert chip.asked[3:] == ["synchronize", "synchronize"]
    assert end.seconds_since(start) == 1.5
