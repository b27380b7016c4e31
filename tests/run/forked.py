"""Predict runs on two processes: held, killed and compared."""

import json
import signal
import time
from functools import partial

import torch
from lightning.pytorch import Callback, seed_everything
from test_kill import counting_lines

from contract import VARIANTS
from lightning_tta import DigitsData, TestTimeAdaptation, available_methods
from nets import make_net
from processes import PATIENCE, Processes, trainer

OWN = ("predictions.rank{}.csv", "batches.rank{}.jsonl")
TIMES = ("seconds", "seconds_per_batch", "wall_seconds", "environment", "peak_memory_mb", "peak_memory")


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
