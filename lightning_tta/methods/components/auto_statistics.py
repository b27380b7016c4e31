"""BatchNorm statistics for streams of which nothing is known: ``statistics="auto"``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tta.errors import check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.class_statistics import ClassStatistics
from lightning_tta.methods.components.stream_statistics import MOMENTS

SUMS, COUNTS = "statistics.sums", "statistics.counts"


class Auto(ClassStatistics):
    """The source's statistics, moved towards those of the stream by as much as the stream has shown of its classes.

    A first pass with what is stored gives the pseudo-labels of the batch. Of each class k, each layer keeps the number
    n_k of its images, and the sums over them of an image's means and mean squares. With these, W of the G classes have
    been seen well, and the statistics are::

        w_k = n_k / (n_k + r)      W = sum_k w_k      alpha = limit W^2 / (W^2 + s^2)
        M = sum_k w_k mean_k / W   V = sum_k w_k square_k / W - M^2
        mean = (1 - alpha) mean_source + alpha M
        var = (1 - alpha) var_source + alpha V + alpha (1 - alpha) (M - mean_source)^2

    So many images of few classes move them little, and a class that fills the stream weighs no more than others. They
    are what is stored with the batch in them. The batch itself is normalised with ``t`` times these and ``1 - t`` times
    what was stored before it, since a batch of fewer classes than the stream has spoils its own statistics. With c_k
    the number of its B images that are of class k, and N = sum_k n_k::

        q = (sum_k n_k^2 / N - 1) / (N - 1)                        that two images of the stream are of one class
        t = min(1, (q + (1 - q) / B) / sum_k (c_k / B)^2)^2        1: the batch is as mixed as the stream

    Then n_k and the sums of a class fade so that n_k stays at most horizon / G, or r where that is larger.

    State: 2 G C floats of sums, C the channels of all layers together, bounded as of
    :class:`~lightning_tta.methods.components.class_statistics.Balanced`; G numbers; 2 C of the statistics. Passes per
    batch and step: one more forward pass. Without gradient through the statistics. A batch that is not finite leaves
    them alone. Several processes can adapt as one.

    Args:
        method: Whose net it is.
        images: r, > 0: images of a class after which it is half known.
        classes_needed: s, > 0: classes after which the stream has half of its largest weight.
        limit: Largest alpha, in [0, 1]. 0: the source's statistics.
        horizon: Images, >= 1, after which older ones fade.
        groups: G, rows, at most the number of classes; ``None``: as many as ``max_bytes`` allows.
        max_bytes: Bound of the sums.
        classes: Number of classes, where the net does not end in a linear layer.

    Raises:
        ConfigError: If ``groups`` exceeds the number of classes.
        UnsupportedModelError: If the number of classes is not known.

    Source: ours; statistics of each class are of TRIBE (arXiv 2309.14949), the mixture with the source's is as of
    Schneider et al. (arXiv 2006.16971).
    """

    float32 = (MOMENTS, SUMS, COUNTS)

    def __init__(
        self,
        method: TTAMethod,
        *,
        images: float = 5.0,
        classes_needed: float = 8.0,
        limit: float = 0.8,
        horizon: int = 1000,
        groups: int | None = None,
        max_bytes: int = 2**26,
        classes: int | None = None,
    ) -> None:
        check_range("images", images, 0, low_open=True)
        check_range("classes_needed", classes_needed, 0, low_open=True)
        check_range("limit", limit, 0, 1)
        check_range("horizon", horizon, 1, integer=True)
        super().__init__(method, groups=groups, max_bytes=max_bytes, classes=classes)
        self.images, self.classes_needed, self.limit, self.horizon = images, classes_needed, limit, horizon
        moments = method.value(MOMENTS)
        method.state(SUMS, moments.new_zeros(2, self.groups, moments.shape[1]), source=0.0)
        method.state(COUNTS, moments.new_zeros(self.groups), source=0.0)
        self._runs: dict[str, int] = {}

    def begin(self, method: State) -> None:
        """Note the coming pass."""
        super().begin(method)
        self._runs = {}

    def stored(self, method: State, name: str) -> Tensor:
        """Rows (2 G + 2, C): the sums of each class, and the statistics that come of them."""
        moments = super().stored(method, name)
        if self.cells is None:
            return moments
        return torch.cat([method.value(SUMS)[:, :, self.places[name]].flatten(0, 1), moments])

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics with this input in the sums; of a layer that runs again, the mean of what its runs add."""
        place = self.places[name]
        before, source = method.value(MOMENTS)[:, place], method.source_value(MOMENTS)[:, place]
        mean, var, times = self.moments(x, before)
        if self.cells is None or not times:
            return before, old
        added = mean.new_zeros(2, self.groups, mean.shape[1])
        both = torch.stack([mean, torch.addcmul(var, mean, mean)])
        added = added.index_add(1, self.cells.repeat(times), both, alpha=1 / times).flatten(0, 1)
        start, run = self.stored(method, name)[:-2], self._runs.get(name, 0)
        if self._is_on:
            self._runs[name] = run + 1
            added = added if run == 0 else (run * (old[:-2] - start) + added) / (run + 1)
        sums = start + added
        rows = self.shrunk(sums.view(2, self.groups, -1), self.counts(method), source)
        return torch.lerp(before, rows, self.trust(method)), torch.cat([sums, rows])

    def own(self, method: State) -> Tensor:
        """How many images of each class the batch has, (G,)."""
        assert self.cells is not None
        counts = torch.zeros_like(method.value(COUNTS))
        return counts.index_add(0, self.cells, torch.ones_like(counts[:1]).expand(len(self.cells)))

    def counts(self, method: State) -> Tensor:
        """How many there are with this batch, (G,)."""
        return method.value(COUNTS) + self.own(method)

    def trust(self, method: State) -> Tensor:
        """t: how far a batch's own share in the statistics is used for the batch itself, 0-dimensional, in [0, 1]."""
        own, with_it = self.own(method), self.counts(method)
        batch, total = own.sum(), with_it.sum()
        stream = ((with_it.square().sum() / total - 1) / (total - 1).clamp_min(1)).clamp(0, 1)
        expected = stream + (1 - stream) / batch
        return (expected / (own / batch).square().sum()).clamp(max=1) ** 2

    def shrunk(self, sums: Tensor, counts: Tensor, source: Tensor) -> Tensor:
        """Mean and variance (2, C) of sums (2, G, C) over numbers of images (G,), and of the source's (2, C)."""
        weights = 1 / (counts + self.images)
        seen = (counts * weights).sum()
        alpha = self.limit * seen**2 / (seen**2 + self.classes_needed**2)
        mean, square = torch.einsum("g,pgc->pc", weights, sums) / seen.clamp_min(1e-12)
        var, distance = square - mean * mean, mean - source[0]
        rows = torch.lerp(source, torch.stack([mean, var.clamp_min(0)]), alpha)
        rows[1].addcmul_(distance, distance * (alpha - alpha * alpha))
        return rows

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Write sums and numbers; what exceeds the horizon of a class fades."""
        if self.cells is None:
            return
        sums, rows = seen[0][:-2].view(2, self.groups, -1), seen[0][-2:]
        counts = self.counts(method)
        room = self.horizon / self.groups
        kept = torch.clamp(max(room, self.images) / counts.clamp_min(1), max=1)
        method.write(SUMS, sums * kept[:, None], good)
        method.write(COUNTS, counts * kept, good)
        method.write(MOMENTS, rows, good)
