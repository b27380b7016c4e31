"""What methods share that move all features by one vector: the state, the source's mean, prediction and export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from lightning_tta import collective
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.source_images import see_source_images


class ShiftMethod(TTAMethod):
    """Predicts with g(z - offset): features z, last linear layer g. No gradient, one forward pass a batch.

    State: ``shift`` (D,) and ``images``, the number of images in it. In float32 at least, whatever the net's precision.

    To write one: write both states in ``step``, and say in :attr:`offset` what is subtracted.

    Args:
        model: A classifier that ends in one linear layer.
        head: Name of the last linear layer where the search finds another.
    """

    source_mean: Tensor

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        super().__init__(model)
        self.split = HeadSplit(self.model, head)
        self._grid = self._shape = torch.Size(())
        shift = torch.zeros_like(at_least_float32(self.split.head.weight.detach()[0]))
        self.state("shift", shift, source=0)
        self.keep_wide("shift")
        self.state("images", torch.zeros((), dtype=torch.int64, device=shift.device), source=0)

    def expect_source(self, rows: int) -> None:
        """Declare that :meth:`prepare` is needed: for one mean of all features, or one for each predicted class."""
        self.needs_source, self.prepared = True, False
        self.register_buffer("source_mean", self.value("shift").new_zeros(rows, self.split.num_features))

    @property
    def offset(self) -> Tensor:
        """What is subtracted from the features, (D,)."""
        return self.value("shift")

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A pass: features (B, D) in the state's precision, the net's logits, and which images to learn from, (B,).

        Over pixels the rows are those of the features, all of a batch one after the other.

        All, or none where one of them is not finite: the net overflowed.
        """
        features, logits = self.features(x)
        self._grid, self._shape = features.shape[:-1], logits.shape
        if features.ndim > 2:
            features = features.flatten(0, -2)
            logits = self.split.head(features)
        features, logits = features.to(self.value("shift").dtype), at_least_float32(logits)
        finite = torch.isfinite(features).all(1) & torch.isfinite(logits).all(1)
        return features, logits, finite & (collective.mean((~finite).to(features.dtype)) == 0)

    def scores(self, features: Tensor, offset: Tensor) -> Tensor:
        """Logits (B, K) of features (B, D) without ``offset``; the head's weights are rounded no further."""
        head, moved = self.split.head, features - offset
        with torch.autocast(features.device.type, enabled=False):
            if type(head).forward is not nn.Linear.forward:  # a layer of the user's own
                return at_least_float32(head(moved.to(head.weight.dtype)))
            bias = None if head.bias is None else head.bias.to(moved.dtype)
            return linear(moved, head.weight.to(moved.dtype), bias)

    def shaped(self, scores: Tensor) -> Tensor:
        """Logits of the rows (N, K) that were seen, as the net gives its own: of pixels (B, H, W, K)."""
        return scores if len(self._grid) == 1 else self.split.finished(scores.view(*self._grid, -1), self._shape)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """Predict with the shift as it is."""
        return self.shaped(self.scores(self.seen(x)[0], self.offset))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take the mean of the source's features, at the source weights; with several, one for each predicted class.

        A class that is never predicted gets the mean of all.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

        Raises:
            DataError: If there is no image with finite features, or a batch is no such dict.
        """
        if "source_mean" in self._buffers:
            rows, device = len(self.source_mean), self.source_mean.device
            with outside_inference_mode():
                sums, counts = torch.zeros_like(self.source_mean), torch.zeros(rows, 1, device=device)

            def see(images: Tensor) -> None:
                features, logits, finite = self.seen(images)
                members = one_hot(logits.argmax(1), rows) if rows > 1 else torch.ones_like(logits[:, :1])
                members = torch.where(finite[:, None], members, 0).to(features)
                sums.add_(members.T @ torch.where(finite[:, None], features, 0))
                counts.add_(members.sum(0)[:, None])

            see_source_images(self, source_batches, see)
            if not bool(counts.sum() > 0):
                raise DataError(
                    f"{type(self).__name__} needs the mean of source features; found no image with finite features. "
                    "Give batches {'image': (B, C, H, W) in [0, 1]} of the training set."
                )
            means = torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum(0) / counts.sum())
            with outside_inference_mode(), torch.no_grad():
                self.source_mean.copy_(means)
        super().prepare(source_batches)

    @property
    def no_plain_net(self) -> str:  # type: ignore[override]
        """Where the head has no bias of its own, which would take the shift."""
        shift, name = (
            "the shift of the features becomes a part of the last linear layer's bias",
            f"{self.split.name}.bias",
        )
        if self.split.head.bias is None:
            return (
                f"{shift}, and '{self.split.name}' has none. Give it one before adapting: "
                f"model.{name} = torch.nn.Parameter(torch.zeros({self.split.num_classes})); or deploy the method itself"
            )
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if sum(parameter is parameters.get(name) for parameter in parameters.values()) != 1:
            return f"{shift}, and '{name}' is shared, computed or quantised. Deploy the method itself"
        return ""

    @torch.no_grad()
    def stream_weights(self) -> dict[str, Tensor]:
        """The bias of the head with which it gives g(z - offset) for z."""
        return {f"{self.split.name}.bias": self.scores(torch.zeros_like(self.offset)[None], self.offset)[0]}
