"""REM: predictions with fewer patches learn from those with more, and must not be surer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from lightning_tta import collective
from lightning_tta.backbones.attention import chosen_tokens, find_attention, watched_attention
from lightning_tta.errors import ConfigError, check_range
from lightning_tta.losses import entropy, soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod


class REM(GradientMethod):
    """Minimises the cross-entropy of predictions with fewer patches from those with more, and ranks their entropies.

    Predictions p_0 of all patches, p_1, p_2, ... without the share ``masked``, 2 ``masked``, ... of them to which the
    class token attends most (the mean over heads of its row in the last block's attention, in the pass of p_0)::

        L = mean_b [ sum_{j < i} CE(stopgrad(p_j), p_i)
                     + weight * sum_{i < j} relu(H(p_i) - stopgrad(H(p_j)) + margin * ln K) ]

    Parameters touched: weight and bias of the normalisation layers but for the last blocks' and the final one
    (:func:`~lightning_tta.backbones.norms.early_norm_parameters`). State: these and the optimizer. Per batch and step:
    ``views`` forward passes, all but the first of fewer tokens, and one backward pass through them. Returns the logits
    of all patches before the step. ``stats``: ``consistency`` and ``ranking``, the two terms.

    Args:
        model: A vision transformer with a class token: blocks in a sequence that take any number of tokens (B, N, D).
            They and their attention are found by what the net computes, in a pass through a copy; timm's, torchvision's
            and Hugging Face's ViT and DeiT are such.
        views: Predictions of an image, >= 2. Authors: 3.
        masked: Share of the patches by which each has fewer, in (0, 1); the last one must keep some. Authors: 0.1.
        weight: Of the ranking, lambda, >= 0. Authors: 1.
        margin: As a share of ln K. Authors: 0.
        frozen_fraction: Share of the net's blocks, from the last, that stay fixed, with the final norm layer, in
            [0, 1]; 0.25 is the authors' blocks 9-11 of a ViT-B.
        **options: ``lr``: authors 1e-3 with Adam at batch 50 (ImageNet) and 20 (CIFAR-10, images of 384 pixels).
            ``optimizer``, ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        ConfigError: If the last prediction would have no patch.
        UnsupportedModelError: If the net has no such blocks (a convolutional net, a Swin), no class token, no attention
            that shows, or its blocks take a fixed number of tokens (relative or rotary positions).

    Source: REM, ICML 2025, arXiv 2505.16441. The formulas are from the authors' code (an early release). Differs from
    it: any net of the kind, where that has two ViTs written out; K is the number of logits in the margin (there 1000
    for ImageNet); the last blocks are found by depth, not by name; the net stays in eval mode in the first pass too.
    """

    about = About(
        does="cross-entropy of predictions with fewer patches from those with more, whose entropies are to be lower",
        learns="norm layers but the last blocks'",
        passes="3 / 1",
        needs="a ViT with a class token",
        holds="-",
        suits="long, without resets",
        formula="code",
        paper="ICML 2025, arXiv 2505.16441",
    )

    synchronized = True

    def __init__(
        self,
        model: nn.Module,
        *,
        views: int = 3,
        masked: float = 0.1,
        weight: float = 1.0,
        margin: float = 0.0,
        frozen_fraction: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("views", views, 2, integer=True)
        check_range("masked", masked, 0, 1, low_open=True)
        if (views - 1) * masked >= 1:
            raise ConfigError(
                f"views={views} and masked={masked} leave the last prediction no patch; (views - 1) * masked must be "
                "below 1."
            )
        check_range("weight", weight, 0)
        check_range("margin", margin)
        self.shares = [1 - number * masked for number in range(1, views)]
        self.weight, self.margin = weight, margin
        self.tokens = find_attention(self.model)
        self.learn(self.select("early_norm", frozen_fraction=frozen_fraction))

    def step(self, x: Tensor) -> Tensor:
        """One step on all samples."""
        with watched_attention(self.model, self.tokens) as rows:
            views = [self.logits(x)]
        attention = rows[0][:, self.tokens.prefix :]
        order = attention.argsort(dim=1, stable=True)  # from the least
        for share in self.shares:
            with chosen_tokens(self.model, self.tokens, order[:, : self.number_of(order.shape[1], share)]):
                views.append(self.logits(x))
        entropies, margin = [entropy(view) for view in views], self.margin * math.log(views[0].shape[-1])
        consistency, ranking = torch.zeros_like(entropies[0]), torch.zeros_like(entropies[0])
        for j, more in enumerate(views):
            for i in range(j + 1, len(views)):
                consistency = consistency + soft_cross_entropy(more.detach(), views[i])
                ranking = ranking + relu(entropies[j] - entropies[i].detach() + margin)
        self.descend(consistency + self.weight * ranking)
        self.note(consistency=collective.mean(consistency), ranking=collective.mean(ranking))
        return views[0]

    @staticmethod
    def number_of(patches: int, share: float) -> int:
        """How many of the patches are a share of them, at least one."""
        return max(1, int(patches * share + 1e-6))  # 100 * (1 - 9 * 0.1) is a little less than 10
