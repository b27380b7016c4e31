"""Which run two processes go on with: they agree, and what stops one stops both."""

import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout

import pytest
from forked import Stop, outcome, run, stopped_at, together, until, whole_runs
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_tta import Guard
from lightning_tta.cli.main import main
from processes import MARKS, Processes
from runs import directory_of

pytestmark = MARKS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_runs(tmp_path_factory)


def refused(root, *words, world=2, **options):
    """All raise the same."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    codes, said = together(root, world=world, **options)
    assert codes == [1] * world
    assert len({text for text in said}) == 1
    assert all(word in said[0] for word in words), said[0]
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def named(root):
    return lambda: TensorBoardLogger(root, name="", version="x")


def test_a_finished_run_is_left_alone(tmp_path):
    root = tmp_path / "a"
    assert together(root)[0] == [0, 0]
    refused(root, "FinishedError", "nothing to continue")
    replaced = directory_of(root) / "final_state.rank1.pt"
    replaced.write_bytes(b"old")
    assert together(root, resume="restart", save_every=None)[0] == [0, 0]
    assert replaced.read_bytes() != b"old"


def test_in_a_named_directory_another_run_or_number_of_processes_is_refused_and_named(tmp_path):
    root = tmp_path / "a"
    stopped_at(root, [5, 3], logger=named(root))
    refused(root, "ConfigError", "method: 'tent' != 'source'", name="source", logger=named(root))
    refused(root, "ConfigError", "protocol.world_size: 2 != 3", world=3, logger=named(root))
    refused(root, "ConfigError", "protocol.world_size: 2 != 1", "'replicas' != 'single'", world=1, logger=named(root))
    (root / "x" / "state.rank0.pt").unlink()
    refused(root, "ConfigError", "protocol.world_size: 2 != 1", world=1, logger=named(root))


@pytest.mark.parametrize("options", [{"save_every": 1}, {"save_every": None, "on_bad_batch": "skip"}])
def test_synchronised_processes_cannot(tmp_path, options):
    root = tmp_path / "a"
    refused(root, "ConfigError", "cannot be used with synchronised", processes="synchronised", **options)
    stopped_at(root, [5, 3])
    refused(root, "ConfigError", "cannot be used with synchronised", processes="synchronised", **options)


def test_a_guard_is_for_one(tmp_path):
    refused(tmp_path / "a", "ConfigError", "Guard is for one process", callbacks=[Guard()])


def test_two_processes_leave_what_one_has_begun(tmp_path):
    """Another number of processes is another run, and has a directory of its own."""
    root = tmp_path / "a"
    stop = Stop(root, [3])
    processes = Processes(lambda rank: run(root, world=1, callbacks=[stop]), root, world=1)
    until((root / "held0").exists)
    processes.kill()
    processes.wait()
    (one,) = root.glob("*/state.pt")
    before = one.read_bytes()
    assert together(root)[0] == [0, 0]
    assert one.read_bytes() == before
    assert len(list(root.glob("tent-*"))) == 2


def test_one_that_lives_keeps_the_directory(tmp_path, whole):
    """The first process is killed; the second, which does not know yet, must not write beside its successor."""
    stop = Stop(tmp_path, [5, 3])
    processes = Processes(lambda rank: run(tmp_path, callbacks=[stop]), tmp_path)
    stop.wait()
    refused(tmp_path, "ConfigError", "in use")
    os.kill(processes.children[0], signal.SIGKILL)
    os.waitid(os.P_PID, processes.children[0], os.WEXITED | os.WNOWAIT)
    refused(tmp_path, "ConfigError", "in use")
    refused(tmp_path, "ConfigError", "in use", resume="restart")
    processes.kill()
    processes.wait()
    assert together(tmp_path)[0] == [0, 0]
    assert outcome(tmp_path) == whole()


@pytest.mark.parametrize("dead", [0, 1])
def test_one_that_is_killed_leaves_none_waiting(tmp_path, whole, dead):
    stop = Stop(tmp_path, [5, None] if dead == 0 else [None, 3])
    processes = Processes(lambda rank: run(tmp_path, callbacks=[stop]), tmp_path)
    stop.wait()
    os.kill(processes.children[dead], signal.SIGKILL)
    start = time.monotonic()
    codes = processes.wait()
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1
    assert time.monotonic() - start < 60
    assert together(tmp_path)[0] == [0, 0]
    assert outcome(tmp_path) == whole()


def test_shorter_predictions_of_one_are_noticed_by_both(tmp_path):
    root = tmp_path / "a"
    stopped_at(root, [5, 3])
    (directory_of(root) / "predictions.rank1.csv").write_text("index\n")
    refused(root, "predictions.rank1.csv has 6 bytes", "--state.resume restart")


# Which directory -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_loggers_write_into_the_directory_of_the_configuration(tmp_path, whole, kind):
    def logger():
        return kind(tmp_path, name="run")

    def runs():
        return sorted(path.name.partition("-")[0] for path in (tmp_path / "run").iterdir())

    stopped_at(tmp_path / "run", [5, 3], logger=logger)
    (tent,) = (tmp_path / "run").iterdir()
    stopped_at(tmp_path / "run", [5, 3], "source", logger=logger)  # another method: a run of its own
    assert runs() == ["source", "tent"]
    assert together(tmp_path, logger=logger)[0] == [0, 0]
    assert outcome(tent) == whole()
    refused(tmp_path, "FinishedError", f"{tent.name} is finished", logger=logger)
    assert together(tmp_path, "source", logger=logger)[0] == [0, 0]
    assert runs() == ["source", "tent"]
    stopped_at(tmp_path / "run", [5, 3], "norm", logger=logger)
    next((tmp_path / "run").glob("norm-*/state.rank1.pt")).unlink()
    assert together(tmp_path, "norm", logger=logger)[0] == [0, 0]  # not every process could continue
    assert together(tmp_path, "norm", logger=logger, world=1)[0] == [0]  # another number of processes
    assert runs() == ["norm", "norm", "source", "tent"]


@pytest.mark.slow
def test_command_line(tmp_path):
    """Started as users do it, killed with all that it has started, and started again until it is done."""
    command = ["predict", "--model.source_ckpt=none", "--model.method=Tent", "--model.backbone=cifar/resnet20"]
    command += ["--data=DigitsData", "--data.domains=[contrast, clean, haze]", "--data.num_images=60"]
    command += ["--data.batch_size=4", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    resume = ("--state.save_every=3",)

    def arguments(name, *more):
        return [*command, f"--trainer.default_root_dir={tmp_path / name}", *more]

    def start():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "lightning_tta", *arguments("cut", *resume)]
        return subprocess.Popen(line, env=environment, start_new_session=True)

    def on_copies(name, *more):
        """The same without another start of Python; what each process prints."""

        def work(rank):
            with (tmp_path / f"{name}{rank}").open("w") as file, redirect_stdout(file):
                main(arguments(name, *more))

        Processes(work, tmp_path / name).succeed()
        return [(tmp_path / f"{name}{rank}").read_text() for rank in range(2)]

    on_copies("whole")
    cut, (whole,) = tmp_path / "cut" / "lightning_logs", (tmp_path / "whole" / "lightning_logs").iterdir()
    killed, path = start(), cut / whole.name / "predictions.rank1.csv"
    until(lambda: path.exists() and path.read_text().count("\n") > 20)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert not (cut / whole.name / "report.json").exists()
    assert start().wait(200) == 0
    assert outcome(cut / whole.name) == outcome(whole)
    said = on_copies("cut", *resume)  # no error: a supervisor may start it again and again
    assert sum(text.count(f"{whole.name} is finished") for text in said) == 1
    assert [path.name for path in cut.iterdir()] == [whole.name]
