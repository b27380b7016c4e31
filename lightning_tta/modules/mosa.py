"""MoSA: adapters that are trained a part at a time."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_tta.draws import random_integers
from lightning_tta.errors import check_range
from lightning_tta.methods.components.adapters import adapter_names


class MoSA(Callback):
    """In each step of a training one random part of each matrix of the adapters runs and learns; the others are 0.

    A matrix that leads into the bottleneck is cut into parts along its inputs, one that leads out of it along its
    outputs, so that a part is an adapter of some features. The parts do not overlap, and make the whole adapter
    together, which runs in validation and afterwards. From an outline of the paper, arXiv 2312.02923: that the parts
    are cut so, that both sides draw apart, and that the whole is not scaled are our reading.

    Args:
        parts: Of each matrix, at least 2.
        seed: Of the draws, which depend on it and the number of the step.
    """

    def __init__(self, parts: int = 4, seed: int = 0) -> None:
        check_range("parts", parts, 2, integer=True)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.parts, self.seed = parts, seed
        self._whole: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, its mask, its values before the step

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let one part of each matrix run."""
        names = [name for name in adapter_names(pl_module) if pl_module.get_parameter(name).ndim == 2]
        draws = random_integers(torch.tensor([self.seed, trainer.global_step]), len(names)).remainder(self.parts)
        for name, draw in zip(names, draws.tolist(), strict=True):
            matrix = pl_module.get_parameter(name)
            dim = 1 if "down" in name.rpartition(".")[2] else 0
            places = torch.arange(matrix.shape[dim], device=matrix.device) * self.parts // matrix.shape[dim]
            mask = (places == draw).to(matrix).view(-1 if dim == 0 else 1, -1 if dim == 1 else 1)
            self._whole.append((matrix, mask, matrix.detach().clone()))
            matrix.mul_(mask)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Let only that part learn."""
        for matrix, mask, _ in self._whole:
            if matrix.grad is not None:
                matrix.grad.mul_(mask)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Put the other parts back."""
        for matrix, mask, before in self._whole:
            matrix.copy_(torch.where(mask.bool(), matrix, before))
        self._whole = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same where a step broke off."""
        self.on_train_batch_end(trainer, pl_module)
