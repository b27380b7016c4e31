"""PERK's inner loop: a context is learned into a few parameters of a language model, by next-token steps.

Training (:class:`lightning_tta.modules.perk.PERK`) and test time call the same :func:`learn_context`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_tta.backbones.passes import safe_checkpoints
from lightning_tta.errors import InputError, UnsupportedModelError, check_choice, check_range
from lightning_tta.meta.unrolling import AdamW, ParameterGroup, Rate, Step, by_name, descend, unroll

InnerOptimizer = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class ContextLoop:
    """The settings of the inner loop.

    Attributes:
        steps: Number of steps K, >= 0. Authors: 4.
        unrolled_steps: Number T of the last steps that the outer gradient is differentiated through, in [0, K]; of the
            others the inner gradients count as constants. K is exact, 0 first order. Authors' code: 2.
        inner_optimizer: ``adamw`` (betas 0.9 and 0.95, as the authors; no weight decay) or ``sgd``.
        inner_lr: Rate of every step, or what learned rates start from. Authors: 5e-5, on far larger nets.
    """

    steps: int = 4
    unrolled_steps: int = 2
    inner_optimizer: InnerOptimizer = "adamw"
    inner_lr: float = 1e-2

    def __post_init__(self) -> None:
        """Check every value."""
        check_range("steps", self.steps, 0, integer=True)
        check_range("unrolled_steps", self.unrolled_steps, 0, self.steps, integer=True)
        check_choice("inner_optimizer", self.inner_optimizer, ("adamw", "sgd"))
        check_range("inner_lr", self.inner_lr, 0, low_open=True)


class Learned(NamedTuple):
    """What :func:`learn_context` returns, for D contexts.

    Attributes:
        parameters: By name, each (D, ...).
        losses: Of each step, before it: the mean over contexts, without graph.
    """

    parameters: dict[str, Tensor]
    losses: list[Tensor]


class TokenWeights(nn.Module):
    """How much each token of a context counts in the inner loss, from the net's last features: (..., F) -> (...).

    ``softplus(3 w) / softplus(0)`` of a small MLP's output ``w``, which is 0 at first, so that all weights are 1. From
    the authors' code, which does not divide. A token's weight comes from the features at the token itself.

    Args:
        features: Their number F.
        hidden: Width of the MLP. Authors: 128.
    """

    def __init__(self, features: int, hidden: int = 128) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Weights > 0."""
        value: Tensor = self.second(functional.gelu(self.first(features))).squeeze(-1)
        return functional.softplus(3 * value) / math.log(2)


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each token from the logits one position before: (..., T - 1) of (..., T, V) and (..., T)."""
    rows = logits[..., :-1, :].flatten(0, -2)
    losses = functional.cross_entropy(rows, ids[..., 1:].flatten(), reduction="none")
    return losses.view(ids[..., 1:].shape)


def mean_loss(logits: Tensor, ids: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over the tokens that count of their cross-entropies, of each context: (D,).

    Args:
        logits: (D, S, T, V).
        ids: (D, S, T).
        counts: Which tokens count, bool (D, S, T); the first of a row never does, for nothing comes before it.
        weights: Of the tokens (D, S, T); the sum is divided by their number all the same.
    """
    counted = counts[..., 1:].to(logits.dtype)
    losses = next_token_losses(logits, ids) * counted
    if weights is not None:
        losses = losses * weights[..., 1:]
    return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)


