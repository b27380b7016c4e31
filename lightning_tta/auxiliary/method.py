"""The base of methods that adapt by an auxiliary of the source's training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal

import torch
from torch import Tensor, nn

from lightning_tta.auxiliary.base import A, find_trained, settle
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError, UnsupportedModelError, check_choice, check_range
from lightning_tta.methods.base.task import with_gradients
from lightning_tta.methods.components.drawing import DrawingMethod
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.source_training import training

Head = Literal["auto", "trained", "prepare"]


class AuxiliaryMethod(DrawingMethod, Generic[A]):
    """Methods that adapt by an auxiliary loss, whose head the net was trained with, or :meth:`prepare` trains.

    A method calls :meth:`take_auxiliary` in its constructor, and :meth:`learn` after that.

    Args:
        model: A classifier.
        head_from: Where the auxiliary's head is from. ``trained``: the source's training; a net without one is refused.
            ``prepare``: trained before the stream on source images, the net as it is. ``auto``: the first where there
            is one, else the second, with a warning.
        head_epochs: How often :meth:`prepare` goes through the source images, >= 1.
        head_lr: Rate of AdamW meanwhile, >= 0.
        seed: Of all random draws.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.
    """

    auxiliary: A
    needs_labels: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        head_from: Head = "auto",
        head_epochs: int = 10,
        head_lr: float = 1e-3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, seed=seed, **options)
        check_choice("head_from", head_from, ("auto", "trained", "prepare"))
        check_range("head_epochs", head_epochs, 1, integer=True)
        check_range("head_lr", head_lr, 0)
        self.head_from, self.head_epochs, self.head_lr = head_from, head_epochs, head_lr

    def take_auxiliary(self, kind: type[A], **options: Any) -> None:
        """Find the head that the net was trained with, or make one that :meth:`prepare` is to train.

        Args:
            kind: Of the auxiliary.
            **options: Of one that is made; a trained one has its own.

        Raises:
            UnsupportedModelError: If there is none and ``head_from="trained"``.
        """
        trained = None if self.head_from == "prepare" else find_trained(self.model, kind)
        if trained is None and self.head_from == "trained":
            raise UnsupportedModelError(f"{self._missing(kind.kind)}; or use head_from='prepare'.")
        self.trains_head = trained is None
        self.auxiliary = settle(kind(self.model, **options), self.model) if trained is None else trained
        self.needs_source, self.prepared = self.trains_head, not self.trains_head

    def _missing(self, kind: str) -> str:
        return (
            f"The net was not trained with the auxiliary {kind!r}, by which '{self.name}' adapts. Train it with "
            f"SourceClassifier(auxiliary={kind!r}) (lightning-tta fit --config configs/digits/source.yaml "
            f"--model.auxiliary {kind}) and load its checkpoint"
        )

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Train the auxiliary's head on source images, if the net brings none; the net stays as it is.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1], and ``label`` (B,) where the loss needs them.

        Raises:
            ConfigError: If the head is trained already.
            DataError: If there is no image, or the head ends in values that are not finite.
        """
        if self.trains_head:
            self.check_not_prepared()
            if self.head_from == "auto":
                warnings.warn(
                    f"{self._missing(self.auxiliary.kind)}. Meanwhile its head is trained alone, on the source images "
                    "that are shown before the stream: a net that was not trained with it adapts less well by it.",
                    stacklevel=2,
                )
            source_batches = list(source_batches) if isinstance(source_batches, Iterator) else source_batches
            with outside_inference_mode():
                self._train_head(source_batches)
        super().prepare(source_batches)

    def _train_head(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        count = 0

        def see(images: Tensor, labels: Tensor | None = None) -> None:
            nonlocal count
            labels = images.new_zeros(len(images), dtype=torch.int64) if labels is None else labels
            key = torch.tensor([self.seed, -1 - count], device=images.device)  # steps of a stream count from 0
            with with_gradients(images, images.dtype) as images:
                loss = self.auxiliary.loss(self.model, images, labels, key)
                if not loss.requires_grad:
                    raise self._no_gradient(loss)
                descend(loss)
            count += 1

        classes = self.split.num_classes if self.needs_labels else None
        with training(self.auxiliary, self.head_lr, self.name) as descend:
            for _ in range(self.head_epochs):
                see_source_images(self, batches, see, classes=classes)
            if not count:
                raise DataError(
                    f"'{self.name}' needs source images; found none. Give batches {{'image': (B, C, H, W) in [0, 1], "
                    "'label': (B,)} of the training set."
                )
        for name, _ in self.auxiliary.named_parameters():
            if f"auxiliary.{name}" in self.adaptable:
                self.renew_source(f"auxiliary.{name}")

    def moving(self) -> list[Tensor]:
        """All that a step changes: what is learned, and the optimizers' moments."""
        return [*self.learned, *(self.value(name) for name in self.rest if name.startswith("optimizers."))]
