"""MEMO and CR-MEMO: adapt to one image through its views, predict it, forget."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.imagenet_classes import class_subset
from lightning_tta.losses import consistency, marginal_entropy
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName, masked_step
from lightning_tta.methods.components.episodes import ViewMethod, per_image
from lightning_tta.views.augmix import make_views

_VIEWS_AT_ONCE = 128


class MEMO(ViewMethod, GradientMethod):
    """Minimises ``H(pbar) + kl_weight * mean_k KL(p_k || pbar)``, pbar the mean prediction over an image's views.

    ``kl_weight = 0`` is MEMO, above 0 CR-MEMO. Each image of a batch is an episode of its own: its views, ``steps``
    steps, the prediction of the image itself with the adapted net, everything back. A batch gives what its images
    would give one by one.

    Parameters touched: all (``params="all"``) or those of the norm layers (``"norm"``: a different, faster method),
    and they come back. State: none; the optimizer is new for each image. Per image: ``steps`` forward and backward
    passes of ``views`` views and one forward pass; with ``"norm"`` a batch can go through them together. Logits
    are those after the steps. An image whose loss or gradient is not finite is predicted without adapting.

    Args:
        model: Any classifier; for ``params="norm"`` one with norm layers.
        lr: Learning rate. The authors: CIFAR 5e-3 (SGD), ResNet-50 2.5e-4 (SGD), transformers 1e-5 (AdamW, weight
            decay 0.01); CR-MEMO 2.5e-4 (AdamW).
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: SGD's, or Adam's first beta; ``None``: 0 and 0.9. In one step from nothing it does not matter.
        weight_decay: Weight decay, >= 0.
        steps: Steps for each image, at least 1.
        kl_weight: Weight of the consistency term, >= 0. CR-MEMO: 0.1 or 0.5.
        kl_direction: ``view_to_mean``, KL(p_k || pbar), or ``mean_to_view``.
        kl_detach: Whether pbar counts as a constant in that term.
        views: Views of each image, at least 1. The authors: 32 (CIFAR, CR-MEMO), 64 (ImageNet).
        augment: One of :data:`lightning_tta.views.augmix.AUGMENTATIONS`. MEMO: ``augmix_crop`` (CIFAR) or ``augmix``;
            CR-MEMO: ``rrc`` or ``rrc_flip``.
        bn_prior: N: BatchNorm takes N / (N + 1) of the source statistics, the rest of the image's views (16 in the
            papers); ``None``: the source statistics.
        params: ``all`` or ``norm``.
        optimizer_state: ``fresh``; or ``stale``, which keeps the optimizer's moments from image to image, as both
            public codes do with Adam: earlier images leak into later ones. For study only.
        loss_classes: Classes that the loss sees: their positions, or ``imagenet_a`` or ``imagenet_r`` (200 of 1000, as
            in MEMO); ``None``: all.
        predict_classes: Classes that may be predicted, named likewise.
        chunk_views: At most this many views in one pass; bounds the memory. ``None``: ``params="norm"`` takes the
            batch at once, ``"all"`` the views of one image.
        together: Whether the images of a batch go through ``params="norm"`` together, each with scales and shifts of
            its own, or one after the other: the same numbers. ``None``: together on an accelerator; on a CPU one
            image's activations stay in its cache, which is faster.
        seed: Seed of the views; an image's views depend on it and the pixels alone.

    Raises:
        ConfigError: If a value is out of range, or ``together`` is not possible.
        UnsupportedModelError: If ``params="norm"`` and the net has no affine norm layer.

    Source: Zhang et al., arXiv 2110.09506 (MEMO), and the public code of CR-MEMO. Differs from them: Adam's state does
    not leak; views come from tensors, not PIL images, so 8-bit rounding between operations is left out.
    """

    returns = "after the step"

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float = 5e-3,
        optimizer: OptimizerName = "sgd",
        momentum: float | None = None,
        weight_decay: float = 0.0,
        steps: int = 1,
        kl_weight: float = 0.0,
        kl_direction: Literal["view_to_mean", "mean_to_view"] = "view_to_mean",
        kl_detach: bool = False,
        views: int = 32,
        augment: str = "augmix_crop",
        bn_prior: int | None = None,
        params: Literal["all", "norm"] = "all",
        optimizer_state: Literal["fresh", "stale"] = "fresh",
        loss_classes: list[int] | str | None = None,
        predict_classes: list[int] | str | None = None,
        chunk_views: int | None = None,
        together: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            views=views,
            augment=augment,
            bn_prior=bn_prior,
            chunk_views=chunk_views,
            seed=seed,
            predict_classes=predict_classes,
            lr=lr,
            optimizer=optimizer,
            momentum=(0.0 if optimizer == "sgd" else 0.9) if momentum is None else momentum,
            weight_decay=weight_decay,
        )
        check_range("steps", steps, 1, integer=True)
        check_range("kl_weight", kl_weight, 0)
        check_choice("kl_direction", kl_direction, ("view_to_mean", "mean_to_view"))
        check_choice("params", params, ("all", "norm"))
        check_choice("optimizer_state", optimizer_state, ("fresh", "stale"))
        self.episode_steps, self.fresh = steps, optimizer_state == "fresh"
        self.kl_weight, self.kl_direction, self.kl_detach = kl_weight, kl_direction, kl_detach
        self.loss_classes = class_subset(loss_classes, "loss_classes")
        if self.loss_classes is not None and len(self.loss_classes) < 2:
            raise ConfigError(f"loss_classes must name at least two classes; got {loss_classes}.")
        named = self.select(params)
        self.learn(named)
        self._names = list(named)
        split = chunk_views is not None and chunk_views < views
        self.can_together = params == "norm" and self.fresh and not split and self.runs_per_image
        if together and not self.can_together:
            raise ConfigError(
                "together=True needs params='norm', optimizer_state='fresh', chunk_views of at least views, and norm "
                "layers of torch's own kinds without fused activations. Use together=None."
            )
        self.together = together

    def step(self, x: Tensor) -> Tensor:
        """An episode for each image; several at once where that is the same and fits."""
        together = x.device.type != "cpu" if self.together is None else self.together
        at_once = max(1, (self.chunk_views or _VIEWS_AT_ONCE) // self.views)
        if together and self.can_together:
            size = len(x) if self.chunk_views is None else at_once
            return self.allowed(torch.cat([self._episodes(images) for images in torch.split(x, size)]))
        logits = []
        for images in torch.split(x, at_once):  # views of several images are made at once, which is faster
            views_of_each = make_views(images, self.views, self.augment, self.seeds(images))
            logits += [self._episode(image[None], views) for image, views in zip(images, views_of_each, strict=True)]
        return self.allowed(torch.cat(logits))

    def _loss(self, logits: Tensor) -> Tensor:
        """The loss of each image, from the logits of its views (S, V, K)."""
        if self.loss_classes is not None:
            logits = logits[..., self.loss_classes]
        loss = marginal_entropy(logits)
        if self.kl_weight:
            loss = loss + self.kl_weight * consistency(logits, self.kl_direction, self.kl_detach)
        return loss

    def _episodes(self, images: Tensor) -> Tensor:
        """Several images at once: each has its own row of scales and shifts, the rest of the net is shared."""
        count = len(images)
        views = make_views(images, self.views, self.augment, self.seeds(images)).flatten(0, 1)
        rows = [p.detach().expand(count, *p.shape).clone().requires_grad_() for p in self.learned]
        affine = dict(zip(self._names, rows, strict=True))
        optimizer = self.new_optimizer(rows)
        good = torch.ones(count, dtype=torch.bool, device=images.device)
        for _ in range(self.episode_steps):
            with per_image(self.model, count, affine, self.bn_prior):
                loss = self._loss(self.logits(views).view(count, self.views, -1))
                gradients = self.differentiate(loss.sum(), rows)
            self.note(loss=loss.mean())
            good = good & loss.detach().isfinite()
            for gradient in gradients:
                good = good if gradient is None else good & gradient.flatten(1).isfinite().all(1)
            masked = [None if g is None else _where(good, g, torch.zeros_like(g)) for g in gradients]
            masked_step(optimizer, masked, torch.ones_like(good[0]))
            self.count("backwards")
            self.count("skipped_steps", ~good.all())
        with torch.no_grad():
            for name, p in zip(self._names, self.learned, strict=True):
                affine[name] = _where(good, affine[name], p.expand_as(affine[name]))
            with per_image(self.model, count, affine, self.bn_prior):
                return self.logits(images)

    def _episode(self, image: Tensor, views: Tensor) -> Tensor:
        """One image (1, C, H, W) with its views (V, C, H, W), on the net itself. Asks the device once a step."""
        if self.fresh:
            self.forget_moments()
        try:
            for _ in range(self.episode_steps):
                with self.source_statistics():  # for the backward pass too, which may compute layers again
                    taken = self.descend(self._loss(self._logits_of_views(views)[None]))
                if not bool(taken):
                    self._restore()
                    break
            with torch.no_grad(), self.source_statistics():
                return self.logits(image)
        finally:
            self._restore()
            if self.fresh:
                self.forget_moments()

    def _restore(self) -> None:
        with torch.no_grad():
            sources = [self.source_value(f"model.{name}") for name in self._names]
            torch._foreach_copy_([tensor.detach() for tensor in self.learned], sources)

    def _logits_of_views(self, views: Tensor) -> Tensor:
        """Logits (V, K); of views in chunks, one chunk's activations are kept at a time, and made again backwards."""
        if self.chunk_views is None or self.chunk_views >= self.views:
            return self.logits(views)
        chunks = torch.split(views, self.chunk_views)
        return torch.cat([checkpoint(self.logits, chunk, use_reentrant=False) for chunk in chunks])


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *(1,) * (yes.ndim - 1)), yes, no)
