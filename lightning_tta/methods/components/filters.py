"""Pieces that entropy methods share: the objective, which samples count, moving averages, a look at the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lightning_tta import collective
from lightning_tta.errors import check_choice
from lightning_tta.losses import come_entropy, entropy
from lightning_tta.methods.base.inputs import at_least_float32
from lightning_tta.methods.base.method import TTAMethod

EntropyName = Literal["softmax", "come"]
_ENTROPIES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": entropy, "come": come_entropy}


def entropy_function(name: EntropyName) -> Callable[[Tensor], Tensor]:
    """The objective per sample, logits (B, K) -> (B,): ``softmax``, the entropy of the prediction, or ``come``.

    Raises:
        ConfigError: If there is no such objective.
    """
    check_choice("entropy", name, tuple(_ENTROPIES))
    return _ENTROPIES[name]


def reliable(entropies: Tensor, logits: Tensor, margin: float | None) -> Tensor:
    """Which samples (B,) have an entropy below ``margin`` times log K; with ``None`` all that have a finite one."""
    bound = math.inf if margin is None else margin * math.log(logits.shape[-1])
    return entropies.detach() < bound  # not so with NaN


def moving_average(average: Tensor | None, new: Tensor, momentum: float) -> Tensor:
    """``momentum * average + (1 - momentum) * new``; ``new`` itself the first time. Without gradient."""
    new = new.detach()
    return new if average is None else momentum * average.to(new) + (1 - momentum) * new


@contextmanager
def at_source(method: TTAMethod) -> Iterator[None]:
    """While active, all that ``method`` adapts has its source value. Not while a graph still needs the others."""
    learned = {name: tensor.detach().clone() for name, tensor in method.adaptable.items()}
    try:
        _write(method, method._snapshot)
        yield
    finally:
        _write(method, learned)


def _write(method: TTAMethod, values: dict[str, Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in method.adaptable.items():
            tensor.copy_(values[name])


@contextmanager
def _usual_attention() -> Iterator[None]:
    """While active, torch's attention layers run without gradients as they do with them, to the last bit."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def source_filter(method: TTAMethod, images: Tensor) -> Callable[[Tensor], Tensor]:
    """OSTTA's filter: keep a sample while it is at least as sure of the source's answer as the source was.

    ``keep_i = p_theta(x_i)[c_i] >= p_theta0(x_i)[c_i]``, ``c_i`` the arg-max of the source model theta0, which sees
    the same batch statistics. Costs one forward pass without gradient, now: call it before the pass to be filtered.

    Args:
        method: Its declared tensors are put back to their source values for the pass; no second net is kept.
        images: The batch (B, C, H, W).

    Returns:
        A function of the logits (B, K), which gives the kept samples (B,), bool.

    Source: Lee et al., OSTTA, ICCV 2023, arXiv 2308.06879.
    """
    with torch.no_grad(), at_source(method), _usual_attention():
        confidence, answer = at_least_float32(method.infer(images)).softmax(-1).max(-1)

    def keep(logits: Tensor) -> Tensor:
        now = at_least_float32(logits.detach()).softmax(-1).gather(-1, answer[:, None]).squeeze(-1)
        kept = now >= confidence
        method.record(kept_by_source_filter=collective.mean(kept.float()))
        return kept

    return keep
