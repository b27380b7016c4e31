"""DELTA: entropy minimisation in which rare classes count more, on renormalised BatchNorm statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.methods.components import statistics
from lightning_tta.methods.components.entropy import EntropyMethod
from lightning_tta.methods.components.filters import LowLoss, empty_by_class
from lightning_tta.methods.components.memory_statistics import check_tracked


class DELTA(EntropyMethod):
    """Minimises the entropy of sure samples, each weighted by how rare its class is in the stream.

    With q the moving average of the batches' mean prediction, from 1/K on, and y the arg-max of p::

        w_b = (1 / q_y) / mean_b(1 / q_y)                                       (DOT, without gradient)
        L   = mean [ w_b exp(E0 - stopgrad(H)) H ]  over the samples with  H < E0 = entropy_margin * ln K

    and then ``q <- frequency_decay q + (1 - frequency_decay) mean_b p_b``. BatchNorm normalises with a moving average
    of the stream's statistics, from the first batch on, and has the gradient of batch statistics (TBR:
    :class:`~lightning_tta.methods.components.statistics.Renormalized`, ``start: batch``); ``statistics=`` takes others
    in its place.

    Parameters touched: weight and bias of every normalisation layer. State: these, the optimizer, q, and the moving
    statistics. Per batch and step: one forward and one backward pass; no step when nothing is kept. Returns the logits
    before the step. ``stats["kept"]`` is the share of kept samples.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        entropy_margin: E0 as a share of ln K, > 0; authors 0.5, "Ent-W + DELTA". ``None``: all samples, without the
            exponential, "Tent + DELTA".
        frequency_decay: Share of q that stays with each batch, in [0, 1]; authors 0.95. 1: no such weights.
        statistics_momentum: Weight of the batch in the moving statistics, in (0, 1]; authors 0.05. ``None``: the
            batch's own statistics.
        **options: ``lr`` and ``optimizer``: authors 2.5e-4 with ``sgd`` (ImageNet, batch 64). Their code has no CIFAR;
            the default, Adam 1e-3 at batch 200, is Tent's there. ``entropy``, ``source_filter``, ``momentum``,
            ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or a BatchNorm layer without source
            statistics.

    Source: Zhao et al., DELTA, ICLR 2023, arXiv 2301.13018. Formula from: code. Differs from it: the moving average is
    of the variance, not of its root, and has the batch in it before it is predicted; q of a batch whose step failed is
    not taken; no class counts as rarer than the precision of its numbers; GroupNorm and LayerNorm nets are allowed,
    with DOT alone.
    """

    about = About(
        does="weighted entropy of sure samples, rare classes more; batch renormalisation",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers",
        holds="moving statistics",
        suits="shuffled or correlated, classes of unequal frequency",
        formula="code",
        paper="ICLR 2023, arXiv 2301.13018",
    )
    synchronized = True

    def __init__(
        self,
        model: nn.Module,
        *,
        entropy_margin: float | None = 0.5,
        frequency_decay: float = 0.95,
        statistics_momentum: float | None = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("frequency_decay", frequency_decay, 0, 1)
        if statistics_momentum is not None:
            check_range("statistics_momentum", statistics_momentum, 0, 1, low_open=True)
        self.frequency_decay = frequency_decay
        self.sure = LowLoss(entropy_margin)
        self.add_filter(self.sure)
        self.learn(self.select("norm"))
        self.state("mean_probability", empty_by_class(self.model), source=NOT_YET)
        if statistics_momentum is not None and batch_norm_layers(self.model):
            check_tracked(self, "statistics_momentum=None, the statistics of each batch")
            statistics.choose(self, {"kind": "renormalized", "momentum": statistics_momentum, "start": "batch"})

    def step(self, x: Tensor) -> Tensor:
        """One step on the samples that are kept."""
        self.look(x)
        logits = self.logits(x)
        entropies = self.entropy(logits)
        kept = self.keep(logits, entropies)
        assert kept is not None
        p = at_least_float32(logits.detach()).softmax(-1)
        frequency = self.sized("mean_probability", p[0]).to(p.dtype)
        frequency = torch.where(frequency.isnan(), 1 / p.shape[-1], frequency)
        rarity = (1 / frequency.clamp_min(torch.finfo(p.dtype).eps))[p.argmax(-1)]
        losses = rarity / collective.mean(rarity) * self.sure.weights(logits, entropies) * entropies
        taken = self.descend(losses, kept)
        mean = collective.mean(p)
        seen = taken | (mean.isfinite().all() & (collective.mean(kept.float()) == 0))
        self.write("mean_probability", torch.lerp(mean, frequency, self.frequency_decay), seen)
        return logits
