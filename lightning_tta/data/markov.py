"""Markov chains over the domains or the classes of a stream, as in UniTTA (arXiv 2407.20080).

An attribute of the images (their domain, or their class) moves from one value to the next with every image:

- ``correlation`` c is the chance to stay at the first, most frequent of n values. Below 1 / n it counts as 1 / n: then
  each value is drawn anew.
- ``imbalance`` r is how many times as often the first value comes as the last. Value i has the share
  ``pi_i ~ r^(-i / (n - 1))``.

Where ``r (1 - c) <= 1 - 1/n``, the matrix is UniTTA's. Value i is left with probability ``(1 - c) r^(i / (n - 1))``,
for any other alike: frequent values are those that last. Elsewhere that chance is above that of drawing anew, and the
matrix is ``rho I + (1 - rho) 1 pi^T`` with ``rho = (c - 1/n) / (1 - 1/n)``: the value is kept, or drawn anew from
``pi``. For r = 1 both are the same. (In the second case UniTTA walks a chain with equal shares, and closes a value when
its share is spent; so its stream ends with frequent values only.)
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def shares(size: int, imbalance: float) -> Floats:
    """The share of each of ``size`` values, (n,): falling geometrically, the first ``imbalance`` times the last."""
    falling = imbalance ** -(np.arange(size) / max(1, size - 1))
    return np.asarray(falling / falling.sum())


def transition(size: int, correlation: float, imbalance: float) -> Floats:
    """Probabilities (n, n) to go from a value, a row, to another; their stationary distribution is :func:`shares`.

    Args:
        size: Number n of values, at least 1.
        correlation: The chance to stay, 0 to below 1.
        imbalance: At least 1.
    """
    if size == 1:
        return np.ones((1, 1))
    least, share = 1 / size, shares(size, imbalance)
    stay = max(correlation, least)
    if imbalance * (1 - stay) <= 1 - least + 1e-9:
        leave = (1 - stay) * share[0] / share
        matrix = np.repeat(leave[:, None] / (size - 1), size, axis=1)
        np.fill_diagonal(matrix, 1 - leave)
        return matrix
    kept = (stay - least) / (1 - least)
    return np.asarray(kept * np.eye(size) + (1 - kept) * share)


def walk(matrix: Floats, start: Floats, steps: int, *key: int) -> npt.NDArray[np.int64]:
    """The values (steps,) of a chain with this ``matrix`` (n, n), the first drawn from ``start`` (n,).

    They depend on nothing but these and ``key``, whole numbers.
    """
    words: Any = np.random.PCG64(list(key)).random_raw(steps)
    draws = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    rows = list(np.cumsum(matrix, axis=1)[:, :-1])  # what is above all of them is the last value
    values = np.empty(steps, dtype=np.int64)
    bounds = np.cumsum(start)[:-1]
    for step, draw in enumerate(draws):
        values[step] = value = bounds.searchsorted(draw, side="right")
        bounds = rows[value]
    return values
