"""A function of rows, on some rows at a time: what is large for all of them exists for a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked(function: Callable[..., Any], tensors: Sequence[Tensor], rows: Tensor, size: int) -> Any:
    """``function`` of the rows that count, ``size`` at a time; the backward pass computes each part again.

    Args:
        function: Of tensors (N, ...), returns a tensor (N,) or a tuple of such, each row by itself.
        tensors: (B, ..., D) each.
        rows: Which rows count (B, ...), bool.
        size: How many rows at a time, at least 1.

    Returns:
        Tensors (B, ...) like what the function returns, 0 where a row does not count.
    """
    index = rows.flatten().nonzero()[:, 0]
    flat = [tensor.flatten(0, rows.ndim - 1) for tensor in tensors]
    parts = torch.split(index if len(index) else index.new_zeros(1), size)
    pieces = [[tensor[part] for tensor in flat] for part in parts]
    if len(pieces) == 1:  # nothing is saved by computing it again
        results = [function(*pieces[0])]
    else:
        results = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
    several = isinstance(results[0], tuple)
    columns = list(zip(*results, strict=True)) if several else [results]
    wholes = []
    for column in columns:
        values = torch.cat(list(column))[: len(index)]
        wholes.append(values.new_zeros(rows.numel()).index_put((index,), values).view(rows.shape))
    return tuple(wholes) if several else wholes[0]
