"""The statistics with which BatchNorm normalises at test time, for every method: ``statistics=``.

Each kind is a class here. All of them start at the source's statistics, but for ``start: batch``, and leave the net's
own alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import batch_moments, batch_norm_layers, merged_moments
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import Account, Statistics, StreamAccount
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.auto_statistics import Auto
from lightning_tta.methods.components.class_statistics import Balanced
from lightning_tta.methods.components.domain_statistics import Domains
from lightning_tta.methods.components.stream_statistics import (
    IMAGES,
    MOMENTS,
    StreamAverage,
    StreamStatistics,
    instance_moments,
    through_moments,
)
from lightning_tta.methods.components.wanted import Wanted, read


class EMA(StreamStatistics):
    """An exponential moving average over the stream: RoTTA's RobustBN.

    ``mean <- (1 - m) mean + m mean_batch``, variance likewise (biased, no cross term), with the batch in it before it
    is predicted. A correlated or class-sorted batch moves it by its share m only; so it survives where the statistics
    of the batch fail.

    Args:
        method: Whose net it is.
        momentum: m, in (0, 1]; authors 0.05 for batches of 64. A smaller batch wants a smaller one: 0.02 at 16.
        start: Where the average starts: at the ``source`` or, of each layer, at the first ``batch`` that it sees.
            Authors: ``source``.

    Source: Yuan et al., RoTTA, CVPR 2023, arXiv 2303.13899. Differs from the authors' code: no gradient through the
    batch's share.
    """

    def __init__(
        self, method: TTAMethod, *, momentum: float = 0.05, start: Literal["source", "batch"] = "source"
    ) -> None:
        check_range("momentum", momentum, 0, 1, low_open=True)
        check_choice("start", start, ("source", "batch"))
        super().__init__(method)
        self.momentum, self.start = momentum, start
        if start == "batch":
            self.small_batch = 8
            self.advice = (
                "starts BatchNorm's averages at the first batch, whose statistics are noise below about 8 images"
            )

    def moved(self, method: State, name: str, batch: Tensor, old: Tensor) -> Tensor:
        """The average (2, C) with a batch in it."""
        new = torch.lerp(old, batch, self.momentum)
        if self.start == "source":
            return new
        is_first = (old == method.source_value(MOMENTS)[:, self.places[name]]).all()  # to the bit: nothing came yet
        return torch.where(is_first, batch, new)

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The average with this input in it."""
        new = self.moved(method, name, torch.stack(batch_moments(x)).to(old), old)
        return new, new


class Renormalized(EMA):
    """As ``ema``, with the gradient of batch statistics: DELTA's test-time batch renormalization.

    The input, normalised by the batch's moments, is normalised again with r and d, which carry no gradient::

        y = (x - m_b) / s_b * r + d    r = s_b / s_ema    d = (m_b - m_ema) / s_ema    s^2 = variance + eps

    So y is what ``ema`` gives, to the bit, and a step is that of a net whose layers undo what the batch has in common.

    Args:
        method: Whose net it is.
        momentum: As of :class:`EMA`, in (0, 1]; authors 0.05.
        start: As of :class:`EMA`; authors ``batch``.
        rmax: r is kept in [1 / rmax, rmax], >= 1; ``None``: as it is. Authors: 3, without effect in their code.
        dmax: d is kept in [-dmax, dmax], >= 0; ``None``: as it is. Authors: 5, without effect.

    Source: Zhao et al., DELTA, ICLR 2023, arXiv 2301.13018. Differs from the authors' code: the average is of the
    variance, not of its root, and has the batch in it before it is predicted.
    """

    def __init__(
        self,
        method: TTAMethod,
        *,
        momentum: float = 0.05,
        start: Literal["source", "batch"] = "source",
        rmax: float | None = None,
        dmax: float | None = None,
    ) -> None:
        if rmax is not None:
            check_range("rmax", rmax, 1)
        if dmax is not None:
            check_range("dmax", dmax, 0)
        super().__init__(method, momentum=momentum, start=start)
        self.rmax, self.dmax = rmax, dmax
        self._batch: tuple[Tensor, Tensor] | None = None  # of the layer that runs now

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The average with this input in it; with bounds, what gives the same as r and d within them."""
        batch, eps = torch.stack(batch_moments(x)).to(old), self.eps[name]
        self._batch = batch[0], batch[1]
        new = self.moved(method, name, batch, old)
        if self.rmax is None and self.dmax is None:
            return new, new
        deviation, average = (batch[1] + eps).sqrt(), (new[1] + eps).sqrt()
        ratio, shift = deviation / average, (batch[0] - new[0]) / average
        if self.rmax is not None:
            ratio = ratio.clamp(1 / self.rmax, self.rmax)
        if self.dmax is not None:
            shift = shift.clamp(-self.dmax, self.dmax)
        scale = deviation / ratio
        return torch.stack([batch[0] - shift * scale, scale * scale - eps]), new

    def enter(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """With gradient through the batch's moments."""
        assert self._batch is not None
        batch, self._batch = self._batch, None
        return through_moments(x, *batch, self.eps[name])


