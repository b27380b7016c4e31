"""SANTA: predictions anchored at the source, features drawn to source prototypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.drawing import DrawingMethod
from lightning_tta.methods.components.prototypes import PrototypeMethod


class SANTA(PrototypeMethod, DrawingMethod):
    """Minimises the surprise of the source model at the net's predictions, and a contrast with source prototypes.

    With the source model a, its BatchNorm on the batch's statistics too, view x~ of x, features z, source prototypes
    c_k and projector h::

        L = anchor_weight   * mean_b [ - sum_k p_k(x) log a_k(x) - sum_k p_k(x~) log a_k(x) ] / 2
          + contrast_weight * mean_b SupCon( h(c_k), h(z), h(z~) ),   k = arg-max cos(c_k, z)

    The gradient of the first term goes through p alone: it raises what a thinks likely, and so sharpens too. SupCon
    (:func:`~lightning_tta.methods.components.contrast.contrast_views`) draws the three vectors of an image together,
    each of length 1; all others are negative. h is Linear, ReLU, Linear, with random weights at the start.

    Parameters touched: weight and bias of every normalisation layer, and h; BatchNorm uses batch statistics, each pass
    its own. State: these, the optimizers and the number of steps, from which views are drawn; saved with them the
    prototypes, K x D floats. The source model is the snapshot for :meth:`reset`. Per batch and step: three forward
    passes, of source, net and view, and one backward pass of two. Returns the logits before the step. ``stats`` has
    both terms.

    Args:
        model: A classifier with normalisation layers that ends in one linear layer.
        anchor_weight: >= 0. A public harness: 1; the paper's sum without the half is 2.
        contrast_weight: >= 0; 1.
        temperature: Of SupCon, > 0; a public harness 0.1.
        projector: Width of h, >= 1; a public harness 128. ``None``: no projector, as there for DomainNet.
        prototypes: ``source``: class means of the source's features, from :meth:`prepare`, with its source statistics.
            ``classifier``: rows of the last linear layer, at the mean length of the batch's features: no source data;
            this form is ours.
        head: Name of the last linear layer where the search finds another.
        seed: Of views and projector.
        **options: ``lr`` and ``optimizer``: a public harness has 1e-3 with ``adam`` (CIFAR, batch 200) and 1e-2 with
            ``sgd`` (ImageNet, batch 64). ``momentum``, ``weight_decay`` (there 0), ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or does not end in a linear layer.

    Source: Chakrabarty et al., TMLR 2023, openreview V7guVYzvE4, arXiv 2304.10113 (as SATA); formula from the code of a
    public harness, which agrees with the paper but for the half; the authors' own code was not seen. Differs from that
    code: prototypes are taken with the source's BatchNorm statistics, not with those of the source batches; a class
    without a source image is nobody's nearest; the view is one draw for the whole batch; SGD without Nesterov; the
    projector's weights are drawn from the seed, the same on every device.
    """

    about = About(
        does="surprise of the source model at the net's predictions, and contrast with source prototypes and a view",
        learns="norm layers, projector",
        passes="3 / 1",
        needs="norm layers, linear head, labelled source images (none with prototypes=classifier)",
        holds="a projector, K x D prototypes",
        suits="shuffled, changing over a long time",
        formula="code and paper",
        paper="TMLR 2023, arXiv 2304.10113",
    )

    draws = 1
    uses_batch_statistics = True
    step_on_host = "it draws its view on the host"

    def __init__(
        self,
        model: nn.Module,
        *,
        anchor_weight: float = 1.0,
        contrast_weight: float = 1.0,
        temperature: float = 0.1,
        projector: int | None = 128,
        prototypes: Literal["source", "classifier"] = "source",
        head: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, seed=seed, **options)
        check_range("anchor_weight", anchor_weight, 0)
        check_choice("prototypes", prototypes, ("source", "classifier"))
        self.anchor_weight, self.prototypes = anchor_weight, prototypes
        self.split = HeadSplit(self.model, head)
        self.learn(self.select("norm"))
        self.make_contrast(contrast_weight, temperature, projector, from_source=prototypes == "source", seed=seed)
        self.needs_source = prototypes == "source" and contrast_weight > 0
        self.prepared = not self.needs_source

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take the class means of the source's features, at the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,), integers below K.

        Raises:
            DataError: If there is no image with finite features, or a batch has no such labels.
        """
        if self.needs_source:
            self.take_prototypes(source_batches)
        super().prepare(source_batches)

    def step(self, x: Tensor) -> Tensor:
        """One step on the batch and a view of it."""
        return cast(Tensor, self.replayed("step", self._step, x, self.view(x)))

    def _step(self, x: Tensor, view: Tensor) -> Tensor:
        with self.at_source(), torch.no_grad():  # before there is a graph, whose weights are replaced for a moment
            anchor = self.logits(x)
        features, logits = self.features(x)
        view_features, view_logits = self.features(view)
        surprise = soft_cross_entropy(torch.stack([logits, view_logits]), anchor).mean(0)
        losses = self.anchor_weight * surprise
        self.note(anchor_loss=surprise.detach().mean())
        if self.contrast_weight:
            contrast = self.contrast(features, view_features)
            losses = losses + self.contrast_weight * contrast
            self.note(contrast_loss=contrast.detach().mean())
        self.count_step(self.descend(losses))
        return logits
