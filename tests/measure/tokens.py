"""A step over tokens beside a plain forward-backward pass of the same LoRA parameters: time and peak memory.

    python tests/measure/tokens.py
    python tests/measure/tokens.py --vocabularies 32000 --tokens 256 --methods tent zerosiam --rounds 3

One table a vocabulary. The net is a small causal model (two layers, width 256), so that head and vocabulary weigh most,
as the loss does in a large one; all positions count. The plain pass is the cross-entropy of the next token, logits
whole. Times are medians of rounds in turn, as ratios to the plain pass. Memory is the peak of all tensors that
operations return, beside weights, in MB of 2**20 bytes. ``chunk`` is how many positions go through the head at a time;
the last row of a method has all of them at once.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_tta import TTAMethod, adapt
from lightning_tta.backbones.gpt import CharGPT
from memory import MB, Allocated
from plumbing import CUDA_OR_CPU, arguments, header, medians, row, take_turns


def plain_pass(method: TTAMethod, ids: Tensor) -> None:
    """Gradients of the next token's cross-entropy by the LoRA parameters."""
    logits = method.model.net(ids)  # type: ignore[operator,union-attr]
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.autograd.grad(loss, method.learned)  # type: ignore[attr-defined]


def step(method: TTAMethod, ids: Tensor) -> None:
    """A step of a method."""
    method({"input_ids": ids})


def peak(run: Any) -> float:
    """MB that tensors take at most while it runs."""
    with Allocated() as counted:
        run()
    return counted.peak / MB


def main(args: list[str] | None = None) -> dict[tuple[int, str, int], tuple[float, float]]:
    """Print the tables; returns time over the plain pass and peak MB by vocabulary, method, chunk (0: all)."""
    options = arguments(
        __doc__,
        args,
        vocabularies=["32000", "128000"],
        methods=["tent", "come", "eta", "zerosiam", "tlm", "slot"],
        chunks=["64", "256"],
        tokens=(512, "of the prompt"),
        width=256,
        rounds=5,
        device=CUDA_OR_CPU,
    )
    torch.set_num_threads(1)
    found: dict[tuple[int, str, int], tuple[float, float]] = {}
    for vocabulary in map(int, options.vocabularies):
        torch.manual_seed(0)
        net = CharGPT(vocabulary, layers=2, width=options.width, heads=4).to(options.device)
        ids = torch.randint(0, vocabulary, (1, options.tokens), device=options.device)
        runs: dict[str, Any] = {"plain": partial(plain_pass, adapt(net, "tent", task={"kind": "tokens"}), ids)}
        for name in options.methods:
            for chunk in (*map(int, options.chunks), 0):
                task = {"kind": "tokens", "loss_on": "all", "chunk": chunk or options.tokens}
                threshold = {"threshold": 0.0} if name == "tlm" else {"entropy_margin": 2.0} if name == "eta" else {}
                runs[f"{name} {chunk}"] = partial(step, adapt(net, name, task=task, **threshold), ids)
        for run in runs.values():
            run()
        peaks = {name: peak(run) for name, run in runs.items()}
        times = medians(take_turns(runs, options.rounds, options.device))
        print(
            f"\nV = {vocabulary}, T = {options.tokens}: one tensor of all logits is "
            f"{4 * vocabulary * options.tokens / MB:.0f} MB; plain pass {times['plain']:.2f} s\n",
        )
        header("step", "chunk", "time over plain", "peak MB", "peak over plain")
        for name in runs:
            method, _, chunk = name.partition(" ")
            ratio = times[name] / times["plain"]
            found[vocabulary, method, int(chunk or 0)] = ratio, peaks[name]
            shown = {"": "-", "0": "all"}.get(chunk, chunk)
            row(method, shown, f"{ratio:.2f}", f"{peaks[name]:.0f}", f"{peaks[name] / peaks['plain']:.2f}")
        print(f"{vocabulary} done", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
