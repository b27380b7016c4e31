"""PEA: each block's output gets the mean and covariance that it has on the source; no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones.blocks import changed_blocks
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.alignment import FOLLOW, NONE_YET, RIDGE, AlignmentMethod
from lightning_tta.views.fixed import fixed_views


class PEA(AlignmentMethod):
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
        entropy_threshold: float | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("views", views, 1, 3, integer=True)
        if entropy_threshold is not None:
            check_range("entropy_threshold", entropy_threshold, 0)
        self.views, self.entropy_threshold = views, entropy_threshold
        self.state("entropy", self.value("weights").new_full((), NONE_YET), source=NONE_YET)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Weigh the blocks in one pass, and align them in another one."""
        samples = fixed_views(x, self.views).flatten(0, 1)
        distances: list[Tensor] = [samples.new_zeros(())] * len(self.blocks)

        def measure(number: int, vectors: Tensor) -> None:
            mean, centered = self.centered(number, vectors)
            variance = collective.mean(centered.square()).add(RIDGE)
            shift = self.source_mean(number) - mean
            distances[number] = shift.norm() + (self.source_variance(number) - variance).norm()

        plain = self._pass(samples, measure)
        distance = torch.stack(distances)
        whole = distance.isfinite().all() & _everywhere(plain.isfinite().all())
        spread = distance.amax(0) - distance.amin(0)
        weights = torch.where(spread > 0, (distance - distance.amin(0)) / spread, 0)
        self.write("weights", weights, whole)
        self.count("skipped_steps", ~whole)
        replaced: list[Tensor] = []
        logits = self._mean_over_views(
            self._pass(samples, lambda number, vectors: self.follow(number, vectors, whole, replaced))
        )
        forgot = self._watch_entropy(logits, whole)
        self.note(distance=distance.mean(), drift_resets=torch.stack(replaced).sum(), entropy_reset=forgot)
        return logits

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """One pass, aligned by what the stream has shown so far."""
        samples = fixed_views(x, self.views).flatten(0, 1)
        return self._mean_over_views(self._pass(samples, self.align))

    def _pass(self, samples: Tensor, change: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        with changed_blocks(self.model, self.blocks, change):
            return self.logits(samples)

    def _mean_over_views(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).view(self.views, -1, logits.shape[-1]).mean(0)

    def _watch_entropy(self, logits: Tensor, whole: Tensor) -> Tensor:
        """Follow the mean entropy, and forget all statistics where it jumps."""
        now, average = collective.mean(entropy(logits)), self.wide("entropy")
        whole = whole & now.isfinite()
        jumped = torch.zeros_like(whole)
        if self.entropy_threshold is not None:
            jumped = whole & (average >= 0) & (now > average + self.entropy_threshold)
        self.write("entropy", torch.where(average < 0, now, torch.lerp(average, now, FOLLOW)), whole)
        for name in ("entropy", "drift", "started"):  # what has not started counts for nothing
            self.write(name, self.source_value(name), jumped)
        return jumped


def _everywhere(condition: Tensor) -> Tensor:
    """Whether a condition, 0-dimensional, is true in all processes."""
    return collective.mean(condition.float()[None]) == 1
