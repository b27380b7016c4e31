"""Runs on two processes, copies of that of the tests, which spares them the imports; held, killed and compared."""

import json
import os
import signal
import socket
import sys
import time
from functools import partial

import pytest
import torch
from contract import VARIANTS
from lightning.pytorch import Callback, Trainer, seed_everything
from nets import make_net
from test_kill import counting_lines

from lightning_tta import DigitsData, TestTimeAdaptation, available_methods

MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
PATIENCE = 120  # seconds
OWN = ("predictions.rank{}.csv", "batches.rank{}.jsonl")
TIMES = ("seconds", "seconds_per_batch", "wall_seconds", "environment", "peak_memory_mb", "peak_memory")


class Processes:
    """Started with ``work(rank)``; what one raises is in a file beside the directory ``root``.

    They are one process group, so that one signal reaches all.
    """

    def __init__(self, work, root, world=2):
        directory = root.with_name(f"errors_{root.name}")
        directory.mkdir(parents=True, exist_ok=True)
        self.errors = [directory / f"error.{rank}" for rank in range(world)]
        for path in self.errors:
            path.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ready, go = os.pipe()
        self.children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(ready, 1)  # until all have been started, and are of one group
                self._child(work, rank, world, port)
            self.children.append(child)
            os.setpgid(child, self.children[0])
        os.close(go)
        os.close(ready)

    def _child(self, work, rank, world, port):
        status = 1
        place = {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
                sys.stdout = sys.stderr = nothing
                work(rank)
            status = 0
        except BaseException as error:
            self.errors[rank].write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)  # nothing of the tests runs twice

    def wait(self):
        """How each ended; whoever takes too long is killed."""
        end, codes = time.monotonic() + PATIENCE, [None] * len(self.children)
        while None in codes:
            for number, child in enumerate(self.children):
                if codes[number] is None:
                    pid, status = os.waitpid(child, os.WNOHANG)
                    codes[number] = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0.01)
            if time.monotonic() > end:
                self.kill()
                end += PATIENCE
        return codes

    def kill(self):
        """All at once."""
        os.killpg(self.children[0], signal.SIGKILL)

    def said(self):
        """What each has raised."""
        return [path.read_text() if path.exists() else "" for path in self.errors]


def trainer(root, world, **options):
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
        enable_progress_bar=False,
        default_root_dir=root,
        **{"logger": False, **options},
    )


def run(root, name="tent", world=2, callbacks=(), logger=False, **options):
    """The first process has ten batches, the second five."""
    seed_everything(0, verbose=False)
    method = partial(available_methods()[name], **VARIANTS.get(name, [{}])[-1])
    data = DigitsData(domains=["gaussian_noise", "contrast", "clean"], num_images=40, batch_size=8)
    options = {"save_every": 2, "resume": "auto", "source_images": 64, "reset": "domain", **options}
    module = TestTimeAdaptation(method, backbone=make_net("bn", num_classes=10), **options)
    made = trainer(root, world, callbacks=list(callbacks), logger=logger() if logger else False)
    made.predict(module, datamodule=data, return_predictions=False)
    return module


def together(root, *args, world=2, **options):
    """Run on all; how each ended, and what it raised."""
    processes = Processes(lambda rank: run(root, *args, world=world, **options), root, world)
    return processes.wait(), processes.said()


def outcome(root):
    """What must not depend on interruptions, of both and of each."""
    whole = json.loads((root / "report.json").read_text())
    for name in TIMES:
        whole.pop(name, None)
    each = []
    for rank in range(2):
        predictions, batches = (root / name.format(rank) for name in OWN)
        rows = [json.loads(line) for line in batches.read_text().splitlines()]
        each += [predictions.read_bytes(), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]]
    return (root / "predictions.csv").read_bytes(), json.dumps(whole), each


class Stop(Callback):
    """Holds a process before its batch number ``at[rank]``, until it is killed."""

    def __init__(self, root, at):
        self.root, self.at = root, at
        for path in root.glob("held*"):
            path.unlink()

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if pl_module.summary.batches == self.at[trainer.global_rank]:
            self.root.joinpath(f"held{trainer.global_rank}").touch()
            time.sleep(1000)

    def wait(self):
        """Wait until each is held, or has ended its share where it is not to be held."""
        for rank, at in enumerate(self.at):
            path = self.root / (f"final_state.rank{rank}.pt" if at is None else f"held{rank}")
            until(path.exists)


def until(found):
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def saved(root):
    """The batches after which each has saved its state."""
    paths = [root / f"state.rank{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=True)["batches"] if path.exists() else None for path in paths]


def stopped_at(root, at, name="tent", **options):
    """Kill both where they are held; what they have saved."""
    stop = Stop(root, at)
    processes = Processes(lambda rank: run(root, name, callbacks=[stop], **options), root)
    try:
        stop.wait()
    finally:
        processes.kill()
    assert processes.wait() == [-signal.SIGKILL] * 2
    for path in root.glob("held*"):
        path.unlink()
    return saved(root)


def line_count(root, name):
    """How many lines of the package each runs."""

    def work(rank):
        lines = counting_lines(lambda: run(root, name))
        (root / f"lines{rank}").write_text(str(lines))

    assert Processes(work, root).wait() == [0, 0]
    return [int((root / f"lines{rank}").read_text()) for rank in range(2)]


def whole_runs(tmp_path_factory):
    """The outcome of runs that nobody interrupts, by method."""
    made = {}

    def of(name="tent"):
        if name not in made:
            root = tmp_path_factory.mktemp("whole") / name
            assert together(root, name, save_every=None, resume="never")[0] == [0, 0]
            made[name] = outcome(root)
        return made[name]

    return of
