"""Losses on logits, shared by training and test time. All start from log_softmax; natural logarithm throughout."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def _log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in at least float32 (half precision loses small probabilities)."""
    return torch.log_softmax(at_least_float32(logits), dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, H(p) = -sum_k p_k log p_k, per sample.

    Shape: logits (..., K) -> (...), values in [0, log K]. Minimised by Tent (Wang et al., arXiv 2006.10726).
    """
    log_p = _log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(-1)


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """(1 - p_y^q) / q of the probability p_y of a label, per sample: the cross-entropy as q -> 0, 1 - p_y at q = 1.

    Its gradient is that of the cross-entropy times p_y^q, so that labels which the net thinks unlikely, as wrong ones
    are, count less. Shape: logits (..., K), labels (...), int64 -> (...). Source: Zhang and Sabuncu, NeurIPS 2018,
    arXiv 1805.07836.
    """
    log_p = _log_probabilities(logits).gather(-1, labels[..., None])[..., 0]
    return -torch.expm1(q * log_p) / q


def come_entropy(logits: Tensor, uncertainty: float | None = None) -> Tensor:
    """Entropy of COME's opinion: K beliefs and one uncertainty, per sample.

    ``u' = u * stopgrad(|u|) / |u|`` has the values of the logits u, but no gradient along u: confidence cannot be
    gained by length. The opinion is ``softmax(u'_1, ..., u'_K, log m)``: beliefs ``b_k = exp(u'_k) / S`` and
    uncertainty ``m / S``, ``S = m + sum_k exp(u'_k)``; the result is its entropy over all K + 1 entries.
    ``uncertainty`` is m, > 0; ``None``: K, the paper's; the authors' code has 1000 for any net.

    Shape: logits (..., K) -> (...), values in [0, log(K + 1)]. Source: COME, ICLR 2025, arXiv 2410.10894. Differs from
    the authors' code: a softmax, which does not overflow.
    """
    logits = at_least_float32(logits)
    length = torch.linalg.vector_norm(logits, dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    fixed = logits / length * length.detach()
    mass = torch.full_like(fixed[..., :1], math.log(logits.shape[-1] if uncertainty is None else uncertainty))
    return entropy(torch.cat([fixed, mass], dim=-1))


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99) -> Tensor:
    """Negative soft likelihood ratio, -sum_k p_k log(p_k / (1 - p_k)) with p_k <= ``clip``, per sample.

    Its gradient does not vanish where the prediction is sure, as that of the entropy does; a probability above ``clip``
    has none. Shape: logits (..., K) -> (...). Minimised by ROID (Marsden et al., arXiv 2306.00650).
    """
    log_p = _log_probabilities(logits).clamp(max=math.log(clip))
    p = log_p.exp()
    return -(p * (log_p - torch.log1p(-p))).sum(-1)


def conjugate_poly(logits: Tensor, epsilon: float) -> Tensor:
    """PolyLoss, -log p_y + epsilon (1 - p_y), with the label that is conjugate to the prediction, per sample.

    ``y_k = p_k / (1 + epsilon p_k)``, scaled to sum 1: the solution of ``(I + epsilon diag(p) - epsilon p p') y = p``.
    The gradient goes through y too; with epsilon 0 it is the entropy. Shape: logits (..., K) -> (...). Source: Goyal et
    al., arXiv 2207.09640.
    """
    log_p = _log_probabilities(logits)
    p = log_p.exp()
    label = p / (1 + epsilon * p)
    label = label / label.sum(-1, keepdim=True)
    return (label * (epsilon * (1 - p) - log_p)).sum(-1)


def symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) = sum_k (p_k - q_k)(log p_k - log q_k), per sample.

    Shape: both (..., K) -> (...). The alignment term of ZeroSiam (arXiv 2509.23183).
    """
    log_p, log_q = _log_probabilities(p_logits), _log_probabilities(q_logits)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def divergence(p_logits: Tensor, q_logits: Tensor, kind: str) -> Tensor:
    """How far two predicted distributions are apart, per sample, >= 0.

    ``symmetric_kl``: :func:`symmetric_kl`; ``kl``: ``KL(p || q)``; ``reverse_kl``: ``KL(q || p)``; ``js``: Jensen and
    Shannon's, ``(KL(p || m) + KL(q || m)) / 2``, ``m = (p + q) / 2``; ``mse``: ``sum_k (p_k - q_k)^2``.

    Shape: both (..., K) -> (...).
    """
    if kind == "symmetric_kl":
        return symmetric_kl(p_logits, q_logits)
    log_p, log_q = _log_probabilities(p_logits), _log_probabilities(q_logits)
    if kind == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "mse":
        return (log_p.exp() - log_q.exp()).square().sum(-1)
    return consistency(torch.stack([log_p, log_q], dim=-2))


def fused_divergence(p_logits: Tensor, q_logits: Tensor, smoothing: float) -> Tensor:
    """KL(f || q) with f = (p + (1 - s) q) / (2 - s), s = ``smoothing``, per sample.

    Gradients flow into q in both places; detach p. Shape: both (..., K) -> (...). Minimised by EATA-C (arXiv
    2403.11491).
    """
    log_q = _log_probabilities(q_logits)
    fused = (_log_probabilities(p_logits).exp() + (1 - smoothing) * log_q.exp()) / (2 - smoothing)
    tiny = torch.finfo(fused.dtype).tiny
    return (fused * (fused.clamp_min(tiny).log() - log_q)).sum(-1)


def soft_cross_entropy(target_logits: Tensor, logits: Tensor, reverse: float = 0.0) -> Tensor:
    """(1 - r) CE(t, p) + r CE(p, t) with CE(t, p) = -sum_k t_k log p_k, of two predicted distributions, per sample.

    ``reverse`` is r: 0 the cross-entropy under a teacher's prediction t (CoTTA, arXiv 2203.13591), 0.5 its symmetric
    form. Shape: both (..., K) -> (...). Gradients flow into both arguments; detach what is a target.
    """
    log_t, log_p = _log_probabilities(target_logits), _log_probabilities(logits)
    return -((1 - reverse) * log_t.exp() * log_p + reverse * log_p.exp() * log_t).sum(-1)


def _confident(log_p: Tensor, threshold: float) -> Tensor:
    """Which samples have a maximal probability of at least ``threshold``: (..., B) bool."""
    return log_p.detach().amax(-1).exp() >= threshold


def confident_loss(logits: Tensor, threshold: float, kind: str = "hard_ce") -> Tensor:
    """Loss of the confident samples, max_k p_k >= threshold: (2 n_hi / N) * mean over these, 0 where there are none.

    ``hard_ce``: cross-entropy with the arg-max as the label (the authors' code); ``entropy``: the entropy (the
    paper's words). Shape: logits (..., N, K) -> (...). Source: Meta-TTT, arXiv 2410.01709.
    """
    log_p = _log_probabilities(logits)
    per_sample = -log_p.amax(-1) if kind == "hard_ce" else -(log_p.exp() * log_p).sum(-1)
    return 2 * (per_sample * _confident(log_p, threshold)).mean(-1)


def unconfident_entropy(logits: Tensor, threshold: float, temperature: str = "none") -> Tensor:
    """Entropy of the unconfident samples, max_k p_k < threshold: (2 n_lo / N) * mean over these, 0 without any.

    With ``temperature="gem_t"`` the entropy is that of (u - mean_k u) / T: the mean over the sample's classes, T the
    mean over classes of the standard deviation over the N samples (biased), both detached; T = 1 where it would be 0
    (one sample, equal images). Which samples are confident is decided without it.

    Shape: logits (..., N, K) -> (...). Source: Meta-TTT, arXiv 2410.01709.
    """
    log_p = _log_probabilities(logits)
    unconfident = ~_confident(log_p, threshold)
    if temperature == "gem_t":
        fixed = logits.detach()
        spread = fixed.std(-2, correction=0).mean(-1)[..., None, None]
        spread = torch.where(spread > torch.finfo(spread.dtype).eps, spread, 1.0)
        log_p = _log_probabilities((logits - fixed.mean(-1, keepdim=True)) / spread)
    per_sample = -(log_p.exp() * log_p).sum(-1)
    return 2 * (per_sample * unconfident).mean(-1)


def log_mean_probability(view_logits: Tensor) -> Tensor:
    """Log of the mean over views of the predicted distributions. Shape: logits (..., V, K) -> (..., K)."""
    return torch.logsumexp(_log_probabilities(view_logits), dim=-2) - math.log(view_logits.shape[-2])


def marginal_entropy(view_logits: Tensor) -> Tensor:
    """Entropy of the mean predicted distribution over V views, H(pbar), pbar = (1/V) sum_k p_k.

    Shape: logits (..., V, K) -> (...), values in [0, log K]. Minimised by MEMO (arXiv 2110.09506). It is the mean
    entropy of the views plus their :func:`consistency`.
    """
    log_p = log_mean_probability(view_logits)
    return -(log_p.exp() * log_p).sum(-1)


def consistency(view_logits: Tensor, direction: str = "view_to_mean", detach: bool = False) -> Tensor:
    """How far views are from their mean distribution pbar: (1/V) sum_k KL, >= 0.

    ``view_to_mean``: KL(p_k || pbar), the Jensen-Shannon divergence of the views (CR-MEMO); ``mean_to_view``:
    KL(pbar || p_k). With ``detach`` pbar counts as a constant, which for ``view_to_mean`` changes no gradient.

    Shape: logits (..., V, K) -> (...).
    """
    log_p, log_mean = _log_probabilities(view_logits), log_mean_probability(view_logits)[..., None, :]
    log_mean = log_mean.detach() if detach else log_mean
    if direction == "view_to_mean":
        return (log_p.exp() * (log_p - log_mean)).sum(-1).mean(-1)
    return (log_mean.exp() * (log_mean - log_p)).sum(-1).mean(-1)
