"""MEMO and CR-MEMO: adapt to one image through its views, predict it, forget."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.imagenet_classes import class_subset
from lightning_tta.losses import consistency, marginal_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.episodes import check_classes
from lightning_tta.methods.components.image_episodes import EpisodeMethod


class MEMO(EpisodeMethod):
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
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``.
        momentum: SGD's, or Adam's first beta; ``None``: 0 and 0.9. In one step from nothing it does not matter.
        weight_decay: Weight decay, >= 0.
        steps: Steps for each image, at least 1.
        kl_weight: Weight of the consistency term, >= 0. CR-MEMO: 0.5 in the notebook of its runs.
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
        crop: ``[R, S]``: images are given before they are fitted to the net, and views made of these, as CR-MEMO's
            crops of the original image are; then the shorter side of views and image is resized to R, and the middle
            S x S cut out. CR-MEMO: ``[232, 224]`` (ResNet-50, weights V2), ``[256, 224]`` (DenseNet-121). ``None``:
            images fit the net.

    Raises:
        ConfigError: If a value is out of range, or ``together`` is not possible.
        UnsupportedModelError: If ``params="norm"`` and the net has no affine norm layer.

    Source: Zhang et al., arXiv 2110.09506 (MEMO), and the public code of CR-MEMO. Differs from them: Adam's state does
    not leak; AugMix's operations are PIL's on 8-bit pixels, but positions are rounded to 1/256 of a pixel; what its
    rotations, shears and shifts bring in from outside is black (in the authors' code the color (128, 0, 0)); crops are
    of the image as it is given, and of its size, by default one that has been resized and cut (in CR-MEMO of the
    original one, before that, and always of 224 x 224 pixels: see ``crop``).
    """

    about = About(
        does="entropy of the mean prediction over an image's views (MEMO), and their consistency (CR-MEMO)",
        learns="all, or norm layers",
        passes="of all views / 1",
        needs="-",
        holds="-",
        suits="each image for itself",
        formula="code and paper",
        paper="NeurIPS 2022, arXiv 2110.09506",
    )

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
        crop: list[int] | None = None,
    ) -> None:
        super().__init__(
            model,
            crop=crop,
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
        self.learn_rows(params, together)

    def image_loss(self, logits: Tensor) -> Tensor:
        """The loss of each image, from the logits of its views (S, V, K)."""
        if self.loss_classes is not None:
            check_classes("loss_classes", self.loss_classes, logits.shape[-1])
            logits = logits.index_select(-1, self.seen)
        loss = marginal_entropy(logits)
        if self.kl_weight:
            loss = loss + self.kl_weight * consistency(logits, self.kl_direction, self.kl_detach)
        return loss
