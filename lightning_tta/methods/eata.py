"""EATA: entropy minimisation on reliable and new samples, held near the source by a Fisher penalty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import check_range
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.fisher import fisher_information
from lightning_tta.methods.components.pull import PullMethod
from lightning_tta.methods.eta import ETA


class EATA(PullMethod, ETA):
    """Minimises the weighted entropy of reliable, non-redundant samples plus a Fisher penalty.

    :class:`~lightning_tta.methods.eta.ETA`, whose filters, weights, state and passes these are, with ::

        L = L_ETA + fisher_alpha * sum_i F_i (theta_i - theta0_i)^2

    F is the mean over source batches of the squared gradient of the cross-entropy with the net's own arg-max; it
    comes from :meth:`prepare`, which is needed unless ``fisher_alpha`` is 0; authors show it 2000 images in batches of
    64, on whose size F depends. Over pixels and tokens the cross-entropy is the mean over all of a batch. State: F too.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        fisher_alpha: Weight of the penalty, >= 0; authors 1 (CIFAR-10), 2000 (ImageNet). Over tokens 0, as source
            texts are seldom at hand.
        **options: Those of ETA.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Niu et al., EATA, ICML 2022, arXiv 2204.02610. Differs from the authors' code as ETA does.
    """

    about = About(
        does="as ETA, held near the source by a Fisher penalty",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers; 2,000 source images",
        holds="a mean probability, Fisher information",
        suits="shuffled, long",
        formula="code and paper",
        paper="ICML 2022, arXiv 2204.02610",
    )

    task_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tokens": {**ETA.task_defaults["tokens"], "fisher_alpha": 0.0}
    }

    def __init__(self, model: nn.Module, *, fisher_alpha: float = 1.0, **options: Any) -> None:
        super().__init__(model, **options)
        check_range("fisher_alpha", fisher_alpha, 0)
        self.fisher_alpha = fisher_alpha
        self.needs_source = fisher_alpha > 0
        self.prepared = not self.needs_source
        if self.needs_source:
            for number, parameter in enumerate(self.learned):
                self.register_buffer(f"fisher_{number}", torch.zeros_like(parameter, requires_grad=False))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take F from every batch of ``source_batches``, at the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; over tokens with ``input_ids`` and
                ``attention_mask`` (B, T), and perhaps ``answer_mask``, which stands for what the net writes itself.
                Labels are not used.

        Raises:
            DataError: If there is no image, or token, or a gradient is not finite.
        """
        if self.fisher_alpha > 0:
            self.let_go()
            fisher = fisher_information(self, source_batches)
            with outside_inference_mode(), torch.no_grad():
                for number, value in enumerate(fisher):
                    self.get_buffer(f"fisher_{number}").copy_(value)
        super().prepare(source_batches)

    def penalty(self) -> Tensor | float:
        """How far the net has moved from the source, weighted by F; its gradient comes by itself."""
        if not self.fisher_alpha:
            return 0.0
        names = list(self.adaptable)
        fisher = [self.get_buffer(f"fisher_{number}") for number in range(len(names))]
        return self.pull([self.source_value(name) for name in names], fisher, self.fisher_alpha)
