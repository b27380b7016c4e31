"""NOTE: instance-aware BatchNorm, and entropy minimisation on a memory that is balanced by predicted class."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.errors import DataError, check_range
from lightning_tta.losses import entropy
from lightning_tta.methods.base.account import Statistics
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.image_memory import MemoryMethod, ReservoirMemory
from lightning_tta.methods.components.memory_statistics import MemoryStatistics
from lightning_tta.methods.components.statistics import instance_aware


class InstanceAware(MemoryStatistics):
    """The statistics of each image, shrunk towards those that are kept, or in a pass over the memory to the memory's.

    Args:
        method: Whose net it is.
        k: >= 0.
        momentum: Of what is kept, in [0, 1].
    """

    def __init__(self, method: TTAMethod, *, k: float, momentum: float) -> None:
        check_range("k", k, 0)
        super().__init__(method, momentum=momentum, share=1.0, unbiased=True)
        self.k = k

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image (2, B, C); and what is kept."""
        if self.weights is None:
            return instance_aware(x, old, self.eps[name], self.k), old
        return super().rule(method, name, x, old)

    def rows(self, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Around the memory's mean and unbiased variance."""
        memory, kept = super().rows(name, x, old)
        assert self.weights is not None
        number = self.weights.sum() * (x[0].numel() // x.shape[1])
        bessel = number / (number - 1).clamp(min=1)
        memory = torch.stack([memory[0], torch.where(number > 1, memory[1] * bessel, memory[1])])
        return instance_aware(x, memory, self.eps[name], self.k), kept


class NOTE(MemoryMethod):
    """Minimises the entropy of remembered images, with BatchNorm layers that look at each image (IABN).

    A layer normalises image i with its own mean and variance where these are farther from those of the population, mu
    and v, than chance; n pixels, ``shrink(x, l) = sign(x) max(|x| - l, 0)``::

        mean_i = mu + shrink(m_i - mu, k sqrt((v + eps) / n))
        var_i  = max(v + shrink(v_i - v, k (v + eps) sqrt(2 / (n - 1))), 0)

    Images enter a memory of M one after the other
    (:class:`~lightning_tta.methods.components.image_memory.ReservoirMemory`), which is balanced by predicted class and
    a uniform sample of each class: so a stream sorted by class looks shuffled there. After every ``update_every``
    images of the stream, wherever the batches end, one step on ``L = mean_i H(p(x_i))`` over the memory, with its mean
    and variance for mu and v; and what the net keeps, with which it predicts, moves there::

        mu <- (1 - m) mu + m mean_i(x_i)       v likewise, unbiased

    **The source net must have been trained with such layers.** In a net trained with plain BatchNorm they take away
    what tells images apart, and cost accuracy on clean images already. :meth:`prepare`, which is not needed, measures
    that on labelled source images, and warns.

    Parameters touched: weight and bias of the normalisation layers. State: these, the statistics, the optimizer, the
    memory with labels, and how many images of each class have come. Returns the logits before the step; images do not
    depend on others of the batch, and batches of any size give the same. Passes: one forward a batch, in parts, and
    every ``update_every`` images one forward and one backward over M images. Memory: M images.

    Args:
        model: A classifier with normalisation layers.
        capacity: M, >= 1; authors 64.
        k: >= 0; authors 4. The larger, the nearer to plain BatchNorm.
        bn_momentum: m, in [0, 1]; authors 0.01.
        seed: Of the draws of what enters and leaves the memory.
        **options: ``update_every`` (authors 64). ``lr`` and ``optimizer``: authors 1e-4 with ``adam``.
            ``momentum``, ``weight_decay`` (authors 0).

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or a BatchNorm layer without source
            statistics.

    Source: Gong et al., NOTE, NeurIPS 2022, arXiv 2208.05117. Formula from the authors' code. Differs from it: a net
    without BatchNorm is allowed; the net stays in eval mode (no dropout); a layer with one value per channel keeps its
    statistics; a step that gives values that are not finite leaves no trace, and neither do the images since the last.
    """

    about = About(
        does="entropy, on a memory balanced by class, with instance-aware BatchNorm",
        learns="norm layers",
        passes="1, and 1 / 1 every 64 images",
        needs="a net trained with IABN",
        holds="64 images",
        suits="sorted by class, one image at a time",
        formula="code",
        paper="NeurIPS 2022, arXiv 2208.05117",
    )

    own_statistics = "they are of each image, around those of a memory, with k and bn_momentum"
    in_parts = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-4,
        capacity: int = 64,
        k: float = 4.0,
        bn_momentum: float = 0.01,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, **options)
        self.learn(self.select("norm"))
        self.images = ReservoirMemory(self, capacity, seed)
        self.of_net = InstanceAware(self, k=k, momentum=bn_momentum)
        self.statistics = (self.of_net,)
        if not self.of_net.is_empty:
            self.no_plain_net = (
                "its BatchNorm layers take the statistics of each image. Deploy the method itself, or use 'norm'"
            )

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Warn if the source net loses accuracy by instance-aware layers; takes labelled batches, changes nothing."""
        super().prepare(source_batches)
        right, number = [0.0, 0.0], 0
        for batch in source_batches if batch_norm_layers(self.model) else ():
            if not isinstance(batch, Mapping) or not {"image", "label"} <= batch.keys():
                raise DataError(
                    "'note' compares accuracies on source batches {'image': (B, C, H, W) in [0, 1], 'label': (B,)}; "
                    f"got {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}."
                )
            images, labels = batch["image"], batch["label"].cpu()
            with torch.no_grad(), self.hold():
                plain = self.model(images.to(self.learned[0]))
            for place, logits in enumerate((self.predict(images), plain)):
                right[place] += float((logits.argmax(1).cpu() == labels).sum())
            number += len(labels)
        aware, plain_share = (count / max(number, 1) for count in right)
        if aware < plain_share - 0.02:
            warnings.warn(
                f"On {number} source images the net is right on {aware:.1%} with instance-aware BatchNorm, as 'note' "
                f"runs it, and on {plain_share:.1%} without: it was not trained with such layers. Use 'rotta' or "
                "statistics='balanced' for it, or a larger k.",
                stacklevel=2,
            )

    def stream_statistics(self) -> Statistics | None:
        """None are the same for all images."""
        return None

    def learn_from(self, images: Tensor, there: Tensor, ages: Tensor, *more: Tensor) -> Tensor:
        """A step on images (M, C, H, W); whether all was finite."""
        with self.of_net.moving(there):
            losses = entropy(self.logits(images))
        return self.descend(losses, there)
