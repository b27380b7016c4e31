"""Square roots of covariance matrices, and their inverses, with or without a decomposition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_tta.methods.base.host import host_has


def root(matrices: Tensor) -> Tensor:
    """The symmetric square roots of symmetric positive semi-definite matrices (..., D, D), by decomposition."""
    values, vectors = torch.linalg.eigh(matrices)
    result: Tensor = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    return result


def inverse_root(matrices: Tensor) -> Tensor:
    """The inverse square roots of symmetric positive definite matrices (..., D, D), all finite, in their own dtype.

    Eigenvalues under a share of ``finfo.eps`` of the largest one are rounding noise, and are not blown up much further.
    Where the host has the values, by decomposition; elsewhere, where that would wait for the device, by
    :func:`iterated`. On a CPU in float64: of a covariance of fewer vectors than D, both are off by some percent in
    float32. Other devices may have no fast float64.
    """
    precise = matrices.double() if matrices.device.type == "cpu" else matrices
    if not host_has(matrices):
        return iterated(precise).to(matrices.dtype)
    values, vectors = torch.linalg.eigh(precise)
    least = values[..., -1:] * torch.finfo(matrices.dtype).eps
    result: Tensor = (vectors * torch.maximum(values, least).rsqrt().unsqueeze(-2)) @ vectors.mT
    return result.to(matrices.dtype)


def iterated(matrices: Tensor) -> Tensor:
    """As :func:`inverse_root`, by a fixed number of matrix products: about 40 in float32, 70 in float64.

    The coupled Newton-Schulz iteration of Y and Z, whose limits are the root and its inverse, with the scaling of Chen
    and Chow (2014): each step is the best of its kind for the interval in which the eigenvalues lie by then.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    bounds = matrices.abs().sum(-1).amax(-1), matrices.square().sum((-2, -1)).sqrt()  # both above all eigenvalues
    largest = torch.minimum(*bounds)[..., None, None]
    y, z = matrices / largest, eye.expand_as(matrices)
    precision = torch.finfo(matrices.dtype).eps
    low = math.sqrt(precision)  # the least root to be lifted to 1
    while 1 - low > precision:
        scale = math.sqrt(3 / (1 + low + low * low))
        step = 1.5 * scale * eye - 0.5 * scale**3 * (z @ y)
        y, z = y @ step, step @ z
        low = 0.5 * scale * low * (3 - (scale * low) ** 2)
    return z / largest.sqrt()
