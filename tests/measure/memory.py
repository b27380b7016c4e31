"""What the backward pass of a net keeps, whose norm layers learn, with and without ``lean``: bytes, peak, time.

    python tests/measure/memory.py
    python tests/measure/memory.py --nets resnet50 vit_b_16 --batch 4 --rounds 3

One table, in MB of 2**20 bytes: what the graph keeps beside weights; the peak of a pass forwards and backwards, by the
shapes of all tensors that operations return (on torch's ``meta`` device, so that no memory is needed; without what
kernels take inside), for the batch and for ``--scaled`` images; the peak of resident memory of Tent in a process of its
own; Tent's time, the kinds taking turns, as a ratio to ``lean=False``, with its quartiles. Nets are torchvision's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import models

from lightning_tta import adapt
from lightning_tta.backbones.lean import lean_backward
from lightning_tta.backbones.norms import norm_parameters
from plumbing import arguments, header, resident, row

KINDS: tuple[bool | str, ...] = (False, "auto", True)
MB = 2**20


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def make(name: str) -> nn.Module:
    """A net of torchvision for 10 classes."""
    net: nn.Module = getattr(models, name)(num_classes=10)
    return net.eval()


def by_shapes(name: str, batch: int, pixels: int, lean: bool | str) -> tuple[float, float]:
    """MB that the graph keeps beside weights, and peak MB with them, of a pass of the net on ``meta``."""
    with torch.device("meta"):
        net, x = make(name).requires_grad_(False), torch.rand(batch, 3, pixels, pixels)
    learned = [parameter.requires_grad_() for parameter in norm_parameters(net).values()]
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None  # the batch's own
    counted, kept = Allocated(), dict[int, int]()
    for tensor in (*net.parameters(), *net.buffers(), x):
        counted.add(tensor)
    weights = set(counted.live)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = 0 if storage._cdata in weights else storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    context: AbstractContextManager[None] = lean_backward(net, only_free=lean == "auto") if lean else nullcontext()
    with counted, context:
        with hooks:
            logits = net(x)
            loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        torch.autograd.grad(loss, learned, allow_unused=True)
    return sum(kept.values()) / MB, counted.peak / MB


def resident_peak(name: str, batch: int, pixels: int, lean: bool | str) -> float:
    """Peak MB of two batches of Tent in a new process, above what it had before the first."""
    given = [name, str(batch), str(pixels), str(lean)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps what is freed between others, else
    command = [sys.executable, __file__, "--worker", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def work(name: str, batch: str, pixels: str, lean: str) -> None:
    """What the new process does."""
    torch.set_num_threads(1)
    kind = {"True": True, "False": False}.get(lean, lean)
    method, images = adapt(make(name), "tent", lean=kind), torch.rand(int(batch), 3, int(pixels), int(pixels))
    before = resident()
    for _ in range(2):
        method(images)
    print((resident("VmHWM") - before) / MB)


def ratios(name: str, batch: int, pixels: int, rounds: int) -> dict[bool | str, list[float]]:
    """Seconds of this thread for Tent's batch over those with ``lean=False``, of each round."""
    net, images = make(name), torch.rand(batch, 3, pixels, pixels)
    methods = {lean: adapt(net, "tent", lean=lean) for lean in KINDS}
    results: dict[bool | str, list[float]] = {lean: [] for lean in KINDS}
    for number in range(rounds + 1):
        seconds = {}
        for lean in KINDS if number % 2 else reversed(KINDS):
            start = time.thread_time()  # not what other processes take
            methods[lean](images)
            seconds[lean] = time.thread_time() - start
        if number:
            for lean, taken in seconds.items():
                results[lean].append(taken / seconds[False])
    return results


def main(args: list[str] | None = None) -> dict[tuple[str, bool | str], list[tuple[float, float]]]:
    """Print the table; returns what is kept and the peak by shapes, of the batch and of the scaled one."""
    options = arguments(
        __doc__,
        args,
        nets=["resnet50", "resnet18", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vit_b_16"],
        batch=8,
        pixels=224,
        scaled=(64, "images of the second peak by shapes"),
        rounds=(10, "timed; 0: no times"),
        no_resident=(False, "leave resident memory out"),
    )
    torch.set_num_threads(1)
    results = {}
    small, large = f"b{options.batch}", f"b{options.scaled}"
    header("net", "lean", f"kept {small}", f"peak {small}", f"kept {large}", f"peak {large}", "resident", "time")
    for name in options.nets:
        times = ratios(name, options.batch, options.pixels, options.rounds) if options.rounds else {}
        for lean in KINDS:
            sizes = [by_shapes(name, number, options.pixels, lean) for number in (options.batch, options.scaled)]
            results[name, lean] = sizes
            cells = [f"{value:,.0f}" for pair in sizes for value in pair]
            peak = "" if options.no_resident else f"{resident_peak(name, options.batch, options.pixels, lean):,.0f}"
            spread = ""
            if len(times.get(lean, [])) > 1:
                low, middle, high = statistics.quantiles(times[lean], n=4)
                spread = f"{middle:.3f} ({low:.3f}-{high:.3f})"
            row(name, lean, *cells, peak, spread)
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
