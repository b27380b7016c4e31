"""COME: Tent with an objective that does not reward long logits."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_tta.methods.base.description import About
from lightning_tta.methods.tent import Tent


class COME(Tent):
    """Minimises the mean entropy of the batch's opinions: K beliefs and one uncertainty.

    ``L = mean_b H(b_b)``, ``b = softmax(u'_1, ..., u'_K, ln K)``, ``u' = u * stopgrad(|u|) / |u|``, u the logits; see
    :func:`~lightning_tta.losses.come_entropy`. A sample of which the net knows little has short logits, and keeps its
    uncertainty: lengthening them is no way down.

    Parameters touched, state, passes and returned logits are those of :class:`~lightning_tta.methods.tent.Tent`. The
    objective is a component: the other entropy methods take it as ``entropy="come"``.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        **options: Those of Tent but ``entropy``; authors' rates: those of the method that is improved.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Zhang et al., COME, ICLR 2025, arXiv 2410.10894. Differs from the authors' code: K is the number of logits
    (there 1000 for any net), and large logits do not overflow.
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

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, entropy="come", **options)
