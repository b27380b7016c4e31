"""MEMO and CR-MEMO: adapt to one image through its views, predict it, forget."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.imagenet_classes import class_subset
from lightning_tta.losses import consistency, marginal_entropy
from lightning_tta.methods.base.gradient import GradientMethod, Gradients, total_norm
from lightning_tta.methods.base.optimizers import OptimizerName, masked_step
from lightning_tta.methods.components.episodes import ViewMethod, check_classes, made_again, per_image
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
        chunk_views: At most this many views in one pass; bounds the memory. ``None``: as many as fit into 0.6 of what
            is free on a GPU (on a CPU 128 views of 224 px), up to the batch at once with ``params="norm"``, the views
            of one image with ``"all"``.
        together: Whether the images of a batch go through ``params="norm"`` together, each with scales and shifts of
            its own, or one after the other: the same numbers. ``None``: together on an accelerator; on a CPU one
            image's activations stay in its cache, which is faster.
        seed: Seed of the views; an image's views depend on it and the pixels alone.

    Raises:
        ConfigError: If a value is out of range, or ``together`` is not possible.
        UnsupportedModelError: If ``params="norm"`` and the net has no affine norm layer.

    Source: Zhang et al., arXiv 2110.09506 (MEMO), and the public code of CR-MEMO. Differs from them: Adam's state does
    not leak; AugMix's operations are PIL's on 8-bit pixels, but positions are rounded to 1/256 of a pixel.
    """

    returns = "after the step"
    seen: Tensor

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
        self.register_buffer("seen", self.positions(self.loss_classes), persistent=False)
        named = self.select(params)
        self.learn(named)
        self._names = list(named)
        is_chosen = self.choice is not None  # other parameters have no rows of their own for each image
        split = chunk_views is not None and chunk_views < views
        self.can_together = params == "norm" and not is_chosen and self.fresh and not split and self.runs_per_image
        if together and not self.can_together:
            raise ConfigError(
                "together=True needs params='norm' without select=, optimizer_state='fresh', chunk_views of at least "
                "views, and norm layers of torch's own kinds without fused activations. Use together=None."
            )
        self.together = together

    def step(self, x: Tensor) -> Tensor:
        """An episode for each image; several at once where that is the same and fits."""
        together = (x.device.type != "cpu" if self.together is None else self.together) and self.can_together
        run, kind = (self._pass_of_rows, "rows") if together else (self.logits, "net")
        images, self._views_at_once = self.fitting(x, run, kind, self.views)
        if x.device.type == "cpu" and not together:  # what goes through the net in turn stays in the caches
            images = min(images, max(1, _VIEWS_AT_ONCE // self.views))
        seeds, parts = self.seeds(x), []
        for first in range(0, len(x), images):  # views of several images are made at once, which is faster
            chunk = x[first : first + images]
            views = make_views(chunk, self.views, self.augment, seeds[first : first + images])
            if together and self._views_at_once == self.views:
                parts.append(self.replayed("episodes", self._episodes, chunk, views))
            else:
                pairs = zip(chunk, views, strict=True)
                parts += [self.replayed("episode", self._episode, one[None], its_views) for one, its_views in pairs]
        logits, losses = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.note(loss=losses.mean())
        return self.allowed(logits)

    def _loss(self, logits: Tensor) -> Tensor:
        """The loss of each image, from the logits of its views (S, V, K)."""
        if self.loss_classes is not None:
            check_classes("loss_classes", self.loss_classes, logits.shape[-1])
            logits = logits.index_select(-1, self.seen)
        loss = marginal_entropy(logits)
        if self.kl_weight:
            loss = loss + self.kl_weight * consistency(logits, self.kl_direction, self.kl_detach)
        return loss

    def _rows(self, images: int) -> tuple[list[Tensor], list[Tensor]]:
        """A row for each image of what is learned: as tensors (S, N), one a dtype; by parameter, (S, ...), in them."""
        flat: list[Tensor] = []
        rows: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in self.learned):
            group = {i: p.detach() for i, p in enumerate(self.learned) if p.dtype == dtype}
            flat.append(torch.cat([p.flatten() for p in group.values()]).expand(images, -1).clone())
            pieces = torch.split(flat[-1], [p.numel() for p in group.values()], 1)
            for (index, p), piece in zip(group.items(), pieces, strict=True):
                rows[index] = piece.view(images, *p.shape).requires_grad_()
        return flat, [rows[index] for index in range(len(rows))]

    def _with_rows(self, rows: list[Tensor]) -> AbstractContextManager[None]:
        return per_image(self.model, len(rows[0]), dict(zip(self._names, rows, strict=True)), self.bn_prior)

    def _pass_of_rows(self, samples: Tensor) -> Tensor:
        """A pass of one image's views, as :meth:`_episodes` has it."""
        with self._with_rows(self._rows(1)[1]):
            return self.logits(samples)

    def _episodes(self, images: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Several images at once: each has its own row of scales and shifts, the rest of the net is shared.

        Images (S, C, H, W) and their views (S, V, C, H, W); logits (S, K) and the last step's losses (S,).
        """
        count, samples = len(images), views.flatten(0, 1)
        flat, rows = self._rows(count)
        source = [tensor[:1].clone() for tensor in flat]
        optimizer = self.new_optimizer(flat)
        good = torch.ones(count, dtype=torch.bool, device=images.device)
        for _ in range(self.episode_steps):
            with self._with_rows(rows):
                losses = self._loss(self.logits(samples).view(count, self.views, -1))
                gradients = self.differentiate(losses.sum(), rows)
            losses, before = losses.detach(), good
            values = [torch.zeros_like(r) if g is None else g for r, g in zip(rows, gradients, strict=True)]
            steps = [torch.cat([v.flatten(1) for v in values if v.dtype == tensor.dtype], 1) for tensor in flat]
            for finite in (losses.isfinite(), *(step.isfinite().all(1) for step in steps)):
                good = good & finite
            self.count("backwards")
            self.count("skipped_steps", (before & ~good).sum())
            masked_step(optimizer, steps, torch.ones((), dtype=torch.bool, device=images.device))
            with torch.no_grad():
                for row, p, gradient in zip(rows, self.learned, gradients, strict=True):
                    if gradient is None:  # weight decay is for what learns
                        row.copy_(p)
        with torch.no_grad(), self._with_rows(rows):
            for tensor, value in zip(flat, source, strict=True):
                tensor.copy_(torch.where(good[:, None], tensor, value))
            return self.logits(images), losses

    def _episode(self, image: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """One image (1, C, H, W) with its views (V, C, H, W), on the net itself; logits (1, K), last step's loss (1,).

        The weights are the source's before and after; a step that is not finite leaves them there for all that follow.
        """
        if self.fresh:
            self.forget_moments()
        good = torch.ones((), dtype=torch.bool, device=image.device)
        try:
            for _ in range(self.episode_steps):
                with self.source_statistics():  # for the backward pass too, which may compute layers again
                    losses = self._loss(self._logits_of_views(views)[None])
                    gradients = self.differentiate(losses.sum())
                losses = losses.detach()
                norm = total_norm([g for g in gradients if g is not None])
                finite = norm.isfinite() & losses.isfinite().all()
                self.count("backwards")
                self.count("skipped_steps", good & ~finite)
                good = good & finite
                if self.known(~good):
                    break
                self.apply_gradients(Gradients(gradients, losses[0], good, norm))
            if self.episode_steps > 1 and not self.known(good):
                self._restore(~good)
            with torch.no_grad(), self.source_statistics():
                return self.logits(image), losses
        finally:
            self._restore()
            if self.fresh:
                self.forget_moments()

    @torch.no_grad()
    def _restore(self, where: Tensor | None = None) -> None:
        tensors = [tensor.detach() for tensor in self.learned]
        sources = [self.source_value(f"model.{name}") for name in self._names]
        if where is not None:
            sources = [torch.where(where, source, t) for source, t in zip(sources, tensors, strict=True)]
        torch._foreach_copy_(tensors, sources)

    def _logits_of_views(self, views: Tensor) -> Tensor:
        """Logits (V, K); of views in chunks, one chunk's activations are kept at a time, and made again backwards."""
        if self._views_at_once >= self.views:
            return self.logits(views)
        chunks = torch.split(views, self._views_at_once)
        return torch.cat([made_again(self.logits, chunk) for chunk in chunks])
