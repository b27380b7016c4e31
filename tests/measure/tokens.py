"""A step over tokens beside a plain forward-backward pass of the same LoRA parameters: time and peak memory.

    python tests/measure/tokens.py
    python tests/measure/tokens.py --vocabularies 32000 --tokens 256 --methods tent zerosiam --rounds 3
    python tests/measure/tokens.py --lora 512 --rounds 5

One table a vocabulary. The net is a small causal model (two layers, width 256), so that head and vocabulary weigh most,
as the loss does in a large one; all positions count. With ``--net llama`` it is one of transformers. The plain pass is
the cross-entropy of the next token, logits whole. Times are medians of rounds in turn, as ratios to the plain pass.
Memory is the peak of all tensors that operations return, beside weights, in MB of 2**20 bytes. ``chunk`` is how many
positions go through the head at a time; the last row of a method has all of them at once.

``--lora T`` compares ways to compute with LoRA, on four layers of width ``--lora-width`` of a Llama with a vocabulary
of 2,000: as a parametrisation of the weight, as here, or as ``x down' up'`` beside the layer. Times of a pass forward
and backward over T tokens, and of an answer of 16 tokens to 32, over those of the net without LoRA (its pass: gradients
of the same layers' outputs, which is what LoRA needs at least).
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta import TTAMethod, adapt
from lightning_tta.backbones.gpt import CharGPT
from lightning_tta.methods.base import method as base
from memory import MB, Allocated
from plumbing import CUDA_OR_CPU, arguments, header, medians, row, take_turns


def make(kind: str, vocabulary: int, width: int, layers: int) -> nn.Module:
    """A causal language model with random weights: ``gpt``, or ``llama`` of transformers."""
    torch.manual_seed(0)
    if kind == "gpt":
        return CharGPT(vocabulary, layers=layers, width=width, heads=max(1, width // 64)).eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 256)}
    sizes = {"hidden_size": width, "intermediate_size": 7 * width // 2, "num_hidden_layers": layers}
    net: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **heads)).eval()
    return net


def plain_pass(net: Any, learned: list[Tensor], ids: Tensor) -> None:
    """Gradients of the next token's cross-entropy by the LoRA parameters."""
    output = net(ids)
    logits = getattr(output, "logits", output)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.autograd.grad(loss, learned)


def step(method: TTAMethod, ids: Tensor) -> None:
    """A step of a method."""
    method({"input_ids": ids})


def peak(run: Any) -> float:
    """MB that tensors take at most while it runs."""
    with Allocated() as counted:
        run()
    return counted.peak / MB


def beside(net: nn.Module) -> list[Tensor]:
    """Put LoRA of rank 8 beside the query and value projections, as hooks; returns its tensors."""
    tensors: list[Tensor] = []
    for name, layer in net.requires_grad_(False).named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("q_proj", "v_proj")):
            like = layer.weight.float()
            pair = like.new_zeros(8, layer.in_features), like.new_zeros(layer.out_features, 8)
            down, up = (tensor.normal_(std=0.01).requires_grad_() for tensor in pair)
            layer.register_forward_hook(
                lambda _, x, y, down=down, up=up: y + (2 * (x[0].to(down) @ down.T) @ up.T).to(y)
            )
            tensors += [down, up]
    return tensors


def outputs(net: nn.Module) -> list[Tensor]:
    """Zeros that are added to the outputs of the query and value projections, for gradients by these."""
    zeros: list[Tensor] = []
    for name, layer in net.requires_grad_(False).named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("q_proj", "v_proj")):
            zero = layer.weight.new_zeros(1, 1, layer.out_features, requires_grad=True)
            layer.register_forward_hook(lambda _, x, y, zero=zero: y + zero)
            zeros.append(zero)
    return zeros


def lora(options: Any) -> dict[tuple[int, str, int], tuple[float, float]]:
    """Print the table of ways to compute with LoRA; returns both ratios by way."""
    dtype = getattr(torch, options.lora_dtype)
    nets = [make("llama", 2000, options.lora_width, 4).to(options.device, dtype) for _ in range(4)]
    ids = torch.randint(0, 2000, (1, options.lora), device=options.device)
    here: Any = adapt(nets[0], "tent")
    passes = {
        "no LoRA": partial(plain_pass, nets[1], outputs(nets[1]), ids),
        "parametrisation": partial(plain_pass, here.model.net, here.learned, ids),
        "beside the layer": partial(plain_pass, nets[2], beside(nets[2]), ids),
    }

    def writes(method: TTAMethod, once: bool = True) -> None:
        with nullcontext() if once else mock.patch.object(base, "computed_once", return_value=nullcontext()):
            method.generate({"input_ids": ids[:, :32]}, max_new_tokens=16)

    plain = adapt(nets[3], "source")
    answers = {
        "no LoRA": partial(writes, plain),
        "parametrisation": partial(writes, here),
        "parametrisation, weights anew for each token": partial(writes, here, False),
        "beside the layer": partial(writes, adapt(nets[2], "source")),
    }
    steps = medians(take_turns(passes, options.rounds, options.device))
    seconds = medians(take_turns(answers, options.rounds, options.device))
    print(
        f"T = {options.lora}, width {options.lora_width}; no LoRA: {steps['no LoRA']:.2f} s, {seconds['no LoRA']:.2f} s"
    )
    header("LoRA", "forward and backward", "answer")
    found = {}
    for name in answers:
        found[options.lora, name, 0] = ratios = (
            steps.get(name, float("nan")) / steps["no LoRA"],
            seconds[name] / seconds["no LoRA"],
        )
        row(name, f"{ratios[0]:.2f}" if name in steps else "-", f"{ratios[1]:.2f}")
    return found


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
        net=("gpt", "gpt, or llama of transformers"),
        lora=(0, "tokens; compares ways to compute with LoRA, and nothing else"),
        lora_width=1024,
        lora_dtype=("float32", "of the net; LoRA learns in float32"),
        rounds=5,
        device=CUDA_OR_CPU,
    )
    torch.set_num_threads(1)
    if options.lora:
        return lora(options)
    found: dict[tuple[int, str, int], tuple[float, float]] = {}
    for vocabulary in map(int, options.vocabularies):
        net = make(options.net, vocabulary, options.width, 2).to(options.device)
        ids = torch.randint(0, vocabulary, (1, options.tokens), device=options.device)
        tent: Any = adapt(net, "tent", task={"kind": "tokens"})
        runs: dict[str, Any] = {"plain": partial(plain_pass, tent.model.net, tent.learned, ids)}
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
