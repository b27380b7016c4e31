"""OSTTA: entropy minimisation on samples of which the adapted net is at least as sure as the source."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import marginal_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.entropy import EntropyMethod


class OSTTA(EntropyMethod):
    """Minimises the entropy of samples that follow the crowd, and raises that of the mean prediction.

    With c the arg-max of the source model theta0, a sample is kept if ``p_theta(x)[c] >= p_theta0(x)[c]``: learning
    from the others has not made it less sure. Images of unknown classes and wrong answers tend to fail this. ::

        L = mean_kept H(p) - alpha * H(mean_batch p)

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics, in the source
    model too. State: these and the optimizer; theta0 is their kept source values, put in place for its pass. Per batch
    and step: two forward passes, the source's without gradient, and one backward pass; no step when nothing is kept.
    Returns the logits before the step. ``stats["kept_by_source_filter"]`` is the share of kept samples: 1 on the first
    batch, when the net is the source.

    The filter is a component: the other entropy methods take it as ``source_filter=True``.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        alpha: Weight of the mean prediction's entropy, >= 0; public code 0.5.
        **options: ``lr``: public code 1e-3 with Adam (CIFAR, batch 200). ``entropy``: of the kept samples; of the mean
            prediction always H. And ``optimizer``, ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Lee et al., OSTTA, ICCV 2023, arXiv 2308.06879, whose filter it is; the entropy of the mean prediction is
    that of the public code of UniEnt (arXiv 2404.06065). Differs from that code: no second net, no gradient through
    the source, no step (there NaN) when nothing is kept.
    """

    about = About(
        does="entropy of samples that agree with the source; an option (source_filter) of others",
        learns="norm layers",
        passes="2 / 1",
        needs="norm layers",
        holds="-",
        suits="long, with unknown classes",
        formula="code",
        paper="ICCV 2023, arXiv 2308.06879",
    )

    synchronized = False  # the mean prediction is that of this process's samples
    fixed_options = frozenset({"source_filter"})

    def __init__(self, model: nn.Module, *, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(model, source_filter=True, **options)
        check_range("alpha", alpha, 0)
        self.alpha = alpha
        self.learn(self.select("norm"))

    def step(self, x: Tensor) -> Tensor:
        """One step, if a sample is kept."""
        self.look(x)
        logits = self.logits(x)
        entropies, mean_entropy = self.entropy(logits), marginal_entropy(logits)
        self.descend(entropies, self.keep(logits, entropies), extra=-self.alpha * mean_entropy)
        self.note(mean_prediction_entropy=mean_entropy)
        return logits
