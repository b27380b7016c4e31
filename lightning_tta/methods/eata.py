"""EATA: entropy minimisation on reliable and new samples, held near the source by a Fisher penalty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_tta import collective
from lightning_tta.backbones.norms import norm_parameters
from lightning_tta.errors import check_range
from lightning_tta.methods.base.inputs import at_least_float32
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import (
    EntropyName,
    entropy_function,
    moving_average,
    reliable,
    source_filter,
)
from lightning_tta.methods.components.fisher import fisher_information


class EATA(TTAMethod):
    """Minimises the weighted entropy of reliable, non-redundant samples plus a Fisher penalty.

    A sample is kept if ``H(p) < E0 = entropy_margin * ln K`` and ``cos(pbar, p) < diversity_margin``, where pbar is
    the moving average (0.9) of the mean kept p, unknown before the first step. Over the kept samples::

        L = mean [ exp(E0 - stopgrad(H)) * H ] + fisher_alpha * sum_i F_i (theta_i - theta0_i)^2

    F is the mean over source batches of the squared gradient of the cross-entropy with the net's own arg-max; it
    comes from :meth:`prepare`, which is needed unless ``fisher_alpha`` is 0 (method ``eta``); authors show it 2000
    images in batches of 64, on whose size F depends.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these,
    the optimizer, pbar and F. Per batch and step: one forward pass, and one backward pass unless nothing is kept, when
    no step is taken. Returns the logits before the step. ``stats["kept"]`` is the share of kept samples.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Authors: 5e-3 (CIFAR-10), 2.5e-4 (ImageNet), SGD at batch 64.
        optimizer: ``sgd`` (authors), ``adam`` or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999].
        weight_decay: >= 0; authors 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).
        entropy_margin: E0 as a share of ln K, > 0; authors 0.4. ``None``: no such filter, and weights of 1.
        diversity_margin: Largest similarity to pbar, > 0; authors 0.4 (CIFAR-10), 0.05 (ImageNet). ``None``: no filter.
        fisher_alpha: Weight of the penalty, >= 0; authors 1 (CIFAR-10), 2000 (ImageNet).
        entropy: ``softmax``, or ``come``: H is :func:`~lightning_tta.losses.come_entropy` (pbar stays as it is).
        source_filter: Keep only samples that OSTTA's filter keeps too
            (:func:`~lightning_tta.methods.components.filters.source_filter`), one more forward pass.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Niu et al., EATA, ICML 2022, arXiv 2204.02610. Differs from the authors' code: :meth:`reset` forgets pbar,
    which would carry one stream's classes into the next; pbar moves only with a step; the net stays in eval mode.
    """

    parallel = frozenset({"replicas", "synchronised"})
    uses_batch_statistics = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-3,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 1,
        lr_batch_size: int | None = None,
        entropy_margin: float | None = 0.4,
        diversity_margin: float | None = 0.4,
        fisher_alpha: float = 1.0,
        entropy: EntropyName = "softmax",
        source_filter: bool = False,
    ) -> None:
        super().__init__(model, steps=steps)
        for name, margin in (("entropy_margin", entropy_margin), ("diversity_margin", diversity_margin)):
            if margin is not None:
                check_range(name, margin, 0, low_open=True)
        check_range("fisher_alpha", fisher_alpha, 0)
        self.entropy_margin, self.diversity_margin = entropy_margin, diversity_margin
        self.fisher_alpha = fisher_alpha
        self.entropy = entropy_function(entropy)
        self.source_filter = source_filter
        parameters = self.declare(norm_parameters(self.model))
        self.add_optimizer("model", parameters, optimizer, lr, momentum=momentum, weight_decay=weight_decay)
        self.scale_lr_by_batch(lr_batch_size)
        self.remember(mean_probability=None)
        self.needs_source = fisher_alpha > 0
        self.prepared = not self.needs_source
        if self.needs_source:
            for number, parameter in enumerate(parameters):
                self.register_buffer(f"fisher_{number}", torch.zeros_like(parameter, requires_grad=False))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take F from every batch of ``source_batches``, at the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

        Raises:
            DataError: If there is no image, or a gradient is not finite.
        """
        if not self.needs_source:
            return super().prepare(source_batches)
        fisher = fisher_information(self, source_batches)
        with torch.inference_mode(False), torch.no_grad():
            for number, value in enumerate(fisher):
                self.get_buffer(f"fisher_{number}").copy_(value)
        self.prepared = True

    def adapt(self, images: Tensor) -> Tensor:
        """One step on the samples that are kept, if any."""
        agrees = source_filter(self, images) if self.source_filter else None
        logits = self.infer(images)
        entropies = self.entropy(logits)
        probabilities = at_least_float32(logits.detach()).softmax(-1)
        average = self.memory["mean_probability"]
        keep = reliable(entropies, logits, self.entropy_margin)
        if self.diversity_margin is not None and average is not None:
            similarity = cosine_similarity(average.to(probabilities)[None], probabilities, dim=-1)
            keep = keep & (similarity < self.diversity_margin)
        if agrees is not None:
            keep = keep & agrees(logits)
        self.record(kept=collective.mean(keep.float()))
        entropies, probabilities = entropies[keep], probabilities[keep]
        if collective.count(entropies):
            if self.entropy_margin is not None:
                bound = self.entropy_margin * math.log(logits.shape[-1])
                entropies = (bound - entropies.detach()).exp() * entropies
            if self.step(collective.mean(entropies) + self._penalty()):
                self.memory["mean_probability"] = moving_average(average, collective.mean(probabilities), 0.9)
        return logits

    def _penalty(self) -> Tensor | float:
        """How far the net has moved from the source, weighted by F."""
        if not self.needs_source:
            return 0.0
        named = enumerate(self.adaptable.items())
        moved = [(self.get_buffer(f"fisher_{i}") * (t - self._snapshot[name]).square()).sum() for i, (name, t) in named]
        return self.fisher_alpha * torch.stack(moved).sum()
