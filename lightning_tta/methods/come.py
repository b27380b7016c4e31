"""COME: Tent with an objective that does not reward long logits."""

from __future__ import annotations

from torch import nn

from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.tent import Tent


class COME(Tent):
    """Minimises the mean entropy of the batch's opinions: K beliefs and one uncertainty.

    ``L = mean_b H(b_b)``, ``b = softmax(u'_1, ..., u'_K, ln K)``, ``u' = u * stopgrad(|u|) / |u|``, u the logits; see
    :func:`~lightning_tta.losses.come_entropy`. A sample of which the net knows little has short logits, and keeps its
    uncertainty: lengthening them is no way down.

    Parameters touched, state, passes and returned logits are those of :class:`~lightning_tta.methods.tent.Tent`, which
    is this with ``entropy="come"``; EATA, SAR and ZeroSiam take the same option.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Authors: those of the method that is improved; here Tent's for CIFAR.
        optimizer: ``adam``, ``sgd`` or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999].
        weight_decay: >= 0; authors 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).
        source_filter: As in Tent.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Zhang et al., COME, ICLR 2025, arXiv 2410.10894. Differs from the authors' code: K is the number of logits
    (there 1000 for any net), and large logits do not overflow.
    """

    parallel = frozenset({"replicas", "synchronised"})

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
        source_filter: bool = False,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            steps=steps,
            lr_batch_size=lr_batch_size,
            entropy="come",
            source_filter=source_filter,
        )
