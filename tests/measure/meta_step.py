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
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta.backbones import create_backbone
from lightning_tta.meta.inner_loop import InnerLoop, InnerParameters, adapt_inner
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from plumbing import CUDA_OR_CPU, arguments, medians, resident, take_turns

Step = Callable[[], list[Tensor]]


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

    def ours(inner: InnerLoop) -> Step:
        inner_parameters = InnerParameters(net, inner)

        def step() -> list[Tensor]:
            result = adapt_inner(
                net, images, inner, domains=options.domains, second_order=True, inner_parameters=inner_parameters
            )
            return gradients(cross_entropy(result.after.flatten(0, 1), labels), net)

        return step

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
    return {**steps, "higher_deep": with_higher(deep)}


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
    )
    if options.peak_of:
        print_peak(options)
        return

    exact = build(options, torch.float64)
    for name in ("", "_deep"):
        pairs = zip(exact[f"ours{name}"](), exact[f"higher{name}"](), strict=True)
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        print(f"ours{name} against higher, float64: gradients differ by {worst:.1e}")
    del exact

    steps = build(options, torch.float32)
    times = medians(take_turns(steps, options.rounds, options.device))
    memory = {} if options.no_memory else {kind: peak_megabytes(kind) for kind in steps}
    for kind in steps:
        line = f"{kind:12} {1000 * times[kind]:8.1f} ms  {_ratios(times, kind)}"
        print(line + (f"   {memory[kind]:7.0f} MB  {_ratios(memory, kind)}" if memory else ""))
    print(json.dumps({"seconds": times, "megabytes": memory, "torch": torch.__version__, "device": options.device}))


def _ratios(values: dict[str, float], kind: str) -> str:
    return f"{values[kind] / values['plain']:5.2f}x plain  {values[kind] / values['higher']:5.2f}x higher"


if __name__ == "__main__":
    main()
