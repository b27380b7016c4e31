"""SIGKILL at any moment: a child process runs the stream, is killed, and another one goes on."""

import json
import os
import random
import signal
import sys
from functools import partial

import pytest
from lightning.pytorch import Trainer
from test_resume import results

import lightning_tta
from contract import IMAGE_METHODS, VARIANTS
from lightning_tta import DigitsData, TestTimeAdaptation, available_methods
from lightning_tta.run.batches import StreamInput
from lightning_tta.run.resume import StateKeeper
from nets import kind_for, make_net
from runs import directory_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


MECHANISMS = ("tent", "eata", "t3a", "cotta", "memo", "meta_ttt")
"""One method of each: norm parameters, what was prepared, a bank, a teacher, episodes, a functional copy."""
PACKAGE = os.path.dirname(lightning_tta.__file__) + os.sep


def run(root, name, save_every=2):
    method = partial(available_methods()[name], **VARIANTS.get(name, [{}])[-1])
    data = DigitsData(domains=["gaussian_noise", "contrast"], num_images=40, batch_size=8)
    module = TestTimeAdaptation(method, backbone=make_net(kind_for(name, "bn"), num_classes=10))
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": root}
    trainer = Trainer(**options, callbacks=[StateKeeper(save_every=save_every), StreamInput(source_images=64)])
    trainer.predict(module, datamodule=data, return_predictions=False)


def in_a_child(work):
    """Run ``work`` in a copy of this process, which spares it the imports; returns how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nothing:
                sys.stdout = sys.stderr = nothing
                work()
                status = 0
        finally:
            os._exit(status)  # nothing of the tests runs twice
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def counting_lines(work, limit=None, end=die):
    """Run, and count the lines of the package that are run; at ``limit`` the process is killed."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        if lines == limit:
            end()
        return trace

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: trace if PACKAGE in frame.f_code.co_filename else None)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def kill_and_compare(tmp_path, name, kills, seed):
    """Kill a run again and again, each time before a random line of the package, and let it go on."""
    whole = tmp_path / "whole"
    lines = counting_lines(lambda: run(whole, name, save_every=2))
    expected, rng, killed, tries = results(whole), random.Random(seed), 0, 0
    while killed < kills:
        root, tries = tmp_path / f"run{tries}", tries + 1
        while not list(root.glob("*/report.json")):  # whatever happens on the way; the last kill may come after it
            limit = rng.randrange(1, lines)
            status = in_a_child(lambda root=root, limit=limit: counting_lines(lambda: run(root, name), limit))
            killed += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL)
        assert results(root) == expected


@pytest.mark.parametrize(("name", "seed"), [("tent", 0), ("cotta", 1), ("t3a", 2)])
def test_killed_runs_go_on_as_if_they_had_not_been(tmp_path, name, seed):
    kill_and_compare(tmp_path, name, 3, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_every_method_survives_a_kill(tmp_path, name):
    """Before a random line of the package; the methods of other mechanisms eight times, the others once."""
    if name in MECHANISMS:
        kill_and_compare(tmp_path, name, 8, seed=len(name))
        return
    run(tmp_path / "whole", name, save_every=2)
    limit = random.Random(name).randrange(500, 5000)
    assert in_a_child(lambda: counting_lines(lambda: run(tmp_path / "killed", name), limit)) == -signal.SIGKILL
    run(tmp_path / "killed", name)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["state.pt", "final_state.pt", "report.json"])
@pytest.mark.parametrize("when", ["while", "before", "after"])
def test_killed_while_a_file_is_written(tmp_path, monkeypatch, moment, when):
    run(tmp_path / "whole", "tent")

    def work():
        from lightning_tta import files

        replace, calls = os.replace, []

        def replaced(source, target):
            mine = os.path.basename(target) == moment
            calls.extend([1] * mine)
            if mine and len(calls) == (2 if moment == "state.pt" else 1):
                if when == "while":
                    with open(source, "r+b") as file:
                        file.truncate(os.path.getsize(source) // 2)
                    die()
                if when == "before":
                    die()
                replace(source, target)
                die()
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", replaced)
        run(tmp_path / "a", "tent")

    assert in_a_child(work) == -signal.SIGKILL
    if (moment, when) == ("report.json", "after"):
        assert json.loads((directory_of(tmp_path / "a") / "report.json").read_text())
    else:
        assert not (directory_of(tmp_path / "a") / "report.json").exists()
        assert in_a_child(lambda: run(tmp_path / "a", "tent")) == 0
    assert results(tmp_path / "a") == results(tmp_path / "whole")
