"""Ctrl-C and SIGTERM in a stream: its state is saved after the batch, and the same command goes on."""

import os
import signal
import threading
import time

import pytest
from forked import run as run_of_two
from forked import saved
from lightning.pytorch import Callback
from test_kill import in_a_child
from test_resume import BATCHES, make_data, results, run
from torch.utils.data import DataLoader

from lightning_tta.errors import Interrupted
from lightning_tta.run import interrupts
from lightning_tta.run.interrupts import ask, listening, waiting
from processes import NEEDS_FORK, Processes
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Signal(Callback):
    """Sends a signal in the middle of batch number ``at``, before anything of it is done."""

    def __init__(self, at, number=signal.SIGINT):
        self.at, self.number = at, number

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if pl_module.run.summary.batches == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("save_every", [None, 4])
def test_the_batch_is_finished_and_kept(tmp_path, number, save_every):
    run(tmp_path / "whole")
    before = signal.getsignal(number)
    for at in (0, 3):
        words = f"Stopped after batch {at + 1} of {BATCHES}. What is done is kept in .*tent-"
        with pytest.raises(Interrupted, match=words) as stop:
            run(tmp_path / "a", callbacks=[Signal(at, number)], save_every=save_every)
        assert stop.value.number == number
        assert signal.getsignal(number) == before
    run(tmp_path / "a", save_every=save_every)
    assert results(tmp_path / "a") == results(tmp_path / "whole")
    assert not (directory_of(tmp_path / "a") / "state.pt").exists()


def test_in_the_last_batch_the_run_is_finished(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Interrupted, match="The run is finished: ") as stop:
        run(tmp_path / "a", callbacks=[Signal(BATCHES - 1)])
    assert stop.value.again is None  # no command to go on with
    assert results(tmp_path / "a") == results(tmp_path / "whole")


def test_a_loader_of_a_user_goes_on(tmp_path):
    images = [{"image": batch["image"]} for batch in make_data().predict_dataloader()]
    loader = DataLoader(images, batch_size=None)
    run(tmp_path / "whole", loader=loader)
    with pytest.raises(Interrupted, match="after batch 3"):
        run(tmp_path / "a", loader=loader, callbacks=[Signal(2)])
    run(tmp_path / "a", loader=loader)
    assert results(tmp_path / "a") == results(tmp_path / "whole")


@NEEDS_FORK
def test_two_processes_save_each_their_own_state(tmp_path):
    """Both get the Ctrl-C of a terminal."""
    processes = Processes(lambda rank: run_of_two(tmp_path, save_every=None, callbacks=[Signal(1 + rank)]), tmp_path)
    assert processes.wait() == [1, 1]
    assert [text.partition(". ")[0] for text in processes.said()] == [
        "Interrupted: Stopped after batch 2 of 10",
        "Interrupted: Stopped after batch 3 of 5",
    ]
    assert saved(tmp_path) == [2, 3]


def test_outside_of_a_stream_the_signal_is_an_exception_at_once():
    with listening(signal.SIGTERM), pytest.raises(Interrupted) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@NEEDS_FORK
def test_a_second_one_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(interrupts, "ECHO", 0.0)

    def twice():
        with waiting():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(100)

    start = time.monotonic()
    assert in_a_child(twice) == 130
    assert time.monotonic() - start < 50


def test_what_a_launcher_passes_on_is_no_second_one():
    with waiting():
        for number in (signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        ask(signal.SIGTERM)  # too late
        assert interrupts._Received.number == signal.SIGINT


def test_handlers_of_the_users_own_stay():
    said = []
    before = signal.signal(signal.SIGINT, lambda *_: said.append("mine"))
    try:
        with waiting():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == ["mine"]


def test_a_thread_gets_no_signals():
    errors = []

    def work():
        try:
            with waiting():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
