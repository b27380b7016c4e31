"""What entropy methods share: an objective per sample, and filters that decide which samples count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.components.filters import Filter, SureAsSource
from lightning_tta.methods.components.objectives import EntropyName, find_objective


class EntropyMethod(GradientMethod):
    """Minimises an entropy of the predictions of the samples that all its filters keep, with batch statistics.

    To write one: declare what learns, add filters with :meth:`add_filter`, and call in ``step`` :meth:`look` before the
    pass, :meth:`keep` for the weights of the descent, and :meth:`accept` after it.

    Args:
        model: A classifier.
        entropy: ``softmax``, the entropy of the prediction, or ``come``,
            :func:`~lightning_tta.losses.come_entropy` in its place; in Python also any function of the logits.
        source_filter: Keep only samples that :class:`~lightning_tta.methods.components.filters.SureAsSource` keeps too,
            one more forward pass.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.
    """

    uses_batch_statistics = True

    def __init__(
        self, model: nn.Module, *, entropy: EntropyName = "softmax", source_filter: bool = False, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.entropy = find_objective(entropy)
        if source_filter and self.task.in_chunks:
            raise ConfigError(f"source_filter is one of images, and the net takes {self.task.kind}. Leave it out.")
        self.filters: list[Filter] = [SureAsSource()] if source_filter else []

    def add_filter(self, new: Filter) -> None:
        """Keep only samples that this filter keeps too."""
        new.attach(self)
        self.filters.append(new)

    def look(self, x: Tensor) -> None:
        """Show the batch to the filters that want to see it before the pass."""
        for each in self.filters:
            each.look(self, x)

    def keep(self, logits: Tensor, losses: Tensor) -> Tensor | None:
        """Which samples all filters keep, (B,) bool; ``None`` without a filter: all. ``stats["kept"]`` is the share.

        Of several predictions a sample each is kept by itself, (B, ...), those that do not count never.
        """
        if not self.filters:
            return self.rows
        flat, values = logits.flatten(0, -2), losses.flatten()
        kept = torch.stack([each.keep(self, flat, values) for each in self.filters]).all(0)
        rows = None if self.rows is None else self.rows.flatten()
        self.note(kept=collective.mean(kept.float(), rows))
        return (kept if rows is None else kept & rows).view(losses.shape)

    def accept(self, logits: Tensor, kept: Tensor | None, taken: Tensor) -> None:
        """Tell the filters what came of the step."""
        if kept is not None and self.filters:
            for each in self.filters:
                each.accept(self, logits.flatten(0, -2), kept.flatten(), taken)

    def mean(self, values: Tensor, kept: Tensor | None) -> Tensor:
        """Mean of values (B, ...) over what is kept, 0-dimensional, for ``stats``."""
        return collective.mean(values.flatten(), None if kept is None else kept.flatten())
