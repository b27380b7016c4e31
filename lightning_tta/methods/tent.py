"""Tent: entropy minimisation through the affine parameters of the normalisation layers."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones.norms import norm_parameters
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import EntropyName, entropy_function, source_filter


class Tent(TTAMethod):
    """Minimises the mean prediction entropy of the batch.

    ``L = mean_b H(p_b)``, ``H(p) = -sum_k p_k log p_k``.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these
    and the optimizer. Per batch and step: one forward, one backward pass. Returns the logits before the step.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Authors: 1e-3 with Adam (CIFAR, batch 200), 2.5e-4 with SGD (ImageNet, batch 64).
        optimizer: ``adam`` (authors, CIFAR), ``sgd`` (authors, ImageNet) or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999].
        weight_decay: >= 0; authors 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).
        entropy: ``softmax``, H above, or ``come``, :func:`~lightning_tta.losses.come_entropy` in its place.
        source_filter: Take the mean over the samples that OSTTA's filter keeps
            (:func:`~lightning_tta.methods.components.filters.source_filter`), one more forward pass; no step if it
            keeps none.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Wang et al., Tent, ICLR 2021, arXiv 2006.10726. Differs from the authors' code: GroupNorm and LayerNorm
    nets are allowed, the net stays in eval mode with batch statistics, source statistics survive.
    """

    parallel = frozenset({"replicas", "synchronised"})
    uses_batch_statistics = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 1,
        lr_batch_size: int | None = None,
        entropy: EntropyName = "softmax",
        source_filter: bool = False,
    ) -> None:
        super().__init__(model, steps=steps)
        self.entropy = entropy_function(entropy)
        self.source_filter = source_filter
        parameters = self.declare(norm_parameters(self.model))
        self.add_optimizer("model", parameters, optimizer, lr, momentum=momentum, weight_decay=weight_decay)
        self.scale_lr_by_batch(lr_batch_size)

    def adapt(self, images: Tensor) -> Tensor:
        """One entropy step on every image of the batch, or on those that the filter keeps."""
        keep = source_filter(self, images) if self.source_filter else None
        logits = self.infer(images)
        entropies = self.entropy(logits)
        if keep is not None:
            entropies = entropies[keep(logits)]
        if collective.count(entropies):
            self.step(collective.mean(entropies))
        return logits
