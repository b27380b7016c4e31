"""PEA: each block's output gets the mean and covariance that it has on the source; no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones.blocks import Tokens, changed_blocks, find_blocks
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.roots import inverse_root, root
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.views.fixed import fixed_views

RIDGE, LEAST_WEIGHT, FOLLOW = 1e-5, 1e-3, 0.2
"""Added to the variances; weight up to which a block is left alone; rate of the averages of drift and entropy."""
NONE_YET = -1.0  # of these averages, which are never negative


class PEA(TTAMethod):
    """Minimises nothing: moves what each block returns so that its mean and covariance are those of the source.

    With vectors X (M, D) of block l, their mean m and covariance S + 1e-5 I, and those of the source, marked s::

        pass 1, as it is:
            d_l = |m_s - m|_2 + |diag S_s - diag S|_2
            w_l = (d_l - min d) / (max d - min d), or 0 if all are equal
        pass 2, block by block, where w_l > 1e-3:
            m_t <- (1 - momentum) m_t + momentum m,  S_t likewise;   copied from the first batch
            X   <- X + w_l (Y - X),   Y = (X - m_t) S_t^(-1/2) S_s^(1/2) + m_s
        returned: the mean logits of the views, of pass 2

    X in pass 2 is what comes after the blocks before it were moved, and so are m and S. Vectors are the class token of
    each image, all tokens, or the channels at each position of a feature map. A block's statistics start anew with the
    batch where ``mean |m - m_t|`` exceeds ``drift_threshold`` times its average; all are forgotten after a batch whose
    mean entropy exceeds its average by ``entropy_threshold``. Both averages are moving ones, of rate 0.2. A batch with
    features or logits that are not finite is predicted with the statistics there are, and changes none.

    Parameters touched: none; BatchNorm keeps its source statistics. Blocks are found by structure, see
    :func:`~lightning_tta.backbones.blocks.find_blocks`, and seen by forward hooks. No backward pass; two forward
    passes of ``views`` times as many images each, so that a batch costs 2 ``views`` passes of it. ``stats`` has the
    mean distance d, the number of blocks whose statistics were replaced, and whether all were forgotten.
    :meth:`predict` is one such pass, with the weights, statistics and maps of the stream so far, so that images do
    not depend on each other.

    State: of each block S_t and the map S_t^(-1/2) S_s^(1/2), besides S_s^(1/2): 3 D^2 floats, and vectors. With groups
    of G channels it is 3 D G: for ViT-B, 12 blocks of D = 768, 85 MB, or 21 MB with ``group_size=192``.

    The root of S_t is one of an eigendecomposition in float64 on a CPU. Elsewhere, where that would wait for the
    device, it is an iteration of about 40 matrix products in float32, no less exact than a decomposition in
    float32: see :func:`~lightning_tta.methods.components.roots.inverse_root`.

    Args:
        model: Any classifier with two blocks or more: a ViT's blocks, the stages of Swin, ConvNeXt or a ResNet.
        views: 1: the image; 2: and its middle (0.9 of each side), resized; 3: and its mirror image. Authors: 3, and 1
            without augmentation. Where a mirror image is another thing (digits, text), take 1 or 2.
        tokens: Of transformers: ``cls``, ``all``, or ``auto``: the class token where the head reads nothing else.
        momentum: Of the statistics, in (0, 1]. Authors: 0.02 at batch size 64.
        drift_threshold: >= 0; ``None``: never. Authors: 4.
        entropy_threshold: In nats, >= 0; ``None``: never. Authors: 1.0.
        group_size: Channels of different groups count as uncorrelated. Groups have the size of the largest divisor of D
            that is no larger than this. Authors: 768.
        source_images: At most so many images are taken by :meth:`prepare`. Authors: 10,000 of ImageNet.
        blocks: Names of the modules to take instead; they run one after the other.

    Raises:
        UnsupportedModelError: If the net has no two blocks, or no class token for ``tokens="cls"``.

    Source: Progressive embedding alignment, ICLR 2026, openreview 7kLNGaAHaw. Written from its formulas. Where these
    leave it open: the statistics of pass 2 are of the vectors as they arrive there; variances are divided by M; what is
    forgotten includes both averages; the entropy is that of the returned logits.
    """

    about = About(
        does="gives each block's output the source's mean and covariance; for transformers first",
        learns="none",
        passes="2 of all views / 0",
        needs="two blocks; 10,000 source images (fewer will do)",
        holds="3 D x D a block",
        suits="shuffled, long",
        formula="code",
        paper="ICLR 2026, openreview 7kLNGaAHaw",
    )

    needs_source = True
    synchronized = True
    no_plain_net = (
        "it changes what the blocks return, which no weights of the net can. Deploy the method itself, or adapt with "
        "'tent', 'zerosiam' or 'norm'"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        views: int = 3,
        tokens: Tokens = "auto",
        momentum: float = 0.02,
        drift_threshold: float | None = 4.0,
        entropy_threshold: float | None = 1.0,
        group_size: int = 768,
        source_images: int = 10_000,
        blocks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model)
        check_range("views", views, 1, 3, integer=True)
        check_range("momentum", momentum, 0, 1, low_open=True)
        check_range("group_size", group_size, 1, integer=True)
        check_range("source_images", source_images, 2, integer=True)
        for name, threshold in (("drift_threshold", drift_threshold), ("entropy_threshold", entropy_threshold)):
            if threshold is not None:
                check_range(name, threshold, 0)
        self.views, self.momentum, self.group_size, self.source_images = views, momentum, group_size, source_images
        self.drift_threshold, self.entropy_threshold = drift_threshold, entropy_threshold
        self.blocks = find_blocks(self.model, blocks, tokens)
        like = next((p.detach() for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))
        like = at_least_float32(like)
        for number, block in enumerate(self.blocks):
            width = max(size for size in range(1, min(group_size, block.width) + 1) if block.width % size == 0)
            eye = torch.eye(width, dtype=like.dtype, device=like.device)
            whole = eye.repeat(block.width // width, 1, 1)
            self.register_buffer(f"source_mean_{number}", like.new_zeros(block.width))
            self.register_buffer(f"source_root_{number}", whole.clone())
            self.state(f"mean.{number}", like.new_zeros(block.width), source=0.0)
            self.state(f"covariance.{number}", whole.clone(), source=eye)
            self.state(f"map.{number}", whole, source=eye)
        count = len(self.blocks)
        self.state("weights", like.new_zeros(count), source=0.0)
        self.state("drift", like.new_full((count,), NONE_YET), source=NONE_YET)
        self.state("entropy", like.new_full((), NONE_YET), source=NONE_YET)
        self.state("started", like.new_zeros(count), source=0.0)  # 1: the block has statistics

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take mean and covariance of each block from source images, in float64.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

        Raises:
            DataError: If there are no two vectors of a block, or they are not finite.
        """
        sums: list[tuple[Tensor, Tensor]] = [(torch.zeros(1), torch.zeros(1))] * len(self.blocks)
        counts = [0] * len(self.blocks)

        def add(number: int, vectors: Tensor) -> None:
            groups = self._grouped(number, vectors.double())
            counts[number] += len(vectors)
            total, squares = sums[number]
            sums[number] = total.to(groups) + groups.sum(1), squares.to(groups) + groups.mT @ groups

        def see(images: Tensor) -> None:
            with changed_blocks(self.model, self.blocks, add):
                self.logits(images)

        see_source_images(self, source_batches, see, most=self.source_images)
        found = [self._moments_of(number, counts[number], *sums[number]) for number in range(len(self.blocks))]
        with outside_inference_mode(), torch.no_grad():
            for number, (mean, covariance) in enumerate(found):
                self.get_buffer(f"source_mean_{number}").copy_(mean.flatten())
                self.get_buffer(f"source_root_{number}").copy_(root(covariance))
        super().prepare(source_batches)

    def _moments_of(self, number: int, count: int, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of a block's vectors, in groups, from their sums."""
        mean = total / max(count, 1)
        covariance = squares / max(count, 1) - mean[..., None] * mean[..., None, :]
        if count < 2 or not bool(covariance.isfinite().all()):
            raise DataError(
                f"PEA needs finite features of two source images or more; block '{self.blocks[number].name}' gave "
                f"{count} vectors{', not all finite' if count > 1 else ''}. Give batches {{'image': (B, C, H, W) in "
                "[0, 1]} of the training set, or use method 't3a', which needs none."
            )
        return mean, covariance + RIDGE * torch.eye(covariance.shape[-1], dtype=mean.dtype, device=mean.device)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Weigh the blocks in one pass, and align them in another one."""
        samples = fixed_views(x, self.views).flatten(0, 1)
        distances: list[Tensor] = [samples.new_zeros(())] * len(self.blocks)

        def measure(number: int, vectors: Tensor) -> None:
            mean, centered = self._centered(number, vectors)
            variance = collective.mean(centered.square()).add(RIDGE)
            source_variance = self._source_root(number).square().sum(-1).flatten()  # the root is symmetric
            shift = self._source_mean(number) - mean
            distances[number] = shift.norm() + (source_variance - variance).norm()

        plain = self._pass(samples, measure)
        distance = torch.stack(distances)
        whole = distance.isfinite().all() & _everywhere(plain.isfinite().all())
        spread = distance.amax(0) - distance.amin(0)
        weights = torch.where(spread > 0, (distance - distance.amin(0)) / spread, 0)
        self.write("weights", weights, whole)
        self.count("skipped_steps", ~whole)
        replaced: list[Tensor] = []
        logits = self._mean_over_views(
            self._pass(samples, lambda number, vectors: self._follow(number, vectors, whole, replaced))
        )
        forgot = self._watch_entropy(logits, whole)
        self.note(distance=distance.mean(), drift_resets=torch.stack(replaced).sum(), entropy_reset=forgot)
        return logits

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """One pass, aligned by what the stream has shown so far."""
        samples = fixed_views(x, self.views).flatten(0, 1)
        return self._mean_over_views(self._pass(samples, self._align))

    def _pass(self, samples: Tensor, change: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        with changed_blocks(self.model, self.blocks, change):
            return self.logits(samples)

    def _mean_over_views(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).view(self.views, -1, logits.shape[-1]).mean(0)

    def _follow(self, number: int, vectors: Tensor, whole: Tensor, replaced: list[Tensor]) -> Tensor:
        """Take a block's vectors (M, D) into its statistics, if the batch is whole, and align them."""
        with torch.autocast(vectors.device.type, enabled=False):
            mean, centered = self._centered(number, vectors)
            groups = self._grouped(number, centered)
            count = torch.ones_like(centered[:, 0]).sum().view(1)  # no number of the host, which a program would fix
            covariance = collective.mean((groups.mT @ groups / count)[None], count)
            covariance = covariance + RIDGE * self.source_value(f"covariance.{number}").to(covariance)
            old_mean, old_covariance = self._now(f"mean.{number}"), self._now(f"covariance.{number}")
            started, averages = self.value("started") > 0, self._now("drift")
            drift, average, had = (mean - old_mean).abs().mean(), averages[number], started[number]
            jumped = torch.zeros_like(had)
            if self.drift_threshold is not None:
                jumped = had & (average >= 0) & (drift > self.drift_threshold * average)
            follows = had & ~jumped
            taken = whole & (self.value("weights")[number] > LEAST_WEIGHT)
            taken = taken & mean.isfinite().all() & covariance.isfinite().all()
            self.write(f"mean.{number}", torch.where(follows, torch.lerp(old_mean, mean, self.momentum), mean), taken)
            mixed = torch.where(follows, torch.lerp(old_covariance, covariance, self.momentum), covariance)
            self.write(f"covariance.{number}", mixed, taken)
            here = torch.arange(len(self.blocks), device=started.device) == number
            drift = torch.where(average < 0, drift, torch.lerp(average, drift, FOLLOW))
            self.write("drift", torch.where(here & had & taken, drift, averages))
            self.write("started", started | (here & taken))
            replaced.append(jumped & taken)
            if not self.known(~taken):
                new = inverse_root(self._now(f"covariance.{number}")) @ self._source_root(number)
                self.write(f"map.{number}", new, taken)
        return self._align(number, vectors)

    def _align(self, number: int, vectors: Tensor) -> Tensor:
        """A block's vectors (M, D), moved towards the source by its weight, if it has statistics."""
        with torch.autocast(vectors.device.type, enabled=False):
            mean = self._now(f"mean.{number}")
            x = vectors.to(mean)
            shifted = self._grouped(number, x - mean) @ self._now(f"map.{number}")
            aligned = shifted.transpose(0, 1).flatten(1) + self._source_mean(number)
            weight = self._now("weights")[number]
            counts = (weight > LEAST_WEIGHT) & (self.value("started")[number] > 0)
            return torch.where(counts, torch.lerp(x, aligned, weight), x)

    def _watch_entropy(self, logits: Tensor, whole: Tensor) -> Tensor:
        """Follow the mean entropy, and forget all statistics where it jumps."""
        now, average = collective.mean(entropy(logits)), self._now("entropy")
        whole = whole & now.isfinite()
        jumped = torch.zeros_like(whole)
        if self.entropy_threshold is not None:
            jumped = whole & (average >= 0) & (now > average + self.entropy_threshold)
        self.write("entropy", torch.where(average < 0, now, torch.lerp(average, now, FOLLOW)), whole)
        for name in ("entropy", "drift", "started"):  # what has not started counts for nothing
            self.write(name, self.source_value(name), jumped)
        return jumped

    def _centered(self, number: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The mean (D,) of all vectors, and the vectors (M, D) less it, in the precision of the state."""
        vectors = vectors.to(self._now(f"mean.{number}"))
        mean = collective.mean(vectors)
        return mean, vectors - mean

    def _grouped(self, number: int, vectors: Tensor) -> Tensor:
        """Vectors (M, D) in groups of channels (D / S, M, S)."""
        size = self.value(f"map.{number}").shape[-1]
        return vectors.view(vectors.shape[0], -1, size).transpose(0, 1)

    def _now(self, name: str) -> Tensor:
        return at_least_float32(self.value(name))

    def _source_mean(self, number: int) -> Tensor:
        return at_least_float32(self.get_buffer(f"source_mean_{number}"))

    def _source_root(self, number: int) -> Tensor:
        return at_least_float32(self.get_buffer(f"source_root_{number}"))


def _everywhere(condition: Tensor) -> Tensor:
    """Whether a condition, 0-dimensional, is true in all processes."""
    return collective.mean(condition.float()[None]) == 1
