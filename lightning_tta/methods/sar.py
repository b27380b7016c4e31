"""SAR: sharpness-aware entropy minimisation on reliable samples, with recovery from collapse."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.methods.components.entropy import EntropyMethod
from lightning_tta.methods.components.filters import LowLoss, move_average


class SAR(EntropyMethod):
    """Minimises the entropy of reliable samples where it is largest within a small ball of weights.

    Kept are the samples with ``H(p) < E0 = entropy_margin * ln K``. With g the gradient of their mean entropy::

        theta' = theta + rho * g / |g|
        L = mean H(p') over the kept samples that have H(p') < E0 at theta' as well

    The gradient of L, taken at theta', steps theta. When the moving average (0.9) of L falls below
    ``reset_threshold``, the net is taken for collapsed and the method resets itself.

    Parameters touched: weight and bias of the normalisation layers but for the last blocks'
    (:func:`~lightning_tta.backbones.norms.early_norm_parameters`); BatchNorm uses batch statistics. State: these, the
    optimizer and the average. Per batch and step: two forward and two backward passes; no step if a filter keeps
    nothing. Returns the logits of the first pass, before the step. ``stats``: ``kept`` and ``kept_twice``, shares of
    the batch; ``recoveries``, own resets.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        entropy_margin: E0 as a share of ln K, > 0; authors 0.4. ``None``: no filter.
        rho: Radius of the ball, >= 0; authors 0.05. 0: plain entropy minimisation, in two passes.
        reset_threshold: In nats, >= 0; authors 0.2, for 1000 classes; high for 10. ``None``: never.
        frozen_fraction: Share of the net's stages or blocks, from the last, that stay fixed, with all norm layers
            behind them, in [0, 1]; 0.25 is the authors' ``layer4`` of a ResNet, and blocks 9-11 and the norm of a ViT.
        **options: ``lr``: authors (ImageNet, SGD, batch 64) 2.5e-4 for ResNet-50, 1e-3 for ViT-Base. They give none for
            CIFAR; the default, Adam 1e-3 at batch 200, is Tent's there and usual in public benchmarks. ``entropy``,
            ``source_filter``, ``optimizer``, ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Niu et al., SAR, ICLR 2023, arXiv 2302.12400. Differs from the authors' code: a reset, its own too, clears
    momentum and average (there SGD's momentum is kept through a recovery, and the old average comes back); the
    threshold is an argument; no step on an empty selection; the last blocks are found by depth, not by name.
    """

    about = About(
        does="entropy of reliable samples at the sharpest point nearby, with recovery",
        learns="norm layers of the first blocks",
        passes="2 / 2",
        needs="norm layers",
        holds="a mean loss",
        suits="long, mixed, batches of one",
        formula="code and paper",
        paper="ICLR 2023, arXiv 2302.12400",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        entropy_margin: float | None = 0.4,
        rho: float = 0.05,
        reset_threshold: float | None = 0.2,
        frozen_fraction: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("rho", rho, 0)
        if reset_threshold is not None:
            check_range("reset_threshold", reset_threshold, 0)
        self.rho, self.reset_threshold = rho, reset_threshold
        self.reliable = LowLoss(entropy_margin)
        self.add_filter(self.reliable)
        (first, *_) = self.learn(self.select("early_norm", frozen_fraction=frozen_fraction))
        self.state("mean_loss", torch.full_like(at_least_float32(first.detach().sum()), NOT_YET), source=NOT_YET)

    def step(self, x: Tensor) -> Tensor:
        """Climb, and step back from there, on the samples that are kept."""
        self.count("recoveries", 0)
        self.look(x)
        logits = self.logits(x)
        entropies = self.entropy(logits)
        kept = self.keep(logits, entropies)
        assert kept is not None
        ascent = self.gradients(entropies, kept)
        if self.known(~ascent.usable):
            return logits
        with self.moved(ascent, self.rho):
            entropies = self.entropy(self.logits(x))
            kept = kept & self.reliable.keep(self, logits, entropies)
            self.note(kept_twice=kept.float().mean())
            descent = self.gradients(entropies, kept)
        taken = self.apply_gradients(dataclasses.replace(descent, usable=descent.usable & ascent.usable))
        self._recover(descent.loss, taken)
        return logits

    def _recover(self, loss: Tensor, taken: Tensor) -> None:
        """Follow the loss of the steps that were taken; reset where its average is too low."""
        average = move_average(self, "mean_loss", loss, 0.9, taken).clone()
        self.note(mean_loss=average)
        if self.reset_threshold is not None:
            collapsed = taken & (average < self.reset_threshold)
            self.count("recoveries", collapsed)
            if not self.known(~collapsed):
                self.reset_where(collapsed)
