"""A search by CMA-ES as state of a method."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tta.draws import random_normals
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.cma_es import CMAES, Roots


class Search(CMAES):
    """CMA-ES whose state is that of a method, under ``search.``.

    Args:
        method: Gets the state.
        dimension: As of CMA-ES.
        population: Likewise.
        sigma: Step size at the start.
        like: Of its dtype and on its device the state is.
        diagonal: As of CMA-ES.
    """

    def __init__(
        self, method: TTAMethod, dimension: int, population: int, sigma: float, like: Tensor, *, diagonal: bool
    ) -> None:
        super().__init__(dimension, population, diagonal=diagonal)
        state = self.start(sigma, like)
        for name, tensor in state.items():
            method.state(f"search.{name}", tensor)
        self.names = tuple(state)

    def now(self, method: TTAMethod) -> dict[str, Tensor]:
        """The state."""
        return {name: method.value(f"search.{name}") for name in self.names}

    def roots_now(self, method: TTAMethod) -> Roots:
        """Of the covariance."""
        covariance = method.value("search.covariance")
        with torch.autocast(covariance.device.type, enabled=False):
            return self.roots(covariance)

    def candidates(self, method: TTAMethod, root: Tensor, seed: int, *others: Tensor) -> Tensor:
        """Points of this generation, (lambda, N), and others (N,) behind them."""
        state = self.now(method)
        generation = state["generation"]
        key = torch.stack([torch.full_like(generation, seed), generation])
        with torch.autocast(root.device.type, enabled=False):
            normals = random_normals(key, self.population, self.dimension)
            return torch.cat([self.points(state, root, normals), *(point[None] for point in others)])

    def learn(self, method: TTAMethod, roots: Roots, points: Tensor, fitness: Tensor, where: Tensor) -> None:
        """Take the values of the points, (lambda,) or (lambda + 1,), if ``where``, 0-dimensional and bool, is true."""
        for name, value in self.update(self.now(method), roots, points, fitness).items():
            method.write(f"search.{name}", value, where)
