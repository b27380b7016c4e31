"""View averaging: test-time augmentation, nothing learns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_tta.losses import log_mean_probability
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.episodes import ViewMethod


class ViewAveraging(ViewMethod):
    """Minimises nothing: predicts with the mean of the predicted distributions over an image's views.

    The baseline that MEMO must beat. Parameters touched: none. State: none. Per batch: one forward pass of ``views``
    times as many images. Logits are log pbar.

    Args:
        model: Any classifier.
        views: Views of each image, at least 1.
        augment: One of :data:`lightning_tta.views.augmix.AUGMENTATIONS`.
        **options: ``bn_prior``, ``predict_classes``, ``chunk_views``, ``seed``: see
            :class:`~lightning_tta.methods.components.episodes.ViewMethod`.

    Source: a baseline in Zhang et al., arXiv 2110.09506.
    """

    about = About(
        does="the mean prediction over an image's views",
        learns="none",
        passes="views / 0",
        needs="-",
        holds="-",
        suits="each image for itself",
        formula="paper",
        paper="a baseline of NeurIPS 2022, arXiv 2110.09506",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        views: int = 32,
        augment: str = "crop_flip",
        **options: Any,
    ) -> None:
        super().__init__(model, views=views, augment=augment, **options)

    def step(self, x: Tensor) -> Tensor:
        """Average."""
        return self.voted(x, replays=True)

    def infer(self, x: Tensor) -> Tensor:
        """Average."""
        return self.voted(x)

    def vote(self, logits: Tensor) -> Tensor:
        """Log of the mean probability."""
        return log_mean_probability(logits)
