"""What is equal: plain and captured steps, GPU and CPU, two runs; and where a step waits. For tests/measure/gpu.py."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tta
from cases import Case, Row
from gpu_bench import Bench, capture_report, is_recorded
from gpu_speed import RIVALS
from lightning_tta import adapt, available_methods
from lightning_tta.errors import ConfigError, UnsupportedModelError
from plumbing import make_images, make_net, same

ROOT = Path(__file__).parents[2]
PACKAGE = str(Path(lightning_tta.__file__).parent)


# Right, and repeatable -----------------------------------------------------------------------------------------------

KINDS_OF_PASSES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {"precision": "exact"}),
    "bf16": (torch.float32, {"precision": "bf16"}),
    "bfloat16": (torch.bfloat16, {}),
}


class Streamed:
    """A method on one of the tests' nets, and what five batches gave.

    Args:
        case: Name and options of the method, kind of the net, images in a batch.
        device: Where.
        dtype: Of net and images.
        resumed: Whether the last three batches are taken by another one, that has its state.
        **execution: Its options.
    """

    def __init__(
        self,
        case: tuple[str, dict[str, Any], str, int],
        device: str,
        dtype: torch.dtype = torch.float32,
        resumed: bool = False,
        **execution: Any,
    ) -> None:
        name, options, kind, batch = case
        stream = [make_images(batch, seed, dtype).to(device) for seed in range(5)]

        def build() -> Any:
            method = adapt(make_net(kind).to(device, dtype), name, in_place=True, **options, **execution)
            if not method.prepared:
                source = [make_images(8, 50 + number, dtype).to(device) for number in range(2)]
                method.prepare([{"image": images, "label": torch.arange(8) % 5} for images in source])
            return method

        method = build()
        logits = []
        for number, images in enumerate(stream):
            if resumed and number == 2:
                saved, method = method.state_dict(), build()
                method.load_state_dict(saved)
            logits.append(method(images))
        self.report = capture_report(method)
        self.logits = [u.cpu() for u in logits]
        self.state = {name: t.detach().cpu() for name, t in method.adaptable.items()}
        self.state |= {name: value.cpu() for name, value in method.memory.items() if isinstance(value, Tensor)}

    def difference(self, other: Streamed) -> float:
        """The largest, of logits and state."""
        pairs = [*zip(self.logits, other.logits, strict=True)]
        pairs += [(value, other.state[name]) for name, value in self.state.items() if name in other.state]
        found = [0.0]
        for one, two in pairs:
            gap = (one.double() - two.double()).abs()
            found.append(
                float(gap[~(one.isnan() & two.isnan())].nan_to_num(nan=float("inf")).max()) if gap.numel() else 0
            )
        return max(found)

    def unequal(self, other: Streamed) -> list[str]:
        """What is not equal bit by bit, by name."""
        logits = [f"logits {number}" for number, u in enumerate(self.logits) if not same(u, other.logits[number])]
        return logits + [name for name, value in self.state.items() if not same(value, other.state.get(name))]


def correct_row(bench: Bench, name: str, options: dict[str, Any]) -> Row:
    """One method on all nets, precisions and batch sizes."""
    worst: dict[str, float] = {}
    equal: dict[str, list[bool]] = {}
    counts = Counter({"recorded": 0, "refused": 0})

    def widest(column: str, value: float) -> None:
        worst[column] = max(worst.get(column, 0.0), value)

    kinds, batches = (("bn", "ln"), (3,)) if bench.smoke else (("bn", "gn", "ln"), (8, 1))
    for kind in kinds:
        for passes, (dtype, execution) in KINDS_OF_PASSES.items():
            for batch in batches:
                run = functools.partial(Streamed, (name, options, kind, batch))
                here = functools.partial(run, bench.device, dtype, **execution)
                with bench.account.guarded(f"correct: {name} {kind} {passes} b{batch}"):
                    try:
                        plain = here(capture=False)
                    except UnsupportedModelError:
                        counts["refused"] += 1
                        continue
                    if passes == "fp32":
                        widest("lean - whole", here(capture=False, lean=True).difference(plain))
                        if bench.cuda:
                            widest("GPU - CPU", run("cpu", dtype, **execution).difference(plain))
                    if bench.cuda:
                        try:
                            captured = here(capture=True)
                            counts["recorded"] += is_recorded(captured.report)
                            widest(f"captured - plain, {passes}", captured.difference(plain))
                        except (ConfigError, UnsupportedModelError) as error:
                            bench.account.notes[f"correct: {name} {kind} {passes} b{batch}: not captured"] = str(error)
                if passes == "fp32" and batch == batches[0]:
                    with bench.account.guarded(f"correct: {name} {kind} deterministic"):
                        exact = functools.partial(here, deterministic=True)
                        first = exact(capture=False)
                        pairs = {"two runs": exact(capture=False), "resumed": exact(resumed=True)}
                        if bench.cuda and is_recorded((captured := exact()).report):
                            pairs["captured = plain"] = captured
                        for column, other in pairs.items():
                            unequal = first.unequal(other)
                            equal.setdefault(column, []).append(not unequal)
                            if unequal:
                                bench.account.notes[f"correct: {name} {kind} deterministic, {column}"] = unequal[:4]
    row: Row = {**counts, **worst}
    return row | {f"bits: {column}": f"{sum(values)} of {len(values)}" for column, values in equal.items()}


def alone_row() -> Row:
    """``deterministic=True`` in a process of its own, which has set nothing before."""
    code = (
        "import torch, lightning_tta\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(1), "
        "torch.nn.Flatten(), torch.nn.Linear(8, 5)).cuda()\n"
        "method = lightning_tta.adapt(net, 'tent', deterministic=True)\n"
        "print([float(method(torch.rand(8, 3, 16, 16, device='cuda')).sum()) for _ in range(4)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return {"in a fresh process": "runs" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:200]}


def correct(bench: Bench) -> Iterator[Case]:
    """Every method."""
    from contract import VARIANTS

    for name in ("tent", "cotta") if bench.smoke else available_methods():
        run = functools.partial(correct_row, bench, name, VARIANTS.get(name, [{}])[0])
        yield Case("correct", name, 15, run, 1)
    yield Case("correct", "deterministic=True", 20, alone_row, 3, bench.without_cuda)


# Where a step waits --------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations, and those whose result or shape has to come to the host."""

    ASK = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "equal", "is_nonzero", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.number, self.asking = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.number += 1
        if name in self.ASK or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.asking[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(step: Callable[[], object]) -> Counter[str]:
    """The package's lines that wait for the GPU."""
    lines: Counter[str] = Counter()

    def count(message: Any, *more: Any, **others: Any) -> None:
        if "synchroniz" in str(message):
            mine = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            lines[f"{mine[-1].filename[len(PACKAGE) + 1 :]}:{mine[-1].lineno}" if mine else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return lines


def kernels_of(step: Callable[[], object]) -> tuple[int, float]:
    """Kernels of a step, and milliseconds in which at least one of them runs."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if "CUDA" in str(e.device_type) and not getattr(e, "is_user_annotation", False)]
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in events if not e.name.startswith(("Mem", "ProfilerStep"))
    )
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return len(spans), busy / 1000


def waits_row(bench: Bench, net: str, name: str, options: dict[str, Any], batch: int) -> Row:
    """A step of one method, plain and captured."""
    x, row = bench.images(net, batch), {}
    for way in ("plain", "captured") if bench.cuda else ("plain",):
        with bench.account.guarded(f"waits: {name} {way}"):
            try:
                method = bench.ours(net, name, capture=False if way == "plain" else "auto", **options)()
            except UnsupportedModelError as error:
                return {"operations": f"refused: {str(error).split('.')[0]}"}
            for _ in range(4 if bench.cuda else 2):
                method(x)
            if way == "plain":
                with Operations() as operations:
                    method(x)
                row |= {"operations": operations.number, "asking": operations.asking.total()}
                if operations.asking:
                    bench.account.notes[f"waits: {name}: asking"] = dict(operations.asking)
            if bench.cuda:
                lines = waits_of(lambda call=method: call(x))
                bench.account.notes[f"waits: {name} {way}: lines"] = dict(lines)
                kernels, busy = kernels_of(lambda call=method: call(x))
                idle = 1 - busy / (1000 * statistics.median(bench.clock(lambda call=method: call(x)) for _ in range(5)))
                row |= {f"{way}: waits": lines.total(), f"{way}: kernels": kernels, f"{way}: idle": f"{idle:.0%}"}
    return row


def waits(bench: Bench) -> Iterator[Case]:
    """Every method."""
    few = {"memo": {"views": 4}, "zero": {"views": 4}, "view_averaging": {"views": 4}}
    net, batch = ("tiny GN", 4) if bench.smoke else ("ResNet-26-GN", 16)
    for name in ("tent", "zerosiam", "memo") if bench.smoke else available_methods():
        options = RIVALS[name][0] if name in RIVALS else few.get(name, {})
        if name == "norm":  # takes BatchNorm alone
            continue
        yield Case("waits", name, 8, functools.partial(waits_row, bench, net, name, options, batch), 3)
