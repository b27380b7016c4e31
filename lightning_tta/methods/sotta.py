"""SoTTA: sharpness-aware entropy minimisation on a memory of sure images of the stream, of each class as many."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.image_memory import MemoryMethod, UniformMemory
from lightning_tta.methods.components.memory_statistics import MemoryStatistics


class SoTTA(MemoryMethod):
    """Minimises the entropy of sure remembered images where it is largest within a small ball of weights.

    Images that the net is sure of, ``max_k p_k >= threshold``, enter a memory of M one after the other, which holds as
    many of each predicted class (:class:`~lightning_tta.methods.components.image_memory.UniformMemory`): so images of
    no class of the net, which come in a polluted stream, stay out. After every ``update_every`` images of the stream,
    wherever the batches end, with x_i in the memory and g the gradient of their mean entropy::

        theta' = theta + rho * g / |g|
        L = mean_i H(p'(x_i)) at theta'       whose gradient steps theta

    Both passes have BatchNorm normalise with the memory's statistics, and move those that the net keeps, with the
    unbiased variance, as torch does in training mode::

        mean <- (1 - m) mean + m mean_i(x_i)       variance likewise

    Images are predicted with what is kept, those behind a step within a batch after it. So images of a batch do not
    depend on each other, one at a time is as good as many, and batches of any size give the same.

    Parameters touched: weight and bias of the normalisation layers but for the last blocks'. State: these, the
    statistics, the optimizer, the memory with labels and confidences. Returns the logits before the step. Passes: one
    forward a batch, in parts, and every ``update_every`` images two forward and two backward over M images. Memory: M
    images.

    Args:
        model: A classifier with normalisation layers.
        capacity: M, >= 1; authors 64.
        threshold: Confidence, in [0, 1]; authors 0.99 (CIFAR-10), 0.66 (CIFAR-100), 0.33 (ImageNet).
        rho: Radius of the ball, >= 0; authors 0.05.
        bn_momentum: m, in [0, 1]; authors 0.2.
        frozen_fraction: Share of the net's stages or blocks, from the last, that stay fixed, in [0, 1]; authors the
            last of four, as in :class:`~lightning_tta.methods.sar.SAR`.
        seed: Of the draws of what leaves the memory.
        **options: ``update_every`` (authors 64). ``lr`` and ``optimizer``: authors 1e-3 with ``adam``.
            ``momentum``, ``weight_decay`` (authors 0).

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or a BatchNorm layer without source
            statistics.

    Source: Gong et al., SoTTA, NeurIPS 2023, arXiv 2310.10074. Formula from the authors' code, in which both passes
    move the statistics, the second one at theta'. Differs from it: the last blocks are found by depth, not by name; the
    net stays in eval mode (no dropout); a BatchNorm layer with one value per channel keeps its statistics; a step that
    gives values that are not finite leaves no trace, and neither do the images since the last one.
    """

    about = About(
        does="sharpness-aware entropy, on a memory of sure images balanced by class",
        learns="norm layers but the last",
        passes="1, and 2 / 2 every 64 images",
        needs="norm layers",
        holds="64 images",
        suits="polluted by other images, any batch size",
        formula="code",
        paper="NeurIPS 2023, arXiv 2310.10074",
    )

    own_statistics = "its own follow a memory of images, with bn_momentum"
    in_parts = True

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity: int = 64,
        threshold: float = 0.99,
        rho: float = 0.05,
        bn_momentum: float = 0.2,
        frozen_fraction: float = 0.25,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("rho", rho, 0)
        self.rho = rho
        self.learn(self.select("early_norm", frozen_fraction=frozen_fraction))
        self.images = UniformMemory(self, capacity, threshold=threshold, seed=seed)
        self.of_net = MemoryStatistics(self, momentum=bn_momentum, share=1.0, unbiased=True)
        self.statistics = (self.of_net,)

    def learn_from(self, images: Tensor, there: Tensor, ages: Tensor, *more: Tensor) -> Tensor:
        """Climb, and step back from there, on images (M, C, H, W); whether all was finite, or there was none."""
        with self.of_net.moving(there):
            ascent = self.gradients(entropy(self.logits(images)), there)
        is_empty = ~there.any()
        if self.known(~ascent.usable):
            return is_empty
        with self.moved(ascent, self.rho), self.of_net.moving(there, again=True):
            descent = self.gradients(entropy(self.logits(images)), there)
        descent = dataclasses.replace(descent, usable=descent.usable & ascent.usable)
        return self.apply_gradients(descent) | is_empty
