"""ROID: a certainty-aware loss on sure and diverse samples, and weights that are drawn back to the source."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.likelihood import LikelihoodMethod
from lightning_tta.methods.components.teacher import approach


class ROID(LikelihoodMethod):
    """Minimises the soft likelihood ratio and the consistency with a view, weighted by diversity and certainty.

    With p_b of an image, p'_b of its view, and q the moving average (0.9) of the batches' mean prediction::

        d_b = 1 - cos(q, p_b),  c_b = -H(p_b),  both scaled to [0, 1] over the batch
        w_b = exp(d_b c_b / tau) if d_b >= mean(d), else 0                                  without gradient
        L   = 1/B sum_b w_b [ SLR(p_b) - 1/2 sum_k (p_bk log p'_bk + p'_bk log p_bk) ]
        SLR(p) = -sum_k p_k log(p_k / (1 - p_k)),  p_k <= clip

    After the step each weight is ``keep * weight + (1 - keep) * source``. The prediction is multiplied by the smoothed
    mean prediction of the batch (:class:`~lightning_tta.methods.components.priors.Moving`).

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics, for the view
    those of the images that count. State: these, the optimizer, q, the number of steps, and the factors of the
    correction. Per batch and step: two forward passes and one backward pass, of both; one forward pass without
    ``consistency``. Returns the logits before the step, corrected. ``predict`` and ``export`` correct by the factors of
    the last batch. ``stats["kept"]`` is the share of images that count.

    Where all d_b are equal, as in a batch of one, all weights are 1.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        keep: Share of the adapted weights that stays, in [0, 1]; authors 0.99. 1: no merging.
        **options: Those of :class:`~lightning_tta.methods.components.likelihood.LikelihoodMethod`, with the authors'
            values: ``weighting``, ``temperature`` (tau, 1/3), ``diversity_momentum`` (0.9), ``clip`` (0.99),
            ``consistency``, ``detach_target``, ``prior_correction`` (``probabilities`` as in the paper, or ``logits``
            as in the code), ``seed``. ``lr`` and ``optimizer``: authors 1e-3 with ``adam`` (CIFAR, batch 200), 2.5e-4
            with ``sgd`` (ImageNet, batch 64). ``momentum``, ``weight_decay`` (authors 0), ``steps``,
            ``lr_batch_size``.

    Raises:
        ConfigError: With ``prior=``, unless ``prior_correction`` is ``none``.
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Marsden, Döbler and Yang, ROID, WACV 2024, arXiv 2306.00650. Formula from: code and paper; the correction's
    default is the paper's. Differs from the authors' code: B is the size of the batch, there the configured one; a
    batch whose values are all equal has weights of 1, there not a number; the view is made of all images, and those
    that do not count are left out of statistics and loss; no 1e-5 in the logarithm; SGD without Nesterov; q and weights
    move only with a step that is taken.
    """

    about = About(
        does="soft likelihood ratio and consistency of sure, diverse samples; weights averaged with the source",
        learns="norm layers",
        passes="2 / 1",
        needs="norm layers",
        holds="-",
        suits="continual, mixed, correlated on GroupNorm or LayerNorm",
        formula="code and paper",
        paper="WACV 2024, arXiv 2306.00650",
    )

    def __init__(self, model: nn.Module, *, keep: float = 0.99, **options: Any) -> None:
        super().__init__(model, **options)
        check_range("keep", keep, 0, 1)
        self.keep = keep

    def merge(self, taken: Tensor) -> None:
        """Draw the weights back to the source."""
        approach(self.weights(), self.source(), 1 - self.keep, taken)
