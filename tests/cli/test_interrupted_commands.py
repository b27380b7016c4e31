"""Ctrl-C and SIGTERM on the command line: two lines, what is kept and how to go on, and no traceback."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from lightning_tta import SourceClassifier, TestTimeAdaptation
from lightning_tta.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
NET = ["--model.backbone=timm/test_resnet", "--model.num_classes=10"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
FIT = ["fit", "--model=SourceClassifier", *NET, "--data=DigitsData", "--data.train_batch_size=512", *QUIET]
PREDICT = ["predict", "--model.source_ckpt=none", *NET, "--model.method=tent", "--data=DigitsData", *QUIET]
PREDICT += ["--data.domains=[clean]", "--data.num_images=40", "--data.batch_size=10"]
BENCHMARK = """
output: out
jobs: 2
data: {class_path: DigitsData, init_args: {domains: [haze, contrast], batch_size: 16}}
nets: {bn: {source_ckpt: none, backbone: timm/test_resnet, num_classes: 10}}
streams: {iid: {kind: iid}}
methods: {one: {class_path: MEMO}, two: {class_path: MEMO, init_args: {lr: 0.1}}}
"""


def stopped(monkeypatch, capsys, args, step, call, number=signal.SIGINT):
    """Run a command that gets a signal in call number ``call`` of ``step``; the lines that it says at the end."""
    owner, name = step
    original, calls = getattr(owner, name), []

    def signalled(self, *inputs, **named):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(self, *inputs, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(args)
    assert end.value.code == 128 + number
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-2:]


def test_a_fit_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, capsys):
    args = [*FIT, "--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path}"]
    step = (SourceClassifier, "training_step")
    kept, again = stopped(monkeypatch, capsys, args, step, 1, signal.SIGTERM)
    assert kept == "Stopped in epoch 1 of 3. No checkpoint was saved yet: the training begins anew."
    assert again == f"Go on with: {shlex.join(['lightning-tta', *args])}"
    kept, again = stopped(monkeypatch, capsys, args, step, 4)
    path = next(tmp_path.rglob("*.ckpt"))
    assert kept == f"Stopped in epoch 2 of 3. The training so far is kept in {path}"
    command = shlex.split(again.removeprefix("Go on with: "))
    assert command == ["lightning-tta", *args, "--ckpt_path", str(path)]
    kept, again = stopped(monkeypatch, capsys, command[1:], step, 2)
    assert kept.startswith("Stopped in epoch 2 of 3.")  # it went on, and names the option once
    assert again.count("--ckpt_path") <= 1


def test_predict_goes_on_with_the_same_command(tmp_path, monkeypatch, capsys):
    args = [*PREDICT, f"--trainer.default_root_dir={tmp_path}"]
    step = (TestTimeAdaptation, "predict_step")
    kept, again = stopped(monkeypatch, capsys, args, step, 2, signal.SIGTERM)
    (state,) = tmp_path.rglob("state.pt")
    assert kept == f"Stopped after batch 2 of 4. What is done is kept in {state.parent}"
    assert again == f"Go on with: {shlex.join(['lightning-tta', *args])}"
    with monkeypatch.context() as patch:
        original, calls = TestTimeAdaptation.predict_step, []
        patch.setattr(
            TestTimeAdaptation, "predict_step", lambda self, *batch: calls.append(1) or original(self, *batch)
        )
        main(args)
    assert len(calls) == 2  # the other two of four
    assert (state.parent / "report.json").exists()

    before = stopped(monkeypatch, capsys, [*args, "--data.order_seed=1"], (TestTimeAdaptation, "setup"), 1)
    assert before[0] == "Stopped before the first batch: nothing was written."


def no_process_is_left(group):
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_a_benchmark_with_its_workers(tmp_path):
    """A real one, of processes side by side, all of which get the signal."""
    (tmp_path / "b.yaml").write_text(BENCHMARK)
    command = [sys.executable, "-m", "lightning_tta", "benchmark", "--config", "b.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    end = time.monotonic() + 300  # on a machine that is busy with other tests
    while not list(tmp_path.glob("out/cells/bn/iid/*/state.pt")) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in said
    kept, again = said.splitlines()[-2:]
    assert re.fullmatch(r"Stopped. [01] of 2 cells are finished and kept in out", kept)
    assert again == "Go on with: lightning-tta benchmark --config b.yaml"
    assert no_process_is_left(process.pid)
    assert list(tmp_path.rglob("state.pt"))
