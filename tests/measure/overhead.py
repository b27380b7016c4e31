"""Speed of this checkout against another one, in one run on one core: batches take turns, A B B A.

    python tests/measure/overhead.py --against ../before
    python tests/measure/overhead.py --against ../before --bare
    python tests/measure/overhead.py --against ../before --trainer

A worker process per checkout has its package (PYTHONPATH) and one thread; only one of them works at a time. The table
gives the medians in ms, the ratio of this checkout to the other, median over pairs of neighbouring batches, and the
ratio's quartiles. ``--bare``: Tent against the hand-written loop (forward with batch statistics, gradients of the norm
parameters, a step of SGD) on a net so small that what a method costs beside the maths shows. ``--trainer``: a predict
run of Tent, without a logger and with TensorBoard, against the bare loop ``method(images)``, on a net whose forward
takes about 3 ms; processor time of all threads, so that the writer of the curves counts and other processes do not.
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
NETS = {"resnet18": (64, 32), "resnet50": (8, 224)}  # of torchvision, 10 classes; images, pixels
METHODS = ["tent", "zerosiam", "eata", "sar", "cotta", "memo"]
BATCHES = int(os.environ.get("BATCHES", "100"))  # of a stream; workers inherit it
FEW = {"views": 2}  # so that it ends
NO_FILTER = {"entropy_margin": None}  # random weights are sure of nothing, and a step without samples costs less
OPTIONS = {"memo": FEW, "cotta": FEW, "sar": NO_FILTER, "eata": {**NO_FILTER, "diversity_margin": 0.9999}}


def tiny_net() -> nn.Module:
    """A convolution, BatchNorm, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def hand_written() -> Callable[[Tensor], Tensor]:
    """Tent without this package."""
    net = tiny_net().requires_grad_(False).train()
    weights = [weight.requires_grad_() for weight in net[1].parameters()]
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)

    def step(images: Tensor) -> Tensor:
        logits = net(images)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
        return logits.detach()

    return step


def stream_net() -> nn.Module:
    """Of which a forward pass of 64 images of 32 pixels takes about 3 ms on one core."""
    widths = (3, 32, 32, 32)
    layers = [
        layer
        for a, b in itertools.pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


def stream(kind: str) -> Callable[[Tensor], float]:
    """Seconds a batch of a stream: ``forward`` alone, Tent ``bare``, in a ``run``, or in a run with a ``board``."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_tta import TestTimeAdaptation, adapt
    from lightning_tta.methods import Tent
    from lightning_tta.run.board import StreamBoard

    images = [torch.rand(64, 3, 32, 32) for _ in range(8)]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Stream(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            labels = {"domain": torch.zeros(64, dtype=torch.int64), "label": torch.arange(64) % 10}
            first = torch.arange(64)
            self.batches = [{"image": images[n % 8], "index": first + 64 * n, **labels} for n in range(BATCHES)]

        def __len__(self) -> int:
            return BATCHES

        def __getitem__(self, number: int) -> dict[str, Tensor]:
            return self.batches[number]

    class Clock(Callback):
        begun = ended = 0.0

        def on_predict_epoch_start(self, *args: object) -> None:
            self.begun = time.process_time()

        def on_predict_epoch_end(self, *args: object) -> None:
            self.ended = time.process_time()

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)

    def run(_: Tensor) -> float:
        module, clock = TestTimeAdaptation(partial(Tent, lr=1e-3), backbone=stream_net()), Clock()
        with tempfile.TemporaryDirectory() as place:
            trainer = Trainer(
                accelerator="cpu",
                logger=TensorBoardLogger(place) if kind == "board" else False,
                callbacks=[clock, StreamBoard(images=0)],
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=place,
            )
            trainer.predict(module, loader, return_predictions=False)
        return (clock.ended - clock.begun) / BATCHES

    @torch.inference_mode()
    def loop(_: Tensor) -> float:
        call = stream_net() if kind == "forward" else adapt(stream_net(), "tent", lr=1e-3)
        begun = time.process_time()
        for batch in loader:
            call(batch["image"])
        return (time.process_time() - begun) / BATCHES

    return loop if kind in ("forward", "bare") else run


def build(task: str) -> tuple[Callable[[Tensor], Any], Tensor]:
    """What a task calls, and its images: ``bare/tent``, ``resnet18/eata``, ``stream/board``."""
    from lightning_tta import adapt

    torch.manual_seed(0)
    net_name, method_name = task.split("/")
    if net_name == "stream":
        return stream(method_name), torch.empty(0)
    if net_name == "bare":
        images = torch.rand(16, 3, 8, 8)
        settings = {"optimizer": "sgd", "lr": 1e-3}
        return hand_written() if method_name == "by_hand" else adapt(tiny_net(), method_name, **settings), images
    from torchvision import models

    batch, pixels = NETS[net_name]
    images = torch.rand(batch, 3, pixels, pixels)
    method = adapt(getattr(models, net_name)(num_classes=10).eval(), method_name, **OPTIONS.get(method_name, {}))
    if not method.prepared:
        method.prepare([{"image": images[:8], "label": torch.arange(len(images[:8])) % 10}] * 2)
    return method, images


def work() -> None:
    """Serve one line after the other: ``build TASK``, then ``run N``, answered with the milliseconds of a call."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        command, value = line.split()
        if command == "build":
            call, images = build(value)
            answer = "ready"
        else:
            start = time.perf_counter()
            times = [call(images) for _ in range(int(value))]
            seconds = sum(times) if isinstance(times[0], float) else time.perf_counter() - start
            answer = str(1000 * seconds / int(value))
        print(answer, flush=True)


class Worker:
    """A process with the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=checkout)

    def ask(self, line: str) -> str:
        """Send a command, wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args}: ended at '{line}', see above.")
        return answer.strip()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(workers: list[Worker], tasks: list[str], repeats: int, calls: int) -> list[list[float]]:
    """Milliseconds of each worker's task: (first, second) in turn, the order reversed in each other pair."""
    for worker, task in zip(workers, tasks, strict=True):
        worker.ask(f"build {task}")
        worker.ask(f"run {calls}")  # warms up
    times: list[list[float]] = [[], []]
    for repeat in range(repeats):
        for number in (0, 1) if repeat % 2 == 0 else (1, 0):
            times[number].append(float(workers[number].ask(f"run {calls}")))
    return times


