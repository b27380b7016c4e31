"""Conjugate pseudo-labels: the self-training loss that belongs to the loss with which the source was trained."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import at_least_float32, conjugate_poly, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName

SourceLoss = Literal["cross_entropy", "poly"]


class ConjugatePL(GradientMethod):
    """Minimises the source's own training loss with the pseudo-label that is conjugate to the prediction.

    A training loss ``f(u) - y . g(u)`` of logits u and a label y becomes ``f(u) - y* . g(u)`` with the y* that makes
    ``grad f = (grad g) y*``, so that at y* the training loss has no gradient; the gradient of this one goes through y*
    too. With p = softmax(u / temperature)::

        cross_entropy   y* = p,  L = mean_b H(p)
        poly            y*_k = p_k / (1 + poly_epsilon p_k), scaled to sum 1
                        L = mean_b [ -sum_k y*_k log p_k + poly_epsilon sum_k y*_k (1 - p_k) ]

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these and
    the optimizer. Per batch and step: one forward and one backward pass, and with ``predict_after`` a forward pass on
    the batch once more. Returns the logits after the step, or without it those before.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        source_loss: The loss that the source was trained with: ``cross_entropy``, where this is Tent at a temperature;
            or ``poly``, PolyLoss, cross-entropy plus ``poly_epsilon (1 - p_y)``. The wrong one is another method.
        temperature: Of the logits in the loss, above 0. Authors: 1 in their configurations; searched for by setting.
        poly_epsilon: That of the source's training, >= 0; authors 6 (CIFAR), 8 (ImageNet).
        predict_after: Whether the batch is predicted after its step, as in the authors' code.
        **options: ``lr`` and ``optimizer``: authors 1e-3 with ``sgd``, batch 200 (CIFAR and ImageNet).
            ``momentum``, ``weight_decay`` (authors 0), ``steps`` (authors 1), ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Goyal et al., NeurIPS 2022, arXiv 2207.09640. Formula from: code and paper. Differs from the authors' code:
    y* of PolyLoss in closed form, there by a K x K system for each sample; GroupNorm and LayerNorm nets are allowed;
    the net stays in eval mode with batch statistics; SGD without Nesterov.
    """

    about = About(
        does="the source's training loss with its conjugate pseudo-label; entropy for cross-entropy",
        learns="norm layers",
        passes="2 / 1",
        needs="norm layers; to know the source's loss",
        holds="-",
        suits="shuffled",
        formula="code and paper",
        paper="NeurIPS 2022, arXiv 2207.09640",
    )
    uses_batch_statistics = True
    synchronized = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "sgd",
        source_loss: SourceLoss = "cross_entropy",
        temperature: float = 1.0,
        poly_epsilon: float = 6.0,
        predict_after: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, **options)
        check_choice("source_loss", source_loss, ("cross_entropy", "poly"))
        check_range("temperature", temperature, 0, low_open=True)
        check_range("poly_epsilon", poly_epsilon, 0)
        self.source_loss, self.temperature, self.poly_epsilon = source_loss, temperature, poly_epsilon
        self.predict_after = predict_after
        if predict_after:
            self.returns = "after the step"
        self.learn(self.select("norm"))

    def step(self, x: Tensor) -> Tensor:
        """One step on all samples."""
        logits = self.logits(x)
        scaled = at_least_float32(logits) / self.temperature
        losses = entropy(scaled) if self.source_loss == "cross_entropy" else conjugate_poly(scaled, self.poly_epsilon)
        self.descend(losses)
        if self.predict_after:
            with torch.no_grad():
                return self.logits(x, accounted=False)
        return logits
