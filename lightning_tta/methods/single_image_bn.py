"""Single-image BatchNorm: each image's own statistics, mixed with the source's."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.errors import UnsupportedModelError
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.episodes import ViewMethod


class SingleImageBN(ViewMethod):
    """Minimises nothing: BatchNorm takes N / (N + 1) of the source statistics and the rest of the image itself.

    Parameters touched: none. State: none. Per batch: one forward pass; images do not see each other.

    Args:
        model: A classifier with BatchNorm layers that keep running statistics.
        prior: N, at least 1.

    Raises:
        UnsupportedModelError: If the net has no such layers.

    Source: Schneider et al., arXiv 2006.16971, with N = 16 as a baseline in Zhang et al., arXiv 2110.09506.
    """

    about = About(
        does="normalizes each image with its own BatchNorm statistics, mixed with the source's",
        learns="none",
        passes="1 / 0",
        needs="BatchNorm",
        holds="-",
        suits="each image for itself",
        formula="code and paper",
        paper="NeurIPS 2020, arXiv 2006.16971",
    )

    own_statistics = "each image's own, mixed with the source's, are all that it does"
    step_on_host = ""  # it makes no views

    def __init__(self, model: nn.Module, *, prior: int = 16) -> None:
        super().__init__(model, views=1, augment="none", bn_prior=prior)
        if not batch_norm_layers(self.model):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no BatchNorm layer, so there are no statistics to mix. For GroupNorm or "
                "LayerNorm nets use 'memo' or 'view_averaging'."
            )

    def step(self, x: Tensor) -> Tensor:
        """Predict with each image's statistics."""
        return self.infer(x)