def main(args: list[str] | None = None) -> dict[str, float]:
    """Print the tables; returns the ratio of each row."""
    from plumbing import arguments, header, row

    options = arguments(
        __doc__,
        args,
        against=(str, "root of the other checkout"),
        nets=list(NETS),
        methods=METHODS,
        repeats=(20, "pairs of batches"),
        calls=(0, "calls timed together; 0: 1, with --bare 50"),
        bare=(False, "the overhead over a hand-written loop"),
        trainer=(False, "the overhead of a predict run over the bare method"),
    )
    against = Path(options.against).resolve()
    alone = (options.bare or options.trainer) and against == ROOT  # each checkout has its own table there
    checkouts = [("this checkout", ROOT), ("the other", against)][: 1 if alone else 2]
    open_workers = [Worker(root) for _, root in checkouts]
    ratios = {}

    def show(name: str, workers: list[Worker], tasks: list[str], calls: int) -> None:
        first, second = compare(workers, tasks, options.repeats, options.calls or calls)
        pairs = [a / b for a, b in zip(first, second, strict=True)]
        low, ratios[name], high = statistics.quantiles(pairs, n=4, method="inclusive")
        medians = (f"{statistics.median(times):.3g}" for times in (first, second))
        row(name, *medians, f"{ratios[name]:.3f}", f"{low:.3f} to {high:.3f}")

    try:
        if options.bare:
            header("tiny net, batch 16, 8 px", "Tent, ms", "by hand, ms", "ratio", "quartiles")
            open_workers.append(helper := Worker(ROOT))
            for (name, _), worker in zip(checkouts, open_workers, strict=False):
                show(name, [worker, helper], ["bare/tent", "bare/by_hand"], 50)
        elif options.trainer:
            header("Tent, batch 64, 32 px", "ms a batch", "bare, ms", "ratio", "quartiles")
            for (name, root), worker in zip(checkouts, list(open_workers), strict=True):
                open_workers.append(helper := Worker(root))
                for kind in ("forward", "run", "board"):
                    show(f"{name}, {kind}", [worker, helper], [f"stream/{kind}", "stream/bare"], 1)
        else:
            header("", "this, ms", "other, ms", "ratio", "quartiles")
            for task in (f"{net}/{method}" for net in options.nets for method in options.methods):
                show(task.replace("/", ", "), open_workers, [task, task], 1)
    finally:
        for worker in open_workers:
            worker.close()
    return ratios


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
