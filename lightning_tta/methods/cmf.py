"""CMF: ROID's loss; a Kalman filter draws the weights to a hidden net, which is drawn to the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import owner
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.likelihood import LikelihoodMethod
from lightning_tta.methods.components.teacher import approach

FEWEST, ENOUGH = 0.89, 0.9999
"""Bounds of beta: below the first it is the first, above the second it is 1."""

VIT_BASE = 38_400
"""Weights of the norm layers of a ViT-Base."""


class CMF(LikelihoodMethod):
    """Minimises ROID's loss, and draws the weights to those of a hidden net that a Kalman filter follows.

    Loss, samples and correction are those of :class:`~lightning_tta.methods.roid.ROID`. With the weights theta, the
    hidden ones h, from the source theta0 on, and their variance v, from 0 on, after each step::

        h <- hidden_keep h + (1 - hidden_keep) theta0      v <- hidden_keep^2 v + Q      (predict)
        beta = (1 - Q) / (v + 1 - Q), at least 0.89, 1 above 0.9999
        h <- beta h + (1 - beta) theta                     v <- beta v                   (update)
        theta <- keep theta + (1 - keep) h
        Q = process_noise * (number of weights that learn, in layers that run) / 38,400, at most 1

    38,400 is the number of a ViT-Base.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: ROID's, h
    and v. Passes, returns and ``stats`` are ROID's.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        keep: Share of the adapted weights that stays, in [0, 1]; authors 0.99, their gamma.
        hidden_keep: Share of h that stays, in [0, 1]; authors 0.99, their alpha.
        process_noise: >= 0; authors 0.005. The larger, the more h follows the weights.
        **options: Those of ROID but for ``keep``, with its defaults.

    Raises:
        ConfigError: With ``prior=``, unless ``prior_correction`` is ``none``.
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Lee and Chang, Continual Momentum Filtering, ICLR 2024, openreview BllUWdpIOA. Formula from: code, as reused
    in a public benchmark; its second form ("op") gives the first, since both names are of one net, and so is left out.
    Differs from it as ROID does; Q is at most 1, where beta is 0.89 already; :meth:`reset` brings v back to 0, too,
    which the code forgets.
    """

    about = About(
        does="ROID's loss; weights averaged with a hidden net of a Kalman filter",
        learns="norm layers",
        passes="2 / 1",
        needs="norm layers",
        holds="the norm layers once more",
        suits="continual, mixed, correlated on GroupNorm or LayerNorm",
        formula="code",
        paper="ICLR 2024, openreview BllUWdpIOA",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float = 0.99,
        hidden_keep: float = 0.99,
        process_noise: float = 0.005,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("keep", keep, 0, 1)
        check_range("hidden_keep", hidden_keep, 0, 1)
        check_range("process_noise", process_noise, 0)
        self.keep, self.hidden_keep, self.process_noise = keep, hidden_keep, process_noise
        weights = self.weights()
        for name, tensor in weights.items():
            hidden = at_least_float32(tensor).clone()
            self.state(f"hidden.{name}", hidden, source=self.source_value(name))
        first = next(iter(weights.values()))
        self.state("variance", torch.zeros_like(at_least_float32(first.sum())), source=0)
        self.keep_wide("variance", *(f"hidden.{name}" for name in weights))

    @property
    def q(self) -> float:
        """Q, by the number of weights in layers that run."""
        ran, weights = self.ran, self.weights()
        running = [n for n in weights if ran is None or owner(n.removeprefix("model.")) in ran]
        return min(self.process_noise * sum(weights[name].numel() for name in running) / VIT_BASE, 1.0)

    def merge(self, taken: Tensor) -> None:
        """Predict and update the hidden weights; draw the weights to them."""
        hidden = {name: self.value(f"hidden.{name}") for name in self.weights()}
        approach(hidden, self.source(), 1 - self.hidden_keep, taken)
        q = self.q
        variance, r = self.hidden_keep**2 * self.value("variance") + q, 1 - q
        beta = (r / (variance + r)).clamp_min(FEWEST)
        beta = torch.where(beta < ENOUGH, beta, 1)
        self.write("variance", beta * variance, taken)
        approach(hidden, self.weights(), 1 - beta, taken)
        approach(self.weights(), hidden, 1 - self.keep, taken)
        self.note(beta=beta)
