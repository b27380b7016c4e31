"""Tent: entropy minimisation through the affine parameters of the normalisation layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.entropy import EntropyMethod


class Tent(EntropyMethod):
    """Minimises the mean prediction entropy of the batch.

    ``L = mean_b H(p_b)``, ``H(p) = -sum_k p_k log p_k``.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these
    and the optimizer. Per batch and step: one forward, one backward pass. Returns the logits before the step.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        **options: ``lr``, >= 0; authors: 1e-3 with Adam (CIFAR, batch 200), 2.5e-4 with SGD (ImageNet, batch 64).
            ``optimizer``: ``adam`` (authors, CIFAR) or ``sgd`` (authors, ImageNet). ``weight_decay``: authors 0.
            ``entropy``: ``come`` is :class:`~lightning_tta.methods.come.COME`. ``source_filter``: no step if the filter
            keeps nothing. And ``momentum``, ``steps``, ``lr_batch_size``. Over tokens: AdamW, 5e-5, on LoRA.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Wang et al., Tent, ICLR 2021, arXiv 2006.10726. Differs from the authors' code: GroupNorm and LayerNorm
    nets are allowed, the net stays in eval mode with batch statistics, source statistics survive.
    """

    about = About(
        does="mean entropy",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers",
        holds="-",
        suits="shuffled, reset at each domain",
        formula="code and paper",
        paper="ICLR 2021, arXiv 2006.10726",
    )

    synchronized = True
    tasks = frozenset({"images", "tokens", "pixels"})
    task_defaults: ClassVar[dict[str, dict[str, Any]]] = {"tokens": {"lr": 5e-5, "optimizer": "adamw"}}

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.learn(self.select("norm"))

    def step(self, x: Tensor) -> Tensor:
        """One entropy step on the samples that the filters keep."""
        self.look(x)
        logits, entropies = self.judged(x, self.entropy)
        self.descend(entropies, self.keep(logits, entropies))
        return logits
