"""SAR: sharpness-aware entropy minimisation on reliable samples, with recovery from collapse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import early_norm_parameters
from lightning_tta.errors import check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import (
    EntropyName,
    entropy_function,
    moving_average,
    reliable,
    source_filter,
)


class SAR(TTAMethod):
    """Minimises the entropy of reliable samples where it is largest within a small ball of weights.

    Kept are the samples with ``H(p) < E0 = entropy_margin * ln K``. With g the gradient of their mean entropy::

        theta' = theta + rho * g / |g|
        L = mean H(p') over the kept samples that have H(p') < E0 at theta' as well

    The gradient of L, taken at theta', steps theta. When the moving average (0.9) of L falls below
    ``reset_threshold``, the net is taken for collapsed and the method resets itself.

    Parameters touched: weight and bias of the normalisation layers but for the last blocks'
    (:func:`~lightning_tta.backbones.norms.early_norm_parameters`); BatchNorm uses batch statistics. State: these, the
    optimizer and the average. Per batch and step: two forward and two backward passes; one forward if the first
    filter keeps nothing, and no second backward and no step if the second one does. Returns the logits of the first
    pass, before the step. ``stats``: ``kept`` and ``kept_twice``, shares of the batch; ``recoveries``, own resets.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Authors (ImageNet, SGD, batch 64): 2.5e-4 for ResNet-50, 1e-3 for ViT-Base. They give
            none for CIFAR; the default, Adam 1e-3 at batch 200, is Tent's there and usual in public benchmarks.
        optimizer: ``adam``, ``sgd`` (authors) or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999].
        weight_decay: >= 0; authors 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).
        entropy_margin: E0 as a share of ln K, > 0; authors 0.4. ``None``: no filter.
        rho: Radius of the ball, >= 0; authors 0.05. 0: plain entropy minimisation, in two passes.
        reset_threshold: In nats, >= 0; authors 0.2, for 1000 classes; high for 10. ``None``: never.
        frozen_fraction: Share of the net's stages or blocks, from the last, that stay fixed, with all norm layers
            behind them, in [0, 1]; 0.25 is the authors' ``layer4`` of a ResNet, and blocks 9-11 and the norm of a ViT.
        entropy: ``softmax``, H above, or ``come``, :func:`~lightning_tta.losses.come_entropy` in its place.
        source_filter: Keep only samples that OSTTA's filter keeps too
            (:func:`~lightning_tta.methods.components.filters.source_filter`), one more forward pass.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Niu et al., SAR, ICLR 2023, arXiv 2302.12400. Differs from the authors' code: a reset, its own too, clears
    momentum and average (there the old average comes back); the threshold is an argument; no step on an empty
    selection; the last blocks are found by depth, not by name.
    """

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
        entropy_margin: float | None = 0.4,
        rho: float = 0.05,
        reset_threshold: float | None = 0.2,
        frozen_fraction: float = 0.25,
        entropy: EntropyName = "softmax",
        source_filter: bool = False,
    ) -> None:
        super().__init__(model, steps=steps)
        if entropy_margin is not None:
            check_range("entropy_margin", entropy_margin, 0, low_open=True)
        if reset_threshold is not None:
            check_range("reset_threshold", reset_threshold, 0)
        check_range("rho", rho, 0)
        self.entropy_margin, self.rho, self.reset_threshold = entropy_margin, rho, reset_threshold
        self.entropy = entropy_function(entropy)
        self.source_filter = source_filter
        parameters = self.declare(early_norm_parameters(self.model, frozen_fraction))
        self.add_optimizer("model", parameters, optimizer, lr, momentum=momentum, weight_decay=weight_decay)
        self.scale_lr_by_batch(lr_batch_size)
        self.remember(mean_loss=None)

    def adapt(self, images: Tensor) -> Tensor:
        """Climb, and step back from there, on the samples that are kept, if any."""
        self._counts.setdefault("recoveries", 0)
        agrees = source_filter(self, images) if self.source_filter else None
        logits = self.infer(images)
        entropies = self.entropy(logits)
        keep = reliable(entropies, logits, self.entropy_margin)
        if agrees is not None:
            keep = keep & agrees(logits)
        self.record(kept=keep.float().mean())
        ascent = self.gradients(entropies[keep].mean()) if bool(keep.any()) else None
        if ascent is None:
            return logits
        with self._climbed(ascent):
            entropies = self.entropy(self.infer(images))
            keep = keep & reliable(entropies, logits, self.entropy_margin)
            self.record(kept_twice=keep.float().mean())
            gradients = None
            if bool(keep.any()):
                loss = entropies[keep].mean()
                gradients = self.gradients(loss)
        if gradients is not None:
            self.apply_gradients(gradients)
            self._watch(loss)
        return logits

    @contextmanager
    def _climbed(self, gradients: Sequence[Tensor | None]) -> Iterator[None]:
        """While active, the weights are ``rho`` up the gradient; afterwards exactly where they were."""
        before = [tensor.detach().clone() for tensor in self.trained]
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        try:
            with torch.no_grad():
                for tensor, gradient in zip(self.trained, gradients, strict=True):
                    if gradient is not None:
                        tensor.add_(gradient * (self.rho / (norm + 1e-12)))
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.trained, before, strict=True):
                    tensor.copy_(value)

    def _watch(self, loss: Tensor) -> None:
        average = moving_average(self.memory["mean_loss"], loss, 0.9)
        self.memory["mean_loss"] = average
        self.record(mean_loss=average)
        if self.reset_threshold is not None and bool(average < self.reset_threshold):
            self.reset()
            self._counts["recoveries"] += 1
