"""What one outer step of Meta-TTT costs, in time and peak memory, against a plain step and against ``higher``.

    python tests/measure/meta_step.py --rounds 20

ResNet-18, two domains x 16 images x 64 pixels by default, one min step. Steps are taken in turn, so that a busy
machine slows all alike; the table gives medians and ratios. ``higher`` (``pip install -e ".[dev]"``) tracks all
weights and takes the domains one after the other, as the authors' code does. Gradients of both are compared first, in
float64. Peak memory: on a GPU, of the allocator; on a CPU, the growth of the resident set of a process that takes
steps of one kind only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta.backbones import create_backbone
from lightning_tta.meta.inner_loop import InnerLoop, InnerParameters, adapt_inner
from lightning_tta.meta.mixed_bn import convert_mixed_bn

Step = Callable[[], list[Tensor]]


def build(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Step]:
    """Each kind of step, as a function that returns the gradient of every parameter."""
    torch.manual_seed(0)
    net: nn.Module = create_backbone(args.net, args.classes)
    settings = InnerLoop(max_steps=0, min_steps=args.steps, threshold=0.5)
    deep = InnerLoop(max_steps=0, min_steps=args.steps, threshold=0.5, adapt_layers=args.deep)
    plain_net = create_backbone(args.net, args.classes).to(args.device, dtype).train()
    net = convert_mixed_bn(net.to(args.device, dtype).eval(), 0.6)
    images = torch.rand(args.domains * args.images, 3, args.pixels, args.pixels, device=args.device, dtype=dtype)
    labels = torch.randint(args.classes, (len(images),), device=args.device)

    def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    def plain() -> list[Tensor]:
        return gradients(cross_entropy(plain_net(images), labels), plain_net)

    def ours(inner: InnerLoop) -> Step:
        inner_parameters = InnerParameters(net, inner)

        def step() -> list[Tensor]:
            result = adapt_inner(
                net, images, inner, domains=args.domains, second_order=True, inner_parameters=inner_parameters
            )
            return gradients(cross_entropy(result.after.flatten(0, 1), labels), net)

        return step

    def with_higher(inner: InnerLoop) -> Step:
        import higher

        kinds = InnerParameters(net, inner).rate_of["min"]
        rates = [inner.rates[kinds[name]] if name in kinds else 0.0 for name, _ in net.named_parameters()]

        def step() -> list[Tensor]:
            total: list[Tensor] = []
            for part, wanted in zip(images.chunk(args.domains), labels.chunk(args.domains), strict=True):
                optimizer = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
                with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, differentiable):
                    for _ in range(inner.min_steps):
                        differentiable.step(inner.loss(fast(part), "min"), override={"lr": rates})
                    found = gradients(cross_entropy(fast(part), wanted) / args.domains, net)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            return total

        return step

    steps = {"plain": plain, "higher": with_higher(settings), "ours": ours(settings), "ours_deep": ours(deep)}
    return {**steps, "higher_deep": with_higher(deep)}


def seconds(step: Step, device: str) -> float:
    """Time of one step."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_megabytes(kind: str) -> float:
    """Peak memory of steps of one kind, in a process of its own with the arguments of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", kind]
    faithful = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: what is freed goes back to the system at once
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=faithful)
    return float(found.stdout.strip().splitlines()[-1])


def report_peak(args: argparse.Namespace) -> None:
    """Print the peak of this process, above what it held before the first step."""
    step = build(args, torch.float32)[args.peak_of]
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    resident = _resident("VmRSS")
    for _ in range(3):
        step()
    print(_resident("VmHWM") - resident)


def _resident(field: str) -> float:
    """Megabytes of this process, now (VmRSS) or at most so far (VmHWM); from /proc, so on Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Compare the gradients, then time and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--net", default="torchvision/resnet18")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--domains", type=int, default=2)
    parser.add_argument("--images", type=int, default=16, help="of each domain")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1, help="inner steps")
    parser.add_argument("--deep", type=float, default=0.3, help="share of the norm layers that the deep mode adapts")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        report_peak(args)
        return

    exact = build(args, torch.float64)
    for name in ("", "_deep"):
        pairs = zip(exact[f"ours{name}"](), exact[f"higher{name}"](), strict=True)
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        print(f"ours{name} against higher, float64: gradients differ by {worst:.1e}")
    del exact

    steps = build(args, torch.float32)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(args.rounds):
        for kind, step in steps.items():
            times[kind].append(seconds(step, args.device))
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    memory = {} if args.no_memory else {kind: peak_megabytes(kind) for kind in steps}
    for kind in steps:
        line = f"{kind:12} {1000 * middle[kind]:8.1f} ms  {_ratios(middle, kind)}"
        print(line + (f"   {memory[kind]:7.0f} MB  {_ratios(memory, kind)}" if memory else ""))
    print(json.dumps({"seconds": middle, "megabytes": memory, "torch": torch.__version__, "device": args.device}))


def _ratios(values: dict[str, float], kind: str) -> str:
    return f"{values[kind] / values['plain']:5.2f}x plain  {values[kind] / values['higher']:5.2f}x higher"


if __name__ == "__main__":
    main()
