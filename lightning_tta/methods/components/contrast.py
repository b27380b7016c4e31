"""Contrastive losses: vectors of the same image are drawn together, and away from those of others."""

from __future__ import annotations

import torch
from torch import Tensor


def contrast_views(vectors: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding the other vectors of the same image among all others, per image.

    With unit vectors a_i, the V B of all images, P(i) the V - 1 others of the image of i::

        l_i = - mean_{j in P(i)} log( exp(a_i . a_j / T) / sum_{k != i} exp(a_i . a_k / T) )

    and the loss of an image is the mean over its V vectors. The supervised contrastive loss (Khosla et al., arXiv
    2004.11362), with each image a class of its own.

    Args:
        vectors: Of length 1, (V, B, D), V >= 2.
        temperature: T, > 0.

    Returns:
        (B,).
    """
    views, batch, _ = vectors.shape
    each = vectors.flatten(0, 1)
    itself = torch.eye(len(each), dtype=torch.bool, device=each.device)
    log_p = (each @ each.T / temperature).masked_fill(itself, float("-inf")).log_softmax(1)
    same_image = itself[:batch, :batch].repeat(views, views) & ~itself
    return -torch.where(same_image, log_p, 0).sum(1).view(views, batch).mean(0) / (views - 1)


def contrast_queue(queries: Tensor, keys: Tensor, queue: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding an image's key, among the negative ones of a queue, from its query, per image.

    ``l_b = -log( exp(q_b . k_b / T) / (exp(q_b . k_b / T) + sum_{m negative for b} exp(q_b . m / T)) )``, 0 where there
    is no negative one. Source: MoCo (He et al., CVPR 2020, arXiv 1911.05722).

    Args:
        queries: Of length 1, (B, D).
        keys: Of length 1, without gradient, (B, D).
        queue: Of length 1, without gradient, (M, D).
        negative: Which of the queue count for each image, (B, M) bool.
        temperature: T, > 0.

    Returns:
        (B,).
    """
    positive = (queries * keys).sum(1, keepdim=True)
    others = (queries @ queue.T).masked_fill(~negative, float("-inf"))
    return -(torch.cat([positive, others], 1) / temperature).log_softmax(1)[:, 0]
