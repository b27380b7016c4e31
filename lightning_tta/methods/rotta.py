"""RoTTA: a student follows its averaged teacher on a memory of the stream that is balanced by class and timely."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.losses import soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.image_memory import MemoryMethod, TimelyMemory
from lightning_tta.methods.components.memory_statistics import MemoryStatistics
from lightning_tta.methods.components.teacher import TeacherMethod
from lightning_tta.views.jitter import jitter


class RoTTA(MemoryMethod, TeacherMethod):
    """Minimises the cross-entropy of a student's views of remembered images under its teacher's predictions.

    The teacher t predicts each batch, and its images enter a memory of M one after the other
    (:class:`~lightning_tta.methods.components.image_memory.TimelyMemory`). After every ``update_every`` images of the
    stream, wherever the batches end, with the images x_i in the memory, a_i the images that have come since i did, one
    random view v and the student s::

        w_i = 1 / (1 + exp(a_i / M))
        L = mean_i w_i CE(p_t(x_i), p_s(v(x_i)))   then one step of s
        t <- ema_decay * t + (1 - ema_decay) * s

    Both passes move BatchNorm statistics, each net has its own, and normalise with them (RobustBN)::

        mean <- (1 - m) mean + m mean_i(x_i)       variance likewise; with gradient through the memory's share

    A batch is predicted with the teacher's statistics as they are, so images of a batch do not depend on each other,
    and one image at a time is as good as many.

    Parameters touched: weight and bias of the normalisation layers, of s and t. State: these, both statistics, the
    optimizer, the memory with labels, ages and entropies. Returns the teacher's logits, before the step. Passes: one
    forward a batch, and every ``update_every`` images two forward and one backward over M images. Memory: M images.

    Args:
        model: A classifier with normalisation layers.
        capacity: M, >= 1; authors 64.
        ema_decay: Of the teacher, in [0, 1]; authors 0.999.
        bn_momentum: m, in [0, 1]; authors 0.05.
        lambda_t: Weight of age in the memory, >= 0; authors 1.
        lambda_u: Weight of entropy, >= 0; authors 1.
        seed: Of the views.
        **options: ``update_every`` (authors 64). ``lr`` and ``optimizer``: authors 1e-3 with ``adam``, for all
            data sets. ``momentum``, ``weight_decay`` (authors 0).

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or a BatchNorm layer without source
            statistics.

    Source: Yuan et al., RoTTA, CVPR 2023, arXiv 2303.13899. Formula from the authors' code. Differs from it: affine
    GroupNorm and LayerNorm layers learn as well; the entropy has no 1e-6 in its logarithm; the net stays in eval mode
    (no dropout); a BatchNorm layer with one value per channel keeps its statistics; a batch, or a step on the memory,
    that gives values that are not finite leaves no trace, and neither do the images since the last step.
    """

    about = About(
        does="cross-entropy of views to an averaged teacher, on a memory balanced by class",
        learns="norm layers",
        passes="1, and 2 / 1 every 64 images",
        needs="norm layers",
        holds="64 images, a teacher",
        suits="sorted by class, domains that change, any batch size",
        formula="code",
        paper="CVPR 2023, arXiv 2303.13899",
    )

    selected = "norm"
    uses_batch_statistics = False
    own_statistics = "its own follow a memory of images, with bn_momentum"

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity: int = 64,
        ema_decay: float = 0.999,
        bn_momentum: float = 0.05,
        lambda_t: float = 1.0,
        lambda_u: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, ema_decay=ema_decay, seed=seed, **options)
        self.images = TimelyMemory(self, capacity, lambda_t=lambda_t, lambda_u=lambda_u)
        self.of_teacher, self.of_student = (
            MemoryStatistics(self, net, momentum=bn_momentum) for net in ("teacher", "student")
        )
        self.statistics = self.of_teacher, self.of_student

    def views_of(self, images: Tensor, seen: int) -> tuple[Tensor, ...]:
        """One, which the number of images seen decides."""
        return (jitter(images, self.host_key(seen, 0)),)

    def learn_from(self, images: Tensor, there: Tensor, ages: Tensor, *more: Tensor) -> Tensor:
        """A step of the student on images (M, C, H, W), then of the teacher; whether all was finite."""
        with torch.no_grad(), self.of_teacher.moving(there):
            target = self.logits(images, self.teacher.weights())
        with self.of_student.moving(there):
            losses = soft_cross_entropy(target, self.logits(more[0]))
        timely = torch.sigmoid(-ages.to(losses.dtype) / self.images.size)
        taken = self.descend(losses * timely, there)
        if not self.known(~taken):
            self.update_teacher(taken)
        return taken
