"""OSTTA: entropy minimisation on samples of which the adapted net is at least as sure as the source."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import marginal_entropy
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import EntropyName, source_filter
from lightning_tta.methods.tent import Tent


class OSTTA(Tent):
    """Minimises the entropy of samples that follow the crowd, and raises that of the mean prediction.

    With c the arg-max of the source model theta0, a sample is kept if ``p_theta(x)[c] >= p_theta0(x)[c]``: learning
    from the others has not made it less sure. Images of unknown classes and wrong answers tend to fail this. ::

        L = mean_kept H(p) - alpha * H(mean_batch p)

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics, in the source
    model too. State: these and the optimizer; theta0 is their kept source values, put in place for its pass. Per batch
    and step: two forward passes, the source's without gradient, and one backward pass unless nothing is kept, when no
    step is taken. Returns the logits before the step. ``stats["kept_by_source_filter"]`` is the share of kept samples:
    1 on the first batch, when the net is the source.

    Tent, EATA, SAR and ZeroSiam take the filter alone as ``source_filter=True``.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Public code: 1e-3 with Adam (CIFAR, batch 200).
        optimizer: ``adam``, ``sgd`` or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999].
        weight_decay: >= 0; there 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).
        alpha: Weight of the mean prediction's entropy, >= 0; public code 0.5.
        entropy: Of the kept samples: ``softmax``, H above, or ``come``, :func:`~lightning_tta.losses.come_entropy`; of
            the mean prediction always H.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Lee et al., OSTTA, ICCV 2023, arXiv 2308.06879, whose filter it is; the entropy of the mean prediction is
    that of the public code of UniEnt (arXiv 2404.06065). Differs from that code: no second net, no gradient through
    the source, no step (there NaN) when nothing is kept.
    """

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
        alpha: float = 0.5,
        entropy: EntropyName = "softmax",
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            steps=steps,
            lr_batch_size=lr_batch_size,
            entropy=entropy,
            source_filter=True,
        )
        check_range("alpha", alpha, 0)
        self.alpha = alpha

    def adapt(self, images: Tensor) -> Tensor:
        """One step, if a sample is kept."""
        keep = source_filter(self, images)
        logits = self.infer(images)
        entropies = self.entropy(logits)[keep(logits)]
        if len(entropies):
            mean_entropy = marginal_entropy(logits)
            self.step(entropies.mean() - self.alpha * mean_entropy)
            self.record(mean_prediction_entropy=mean_entropy)
        return logits
