"""CMA-ES: a search without gradients, by a normal distribution that follows the best of its samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_tta.errors import check_range

Roots = tuple[Tensor, Tensor]
"""The symmetric root of the covariance and its inverse, (N, N); of a diagonal one (N,)."""


class CMAES:
    """Minimises a function of N numbers, of which it sees the order of its values at sampled points alone.

    With mean m, step size s, covariance C and lambda points ``x_i = m + s y_i``, ``y_i ~ N(0, C)``, in the order of
    their values, weights w_i of that order, mu of them positive, and ``y_w = sum_(i <= mu) w_i y_i``::

        m   <- m + s y_w
        p_s <- (1 - c_s) p_s + sqrt(c_s (2 - c_s) mu_eff) C^(-1/2) y_w        s <- s exp(c_s / d_s (|p_s| / E - 1))
        p_c <- (1 - c_c) p_c + h sqrt(c_c (2 - c_c) mu_eff) y_w               h: 1, or 0 while p_s is long
        C   <- (1 - c_1 h' - c_mu sum_i w_i) C + c_1 p_c p_c^T + c_mu sum_i w_i y_i y_i^T

    E is the expected length of a standard normal vector, ``h' = 1 - (1 - h) c_c (2 - c_c)``. Of points that are worse
    than the middle, w_i < 0, and y_i is scaled to the length sqrt(N) in the metric of C, so that C stays positive.
    ``y = C^(1/2) z`` with the symmetric root: the signs of eigenvectors, which no library fixes, do not matter.

    ``diagonal``: C is diagonal, (N,), no weight is negative, and c_1 and c_mu are (N + 2) / 3 times as large.

    An object holds constants only. What changes is a dict of tensors, see :meth:`start`; nothing is asked of the host,
    but for :meth:`roots` of a full covariance.

    Args:
        dimension: N, >= 2.
        population: lambda, >= 4; usual: 4 + 3 ln N, rounded down.
        diagonal: Whether C is diagonal.

    Source: Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772; ``diagonal``: Ros and Hansen, PPSN 2008
    (sep-CMA-ES), with the tutorial's other constants. A point from elsewhere (:meth:`update`): Hansen, arXiv 1110.4181.
    """

    def __init__(self, dimension: int, population: int, *, diagonal: bool = False) -> None:
        check_range("dimension", dimension, 2, integer=True)
        check_range("population", population, 4, integer=True)
        self.dimension, self.population, self.diagonal = dimension, population, diagonal
        raw = [math.log((population + 1) / 2) - math.log(rank) for rank in range(1, population + 1)]
        n, self.parents = dimension, sum(weight > 0 for weight in raw)
        self.mass = mass = _effective(raw[: self.parents])
        self.c_sigma = (mass + 2) / (n + mass + 5)
        self.damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + self.c_sigma
        self.c_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
        faster = (n + 2) / 3 if diagonal else 1.0
        self.c_one = min(1.0, faster * 2 / ((n + 1.3) ** 2 + mass))
        self.c_mu = min(1 - self.c_one, faster * 2 * (0.25 + mass + 1 / mass - 2) / ((n + 2) ** 2 + mass))
        self.expected_length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self.longest = math.sqrt(n) + 2 * n / (n + 2)  # of a point from elsewhere
        bounds = (
            1 + self.c_one / self.c_mu,
            1 + 2 * _effective(raw[self.parents :]) / (mass + 2),
            (1 - self.c_one - self.c_mu) / (n * self.c_mu),
        )
        self.negative = 0.0 if diagonal else min(bounds)  # minus the sum of the negative weights

    def start(self, sigma: float, like: Tensor) -> dict[str, Tensor]:
        """The state at the start, of the dtype and on the device of ``like``.

        ``mean`` (N,), 0; ``sigma`` (); ``covariance`` (N, N) or (N,), the identity; ``path_sigma`` and ``path``
        (N,), 0; ``generation``, (), int64, 0: how many updates there were.
        """
        n = self.dimension
        zeros = torch.zeros(n, dtype=like.dtype, device=like.device)
        return {
            "mean": zeros.clone(),
            "sigma": torch.full_like(zeros[0], sigma),
            "covariance": torch.ones_like(zeros) if self.diagonal else torch.diag(torch.ones_like(zeros)),
            "path_sigma": zeros.clone(),
            "path": zeros.clone(),
            "generation": torch.zeros((), dtype=torch.int64, device=like.device),
        }

    def roots(self, covariance: Tensor) -> Roots:
        """The root of the covariance and its inverse; of a full one by its eigenvectors, which a GPU waits for."""
        if self.diagonal:
            root = covariance.sqrt()
            return root, 1 / root
        values, vectors = torch.linalg.eigh(covariance)
        smallest = torch.finfo(values.dtype).eps * values.amax()
        lengths = values.clamp_min(smallest).sqrt()
        return (vectors * lengths) @ vectors.T, (vectors / lengths) @ vectors.T

    def points(self, state: dict[str, Tensor], root: Tensor, normals: Tensor) -> Tensor:
        """Points (lambda, N) to be valued, of standard normal numbers (lambda, N)."""
        return state["mean"] + state["sigma"] * self._times(normals.to(root), root)

    def update(self, state: dict[str, Tensor], roots: Roots, points: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The next state.

        Args:
            state: As it was when the points were drawn; not written to.
            roots: Of its covariance.
            points: (lambda, N); or (lambda + 1, N), of which the last one comes from elsewhere. That one is moved
                towards the mean if it is further away than a sample would be, takes no negative weight, and the weight
                0 is put in after those of the parents.
            values: (lambda,) or (lambda + 1,), smaller is better. What is not finite ranks last.
        """
        n, more = self.dimension, len(points) - self.population
        mean, sigma, inverse = state["mean"], state["sigma"], roots[1]
        steps = (points - mean) / sigma
        lengths = torch.linalg.vector_norm(self._times(steps, inverse), dim=1)
        comes_from_elsewhere = torch.arange(len(points), device=points.device) >= self.population
        scale = torch.where(comes_from_elsewhere, (self.longest / lengths).clamp_max(1), 1.0).to(lengths)
        order = torch.where(torch.isfinite(values), values, torch.inf).argsort(stable=True)
        steps, lengths = (steps * scale[:, None])[order], (lengths * scale)[order]
        weights = self._weights(more, steps)
        weights = torch.where(comes_from_elsewhere[order], weights.clamp_min(0), weights)

        step = steps.T.mv(weights.clamp_min(0))
        push = math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.mass)
        path_sigma = (1 - self.c_sigma) * state["path_sigma"] + push * self._times(step, inverse)
        generation = state["generation"] + 1
        length = torch.linalg.vector_norm(path_sigma)
        usual = (1 - (1 - self.c_sigma) ** (2 * generation.to(length))).sqrt() * self.expected_length
        moves = (length < (1.4 + 2 / (n + 1)) * usual).to(length)
        push = math.sqrt(self.c_path * (2 - self.c_path) * self.mass)
        path = (1 - self.c_path) * state["path"] + moves * push * step
        of_path = self.c_one * (1 - (1 - moves) * self.c_path * (2 - self.c_path))
        in_metric = torch.where(weights < 0, weights * n / lengths.square().clamp_min(1e-12), weights)
        covariance = (1 - of_path - self.c_mu * weights.sum()) * state["covariance"]
        if self.diagonal:
            covariance = covariance + self.c_one * path.square() + self.c_mu * steps.square().T.mv(in_metric)
        else:
            covariance = covariance + self.c_one * torch.outer(path, path)
            covariance = covariance + self.c_mu * (steps.T @ (in_metric[:, None] * steps))
            covariance = (covariance + covariance.T) / 2
        return {
            "mean": mean + sigma * step,
            "sigma": sigma * (self.c_sigma / self.damping * (length / self.expected_length - 1)).clamp_max(1).exp(),
            "covariance": covariance,
            "path_sigma": path_sigma,
            "path": path,
            "generation": generation,
        }

    def _weights(self, more: int, like: Tensor) -> Tensor:
        """Weights (lambda + more,), best first; ``more`` zeros after those of the parents."""
        rank = torch.arange(1, self.population + 1, dtype=like.dtype, device=like.device)
        raw = math.log((self.population + 1) / 2) - rank.log()
        best, rest = raw[: self.parents], raw[self.parents :]
        return torch.cat([best / best.sum(), torch.zeros_like(raw[:more]), self.negative * rest / rest.sum().abs()])

    def _times(self, vectors: Tensor, root: Tensor) -> Tensor:
        if self.diagonal:
            return vectors * root
        return root.mv(vectors) if vectors.ndim == 1 else vectors @ root


def _effective(weights: list[float]) -> float:
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)
