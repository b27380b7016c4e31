"""The contrast of an image, a view of it and the nearest prototype of a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.components.contrast import contrast_views
from lightning_tta.methods.components.projector import make_projector
from lightning_tta.methods.components.source_features import class_moments


class PrototypeMethod(GradientMethod):
    """Base of methods that draw features of an image, of a view of it and the nearest prototype together.

    Prototypes c_k are the class means of the source's features, of which a class without a source image has none; or
    the rows of the last linear layer, at the mean length of the batch's features.

    A method calls :meth:`make_contrast` in its constructor, :meth:`take_prototypes` in ``prepare`` if they are the
    source's, and :meth:`contrast` in its step. What is taken is saved with the state, and does not change in a stream.
    """

    source_prototypes: Tensor | None
    projector: nn.Module

    def make_contrast(
        self, contrast_weight: float, temperature: float, projector: int | None, *, from_source: bool, seed: int
    ) -> None:
        """Make the projector, which learns with an optimizer of its own, and room for the source's prototypes.

        Args:
            contrast_weight: >= 0. 0: there is no projector.
            temperature: > 0.
            projector: Width of the projector, >= 1; ``None``: the features themselves are compared.
            from_source: Whether prototypes are the source's.
            seed: Of the projector's weights.
        """
        check_range("contrast_weight", contrast_weight, 0)
        check_range("temperature", temperature, 0, low_open=True)
        self.contrast_weight, self.temperature = contrast_weight, temperature
        weight = self.split.head.weight.detach()
        self.register_buffer("source_prototypes", torch.zeros_like(at_least_float32(weight)) if from_source else None)
        self.projector = nn.Identity()
        if projector is not None:
            check_range("projector", projector, 1, integer=True)
            if contrast_weight:
                self.projector = make_projector(self.split.num_features, projector, projector, seed=seed, like=weight)
                self.learn(dict(self.projector.named_parameters()), "projector.", optimizer="projector")

    def take_prototypes(self, source_batches: Iterable[Mapping[str, Tensor]], **options: Any) -> None:
        """Take the class means of the source's features, see ``class_moments``, of which the options are."""
        means = class_moments(self, source_batches, **options).means
        assert self.source_prototypes is not None
        with outside_inference_mode(), torch.no_grad():
            self.source_prototypes.copy_(means)

    def contrast(self, features: Tensor, view_features: Tensor) -> Tensor:
        """The loss (B,) of features (B, D), those of a view, and the prototypes nearest to the first by cosine."""
        weight = self.split.head.weight.detach()
        with torch.no_grad():
            now = at_least_float32(features)
            if self.source_prototypes is None:
                prototypes = normalize(weight.to(now.dtype), dim=1) * now.norm(dim=1).mean()
            else:
                prototypes = self.source_prototypes.to(now.dtype)
            similar = normalize(now, dim=1) @ normalize(prototypes, dim=1).T
            nearest = torch.where((prototypes != 0).any(1), similar, -torch.inf).argmax(1)
        vectors = torch.stack([each.to(weight.dtype) for each in (prototypes[nearest], features, view_features)])
        return contrast_views(normalize(at_least_float32(self.projector(vectors)), dim=-1), self.temperature)
