"""Several processes that adapt as one: sums and means over the samples of all of them.

A method takes its means and gradients through the functions here. Alone they are the ordinary ones. While
:func:`joined` is active, each process holds a part of one batch, and they are those of the whole batch: every process
has the same loss, the same gradients and takes the same decisions, so the nets stay equal without being sent around.

Every process must call them equally often and in the same order, also one that has no sample, or keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_tta.losses import at_least_float32


@dataclass(frozen=True)
class _Group:
    size: int
    present: bool = True  # otherwise the samples of this process count for nothing


_GROUP: ContextVar[_Group | None] = ContextVar("group", default=None)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs, as all of them use the result."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result: Tensor = _Sum.apply(gradient)
        return result


@contextmanager
def joined(size: int, *, present: bool = True) -> Iterator[None]:
    """While active, this process's samples are a part of a batch that all ``size`` processes share.

    Args:
        size: Number of processes, those of torch's default group; with 1 nothing changes.
        present: Whether its samples count; without, it takes part with a stand-in that changes nothing.
    """
    token = _GROUP.set(_Group(size, present) if size > 1 else None)
    try:
        yield
    finally:
        _GROUP.reset(token)


@contextmanager
def absent() -> Iterator[None]:
    """While active, the samples of this process count for nothing; alone, nothing changes."""
    group = _GROUP.get()
    token = _GROUP.set(group and replace(group, present=False))
    try:
        yield
    finally:
        _GROUP.reset(token)


def is_joined() -> bool:
    """Whether several processes adapt as one at this moment."""
    return _GROUP.get() is not None


def count(values: Tensor) -> int:
    """How many values there are along the first dimension, in all."""
    group = _GROUP.get()
    if group is None:
        return len(values)
    total = torch.tensor(len(values) if group.present else 0, device=values.device)
    dist.all_reduce(total)
    return int(total)


def gather(values: Tensor) -> Tensor:
    """Values (N, ...) of all processes, one process after the other; alone, those given. Without gradient."""
    group = _GROUP.get()
    if group is None:
        return values
    counts = torch.zeros(group.size, dtype=torch.int64, device=values.device)
    counts[dist.get_rank()] = len(values) if group.present else 0
    dist.all_reduce(counts)
    sizes = counts.tolist()
    start = sum(sizes[: dist.get_rank()])
    everyone = values.new_zeros(sum(sizes), *values.shape[1:])
    if group.present:
        everyone[start : start + len(values)] = values.detach()
    dist.all_reduce(everyone)
    return everyone


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the first dimension of all values (N, ...); with gradient.

    Args:
        values: (N, ...).
        weights: (N,), >= 0: the mean is ``sum_n w_n v_n / sum_n w_n``; values of weight 0 may be anything.

    Returns:
        (...); not a number where there is no value, or all weights are 0.
    """
    if weights is not None:
        return weighted_sums(values, weights)[0]
    group = _GROUP.get()
    if group is None:
        return values.mean(0)
    total, number = _total(values.sum(0), len(values), group)
    return total / number


def weighted_sums(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean over the first dimension, as :func:`mean` has it, and the sum of all weights, 0-dimensional."""
    weights = weights.detach().to(values.dtype)
    column = weights.view(-1, *(1,) * (values.ndim - 1))
    here, number = torch.where(column > 0, values * column, 0).sum(0), weights.sum()
    group = _GROUP.get()
    if group is not None:
        here, number = _total(here, number, group)
    return here / number, number


def moments(x: Tensor, dims: Sequence[int], *, unbiased: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance over ``dims`` of all of ``x``, with gradient, and how many values each is of.

    In two passes, as one process does. Call it in a joined group.
    """
    group = _GROUP.get()
    assert group is not None
    x = at_least_float32(x)
    here = x.numel() // max(x.sum(list(dims)).numel(), 1)
    total, number = _total(x.sum(list(dims)), here, group)
    mean = total / number
    shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    squares, _ = _total((x - mean.reshape(shape)).square().sum(list(dims)), here, group)
    return mean, squares / (number - int(unbiased)), number


def _total(here: Tensor, number: int | Tensor, group: _Group) -> tuple[Tensor, Tensor]:
    """A sum over processes, and the number of values in it, in one message."""
    presence = float(group.present)
    count = torch.as_tensor(number, dtype=here.dtype, device=here.device).detach().view(1)
    message: Tensor = _Sum.apply(presence * torch.cat([here.flatten(), count]))
    return message[:-1].reshape(here.shape), message[-1].detach()


def average(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The mean over processes of gradients, which have the same places without one (``None``) everywhere.

    The loss is the same on every process, and sums hand back the sum of the gradients, hence the mean.
    """
    group = _GROUP.get()
    present = [gradient for gradient in gradients if gradient is not None]
    if group is None or not present:
        return tuple(gradients)
    message = torch.cat([gradient.flatten().to(present[0].dtype) for gradient in present])
    dist.all_reduce(message)
    shares = iter(torch.split(message / group.size, [gradient.numel() for gradient in present]))
    return tuple(None if g is None else next(shares).view_as(g).to(g.dtype) for g in gradients)
