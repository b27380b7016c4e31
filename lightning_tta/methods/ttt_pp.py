"""TTT++: contrastive learning on the stream, and features whose mean and covariance stay those of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.auxiliary.contrastive import Contrastive
from lightning_tta.auxiliary.method import AuxiliaryMethod
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError, UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.source_training import all_or_nothing

MEAN_SHARE = 0.5
"""Weight of the means' distance beside that of the covariances, in the authors' code."""


class TTTpp(AuxiliaryMethod[Contrastive]):
    """Minimises a contrastive loss of two views, plus distances of mean and covariance to the source's, at two places.

    With features z, and projections q = h(z) by the projector h of the source's contrastive training
    (:class:`~lightning_tta.auxiliary.contrastive.Contrastive`), mean m and covariance C of the last features, those of
    the batch with their gradient and up to ``queue`` earlier ones without; n of them in all::

        L = contrast_weight * mean_b SimCLR_b(h(z(two views)))
          + sum over f in (z, q) of scale_f * [ |C_s - C|^2 / c_n + MEAN_SHARE * |m_s - m|^2 / m_n ],   MEAN_SHARE 0.5

    m_s and C_s are the source's, from :meth:`prepare`; c_n and m_n are what such a distance is between two samples of n
    source features: ``c_n = 2 / n * (E |f - m_s|^4 - |C_s|^2)``, ``m_n = 2 / n * tr C_s``.

    Parameters touched: all but the last linear layer; h stays. BatchNorm uses batch statistics, the views' their own,
    all views together; in :meth:`prepare` those of the source. State: these, the optimizer, the queue, the number of
    steps; saved with them m_s and C_s. Per batch and step two forward passes, of the batch and of twice as many views,
    and one backward pass of both. Returns the logits before the step. ``stats`` has ``contrast``, ``alignment`` (of z)
    and ``projected_alignment`` (of q), before their weights.

    The net must have been trained with the projector: ``lightning-tta fit --config configs/digits/source.yaml
    --model.auxiliary contrastive``. For other nets :meth:`prepare` trains one, with the net as it is; our addition.

    Args:
        model: A classifier that ends in a linear layer.
        lr: Learning rate, >= 0; authors 0.01 (CIFAR-10, batch 256).
        optimizer: ``sgd`` (authors), ``nesterov``, ``adam`` or ``adamw``.
        momentum: In [0, 0.9999]; authors 0.9.
        contrast_weight: >= 0; 1 in the paper. In the authors' code it is temperature / 0.07, by a default of the loss
            that they use: 7.1.
        feature_scale: scale_z, >= 0; authors 0.05 (CIFAR-10).
        projection_scale: scale_q, >= 0; authors 0.2 (CIFAR-10).
        queue: Earlier features that are kept, >= 0; authors 1280.
        **options: ``head_from``, ``head_epochs``, ``head_lr``, ``seed``: see
            :class:`~lightning_tta.auxiliary.method.AuxiliaryMethod`. ``steps``, ``weight_decay`` (authors 0),
            ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer, or was not trained with a projector and
            ``head_from="trained"``.

    Source: Liu et al., NeurIPS 2021; formula from the authors' code. Differs from it: one pass over the stream, not up
    to 500 epochs over the test set, with alignment from the start; the batch itself is aligned, not a view of it; the
    queue counts from its first features on; c_n and m_n follow from source moments, where the code measures them on
    batches of the queue's size, against the first of them; views without hue.
    """

    about = About(
        does="contrastive loss of two views, and mean and covariance of features and projections as on the source",
        learns="all but the last layer",
        passes="2 / 1",
        needs="linear head; a source trained with auxiliary contrastive; 2,000 source images",
        holds="a projector, D x D floats, 1,280 features",
        suits="shuffled, long",
        formula="code",
        paper="NeurIPS 2021",
    )

    uses_batch_statistics = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-2,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.9,
        contrast_weight: float = 1.0,
        feature_scale: float = 0.05,
        projection_scale: float = 0.2,
        queue: int = 1280,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, momentum=momentum, **options)
        scales = {"contrast_weight": contrast_weight, "feature_scale": feature_scale}
        for name, value in {**scales, "projection_scale": projection_scale}.items():
            check_range(name, value, 0)
        check_range("queue", queue, 0, integer=True)
        self.contrast_weight, self.queue = contrast_weight, queue
        self.scales = {"features": feature_scale, "projections": projection_scale}
        self.take_auxiliary(Contrastive)
        self.needs_source, self.prepared = True, False
        head = {id(parameter) for parameter in self.split.head.parameters()}
        encoder = {name: p for name, p in self.select("all").items() if id(p) not in head}
        if not encoder:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has nothing that may learn before its last linear layer. Thaw the layers "
                "before it, or use method 'lame', which changes no weights."
            )
        self.learn(encoder)
        like = at_least_float32(self.split.head.weight.detach())
        self.state("queued", torch.zeros((), dtype=torch.int64, device=like.device), source=0)
        for name, width in (("features", self.split.num_features), ("projections", self.auxiliary.width)):
            self.register_buffer(f"{name}_mean", like.new_zeros(width))
            self.register_buffer(f"{name}_covariance", like.new_zeros(width, width))
            self.register_buffer(f"{name}_spread", like.new_ones(()))  # E |f - m|^4 - |C|^2
            self.state(f"{name}_queue", like.new_zeros(queue, width), source=0.0)

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Train the projector, if the net brings none; then take the moments of the source's features.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

        Raises:
            DataError: If there are fewer than two images with finite features.
        """
        source_batches = list(source_batches) if isinstance(source_batches, Iterator) else source_batches
        with all_or_nothing(self.auxiliary):
            super().prepare(source_batches)
            self.prepared = False  # until the moments are there
            self._take_moments(source_batches)
        self.prepared = True

    def _take_moments(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        seen: dict[str, list[Tensor]] = {name: [] for name in self.scales}
        with self.at_source():
            see_source_images(self, source_batches, lambda images: self._see(images, seen), running=nullcontext)
        for name, batches in seen.items():
            f = torch.cat([*batches, torch.zeros(0, self.get_buffer(f"{name}_mean").shape[0]).double()])
            f = f[f.isfinite().all(1)]
            if len(f) < 2:
                raise DataError(
                    f"'{self.name}' needs finite features of two source images or more; found {len(f)}. Give batches "
                    "{'image': (B, C, H, W) in [0, 1]} of the training set, 2,000 images or so."
                )
            mean, covariance = f.mean(0), f.T.cov()
            spread = (f - mean).square().sum(1).square().mean() - covariance.square().sum()
            with outside_inference_mode(), torch.no_grad():
                for part, value in (("mean", mean), ("covariance", covariance), ("spread", spread.clamp_min(1e-12))):
                    self.get_buffer(f"{name}_{part}").copy_(value)

    @torch.no_grad()
    def _see(self, images: Tensor, seen: dict[str, list[Tensor]]) -> None:
        features, _ = self.features(images)
        for name, value in (("features", features), ("projections", self._project(features))):
            seen[name].append(value.detach().cpu().double())

    def _project(self, features: Tensor) -> Tensor:
        projections: Tensor = self.auxiliary.projector(features.to(self.split.head.weight.dtype))
        return projections

    def step(self, x: Tensor) -> Tensor:
        """One step on two views and the batch; then the batch's features join the queue."""
        features, logits = self.features(x)
        found = {"features": features, "projections": self._project(features)}
        distances = {name: self._distance(name, at_least_float32(value)) for name, value in found.items()}
        seen, _ = self.features(self.auxiliary.views(x, self.draw_key(), self.draw_key(1)))
        contrast = self.auxiliary.contrast(self._project(seen))
        extra = sum(self.scales[name] * distance for name, distance in distances.items())
        taken = self.descend(self.contrast_weight * contrast, extra=extra)
        self.note(contrast=collective.mean(contrast), alignment=distances["features"])
        self.note(projected_alignment=distances["projections"])
        self.count_step(taken)
        for name, value in found.items():
            rows = torch.cat([self.value(f"{name}_queue"), value.detach().to(self.value(f"{name}_queue"))])
            self.write(f"{name}_queue", rows[len(rows) - self.queue :], taken)
        self.write("queued", (self.value("queued") + len(x)).clamp(max=self.queue), taken)
        return logits

    def _distance(self, name: str, f: Tensor) -> Tensor:
        """Of mean and covariance of the last features to the source's, in units of what two samples of it have."""
        queue, queued = self.value(f"{name}_queue"), self.value("queued")
        rows = torch.cat([queue.to(f.dtype), f])
        ages = torch.arange(self.queue, 0, -1, device=f.device)
        weights = torch.cat([(ages <= queued).to(f.dtype), torch.ones_like(f[:, 0])])
        n = weights.sum()
        mean = (weights[:, None] * rows).sum(0) / n
        centered = (rows - mean) * weights[:, None]
        covariance = centered.T @ centered / (n - 1).clamp_min(1)
        source = {part: self.get_buffer(f"{name}_{part}").to(f.dtype) for part in ("mean", "covariance", "spread")}
        of_means = 2 / n * source["covariance"].trace().clamp_min(1e-12)
        apart = (source["covariance"] - covariance).square().sum() / (2 / n * source["spread"])
        moved = MEAN_SHARE * (source["mean"] - mean).square().sum() / of_means
        return torch.where(n > 1, apart, 0.0) + moved
