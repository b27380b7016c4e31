"""BatchNorm statistics for streams of which nothing is known: ``statistics="auto"``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tta import collective
from lightning_tta.errors import check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.class_statistics import ClassStatistics
from lightning_tta.methods.components.stream_statistics import MOMENTS

SUMS, COUNTS = "statistics.sums", "statistics.counts"


class Batch(NamedTuple):
    """What is the same in all layers of a batch.

    Attributes:
        counts: n_k with the batch, (G,).
        same: What remains of what was seen before, 0-dimensional, in [0, 1].
        trust: See :meth:`Auto.trust`.
        seen: W.
    """

    counts: Tensor
    same: Tensor
    trust: Tensor
    seen: Tensor


class Auto(ClassStatistics):
    """The source's statistics, moved towards those of the stream by as much as the stream has shown of its classes.

    A first pass with what is stored gives the pseudo-labels of the batch. Of each class k, each layer keeps sums over
    its n_k images: of an image's mean over its pixels, and of its mean square. With the batch in the sums, and W the
    number of classes that have been seen well::

        w_k = n_k / (n_k + r)    W = sum_k w_k
        M = sum_k w_k mean_k / W    V = sum_k w_k square_k / W - M^2
        d = mean over channels of min(|ln (V + eps) / (var_source + eps)|, 2)
        alpha = alpha_max W^2 / (W^2 + s^2) d^8 / (d^8 + t^8)
        mean = (1 - alpha) mean_source + alpha M
        var = (1 - alpha) var_source + alpha V + alpha (1 - alpha) (M - mean_source)^2

    So a class counts once, however often it comes; one class alone hardly moves anything; and a layer whose variances
    are those of the source stays at the source, as on clean images, of which M and V would be noise. The batch itself
    is normalised with these statistics only as far as it is as diverse as the stream: with q_k the shares of the
    classes in the batch of B images, and c the chance that two images of the stream have the same class::

        e = c + (1 - c) / B    trust = min(1, e / sum_k q_k^2)^2
        used = before + trust (after - before)

    Stored, and used by ``predict`` and ``export``, is ``after``. Of a class, what exceeds ``horizon`` / G images fades.
    And all of it fades where the images change: with v the change of log variance, as d, between the batch in the first
    pass and what is remembered, a mean over the first quarter of the layers, all n_k and sums are multiplied by
    ``1 / (1 + (v / u)^8)``, ``u = least_change (1 + 2 / sqrt(B))``, before the batch is taken in.

    State: 2 G C floats of sums, G numbers of images and 2 C statistics; C are the channels of all layers, G the number
    of classes, or of groups of them as of :class:`~lightning_tta.methods.components.class_statistics.Balanced`: 0.4 MB
    for a ResNet-18 and 10 classes. Passes per batch and step: one more forward pass. A batch that gives values that
    are not finite changes nothing. Several processes can adapt as one.

    Args:
        method: Whose net it is.
        images: r, images after which a class has half of its weight, > 0.
        classes_needed: s, well-seen classes at which alpha is half of its limit, > 0; ``None``: 8, or 0.8 G where that
            is less, so that alpha can reach 0.49 also with few classes.
        limit: alpha_max, the most that the stream counts, in [0, 1]; 0: the source's statistics.
        least_shift: t, the mean change of a layer's log variances at which alpha is halved, > 0.
        least_change: At batches of many images, the mean change of log variances at which what is remembered counts
            half, > 0; ``None``: it never fades for that.
        horizon: Images of all classes together that are remembered, >= 1; but ``images`` of each at least.
        groups: G, at most K; ``None``: as many as ``max_bytes`` allows.
        max_bytes: Bound of the sums, in bytes, >= 1.
        classes: K, where the net does not end in a linear layer.

    Raises:
        ConfigError: If a value is out of range, or ``groups`` exceeds the number of classes.
        UnsupportedModelError: If the number of classes is not known.

    Evidence: error in %, ResNet-20 on CIFAR-10 images (JPEG), ImageNet-C functions at severity 1, gaussian_noise,
    contrast and jpeg_compression, 2,000 images each, reset by domain, one order; correlated (Dirichlet 0.01), shuffled.
    Batches of 200: source 53.0, 53.0; batch statistics 75.9, 36.3; ``ema`` 39.9, 36.7; ``balanced`` 39.1, 36.5;
    ``auto`` 35.8, 33.5. Of 16: batch statistics 83.9, 39.1; ``balanced`` 37.9, 37.1; ``auto`` 37.3, 33.6. The constants
    were chosen on such streams, of these and three other corruptions; ``least_shift`` on clean images of 1,000 classes.

    Not the best: where the pseudo-labels are mostly wrong, for then classes are counted that are not there; where a
    shift moves means and no variances, of which d sees nothing; in the first batches after a reset, where it is still
    near the source; where a second pass cannot be paid (``ema``); where several domains are in one batch, which no one
    set of statistics fits.

    Own work, without a paper. It builds on TRIBE (Su et al., AAAI 2024, arXiv 2309.14949), from which the statistics
    by class are, and on Schneider et al. (NeurIPS 2020, arXiv 2006.16971), who mix the source's with those of a batch.
    """

    float32 = (MOMENTS, SUMS, COUNTS)

    def __init__(
        self,
        method: TTAMethod,
        *,
        images: float = 5.0,
        classes_needed: float | None = None,
        limit: float = 0.8,
        least_shift: float = 0.18,
        least_change: float | None = 0.4,
        horizon: int = 1000,
        groups: int | None = None,
        max_bytes: int = 2**26,
        classes: int | None = None,
    ) -> None:
        check_range("images", images, 0, low_open=True)
        check_range("limit", limit, 0, 1)
        check_range("least_shift", least_shift, 0, low_open=True)
        check_range("horizon", horizon, 1, integer=True)
        if least_change is not None:
            check_range("least_change", least_change, 0, low_open=True)
        super().__init__(method, groups=groups, max_bytes=max_bytes, classes=classes)
        self.classes_needed = min(8.0, 0.8 * self.groups) if classes_needed is None else classes_needed
        check_range("classes_needed", self.classes_needed, 0, low_open=True)
        self.images, self.limit, self.least_shift, self.horizon = images, limit, least_shift, horizon
        moments = method.value(MOMENTS)
        method.state(SUMS, moments.new_zeros(2, self.groups, moments.shape[1]), source=0.0)
        method.state(COUNTS, moments.new_zeros(self.groups), source=0.0)
        self.least_change = least_change
        early = list(self.places.values())[: max(1, len(self.places) // 4)]
        self._early, self._eps = early[-1].stop, next(iter(self.eps.values()))
        self._changes: list[Tensor] | None = None  # in the first pass: of each early layer
        self.batch: Batch | None = None  # while it is in the method's hands
        self._runs: dict[str, int] = {}

    def look(self, method: State, x: Tensor) -> None:
        """Label the batch, and see whether it is of the domain that is remembered."""
        self._changes = None if self.least_change is None else []
        try:
            super().look(method, x)
            changes = self._changes
        finally:
            self._changes = None
        assert self.cells is not None
        with torch.no_grad():
            before = method.value(COUNTS)
            own = torch.zeros_like(before).index_add(0, self.cells, torch.ones_like(self.cells, dtype=before.dtype))
            same = torch.ones_like(before[0])
            if changes and self.least_change is not None:
                bound = self.least_change * (1 + 2 / math.sqrt(len(self.cells)))
                faded = 1 / (1 + (torch.stack(changes).mean() / bound) ** 8)
                same = torch.where(faded.isfinite() & (before.sum() > 0), faded, same)
            counts = before * same + own
            batch = Batch(counts, same, self.trust(own, counts), (counts / (counts + self.images)).sum())
            self.batch = Batch(*(self.keep(method, f"batch.{n}", value) for n, value in enumerate(batch)))

    def change(self, method: State, place: slice, means: Tensor, squares: Tensor) -> Tensor:
        """How the variances of a layer's input differ from those remembered, 0-dimensional; of samples (N, C)."""
        sums = method.value(SUMS)[:, :, place].sum(1) / method.value(COUNTS).sum().clamp_min(1e-12)
        pairs = (collective.mean(means), collective.mean(squares)), sums
        batch, before = ((square - mean * mean).clamp_min(0) + self._eps for mean, square in pairs)
        return (batch / before).log().abs().clamp(max=2).mean()

    def drop(self, where: Tensor | None = None) -> None:
        """Forget what was noted; at the end of a batch, also what was seen of it."""
        super().drop(where)
        if where is None:
            self.batch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "batch": None}

    def begin(self, method: State) -> None:
        """Note the coming pass."""
        super().begin(method)
        self._runs = {}

    def stored(self, method: State, name: str) -> Tensor:
        """Rows (2 N + 2, C): what each image of the batch adds to the sums of its class, and the statistics."""
        moments = super().stored(method, name)
        if self.cells is None:
            return moments
        return torch.cat([moments.new_zeros(2 * len(self.cells), moments.shape[1]), moments])

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics with this input in the sums; of a layer that runs again, the mean of what its runs add."""
        place = self.places[name]
        before, source = method.value(MOMENTS)[:, place], method.source_value(MOMENTS)[:, place]
        mean, var, times = self.moments(x, before)
        if self.cells is None and self._changes is not None and place.stop <= self._early:
            self._changes.append(self.change(method, place, mean, torch.addcmul(var, mean, mean)))
        if self.cells is None or self.batch is None or not times:
            return before, old
        added = torch.stack([mean, torch.addcmul(var, mean, mean)])
        if times > 1:  # views of the batch one after the other
            added = added.view(2, times, len(self.cells), -1).mean(1)
        added, run = added.flatten(0, 1), self._runs.get(name, 0)
        if self._is_on:
            self._runs[name] = run + 1
            added = added if run == 0 else (run * old[:-2] + added) / (run + 1)
        weights = 1 / (self.batch.counts + self.images)
        sums = torch.einsum("g,pgc->pc", weights, method.value(SUMS)[:, :, place]) * self.batch.same
        sums = sums + torch.einsum("n,pnc->pc", weights[self.cells], added.view(2, len(self.cells), -1))
        rows = self.shrunk(sums, self.batch.seen, source, self.eps[name])
        return torch.lerp(before, rows, self.batch.trust), torch.cat([added, rows])

    @staticmethod
    def trust(own: Tensor, counts: Tensor) -> Tensor:
        """How far a batch is normalised with its own share in the statistics, 0-dimensional, in [0, 1].

        Args:
            own: Images of each class in the batch, (G,).
            counts: And in all, with it.
        """
        batch, total = own.sum(), counts.sum()
        same = ((counts.square().sum() / total - 1) / (total - 1).clamp_min(1)).clamp(0, 1)
        expected = same + (1 - same) / batch
        return (expected / (own / batch).square().sum()).clamp(max=1) ** 2

    def shrunk(self, sums: Tensor, seen: Tensor, source: Tensor, eps: float) -> Tensor:
        """The statistics, (2, C).

        Args:
            sums: Of means and mean squares, each image divided by the images of its class and r, (2, C).
            seen: W, 0-dimensional.
            source: The source's statistics (2, C).
            eps: What the layer adds to a variance.
        """
        mean, square = sums / seen.clamp_min(1e-12)
        var, distance = (square - mean * mean).clamp_min(0), mean - source[0]
        shift = ((var + eps) / (source[1] + eps)).log().abs().clamp(max=2).mean() / self.least_shift
        alpha = self.limit * seen**2 / (seen**2 + self.classes_needed**2) * (shift**8 / (shift**8 + 1))
        rows = torch.lerp(source, torch.stack([mean, var]), alpha)
        rows[1].addcmul_(distance, distance * (alpha - alpha * alpha))
        return rows

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Write sums and numbers; what exceeds the horizon of a class fades. Classes without an image stay."""
        if self.cells is None or self.batch is None:
            return
        added, rows = seen[0][:-2].view(2, len(self.cells), -1), seen[0][-2:]
        counts, table = self.batch.counts, method.value(SUMS)
        table.mul_(torch.where(good, self.batch.same, 1))
        room = max(self.horizon / self.groups, self.images)
        kept = torch.clamp(room / counts.clamp_min(1), max=1)
        table.index_add_(1, self.cells, torch.where(good, added, 0))
        faded = table[:, self.cells] * torch.where(good, kept[self.cells], 1)[:, None]
        table.index_copy_(1, self.cells, faded)  # the same for all images of a class
        method.write(COUNTS, counts * kept, good)
        method.write(MOMENTS, rows, good)
