"""Mixed batch normalisation as one operation with derivatives of first and second order written out.

Put together from torch's operations, a layer is some 60 kernels forward and 250 in the derivatives, nearly all of them
on numbers a channel. Here it is 15 forward, 20 in the gradient, and 40 in the gradient of the gradient.

Notation, all per domain and channel, n values each: x with mean mu and unbiased variance V; source statistics m_s, V_s;
weight w on the source and c = 1 - w::

    d = m_s - mu        m = mu + w d        u = w V_s + c V + w c d^2 + eps        r = u^-1/2
    y = a (x - m) + bias,  a = weight r

The gradient, for g = dL/dy, B = sum g, T = sum g (x - m), rho = r^2 (0 where u is kept from falling below eps),
e = a rho T and K = V_s - V + (1 - 2w) d^2::

    dL/dx = a g - p (x - mu) - c (a B - w d e) / n        p = c e / (n - 1)
    dL/dweight = r T        dL/dbias = B        dL/dw = -a B d - e K / 2

The gradient of that, for cotangents v of dL/dx and v_weight, v_bias, v_w, follows from the scalar
``J = <v, dL/dx> + <v_weight, dL/dweight> + <v_bias, dL/dbias> + <v_w, dL/dw>``, which with S = sum v,
X = sum v (x - mu), G = sum v g is::

    J = a (G - B L) + v_bias B + T H        L = c S / n + v_w d        H = r v_weight + a rho Q
    Q = -c X / (n - 1) + w c d S / n - v_w K / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_tta.backbones.norms import affine, moments
from lightning_tta.losses import at_least_float32


class Source(NamedTuple):
    """The source's side of a mixture: mean and variance (C,), eps, and whether a variance below 0 is set to 0."""

    mean: Tensor
    var: Tensor
    eps: float
    bounded: bool


class Inner:
    """Shared by the passes of an inner loop: whether the gradient that is taken now is one of its steps'.

    The engine does not tell a function which of its gradients somebody wants. A step does not want that of the mixing
    weights, where their rate is 0.

    Attributes:
        mixing: Whether the gradients of the mixing weights are wanted.
    """

    mixing: bool = True


class _Channels(NamedTuple):
    """What the derivatives need of a pass, each (D, C), ``w`` and ``share`` perhaps (C,)."""

    mu: Tensor
    d: Tensor
    w: Tensor
    wd: Tensor
    m: Tensor
    r: Tensor
    rho: Tensor
    a: Tensor
    a_rho: Tensor
    share: Tensor  # c / (n - 1)
    skew: Any  # (1 - 2w) d; None where w is fixed
    slope: Any  # K; the same


def mixed_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor,
    source: Source,
    domains: int,
    inner: Inner | None = None,
) -> Tensor:
    """Normalise x (D * B, C, ...) with the moments of the mixture, see :class:`MixedBatchNorm`; twice differentiable.

    ``weight``, ``bias`` and ``w`` are (C,) or (D, C). Keeps x for backward, and nothing else of that size.
    """
    return _Mixed.apply(x, weight, bias, w, source, domains, inner)  # type: ignore[no-any-return]


