"""CoTTA: a student follows its moving average, which views steady where the source is unsure."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.teacher import ViewedMethod


class CoTTA(ViewedMethod):
    """Minimises the cross-entropy of the student under its teacher's predictions.

    With student s, teacher t (an average of past students) and anchor a (the source), logits u::

        target = mean_v u_t(view_v(x))  if mean_b max_k p_a(x) < anchor_threshold   (the anchor is unsure)
                 u_t(x)                 else
        L = mean_b CE(p_target, p_s(x))            then one step of s
        t <- ema_decay * t + (1 - ema_decay) * s   then each weight of s returns to the source with probability restore

    Parameters touched: all, of s and t; BatchNorm uses batch statistics, each view its own. State: s, t, the optimizer
    and the number of steps, from which masks and views are drawn; the anchor is the snapshot for :meth:`reset`.
    Returns the target, before the step.

    Passes per batch and step: one backward and three forward: anchor, teacher, student. If the anchor is unsure, the
    teacher's pass is replaced by ceil(views / n) passes of n views of the whole batch, n = chunk_views / batch size. At
    ``anchor_threshold`` 0 the anchor is not asked: two forward passes. A net with BatchNorm makes the teacher's pass in
    any case, for the account of the stream; :meth:`predict` is that pass, without views. ``stats`` has the anchor's
    confidence.

    As long as s = t, at the start and after a reset, a sure anchor leaves the L above without gradient: the first step
    of SGD is none, that of Adam is rounding noise, scaled up; it takes an unsure anchor, and so views, to move the
    student away. Not so with ``symmetric``: half of its gradient is then that of the entropy.

    Args:
        model: Any classifier.
        ema_decay: Of the teacher, in [0, 1]. Authors: 0.999.
        anchor_threshold: In [0, 1]. Authors: 0.92 (CIFAR-10), 0.72 (CIFAR-100), 0.1 (ImageNet).
        views: Views where the anchor is unsure, >= 1. Authors: 32.
        restore: Probability, in [0, 1]. Authors: 0.01 (CIFAR), 0.001 (ImageNet).
        symmetric: Whether L is the mean of CE(p_target, p_s) and CE(p_s, p_target), as in the authors' ImageNet code.
        chunk_views: At most this many images in one pass of views (but one view of the batch at least): a limit of
            memory that changes nothing else; ``None``: all views in one pass.
        seed: Of the views and masks.
        **options: ``lr`` and ``optimizer``: authors 1e-3 with ``adam`` (CIFAR, batch 200), 1e-2 with ``sgd`` (ImageNet,
            batch 64). ``momentum``, ``weight_decay`` (authors 0), ``steps`` (authors 1), ``lr_batch_size``.

    Source: Wang et al., CVPR 2022, arXiv 2203.13591. Views as in the authors' code, their mean over logits too. Differs
    from it: weights of every name are restored, class tokens too; a teacher's pass that is not used is not made; the
    net stays in eval mode (no dropout) with batch statistics, and source statistics survive; SGD without Nesterov.
    """

    about = About(
        does="cross-entropy to an averaged teacher, with views where the source is unsure; random restore",
        learns="all",
        passes="3, and views / 1",
        needs="-",
        holds="a teacher",
        suits="long, domains that change",
        formula="code",
        paper="CVPR 2022, arXiv 2203.13591",
    )

    tasks = frozenset({"images", "pixels"})
    step_on_host = "it asks whether the anchor is sure, which decides the number of passes"

    def __init__(
        self,
        model: nn.Module,
        *,
        ema_decay: float = 0.999,
        anchor_threshold: float = 0.92,
        views: int = 32,
        restore: float = 0.01,
        symmetric: bool = False,
        chunk_views: int | None = 512,
        seed: int = 0,
        **options: Any,
    ) -> None:
        options |= {"ema_decay": ema_decay, "seed": seed, "views": views, "chunk_views": chunk_views}
        super().__init__(model, restore=restore, symmetric=symmetric, **options)
        check_range("anchor_threshold", anchor_threshold, 0, 1)
        self.anchor_threshold = anchor_threshold

    def step(self, x: Tensor) -> Tensor:
        """One step of the student towards the teacher, of the teacher towards the student, and restore."""
        target = self._target_of_views(x)
        if target is None:
            return cast(Tensor, self.replayed("sure step", self._sure_step, x))
        return cast(Tensor, self.replayed("step with views", self._step_with_views, x, target))

    def infer(self, x: Tensor) -> Tensor:
        """The teacher's prediction, averaged over views where the anchor is unsure, which asks the device."""
        target = self._target_of_views(x)
        return self.infer_plain(x) if target is None else target

    def infer_plain(self, x: Tensor) -> Tensor:
        """The teacher's prediction."""
        return super().infer(x)

    def export(self) -> nn.Module:
        """As of every method: the teacher. Warns that it has no views."""
        net = super().export()
        if self.anchor_threshold > 0:
            warnings.warn(
                "Where the source is unsure CoTTA averages over views of the image; a plain net does not, nor does "
                "method.predict(images). method.predict(images, statistics='batch') does.",
                stacklevel=2,
            )
        return net

    def _target_of_views(self, x: Tensor) -> Tensor | None:
        """The teacher's mean logits over views, if the anchor is unsure: the one question to the device."""
        if not self.anchor_threshold:
            return None
        confidence, steps_taken = self.replayed("anchor pass", self._anchor_pass, x).tolist()
        return self.teach_views(x, int(steps_taken)).mean(0) if confidence < self.anchor_threshold else None

    @torch.no_grad()
    def _anchor_pass(self, x: Tensor) -> Tensor:
        anchor = at_least_float32(self.logits(x, self.source()))
        confidence = anchor.softmax(-1).amax(-1).mean()
        self.note(anchor_confidence=confidence)
        return torch.stack([confidence.double(), self.value("steps_taken").double()])

    def _sure_step(self, x: Tensor) -> Tensor:
        return self._step_towards(self.infer_plain(x), x)

    def _step_with_views(self, x: Tensor, target: Tensor) -> Tensor:
        if x is self._unrecorded:  # the statistics of the batch itself, with the weights that predict
            self.infer_plain(x)
        return self._step_towards(target, x)

    def _step_towards(self, target: Tensor, x: Tensor) -> Tensor:
        losses = soft_cross_entropy(target, self.logits(x), self.reverse)
        self.follow(self.descend(losses, extra=self.prior()))
        return target

    def prior(self) -> Tensor | float:
        """A term of the loss that does not depend on the batch."""
        return 0.0