class Mixed(StreamAverage):
    """A mixture of the source's statistics with those of the batch.

    ``mean = w * source + (1 - w) * batch``, variance likewise. Over the stream, for ``predict`` and ``export``, the
    batch's part is an average as of :class:`~lightning_tta.methods.base.account.StreamAccount`.

    Args:
        method: Whose net it is.
        source_weight: w, in [0, 1].
        cross_term: Whether the variance is that of a population of which a share w has the source's statistics:
            ``+ w (1 - w) (mean_source - mean_batch)^2``.

    Source: Schneider et al., arXiv 2006.16971, without the cross term, with w = N / (N + n) for batches of n images.
    """

    small_batch = 4

    def __init__(self, method: TTAMethod, *, source_weight: float = 0.7, cross_term: bool = False) -> None:
        check_range("source_weight", source_weight, 0, 1)
        super().__init__(method)
        self.source_weight, self.cross_term = source_weight, cross_term
        self.advice = f"mixes the statistics of each batch, {1 - source_weight:.0%}, into those of the source"

    def _mixture(self, method: State, place: slice, rows: Tensor) -> Tensor:
        source = method.source_value(MOMENTS)[:, place]
        weight = 1 - self.source_weight
        return merged_moments(source, rows, weight) if self.cross_term else torch.lerp(source, rows, weight)

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture; to note, the batch's part."""
        batch = torch.stack(batch_moments(x)).to(old)
        return self._mixture(method, self.places[name], batch), batch

    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """The mixture with the average over the stream; empty if nothing was seen."""
        if not bool(method.value(IMAGES) > 0):
            return {}
        return self.split(self._mixture(method, slice(None), method.value(MOMENTS)), model)


class Median(StreamAverage):
    """The batch's median in the place of its mean, and the mean squared distance from it for the variance: MedBN.

    A few images made to shift the mean of a batch, which would spoil the others, hardly shift its median. Of an even
    number of values the lower one in the middle. Gradients go through the variance, not through the median. Over the
    stream, for ``predict`` and ``export``, both are an average as of
    :class:`~lightning_tta.methods.base.account.StreamAccount`. A median costs a sort of each channel, and cannot be
    summed over processes.

    Args:
        method: Whose net it is.

    Source: Park et al., MedBN, CVPR 2024, arXiv 2403.19326. Differs from it: no gradient through the median.
    """

    synchronized = False
    small_batch = 8
    advice = "normalises BatchNorm layers with medians of each batch: of fewer than about 8 images they are noise"

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The median, and the mean squared distance from it."""
        values = at_least_float32(x).transpose(0, 1).flatten(1)
        if x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
            median = values.sort(1).values[:, (values.shape[1] - 1) // 2]  # that of CUDA may differ in which it takes
        else:
            median = values.median(1).values
        rows = torch.stack([median, (values - median[:, None]).square().mean(1)]).to(old)
        return rows, rows

    def enter(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """With gradient through the variance."""
        return through_moments(x, rows[0], rows[1], self.eps[name], through_mean=False)


class Instance(StreamStatistics):
    """The source's statistics, moved towards those of an image where these are farther off than chance: NOTE's IABN.

    With M, V of the source, m_i, v_i (unbiased) those of image i over its n pixels, and
    ``shrink(x, l) = sign(x) max(|x| - l, 0)``::

        mean = M + shrink(m_i - M, k sqrt((V + eps) / n))
        var  = max(V + shrink(v_i - V, k (V + eps) sqrt(2 / (n - 1))), 0)

    **The source net must have been trained with such layers.** In a net trained with plain BatchNorm they take away
    what tells images apart, and cost accuracy on clean images already: look at it first. Images do not depend on each
    other. A layer with one value per channel and image keeps M and V. Without gradient through the statistics.

    Args:
        method: Whose net it is.
        k: >= 0; authors 4. The larger, the nearer to plain BatchNorm.
        momentum: Of an average over the stream, as of :class:`EMA`, in the place of M and V, in [0, 1]; it counts from
            the next batch. 0: the source's. Authors 0.01, over a memory that is balanced by class.

    Source: Gong et al., NOTE, NeurIPS 2022, arXiv 2208.05117. Differs from the authors' code: no gradient through an
    image's statistics.
    """

    images_apart = False
    no_plain_net = "its BatchNorm layers take the statistics of each image (statistics='instance'). Use another kind"

    def __init__(self, method: TTAMethod, *, k: float = 4.0, momentum: float = 0.0) -> None:
        check_range("k", k, 0)
        check_range("momentum", momentum, 0, 1)
        super().__init__(method)
        self.k, self.momentum = k, momentum
        warnings.warn(
            "statistics='instance' is for nets whose BatchNorm layers were instance-aware (IABN) in training already; "
            "any other net loses accuracy by it, on clean images too. Use 'ema' or 'balanced' for such a net.",
            stacklevel=2,
        )

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics of each image; to note, the average over the stream."""
        new = torch.lerp(old, torch.stack(batch_moments(x)).to(old), self.momentum) if self.momentum else old
        return instance_aware(x, old, self.eps[name], self.k), new

    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """None are the same for all images."""
        return None


