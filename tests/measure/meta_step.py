"""What one outer step of Meta-TTT costs, in time and peak memory, against a plain step and against ``higher``.

    python tests/measure/meta_step.py --rounds 20
    python tests/measure/meta_step.py --rounds 20 --against ../before

ResNet-18, two domains x 16 images x 64 pixels by default, one min step. Steps are taken in turn, so that a busy
machine slows all alike; the table gives medians and ratios. ``higher`` (``pip install -e ".[dev]"``) tracks all
weights and takes the domains one after the other, as the authors' code does. Gradients of both are compared first, in
float64. Peak memory: on a GPU, of the allocator; on a CPU, the growth of the resident set of a process that takes
steps of one kind only. ``kernels``: operations of torch that compute something, forward and backward; a GPU at this
size is bound by their number. ``asks``: those that would wait for a device. ``saved``: what the graph holds before the
outer backward, parameters left out. ``--against``: the same step with the package of another checkout, in a process of
its own that takes its turn. On a GPU ``replayed`` is the step as the training module takes it: as one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tta.backbones import create_backbone
from lightning_tta.meta.inner_loop import InnerLoop, InnerParameters, adapt_inner
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from plumbing import CUDA_OR_CPU, arguments, header, medians, resident, row, take_turns

Step = Callable[[], list[Tensor]]
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
NO_KERNEL = ("detach", "empty", "new_empty", "lift_fresh", "_unsafe_view", "_reshape_alias")


def build(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Step]:
    """Each kind of step, as a function that returns the gradient of every parameter."""
    torch.manual_seed(0)
    net: nn.Module = create_backbone(options.net, options.classes)
    all_layers, deep = (
        InnerLoop(max_steps=0, min_steps=options.steps, threshold=0.5, adapt_layers=share)
        for share in (1.0, options.deep)
    )
    plain_net = create_backbone(options.net, options.classes).to(options.device, dtype).train()
    net = convert_mixed_bn(net.to(options.device, dtype).eval(), 0.6)
    shape = (options.domains * options.images, 3, options.pixels, options.pixels)
    images = torch.rand(shape, device=options.device, dtype=dtype)
    labels = torch.randint(options.classes, shape[:1], device=options.device)

    def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    def plain() -> list[Tensor]:
        return gradients(cross_entropy(plain_net(images), labels), plain_net)

    def ours(inner: InnerLoop, replayed: bool = False) -> Step:
        inner_parameters = InnerParameters(net, inner)

        def step() -> list[Tensor]:
            return gradients(outer(images, labels), net)

        def outer(images: Tensor, labels: Tensor) -> Tensor:
            result = adapt_inner(
                net, images, inner, domains=options.domains, second_order=True, inner_parameters=inner_parameters
            )
            return cross_entropy(result.after.flatten(0, 1), labels)

        if not replayed:
            return step
        from lightning_tta.modules.recorded_loss import RecordedLoss

        recorded = RecordedLoss(capture=True)
        return lambda: gradients(recorded(net, lambda *given: (outer(*given),), [images, labels])[0], net)

    def with_higher(inner: InnerLoop) -> Step:
        kinds = InnerParameters(net, inner).rate_of["min"]
        rates = [inner.rates[kinds[name]] if name in kinds else 0.0 for name, _ in net.named_parameters()]

        def step() -> list[Tensor]:
            import higher

            by_domain = []
            for x, y in zip(images.chunk(options.domains), labels.chunk(options.domains), strict=True):
                optimizer = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
                with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, differentiable):
                    for _ in range(inner.min_steps):
                        differentiable.step(inner.loss(fast(x), "min"), override={"lr": rates})
                    by_domain.append(gradients(cross_entropy(fast(x), y) / options.domains, net))
            return [torch.stack(domains).sum(0) for domains in zip(*by_domain, strict=True)]

        return step

    steps = {"plain": plain, "higher": with_higher(all_layers), "ours": ours(all_layers), "ours_deep": ours(deep)}
    if options.device == "cuda":
        steps |= {"replayed": ours(all_layers, replayed=True), "replayed_deep": ours(deep, replayed=True)}
    return {**steps, "higher_deep": with_higher(deep)}


class Operations(TorchDispatchMode):
    """Counts operations that compute something, and those that ask a device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.asks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        name = func.name().split("::")[1].split(".")[0]
        self.asks += name.startswith(ASKS)
        self.kernels += not (func.is_view or name.startswith(NO_KERNEL))
        return func(*args, **(kwargs or {}))