def run_with(net: nn.Module, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (D, S, T, V) of token ids (D, S, T), each of the D with parameters of its own, (D, ...) by name.

    Rows are padded on the right, where no token of a causal net sees the padding: no attention mask is needed.
    Attention runs in plain operations, for the fused ones cannot be differentiated twice.

    Raises:
        UnsupportedModelError: If the net returns no logits.
    """
    return _run(net, parameters, ids, None)[0]


def _run(net: nn.Module, parameters: Mapping[str, Tensor], ids: Tensor, head: nn.Module | None) -> tuple[Tensor, ...]:
    """The logits, and, with ``head``, its input."""
    inputs: list[Tensor] = []

    def call(values: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, ...]:
        output = functional_call(net, values, (), {"input_ids": rows})
        output = getattr(output, "logits", output)
        logits = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(logits, Tensor) or logits.shape[:-1] != rows.shape:
            raise UnsupportedModelError(
                f"{type(net).__name__} must return logits (B, T, V) of input_ids (B, T), as a tensor or as an "
                "attribute 'logits'. Wrap it in a module that does."
            )
        return (logits, inputs.pop()) if head is not None else (logits,)

    hook = nullcontext() if head is None else head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with hook, sdpa_kernel(SDPBackend.MATH), safe_checkpoints(recompute=False):
        if len(ids) > 1 and parameters:
            result: tuple[Tensor, ...] = vmap(call)(dict(parameters), ids)
            return result
        one = {name: value[0] for name, value in parameters.items()}  # as any call: nothing needs to know of copies
        return tuple(value.view(ids.shape[:2] + value.shape[1:]) for value in call(one, ids.flatten(0, 1)))


def learn_context(
    net: nn.Module,
    names: Sequence[str],
    segments: Tensor,
    counts: Tensor,
    settings: ContextLoop,
    *,
    differentiable: bool = False,
    rates: Tensor | None = None,
    weights: TokenWeights | None = None,
    head: nn.Module | None = None,
) -> Learned:
    """Steps on the next-token loss of a context's segments, on a functional copy of some parameters.

    The segments are one batch: their order does not matter, and each starts at the first position. The net itself does
    not change. Contexts learn each on their own, all in one pass.

    Args:
        net: A causal language model, deterministic between passes (eval mode).
        names: Of the parameters that learn: its LoRA.
        segments: Token ids (D, S, T) of D contexts of S segments, padded on the right.
        counts: Which tokens count in the loss, bool (D, S, T); not the padding.
        settings: Steps, optimizer, rate.
        differentiable: Whether the result keeps a graph to the net's parameters, the rates and the weights, through
            the last ``settings.unrolled_steps`` steps.
        rates: Of each step and parameter, (K, P), in place of the settings' one.
        weights: Of the tokens in the loss.
        head: With ``weights``: the layer whose inputs they come from.

    Raises:
        InputError: If shapes do not fit.
        UnsupportedModelError: If the net returns no logits, or no gradient reaches the parameters.

    Source: PERK, arXiv 2507.06415, and the authors' code.
    """
    if segments.ndim != 3 or counts.shape != segments.shape or segments.is_floating_point():
        raise InputError(
            "A context is token ids (D, S, T), int64, with a bool of the same shape of the tokens that count; got "
            f"{segments.dtype} {tuple(segments.shape)} and {counts.dtype} {tuple(counts.shape)}."
        )
    named = dict(net.named_parameters())
    group = ParameterGroup({name: named[name] for name in names})
    sizes = torch.tensor(group.sizes, device=segments.device)
    copies = len(segments)

    def rate(step: int) -> Rate:
        if rates is None:
            return settings.inner_lr
        return torch.repeat_interleave(rates[step], sizes, output_size=sum(group.sizes))

    def for_each(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return parameters if copies > 1 else {name: value[None] for name, value in parameters.items()}

    def run(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return _run(net, for_each(parameters), segments, None if weights is None else head)

    def loss(output: tuple[Tensor, ...]) -> Tensor:
        return mean_loss(output[0], segments, counts, None if weights is None else weights(output[1]))

    rule = AdamW() if settings.inner_optimizer == "adamw" else descend
    last = settings.unrolled_steps if differentiable else 0
    steps = [Step({0: rate(step)}, loss, rule) for step in range(settings.steps)]
    done = unroll(net, run, [group], steps, copies=copies, differentiable=differentiable, last=last, what="adapters")
    parameters = for_each(by_name([group], done.values))
    if not differentiable:
        parameters = {name: value.detach() for name, value in parameters.items()}
    return Learned(parameters, done.losses)
