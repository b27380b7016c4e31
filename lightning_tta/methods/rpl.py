"""RPL: robust pseudo-labels, the generalised cross-entropy with the net's own arg-max."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import generalized_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod


class RPL(GradientMethod):
    """Minimises the generalised cross-entropy of the batch with the net's own arg-max as the labels.

    With y = arg-max p of the same pass, which is a constant::

        L = mean_b (1 - p_y^q) / q

    The gradient is that of the cross-entropy times p_y^q: of a sample whose label is unsure little is learned, and none
    is left out. ``q`` near 0 is hard pseudo-labelling, ``q`` 1 the most robust form.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these and
    the optimizer. Per batch and step: one forward, one backward pass. Returns the logits before the step.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        q: In (0, 1]. Authors: 0.8.
        params: ``norm``, the paper's; ``all``, what the authors' example code steps: it collects the norm parameters,
            and gives the optimizer all.
        **options: ``lr`` and ``optimizer``: a public harness has 1e-3 with ``adam`` (CIFAR, batch 200) and 5e-4 with
            ``sgd`` (ImageNet, batch 64); the authors' example 7.5e-4 with ``sgd`` without momentum (ImageNet, batch 96,
            5 epochs). ``momentum``, ``weight_decay`` (authors 0), ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, with ``params="norm"``.

    Source: Rusak et al., "If your data distribution shifts, use self-learning", TMLR 2022, arXiv 2104.12928; formula
    from the authors' code, which agrees with the paper. The labels are those of the current step, the paper's shortest
    interval of a teacher. Differs from the code: any norm layers, and the net's eval mode with batch statistics, in
    which source statistics survive.
    """

    about = About(
        does="generalised cross-entropy with the net's own labels, which counts unsure ones less",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers",
        holds="-",
        suits="shuffled, reset at each domain",
        formula="code and paper",
        paper="TMLR 2022, arXiv 2104.12928",
    )

    uses_batch_statistics = True
    synchronized = True

    def __init__(
        self, model: nn.Module, *, q: float = 0.8, params: Literal["norm", "all"] = "norm", **options: Any
    ) -> None:
        super().__init__(model, **options)
        check_range("q", q, 0, 1, low_open=True)
        check_choice("params", params, ("norm", "all"))
        self.q = q
        self.learn(self.select(params))

    def step(self, x: Tensor) -> Tensor:
        """One step on the whole batch."""
        logits = self.logits(x)
        self.descend(generalized_cross_entropy(logits, logits.detach().argmax(-1), self.q))
        return logits
