"""EATA-C: the net agrees with a part of itself, and is made sure or unsure as the two agree."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import replaced_forwards
from lightning_tta.backbones.residual import residual_blocks, without_blocks
from lightning_tta.draws import random_flags
from lightning_tta.errors import UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import fused_divergence
from lightning_tta.methods.base.description import About
from lightning_tta.methods.eata import EATA

Drop = Literal["auto", "blocks", "features"]


class EATAC(EATA):
    """Minimises the divergence of a sub-network from the net, and its entropy where both predict the same class.

    With p of the net, without gradient, and q of a sub-network, on the samples that EATA's filters keep by p::

        f = (p + (1 - smoothing) q) / (2 - smoothing)
        L = mean [ KL(f || q) + alpha C H(q) ] + fisher_alpha * sum_i F_i (theta_i - theta0_i)^2

    C is 1 where q and p have the same arg-max, and -1 where they have not: what the net and its part disagree on is
    ambiguous, and is made less sure. The gradient goes through q in f too.

    The sub-network is drawn for each step: each residual block is left out with probability ``drop_rate`` (stochastic
    depth, :func:`~lightning_tta.backbones.residual.residual_blocks`: not those that change the shape). A net without
    two of them has each channel of the last layer's input set to 0, and the others scaled up.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics, in the
    sub-network those of the kept samples. State: these, the optimizer, EATA's mean prediction and F, and the number of
    draws. Per batch and step: two forward passes, one without gradient, and one backward pass. Returns the logits of
    the net before the step. ``stats``: ``kept``, and ``agree``, the share of kept samples with C = 1.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        alpha: Weight of the entropy, >= 0; 0.1.
        smoothing: In [0, 1]; 0.5. 1: f is p.
        drop: ``blocks``, ``features``, or ``auto``: the blocks where there are at least two.
        drop_rate: Probability, in [0, 1); 0.2.
        seed: Of the draws.
        **options: Those of EATA: ``lr`` 2.5e-4 with ``sgd`` (ImageNet, batch 64), ``entropy_margin`` 0.4,
            ``diversity_margin`` 0.05 (ImageNet), ``fisher_alpha`` 50 (ImageNet; for CIFAR EATA's 1). ``entropy`` is H,
            of the filter too.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or no blocks to leave out, or does not end
            in a linear layer.

    Source: Tan et al., IEEE TPAMI 2025, arXiv 2403.11491. Formula from: reconstruction, by the paper's abstract and a
    re-implementation in other authors' public code, whose values the defaults are; its sub-network sets the rate of
    dropout layers, which most nets have none of. Unknown from the paper: whether EATA's weights stand before L (here
    none), the rate by depth (here the same for all blocks), and its CIFAR settings (here EATA's).
    """

    about = About(
        does="divergence of a sub-network from the net; entropy down where they agree, up where not; Fisher penalty",
        learns="norm layers",
        passes="2 / 1",
        needs="norm layers; 2,000 source images",
        holds="Fisher information",
        suits="shuffled, long; where calibration counts",
        formula="reconstruction",
        paper="TPAMI 2025, arXiv 2403.11491",
    )
    synchronized = False

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 0.1,
        smoothing: float = 0.5,
        drop: Drop = "auto",
        drop_rate: float = 0.2,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("alpha", alpha, 0)
        check_range("smoothing", smoothing, 0, 1)
        check_choice("drop", drop, ("auto", "blocks", "features"))
        check_range("drop_rate", drop_rate, 0, 0.99)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.alpha, self.smoothing, self.drop_rate = alpha, smoothing, drop_rate
        blocks = [] if drop == "features" else residual_blocks(self.model)
        if drop == "blocks" and not blocks:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no residual blocks that EATA-C could leave out (modules with a norm "
                "layer that add to their input). Use drop='features'."
            )
        self.blocks = [] if drop == "auto" and len(blocks) < 2 else blocks
        self.state("draws", torch.tensor([seed, 0], device=self.learned[0].device))  # the key of the next one

    def step(self, x: Tensor) -> Tensor:
        """One step of a sub-network on the samples that are kept."""
        self.look(x)
        with torch.no_grad():
            logits = self.logits(x)
            kept = self.keep(logits, self.entropy(logits))
        assert kept is not None
        if self.known(~kept.any()):
            return logits
        with self._sub_network(), self.counting(kept):
            part = self.logits(x, accounted=False)
        agree = part.argmax(-1) == logits.argmax(-1)
        self.note(agree=(agree & kept).float().sum() / kept.sum())
        sign = torch.where(agree, 1.0, -1.0).to(part.dtype)
        losses = fused_divergence(logits, part, self.smoothing) + self.alpha * sign * self.entropy(part)
        taken = self.descend(losses, kept, extra=self.penalty())
        self.accept(logits, kept, taken)
        key = self.value("draws")
        self.write("draws", key + torch.arange(2, device=key.device), taken)
        return logits

    def _sub_network(self) -> AbstractContextManager[None]:
        """While active, parts of the net are left out."""
        keep = self._drawn()
        if self.blocks:
            return without_blocks(self.model, self.blocks, keep)
        head = self.split.head
        plain, scale = head.forward, 1 / (1 - self.drop_rate)
        return replaced_forwards({head: lambda z: plain(torch.where(keep, z * scale, 0))})

    def _drawn(self) -> Tensor:
        """What stays in the next sub-network, (N,) bool: N blocks, or features."""
        number = len(self.blocks) or self.split.num_features
        return ~random_flags(self.value("draws"), number, self.drop_rate)