def instance_aware(x: Tensor, rows: Tensor, eps: float, k: float) -> Tensor:
    """Mean and variance (2, B, C) of each image of x (B, C, ...), as :class:`Instance` has them around ``rows`` (2, C).

    With gradient by both. Of one value per channel and image, ``rows``.
    """
    pixels = x.shape[2:].numel()
    if pixels == 1:
        return rows
    mean, var = instance_moments(x, unbiased=True)
    of_mean = k * ((rows[1] + eps) / pixels).sqrt()
    of_var = k * math.sqrt(2 / (pixels - 1)) * (rows[1] + eps)
    mean = rows[0] + _shrink(mean.to(rows) - rows[0], of_mean)
    var = (rows[1] + _shrink(var.to(rows) - rows[1], of_var)).clamp(min=0)
    return torch.stack([mean, var])


def _shrink(x: Tensor, bound: Tensor) -> Tensor:
    return x - torch.maximum(torch.minimum(x, bound), -bound)


KINDS: dict[str, Callable[..., Account | None]] = {
    "batch": lambda method: StreamAccount(method, method.model),
    "source": lambda method: None,
    "mixed": Mixed,
    "ema": EMA,
    "renormalized": Renormalized,
    "balanced": Balanced,
    "domains": Domains,
    "median": Median,
    "instance": Instance,
    "auto": Auto,
}
"""The kinds, by the word that ``statistics=`` takes."""


def choose(method: TTAMethod, wanted: Wanted) -> None:
    """Run a method's BatchNorm layers with other statistics than its own.

    Args:
        method: Before its first batch. A net without BatchNorm is left as it is.
        wanted: One of :data:`KINDS`, or a dict of ``kind`` and the options of its class.

    Raises:
        ConfigError: If the kind or an option is unknown or out of range, or the method chooses statistics itself.
        UnsupportedModelError: If a layer keeps no source statistics and the kind needs them.
    """
    kind, options = read(wanted, "statistics", KINDS)
    if not batch_norm_layers(method.model):
        if kind != "auto":
            warnings.warn(
                f"statistics={kind!r} has no effect: {type(method.model).__name__} has no BatchNorm layer. Leave it "
                "out.",
                stacklevel=2,
            )
        return
    if method.own_statistics:
        raise ConfigError(
            f"statistics={kind!r} and method '{method.name}' exclude each other: {method.own_statistics}. Leave one of "
            "the two out."
        )
    method.leave_statistics()
    account = KINDS[kind](method, **options)
    if account is not None and method.images_apart and not account.images_apart:
        raise ConfigError(
            f"statistics={kind!r} and method '{method.name}' exclude each other: the method treats each image of a "
            "batch on its own, and holds the statistics fixed meanwhile. Use statistics='ema', 'balanced' or 'source'."
        )
    method.take_up(account)
