"""What each kind of statistics= costs: time of a batch over ``batch``, passes, memory; all kinds take turns.

    python tests/measure/bn_statistics.py
    python tests/measure/bn_statistics.py --nets resnet50 --pixels 96 --rounds 5 --methods tent --classes 1000

Nets are torchvision's, with random weights; images are noise, each batch of another brightness. Times are this thread's
processor time, one thread, so that other processes do not count; the ratio is the median over rounds, with its
quartiles. ``state`` is what the kind keeps, ``peak`` the most that a batch has in memory at a time beside weights and
state, by the tensors that operations return; both in MB of 2**20 bytes.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from torchvision import models

from lightning_tta import adapt
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import size
from lightning_tta.methods.components.statistics import KINDS
from memory import MB, Allocated
from plumbing import arguments, header, row

IMAGES = {"resnet18": (64, 32), "resnet50": (8, 64)}


def make(net: str, method: str, kind: str, classes: int) -> TTAMethod:
    """A method on a net whose source statistics are those of a batch, so that its activations are of a usual size."""
    torch.manual_seed(0)
    model = models.get_model(net, num_classes=classes).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(16, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # instance: that the net was not trained with it
        return adapt(model.eval(), method, statistics=kind, in_place=True)


def peak(method: TTAMethod, images: torch.Tensor) -> float:
    """MB at most in a batch, beside what is there before it."""
    counted = Allocated()
    for tensor in (*method.parameters(), *method.buffers(), *method.rest.values(), images):
        counted.add(tensor)
    before = counted.now
    counted.peak = before
    with counted:
        method(images)
    return (counted.peak - before) / MB


def main(args: list[str] | None = None) -> dict[tuple[str, str, str], float]:
    """Print the table; returns the ratio of the time to that of ``batch``, by net, method and kind."""
    options = arguments(
        __doc__,
        args,
        nets=list(IMAGES),
        methods=["tent", "source"],
        kinds=[kind for kind in KINDS if kind != "batch"],
        batch=(0, "images; 0: 64 of resnet18, 8 of others"),
        pixels=(0, "of a side; 0: 32 of resnet18, 64 of others"),
        classes=10,
        rounds=(10, "timed"),
    )
    torch.set_num_threads(1)
    ratios = {}
    header("net", "method", "kind", "ms", "x batch", "quartiles", "forward", "state", "peak")
    for net in options.nets:
        number, pixels = IMAGES.get(net, (8, 64))
        shape = (options.batch or number, 3, options.pixels or pixels, options.pixels or pixels)
        for name in options.methods:
            kinds = ["batch", *(kind for kind in options.kinds if kind != "batch")]
            methods = {kind: make(net, name, kind, options.classes) for kind in kinds}
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for turn in range(options.rounds + 1):
                images = torch.rand(shape) * (0.5 + 0.5 * (turn % 3) / 2)
                for kind in kinds if turn % 2 else reversed(kinds):
                    start = time.thread_time()
                    methods[kind](images)
                    if turn:
                        seconds[kind].append(time.thread_time() - start)
            for kind, method in methods.items():
                over = [a / b for a, b in zip(seconds[kind], seconds["batch"], strict=True)]
                low, middle, high = statistics.quantiles(over, n=4) if len(over) > 1 else over * 3
                ratios[net, name, kind] = middle
                kept = {state: value for state, value in method.memory.items() if state.startswith("statistics.")}
                row(
                    net,
                    name,
                    kind,
                    f"{1000 * statistics.median(seconds[kind]):.0f}",
                    f"{middle:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{method.stats['forwards']:.0f}",
                    f"{size(kept) / MB:.2f}",
                    f"{peak(method, images):.0f}",
                )
    return ratios


if __name__ == "__main__":
    main()
