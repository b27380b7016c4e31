"""BatchNorm statistics for streams of which nothing is known: ``statistics="auto"``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tta.errors import check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.class_statistics import BETWEEN, CLASSES, Balanced
from lightning_tta.methods.components.stream_statistics import MOMENTS

SUMS, COUNTS = "statistics.sums", "statistics.counts"


class Auto(Balanced):
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

    State: 2 G C floats of sums, G numbers of images and 2 C statistics; C are the channels of all layers, G the number
    of classes, or of groups of them as of :class:`~lightning_tta.methods.components.class_statistics.Balanced`: 0.4 MB
    for a ResNet-18 and 10 classes. Passes per batch and step: one more forward pass. A batch that gives values that
    are not finite changes nothing. Several processes can adapt as one.

    Args:
        method: Whose net it is.
        images: r, images after which a class has half of its weight, > 0.
        classes_needed: s, well-seen classes at which alpha is half of its limit, > 0. With K classes alpha stays below
            ``limit K^2 / (K^2 + s^2)``: 0.49 for 10 classes, 0.05 for 2, where 0.8 K keeps the 0.49.
        limit: alpha_max, the most that the stream counts, in [0, 1]; 0: the source's statistics.
        least_shift: t, the mean change of a layer's log variances at which alpha is halved, > 0.
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
    ``auto`` 35.9, 33.5. Of 16: batch statistics 83.9, 39.1; ``balanced`` 37.9, 37.1; ``auto`` 37.3, 33.8. The constants
    were chosen on such streams, of these and three other corruptions; other numbers of classes had no part in it.

    Not the best: where the pseudo-labels are mostly wrong, for then classes are counted that are not there; with few
    classes, see ``classes_needed``; where a shift moves means and no variances, of which d sees nothing; in the first
    batches after a reset, where it is still near the source; where a second pass cannot be paid (``ema``); where
    several domains are in one batch, which no one set of statistics fits.

    Own work, without a paper. It builds on TRIBE (Su et al., AAAI 2024, arXiv 2309.14949), from which the statistics
    by class are, and on Schneider et al. (NeurIPS 2020, arXiv 2006.16971), who mix the source's with those of a batch.
    """

    float32 = (MOMENTS, SUMS, COUNTS)

    def __init__(
        self,
        method: TTAMethod,
        *,
        images: float = 5.0,
        classes_needed: float = 8.0,
        limit: float = 0.8,
        least_shift: float = 0.18,
        horizon: int = 1000,
        groups: int | None = None,
        max_bytes: int = 2**26,
        classes: int | None = None,
    ) -> None:
        check_range("images", images, 0, low_open=True)
        check_range("classes_needed", classes_needed, 0, low_open=True)
        check_range("limit", limit, 0, 1)
        check_range("least_shift", least_shift, 0, low_open=True)
        check_range("horizon", horizon, 1, integer=True)
        super().__init__(method, eta=1.0, gamma=0.0, groups=groups, max_bytes=max_bytes, classes=classes)
        method.withdraw(CLASSES, BETWEEN)
        self.images, self.classes_needed, self.limit, self.horizon = images, classes_needed, limit, horizon
        self.least_shift = least_shift
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
        place = self.places[name]
        if self._members is None:
            return method.value(MOMENTS)[:, place]
        return torch.cat([method.value(SUMS)[:, :, place].flatten(0, 1), method.value(MOMENTS)[:, place]])

    def counts(self, method: State) -> Tensor:
        """How many images of each class there are with this batch, (G,)."""
        assert self._members is not None
        counts = method.value(COUNTS)
        return counts.index_add(0, self._members.cells, torch.ones_like(counts[:1]).expand(len(self._members.cells)))

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics with this input in the sums; of a layer that runs again, the mean of what its runs add."""
        (mean, var), members = self.moments(x, self._members)
        if members is None:
            return method.value(MOMENTS)[:, self.places[name]], old
        assert self._members is not None
        share = len(self._members.cells) / len(members.cells)  # of views of the batch one after the other
        groups, width = self.groups, mean.shape[1]
        added = mean.new_zeros(2, groups, width)
        added = added.index_add(1, members.cells, torch.stack([mean, torch.addcmul(var, mean, mean)]), alpha=share)
        added = added.flatten(0, 1)
        run = self._runs.get(name, 0) if self._is_on else 0
        start = self.stored(method, name)[:-2]
        added = added if run == 0 else (run * (old[:-2] - start) + added) / (run + 1)
        if self._is_on:
            self._runs[name] = run + 1
        sums = (start + added).view(2, groups, width)
        source = method.source_value(MOMENTS)[:, self.places[name]]
        rows = self.shrunk(sums, self.counts(method), source, self.eps[name])
        before = method.value(MOMENTS)[:, self.places[name]]
        return torch.lerp(before, rows, self.trust(method)), torch.cat([sums.flatten(0, 1), rows])

    def trust(self, method: State) -> Tensor:
        """How far a batch's own share in the statistics is used for the batch itself, 0-dimensional, in [0, 1]."""
        assert self._members is not None
        with_it = self.counts(method)
        own = torch.zeros_like(with_it).index_add(
            0, self._members.cells, torch.ones_like(with_it[:1]).expand(len(self._members.cells))
        )
        batch, total = own.sum(), with_it.sum()
        stream = ((with_it.square().sum() / total - 1) / (total - 1).clamp_min(1)).clamp(0, 1)
        expected = stream + (1 - stream) / batch
        return (expected / (own / batch).square().sum()).clamp(max=1) ** 2

    def shrunk(self, sums: Tensor, counts: Tensor, source: Tensor, eps: float) -> Tensor:
        """Mean and variance (2, C) of sums (2, G, C) over numbers of images (G,), and of the source's (2, C)."""
        weights = 1 / (counts + self.images)
        seen = (counts * weights).sum()
        alpha = self.limit * seen**2 / (seen**2 + self.classes_needed**2)
        mean, square = torch.einsum("g,pgc->pc", weights, sums) / seen.clamp_min(1e-12)
        var, distance = (square - mean * mean).clamp_min(0), mean - source[0]
        shift = ((var + eps) / (source[1] + eps)).log().abs().clamp(max=2).mean() / self.least_shift
        alpha = alpha * shift**8 / (shift**8 + 1)
        rows = torch.lerp(source, torch.stack([mean, var]), alpha)
        rows[1].addcmul_(distance, distance * (alpha - alpha * alpha))
        return rows

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Write sums and numbers; what exceeds the horizon of a class fades."""
        if self._members is None:
            return
        sums, rows = seen[0][:-2].view(2, self.groups, -1), seen[0][-2:]
        counts = self.counts(method)
        room = self.horizon / self.groups
        kept = torch.clamp(max(room, self.images) / counts.clamp_min(1), max=1)
        method.write(SUMS, sums * kept[:, None], good)
        method.write(COUNTS, counts * kept, good)
        method.write(MOMENTS, rows, good)
