"""Losses on logits, shared by training and test time. All start from log_softmax; natural logarithm throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def _log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in at least float32 (half precision loses small probabilities)."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, H(p) = -sum_k p_k log p_k, per sample.

    Shape: logits (..., K) -> (...), values in [0, log K]. Minimised by Tent (Wang et al., arXiv 2006.10726).
    """
    log_p = _log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(-1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) of two predicted distributions, per sample.

    Shape: both (..., K) -> (...). Gradients flow into both arguments; detach what is a target.
    """
    log_p, log_q = _log_probabilities(p_logits), _log_probabilities(q_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) = sum_k (p_k - q_k)(log p_k - log q_k), per sample.

    Shape: both (..., K) -> (...). The alignment term of ZeroSiam (arXiv 2509.23183).
    """
    log_p, log_q = _log_probabilities(p_logits), _log_probabilities(q_logits)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
