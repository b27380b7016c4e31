"""ZERO: a vote among the views the net is sure of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.episodes import ViewMethod


class Zero(ViewMethod):
    """Minimises nothing: keeps the views with the lowest entropy, and lets them vote (softmax at temperature zero).

    Parameters touched: none. State: none. Per batch: one forward pass of ``views`` times as many images. Logits are
    log(votes / kept views), where the mean probability of the kept views, weighted 1e-3, breaks ties and keeps them
    finite.

    Args:
        model: Any classifier.
        views: Views of each image, at least 1.
        keep: Share of the views that vote, in (0, 1]; at least one.
        augment: One of :data:`lightning_tta.views.augmix.AUGMENTATIONS`.
        **options: ``predict_classes``, ``chunk_views``, ``seed``: see
            :class:`~lightning_tta.methods.components.episodes.ViewMethod`.

    Source: Farina et al., arXiv 2405.18330, for vision-language models; here any classifier.
    """

    about = About(
        does="a vote of the views that the net is sure of",
        learns="none",
        passes="views / 0",
        needs="-",
        holds="-",
        suits="each image for itself",
        formula="code and paper",
        paper="NeurIPS 2024, arXiv 2405.18330",
    )

    fixed_options = frozenset({"bn_prior"})

    def __init__(
        self,
        model: nn.Module,
        *,
        views: int = 64,
        keep: float = 0.3,
        augment: str = "rrc_flip",
        **options: Any,
    ) -> None:
        super().__init__(model, views=views, augment=augment, bn_prior=None, **options)
        check_range("keep", keep, 0, 1, low_open=True)
        self.keep = keep

    def step(self, x: Tensor) -> Tensor:
        """Vote."""
        return self.voted(x, replays=True)

    def infer(self, x: Tensor) -> Tensor:
        """Vote."""
        return self.voted(x)

    def vote(self, logits: Tensor) -> Tensor:
        """Log of the shares of the votes."""
        logits = at_least_float32(logits)
        count = max(1, int(self.keep * self.views))
        sure = entropy(logits).topk(count, dim=1, largest=False).indices
        kept = logits.gather(1, sure[..., None].expand(-1, -1, logits.shape[-1]))
        classes = torch.arange(logits.shape[-1], device=logits.device)
        votes = (kept.argmax(-1, keepdim=True) == classes).to(kept).mean(1)
        return torch.log(votes + 1e-3 * kept.softmax(-1).mean(1) + 1e-12)
