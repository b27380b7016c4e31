"""DeYO: entropy minimisation on samples whose prediction depends on the object's shape."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.draws import random_orders
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.entropy import EntropyMethod
from lightning_tta.methods.components.filters import LowLoss
from lightning_tta.views.augmix import permute_patches


class DeYO(EntropyMethod):
    """Minimises the weighted entropy of samples that are sure, and sure because of the object.

    With x' the image with its patches shuffled and y the arg-max of p(x), PLPD = p_y(x) - p_y(x'). A sample is kept
    if ``H < entropy_margin * ln K`` and ``PLPD > plpd_threshold``. Over the kept samples::

        L = mean [ stopgrad( exp(weight_margin * ln K - H) + exp(PLPD) ) * H ]

    Parameters touched: weight and bias of the normalisation layers but for the last blocks'
    (:func:`~lightning_tta.backbones.norms.early_norm_parameters`); BatchNorm uses batch statistics, for the shuffled
    images those of the samples that the entropy keeps. State: these, the optimizer, and the number of shuffles. Per
    batch and step: one forward pass, one without gradient on the shuffled images, and one backward pass; no step if no
    sample is kept. Returns the logits before the step. ``stats``: ``kept_by_entropy`` and ``kept``, shares of the
    batch, and ``plpd``, its mean over the former.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        entropy_margin: As a share of ln K, > 0; authors 0.5. ``None``: no such filter.
        weight_margin: As a share of ln K, >= 0; authors 0.4.
        plpd_threshold: In [-1, 1]; authors 0.2, and 0.3 for mild shifts.
        patches: Patches along a side, >= 1; authors 4.
        frozen_fraction: Share of the net's stages or blocks, from the last, that stay fixed, see
            :class:`~lightning_tta.methods.sar.SAR`, whose parameters these are.
        seed: Of the shuffles.
        **options: ``lr``: authors (ImageNet, SGD, batch 64) 2.5e-4 for ResNet-50, 1e-3 for ViT-B. They give none for
            CIFAR; the default, Adam 1e-3 at batch 200, is Tent's there and usual in public benchmarks. ``entropy``,
            ``source_filter``, ``optimizer``, ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        ConfigError: If an image has fewer pixels than patches along a side.
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Lee et al., DeYO, ICLR 2024, arXiv 2403.07366. Differs from the authors' code: the shuffles are seeded and
    resumed, and the same on every device; the last blocks are found by depth, not by name; the net stays in eval mode.
    """

    about = About(
        does="weighted entropy of samples that need the object's shape (patches shuffled)",
        learns="norm layers of the first blocks",
        passes="2 / 1",
        needs="norm layers",
        holds="-",
        suits="mixed, shifted in more than style",
        formula="code and paper",
        paper="ICLR 2024, arXiv 2403.07366",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        entropy_margin: float | None = 0.5,
        weight_margin: float = 0.4,
        plpd_threshold: float = 0.2,
        patches: int = 4,
        frozen_fraction: float = 0.25,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("weight_margin", weight_margin, 0)
        check_range("plpd_threshold", plpd_threshold, -1, 1)
        check_range("patches", patches, 1, integer=True)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.weight_margin, self.plpd_threshold, self.patches = weight_margin, plpd_threshold, patches
        self.add_filter(LowLoss(entropy_margin))
        (first, *_) = self.learn(self.select("early_norm", frozen_fraction=frozen_fraction))
        self.state("shuffles", torch.tensor([seed, 0], device=first.device))  # the key of the next ones

    def step(self, x: Tensor) -> Tensor:
        """One step on the samples that are kept."""
        self.look(x)
        logits = self.logits(x)
        entropies = self.entropy(logits)
        sure = self.keep(logits, entropies)
        assert sure is not None
        self.note(kept_by_entropy=sure.float().mean())
        if self.known(~sure.any()):
            return logits
        plpd = self._plpd(x, logits, sure)
        kept = sure & (plpd > self.plpd_threshold)
        self.note(kept=kept.float().mean(), plpd=torch.where(sure, plpd, 0).sum() / sure.sum())
        bound = self.weight_margin * math.log(logits.shape[-1])
        taken = self.descend(((bound - entropies.detach()).exp() + plpd.exp()) * entropies, kept)
        key = self.value("shuffles")
        self.write("shuffles", key + torch.arange(2, device=key.device), sure.any() & (taken | ~kept.any()))
        return logits

    @torch.no_grad()
    def _plpd(self, x: Tensor, logits: Tensor, sure: Tensor) -> Tensor:
        """How much of the probability of the predicted class is lost with the object's shape, (B,)."""
        orders = random_orders(self.value("shuffles"), len(x), self.patches**2)
        with self.counting(sure):
            shuffled = self.logits(permute_patches(x, self.patches, orders))
        before, after = (at_least_float32(u).softmax(-1) for u in (logits, shuffled))
        highest, label = before.max(-1)
        return highest - after.gather(-1, label[:, None]).squeeze(-1)
