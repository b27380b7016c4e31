"""COME: Tent with an objective that does not reward long logits."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from lightning_tta.errors import check_range
from lightning_tta.losses import come_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.tent import Tent


class COME(Tent):
    """Minimises the mean entropy of the batch's opinions: K beliefs and one uncertainty.

    ``L = mean_b H(b_b)``, ``b = softmax(u'_1, ..., u'_K, ln m)``, ``u' = u * stopgrad(|u|) / |u|``, u the logits, m the
    weight of the uncertainty; see :func:`~lightning_tta.losses.come_entropy`. A sample of which the net knows little
    has short logits, and keeps its uncertainty: lengthening them is no way down.

    m decides which samples the step makes surer: about those with ``sum_k exp(u_k) > m``. The others are moved towards
    the uniform distribution. Where the logits are long, K is little, and all are made surer, which on nets without
    BatchNorm may end in one class; see the results on CIFAR-10. m is a bound on the logits of the net at hand: another
    scale of them wants another m.

    Parameters touched, state, passes and returned logits are those of :class:`~lightning_tta.methods.tent.Tent`. The
    objective is a component: the other entropy methods take it as ``entropy="come"``, there with m = K, as their bounds
    on the loss are shares of ln K.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        uncertainty: m, > 0. Authors' code: 1000, for any net. ``None``: K, the paper's.
        **options: Those of Tent but ``entropy``; authors' rates: those of the method that is improved.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Zhang et al., COME, ICLR 2025, arXiv 2410.10894; m is 1000 in the authors' code, K in the paper. Differs
    from the code: large logits do not overflow.
    """

    about = About(
        does="entropy of the classes and an uncertainty beside them; an option (entropy: come) of others",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers",
        holds="-",
        suits="shuffled, reset at each domain",
        formula="code and paper",
        paper="ICLR 2025, arXiv 2410.10894",
    )

    fixed_options = frozenset({"entropy"})

    def __init__(self, model: nn.Module, *, uncertainty: float | None = 1000.0, **options: Any) -> None:
        super().__init__(model, entropy="come", **options)
        if uncertainty is not None:
            check_range("uncertainty", uncertainty, 0, low_open=True)
        self.entropy = partial(come_entropy, uncertainty=uncertainty)
