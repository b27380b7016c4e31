"""RMT: a student held by its teacher, by prototypes of the source and by source images that are played again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import masked_step
from lightning_tta.methods.base.task import with_gradients
from lightning_tta.methods.components.prototypes import PrototypeMethod
from lightning_tta.methods.components.replay import ReplayMethod
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.teacher import TogetherMethod

WARMUP_BATCH = 64


class RMT(PrototypeMethod, ReplayMethod, TogetherMethod):
    """Minimises a symmetric cross-entropy with a teacher, a contrast with source prototypes, and a loss on the source.

    With student s, teacher t (an average of past students), view x~ of x, features z, logits u, source prototypes c_k,
    projector h, and ``SCE(u, v) = CE(p_u, p_v) / 2 + CE(p_v, p_u) / 2``::

        L = target_weight   * mean_b [ SCE(u_s(x), u_t(x)) + SCE(u_s(x~), u_t(x)) ] / 2
          + contrast_weight * mean_b SupCon( h(c_k), h(z), h(z~) ),   k = arg-max cos(c_k, z)
          + replay_weight   * mean CE(source labels, u_s(source images)),   as many as the batch has
        one step of s and h;   t <- ema_decay * t + (1 - ema_decay) * s

    SupCon (:func:`~lightning_tta.methods.components.contrast.contrast_views`) draws the three vectors of an image
    together, each of length 1; all others, those with the same prototype too, are negative. h is Linear, ReLU, Linear.

    Parameters touched: all, of s, t and h; BatchNorm uses batch statistics, each of the passes its own. State: these,
    the optimizers, the number of steps; saved with them the prototypes, K x D floats, and the source images, in 8 bits.
    Per batch and step: four forward passes, of student, view, teacher and source images, and one backward pass of
    three. Returns the sum of the logits of student and teacher, before the step.

    With ``source_free`` nothing of the source is seen: there is no replay, and c_k is the row w_k of the classifier, at
    the mean length of the batch's features. This form is our reconstruction. The authors' own source-free form keeps
    the prototypes of the source: ``replay_weight=0``.

    Args:
        model: A classifier that ends in one linear layer.
        source_free: Do without source data.
        target_weight: Of the cross-entropies with the teacher, >= 0; authors 1.
        contrast_weight: >= 0; authors 1.
        replay_weight: >= 0; authors 1. 0: no source image is kept.
        temperature: T of SupCon, > 0; authors 0.1.
        projector: Width of h, >= 1; authors 128. ``None``: no projector, the authors' choice for DomainNet.
        ema_decay: Of the teacher, in [0, 1]; authors 0.999.
        replay_images: Source images kept at most, the first that :meth:`prepare` is shown, >= 1; authors: all of them.
        warmup: Source images, of those kept, on which :meth:`prepare` trains the student towards the teacher by SCE, in
            batches of 64 and at a rate that rises to ``lr``, >= 0. Authors 50,000. A reset then goes back to the net
            after the warm-up. 0: none.
        head: Name of the last linear layer where the search finds another.
        seed: Of views, replayed images and projector.
        **options: ``lr`` and ``optimizer``: authors 1e-3 with ``adam`` (CIFAR, batch 200), 1e-2 with ``sgd`` (ImageNet,
            batch 64). ``momentum``, ``weight_decay`` (authors 0), ``steps`` (authors 1), ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: Döbler, Marsden and Yang, CVPR 2023, arXiv 2211.09081; formula from the authors' code. Differs from it: a
    class without a source image is nobody's nearest; source images are a bounded number, drawn anew for each step; the
    view is one draw for the whole batch; moments start at 0 after a warm-up, whose batches are of 64 images; SGD
    without Nesterov; the net stays in eval mode (no dropout).
    """

    about = About(
        does="symmetric cross-entropy with a teacher, contrast with source prototypes, loss on source images",
        learns="all",
        passes="4 / 1",
        needs="linear head, labelled source images (none with source_free)",
        holds="a teacher, a projector, K x D prototypes, 2,000 source images",
        suits="shuffled, changing over a long time",
        formula="code",
        paper="CVPR 2023, arXiv 2211.09081",
    )
    step_on_host = "it draws its view on the host"

    def __init__(
        self,
        model: nn.Module,
        *,
        source_free: bool = False,
        target_weight: float = 1.0,
        contrast_weight: float = 1.0,
        replay_weight: float = 1.0,
        temperature: float = 0.1,
        projector: int | None = 128,
        ema_decay: float = 0.999,
        replay_images: int = 2000,
        warmup: int = 0,
        head: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, ema_decay=ema_decay, seed=seed, **options)
        check_range("target_weight", target_weight, 0)
        check_range("replay_weight", replay_weight, 0)
        check_range("replay_images", replay_images, 1, integer=True)
        check_range("warmup", warmup, 0, integer=True)
        self.target_weight, self.replay_weight = target_weight, 0.0 if source_free else replay_weight
        self.source_free, self.warmup = source_free, 0 if source_free else warmup
        self.replay_images = replay_images if self.replay_weight or self.warmup else 0
        self.needs_source, self.prepared = not source_free, source_free
        self.split = HeadSplit(self.model, head)
        self.make_contrast(contrast_weight, temperature, projector, from_source=not source_free, seed=seed)
        if not source_free:
            self.make_room(self.replay_images)
        if self.warmup:  # teacher and student part before the stream, so each has a source of its own
            for slot in self.teacher.slots.values():
                self.state(f"teacher.{slot}", self.teacher.get_buffer(slot))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take prototypes, the class means of the features, and keep images; then the warm-up. At the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,).

        Raises:
            ConfigError: If the method is prepared already, and has a warm-up.
            DataError: If there is no image with finite features, or a label is missing or no class of the net.
        """
        if self.warmup:
            self.check_not_prepared()
        if not self.source_free:
            self.make_room(self.replay_images)
            self.take_prototypes(source_batches, running=self.normalizing, also=self.keep)
            if self.warmup:
                self._warm_up()
        super().prepare(source_batches)

    def _warm_up(self) -> None:
        """Train the student towards the teacher on source images, and let that be the source from here on."""
        steps, number = max(1, self.warmup // WARMUP_BATCH), 0
        batches, students = self.replayed_batches(self.seed, steps, WARMUP_BATCH), list(self.student().values())

        def see(images: Tensor) -> None:
            nonlocal number
            number += 1
            with with_gradients(images, images.dtype) as images:
                loss = soft_cross_entropy(self.teach(images), self.logits(images), 0.5).mean()
                gradients = torch.autograd.grad(loss, students, allow_unused=True)
            masked_step(self.optimizers["model"], gradients, loss.detach().isfinite(), number / steps)
            self.update_teacher()

        see_source_images(self, batches, see, running=self.normalizing)
        with outside_inference_mode():
            self.forget_moments()
            for name in (n for n in self.adaptable if n.startswith(("model.", "teacher."))):
                self.renew_source(name)

    def step(self, x: Tensor) -> Tensor:
        """One step of student and projector, and of the teacher towards the student."""
        return cast(Tensor, self.replayed("step", self._step, x, self.view(x, 1)))

    def _step(self, x: Tensor, view: Tensor) -> Tensor:
        target = self.teach(x)  # before there is a graph, whose weights the teacher's may replace for a moment
        features, logits = self.features(x)
        view_features, view_logits = self.features(view)
        losses = self.target_weight * soft_cross_entropy(target, torch.stack([logits, view_logits]), 0.5).mean(0)
        if self.contrast_weight:
            losses = losses + self.contrast_weight * self.contrast(features, view_features)
        replay = self.replay_loss(self.draw_key(), len(x), x.dtype) if self.replay_weight else 0.0
        self.follow(self.descend(losses, extra=self.replay_weight * replay))
        return at_least_float32(logits.detach()) + at_least_float32(target)