class _Mixed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        w: Tensor,
        source: Source,
        domains: int,
        inner: Inner | None,
    ) -> Tensor:
        wide = at_least_float32(_by_domain(x, domains))
        mu, var = moments(wide, [1, *range(3, wide.ndim)], unbiased=True)
        w_, mean_s, var_s = w.to(mu.dtype), source.mean.to(mu.dtype), source.var.to(mu.dtype)
        d = mean_s - mu
        wd = w_ * d
        m, rest = torch.lerp(mu, mean_s, w_), d - wd
        u = torch.lerp(var, var_s, w_).addcmul_(wd, rest).add_(source.eps)  # w c d^2 = w d (d - w d)
        r = (u.clamp_min(source.eps) if source.bounded else u).rsqrt()
        a = r if weight is None else r * weight
        shift = -m * a if bias is None else torch.addcmul(bias.to(m.dtype), m, a, value=-1)
        if any(ctx.needs_input_grad):
            # Past any rounding: where u is eps itself, the derivative is that of u.
            low = source.eps * (1 - 1e-6)
            rho = torch.threshold(u, low, torch.inf).reciprocal_() if source.bounded else r * r
            share = (1 - w_).div_(x.numel() // mu.numel() - 1)
            skew = rest - wd if ctx.needs_input_grad[3] else None
            slope = torch.addcmul(var_s - var, d, skew) if skew is not None else None
            ctx.save_for_backward(x, weight, bias, w, mu, d, w_, wd, m, r, rho, a, a * rho, share, skew, slope)
        ctx.domains, ctx.inner = domains, inner
        ctx.set_materialize_grads(False)  # zeros would look like gradients where none comes through
        return _sum_like(x, [(wide, a)], shift)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        x, weight, bias, w, *channels = ctx.saved_tensors
        *needs, needs_w = ctx.needs_input_grad[:4]
        needs.append(needs_w and (ctx.inner is None or ctx.inner.mixing))
        gradients = _MixedGradient.apply(g, x, weight, w, bias, _Channels(*channels), ctx.domains, needs)
        return (*gradients, None, None, None)


class _MixedGradient(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        w: Tensor,
        bias: Tensor | None,
        k: _Channels,
        domains: int,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        wide_g, wide_x = (at_least_float32(_by_domain(value, domains)) for value in (g, x))
        n = x.numel() // k.mu.numel()
        b = _total(wide_g)
        t = torch.addcmul(_total(wide_g * wide_x), k.m, b, value=-1)
        e, ab = k.a_rho * t, k.a * b
        p = k.share * e
        gx = gweight = gbias = gw = None
        if needs[0]:
            shift = (p * k.mu).addcmul_(k.share, torch.addcmul(ab, k.wd, e, value=-1), value=(1 - n) / n)
            gx = _sum_like(x, [(wide_g, k.a), (wide_x, p)], shift, [1, -1])
        if needs[1] and weight is not None:
            gweight = _like(k.r * t, weight)
        if needs[2] and bias is not None:
            gbias = _like(b, bias)
        if needs[3]:
            gw = _like((ab * k.d).addcmul_(e, k.slope, value=0.5).neg_(), w)
        ctx.save_for_backward(g, x, weight, w, b, t, e, ab, p, *k)
        ctx.domains = domains
        ctx.set_materialize_grads(False)
        return gx, gweight, gbias, gw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the head of the file; J's derivative by each tensor that it depends on."""
        g, x, weight, w, b, t, e, ab, p, *channels = ctx.saved_tensors
        k = _Channels(*channels)
        n = x.numel() // k.mu.numel()
        needs_g, needs_x, needs_weight, needs_w = ctx.needs_input_grad[:4]
        wide_g, wide_x = (at_least_float32(_by_domain(value, ctx.domains)) for value in (g, x))
        wide_v = None if v is None else at_least_float32(_by_domain(v, ctx.domains))
        v_weight, v_bias, v_w = (None if value is None else value.to(b.dtype) for value in cotangents)
        if wide_v is None:  # of the first layer, whose input needs no gradient
            s = centred = product = torch.zeros_like(b)
        else:
            s = _total(wide_v)
            centred = torch.addcmul(_total(wide_v * wide_x), k.mu, s, value=-1)
            product = _total(wide_v * wide_g)
        share_n = (n - 1) / n
        big_l = by_s = k.share * s  # L but for the factor share_n
        minus_q = torch.addcmul(k.share * centred, k.wd, big_l, value=-share_n)
        if v_w is not None:
            big_l = torch.addcmul(big_l, v_w, k.d, value=1 / share_n)
            minus_q = torch.addcmul(minus_q, v_w, k.slope, value=0.5)
        rest = torch.addcmul(product, b, big_l, value=-share_n)  # G - B L
        minus_aq = k.a_rho * minus_q
        minus_h = minus_aq if v_weight is None else torch.addcmul(minus_aq, k.r, v_weight, value=-1)

        grad_g = grad_x = grad_weight = grad_w = None
        if needs_g:
            shift = k.m * minus_h if v_bias is None else torch.addcmul(v_bias, k.m, minus_h)
            shift = shift.addcmul_(k.a, big_l, value=-share_n)
            grad_g = _sum_like(g, [(wide_x, minus_h), (wide_v, k.a)], shift, [-1, 1])
        if needs_weight and weight is not None:
            grad_weight = _like(torch.addcmul(rest, t, k.rho * minus_q, value=-1).mul_(k.r), weight)
        if not (needs_x or needs_w):
            return grad_g, None, grad_weight, *(None,) * 5
        twice_u = torch.add(minus_h, minus_aq, alpha=2).mul_(t).addcmul_(k.a, rest, value=-1).mul_(k.rho)  # 2 dJ/du
        minus_bh = b * minus_h
        if needs_x:
            by_var = k.share * twice_u  # 2 / (n - 1) dJ/dV; first by way of u
            # dJ/dmu = -B H + p S - dJ/dd, where mu has no part in d, and dJ/dd = w (...)
            by_d = torch.addcmul(minus_bh, e, by_s, value=share_n).addcmul_(k.d, by_var, value=n - 1)
            by_mu = torch.addcmul(minus_bh, p, s).addcmul_(k.w, by_d, value=-1)
            if v_w is not None:
                by_mu.addcmul_(v_w, torch.addcmul(ab, e, k.skew))
                by_var = torch.addcmul(by_var, v_w, e, value=1 / (n - 1))
            shift = by_mu.div_(n).addcmul_(by_var, k.mu, value=-1)
            grad_x = _sum_like(x, [(wide_x, by_var), (wide_g, minus_h), (wide_v, p)], shift, [1, -1, -1])
        if needs_w:
            by_q = torch.addcmul(centred / (n - 1), k.skew, s, value=1 / n)
            by_q = by_q if v_w is None else by_q.addcmul_(v_w, k.d * k.d)
            by_w = (e * by_q).addcmul_(ab, s, value=1 / n).addcmul_(minus_bh, k.d)
            grad_w = _like(by_w.addcmul_(twice_u, k.slope, value=0.5), w)
        return grad_g, grad_x, grad_weight, grad_w, *(None,) * 4


def _by_domain(x: Tensor, domains: int) -> Tensor:
    """(D * B, C, ...) -> (D, B, C, ...)."""
    return x.view(domains, -1, *x.shape[1:])


def _total(x: Tensor) -> Tensor:
    """The sum of x (D, B, C, ...) over all but domains and channels."""
    return x.sum((1, *range(3, x.ndim)))


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """(D, C) -> what broadcasts over x (D, B, C, ...)."""
    return value.view(value.shape[0], 1, -1, *(1,) * (x.ndim - 3))


def _sum_like(
    x: Tensor, terms: list[tuple[Tensor | None, Tensor]], shift: Tensor, signs: Sequence[int] = (1,)
) -> Tensor:
    """The sum of tensors (D, B, C, ...), each times its factor (D, C) and sign, and of a shift (D, C); shaped like x.

    Terms that are ``None`` are left out.
    """
    (first, factor), *more = [(term, factor) for term, factor in terms if term is not None]
    present = [sign for (term, _), sign in zip(terms, signs, strict=True) if term is not None]
    assert first is not None
    shift, factor = _spread(shift, first), _spread(factor, first)
    result = torch.empty_like(x if x.dtype == first.dtype else first.flatten(0, 1))  # no view: layers may write into it
    out = _by_domain(result, first.shape[0])
    if present[0] > 0 and x.device.type == "cpu":  # addcmul does not broadcast well there, unless it adds to its result
        torch.mul(first, factor, out=out).add_(shift)
    else:
        torch.addcmul(shift, first, factor, value=present[0], out=out)
    for (term, factor), sign in zip(more, present[1:], strict=True):
        out.addcmul_(term, _spread(factor, first), value=sign)
    return result.to(x.dtype)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A gradient (D, C) for a parameter (D, C), or (C,) that all domains share."""
    return (value if parameter.ndim == 2 else value.sum(0) if value.shape[0] > 1 else value[0]).to(parameter.dtype)


def source_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, source: Source, domains: int) -> Tensor:
    """Normalise x (D * B, C, ...) with the source's moments, see :func:`mixed_batch_norm`; twice differentiable."""
    scale = (at_least_float32(source.var) + source.eps).rsqrt()
    shift = -source.mean * scale
    if weight is not None and bias is not None:
        scale = scale * weight
        shift = bias - source.mean * scale
    by_domain = _by_domain(x, domains)
    scale, shift = (_spread(value.view(-1, x.shape[1]), by_domain) for value in (scale, shift))
    return affine(by_domain, scale, shift).flatten(0, 1)