def count(step: Step) -> tuple[int, int, float]:
    """Kernels, questions to the device, and saved MB of a step."""
    with Operations() as operations:
        step()
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # so that no address is given out twice
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return operations.kernels, operations.asks, sum(storages.values()) / 2**20


class Elsewhere:
    """A step of one kind with the package of another checkout, in a process of its own."""

    def __init__(self, root: str, kind: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(root).resolve())}
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", kind]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self) -> list[Tensor]:
        """Take one step there; the pipe costs microseconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        self.answer = json.loads(self.process.stdout.readline())
        return []


def serve(options: argparse.Namespace) -> None:
    """Take a step for each line of the input; the first answer holds the counts."""
    step = build(options, torch.float32)[options.serve]
    counts = count(step)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps([time.perf_counter() - start, *counts]), flush=True)


def peak_megabytes(kind: str) -> float:
    """Peak memory of steps of one kind, in a process of its own with the arguments of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", kind]
    faithful = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: what is freed goes back to the system at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=faithful)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(options: argparse.Namespace) -> None:
    """Print the peak of this process, above what it held before the first step."""
    step, cuda = build(options, torch.float32)[options.peak_of], options.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident()
    for _ in range(3):
        step()
    print(((torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before) / 2**20)


def main(args: list[str] | None = None) -> None:
    """Compare the gradients, then time and memory."""
    options = arguments(
        __doc__,
        args,
        net="torchvision/resnet18",
        classes=10,
        domains=2,
        images=(16, "of each domain"),
        pixels=64,
        steps=(1, "inner steps"),
        deep=(0.3, "share of the norm layers that the deep mode adapts"),
        rounds=20,
        device=CUDA_OR_CPU,
        no_memory=(False, "measure time only"),
        peak_of=("", "print the peak memory of this kind of step, nothing else"),
        serve=("", "take steps of this kind, one for each line of the input"),
        against=("", "root of another checkout"),
        kinds=(["plain", "higher", "ours", "ours_deep", "replayed", "replayed_deep", "higher_deep"], "of steps"),
        no_check=(False, "do not compare gradients with those of higher"),
    )
    if options.serve:
        serve(options)
        return
    if options.peak_of:
        print_peak(options)
        return

    exact = {} if options.no_check else build(options, torch.float64)
    for name in ("", "_deep") if exact else ():
        pairs = zip(exact[f"ours{name}"](), exact[f"higher{name}"](), strict=True)
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        print(f"ours{name} against higher, float64: gradients differ by {worst:.1e}")
    del exact

    steps = {kind: step for kind, step in build(options, torch.float32).items() if kind in ("plain", *options.kinds)}
    counts = {kind: count(step) for kind, step in steps.items()}
    memory = {} if options.no_memory else {kind: peak_megabytes(kind) for kind in steps}
    turns: dict[str, Callable[[], object]] = dict(steps)
    if options.against:
        turns |= {f"{kind}, before": Elsewhere(options.against, kind) for kind in steps if kind.startswith("ours")}
    times = medians(take_turns(turns, options.rounds, options.device))
    for kind, turn in turns.items():
        if isinstance(turn, Elsewhere):
            counts[kind] = tuple(turn.answer[1:])
            turn.process.kill()
    header("step", "ms", "over plain", "kernels", "asks", "saved MB", "peak MB")
    for kind in turns:
        kernels, asks, saved = counts[kind]
        peak = f"{memory[kind]:.0f}" if kind in memory else ""
        row(
            kind, f"{1e3 * times[kind]:.1f}", f"{times[kind] / times['plain']:.2f}", kernels, asks, f"{saved:.0f}", peak
        )
    print(json.dumps({"seconds": times, "megabytes": memory, "torch": torch.__version__, "device": options.device}))


if __name__ == "__main__":
    main()
