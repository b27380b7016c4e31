"""Blocks whose outputs get the mean and covariance that they have on the source: what is kept of them, and the map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones.blocks import Tokens, changed_blocks, find_blocks
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError, check_names, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.roots import inverse_root, root
from lightning_tta.methods.components.source_images import see_source_images

RIDGE, LEAST_WEIGHT, FOLLOW = 1e-5, 1e-3, 0.2
"""Added to the variances; weight up to which a block is left alone; rate of the average of the drift."""
NONE_YET = -1.0  # of this average, which is never negative


class AlignmentMethod(TTAMethod):
    """Moves what blocks return by maps X -> X + w (Y - X), Y = (X - m_t) S_t^(-1/2) S_s^(1/2) + m_s; no gradients.

    To write one: write the blocks' weights w, state ``weights``, and let :meth:`follow` or :meth:`align` change the
    vectors of each block in a pass.

    Args:
        model: Any classifier with two blocks or more.
        tokens: Of transformers: ``cls``, ``all``, or ``auto``: the class token where the head reads nothing else.
        momentum: Of the statistics, in (0, 1]. Authors: 0.02 at batch size 64.
        drift_threshold: >= 0; ``None``: never. Authors: 4.
        group_size: Channels of different groups count as uncorrelated. Groups have the size of the largest divisor of D
            that is no larger than this. Authors: 768.
        source_images: At most so many images are taken by :meth:`prepare`. Authors: 10,000 of ImageNet.
        blocks: Names of the modules to take instead; they run one after the other.
    """

    needs_source = True

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: Tokens = "auto",
        momentum: float = 0.02,
        drift_threshold: float | None = 4.0,
        group_size: int = 768,
        source_images: int = 10_000,
        blocks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model)
        check_range("momentum", momentum, 0, 1, low_open=True)
        check_range("group_size", group_size, 1, integer=True)
        check_range("source_images", source_images, 2, integer=True)
        if drift_threshold is not None:
            check_range("drift_threshold", drift_threshold, 0)
        self.momentum, self.drift_threshold = momentum, drift_threshold
        self.group_size, self.source_images = group_size, source_images
        check_names("blocks", blocks)
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
            found = f"{count} vectors{', not all finite' if count > 1 else ''}"
            raise DataError(
                f"{type(self).__name__} needs finite features of two source images or more; block "
                f"'{self.blocks[number].name}' gave {found}. Give batches {{'image': (B, C, H, W) in [0, 1]}} of the "
                "training set, or use method 't3a', which needs none."
            )
        return mean, covariance + RIDGE * torch.eye(covariance.shape[-1], dtype=mean.dtype, device=mean.device)

    def follow(self, number: int, vectors: Tensor, whole: Tensor, replaced: list[Tensor]) -> Tensor:
        """Take a block's vectors (M, D) into its statistics, if the batch is whole, and align them."""
        with torch.autocast(vectors.device.type, enabled=False):
            mean, centered = self.centered(number, vectors)
            groups = self._grouped(number, centered)
            count = torch.ones_like(centered[:, 0]).sum().view(1)  # no number of the host, which a program would fix
            covariance = collective.mean((groups.mT @ groups / count)[None], count)
            covariance = covariance + RIDGE * self.source_value(f"covariance.{number}").to(covariance)
            old_mean, old_covariance = self.wide(f"mean.{number}"), self.wide(f"covariance.{number}")
            started, averages = self.value("started") > 0, self.wide("drift")
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
                new = inverse_root(self.wide(f"covariance.{number}")) @ self._source_root(number)
                self.write(f"map.{number}", new, taken)
        return self.align(number, vectors)

    def align(self, number: int, vectors: Tensor) -> Tensor:
        """A block's vectors (M, D), moved towards the source by its weight, if it has statistics."""
        with torch.autocast(vectors.device.type, enabled=False):
            mean = self.wide(f"mean.{number}")
            x = vectors.to(mean)
            shifted = self._grouped(number, x - mean) @ self.wide(f"map.{number}")
            aligned = shifted.transpose(0, 1).flatten(1) + self.source_mean(number)
            weight = self.wide("weights")[number]
            counts = (weight > LEAST_WEIGHT) & (self.value("started")[number] > 0)
            return torch.where(counts, torch.lerp(x, aligned, weight), x)

    def source_variance(self, number: int) -> Tensor:
        """The variances (D,) that a block's vectors have on the source."""
        return self._source_root(number).square().sum(-1).flatten()  # the root is symmetric

    def centered(self, number: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The mean (D,) of all vectors, and the vectors (M, D) less it, in the precision of the state."""
        vectors = vectors.to(self.wide(f"mean.{number}"))
        mean = collective.mean(vectors)
        return mean, vectors - mean

    def _grouped(self, number: int, vectors: Tensor) -> Tensor:
        """Vectors (M, D) in groups of channels (D / S, M, S)."""
        size = self.value(f"map.{number}").shape[-1]
        return vectors.view(vectors.shape[0], -1, size).transpose(0, 1)

    def wide(self, name: str) -> Tensor:
        """A state in float32 at least."""
        return at_least_float32(self.value(name))

    def source_mean(self, number: int) -> Tensor:
        """The mean (D,) that a block's vectors have on the source."""
        return at_least_float32(self.get_buffer(f"source_mean_{number}"))

    def _source_root(self, number: int) -> Tensor:
        return at_least_float32(self.get_buffer(f"source_root_{number}"))
