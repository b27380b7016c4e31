"""Labelled source images that a method keeps, and plays again during the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_tta.draws import random_orders
from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import TTAMethod


class ReplayMethod(TTAMethod):
    """Base of methods that play source images again. They are kept in 8 bits, as image files have them.

    A method calls :meth:`make_room` in its constructor and at the start of ``prepare``, :meth:`keep` in ``prepare``,
    and :meth:`replay_loss` in its step. What is kept is saved with the state, and does not change in a stream.
    """

    replayed_images: Tensor
    replayed_labels: Tensor
    _room: int

    def make_room(self, most: int) -> None:
        """Keep no image, and so many at most from here on."""
        self._room = most
        like = next((p for p in self.model.parameters()), torch.zeros(0))
        self.collect("replayed_images", torch.zeros(0, dtype=torch.uint8, device=like.device))
        self.collect("replayed_labels", torch.zeros(0, dtype=torch.int64, device=like.device))

    def keep(self, images: Tensor, labels: Tensor) -> None:
        """Keep the first of images (B, C, H, W) in [0, 1] with labels (B,), as far as there is room.

        Raises:
            DataError: If they are of another size than those before.
        """
        room = self._room - len(self.replayed_labels)
        if room > 0:
            eight_bits = (images[:room].clamp(0, 1) * 255).round().to(torch.uint8)
            before = self.replayed_images if len(self.replayed_labels) else eight_bits[:0]
            if before.shape[1:] != images.shape[1:]:
                raise DataError(
                    f"'{self.name}' plays source images again, in batches, so they must have one size; got "
                    f"{tuple(images.shape[1:])} (C, H, W) after {tuple(before.shape[1:])}. Resize them."
                )
            self.collect("replayed_images", torch.cat([before, eight_bits]))
            self.collect("replayed_labels", torch.cat([self.replayed_labels, labels[:room]]))

    def replayed_batch(self, key: Tensor, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """So many images that are kept, or all there are, each at most once, and their labels; drawn by a key."""
        chosen = random_orders(key, 1, len(self.replayed_labels))[0, :number].to(self.replayed_labels.device)
        return self.replayed_images[chosen].to(dtype) / 255, self.replayed_labels[chosen]

    def replayed_batches(self, seed: int, batches: int, number: int) -> Iterator[Mapping[str, Tensor]]:
        """Batches as those of a data set, each as :meth:`replayed_batch` draws it."""
        for counter in range(batches):
            key = torch.tensor([seed, -1000 - counter])  # steps of a stream count from 0
            image, label = self.replayed_batch(key, number, torch.float32)
            yield {"image": image, "label": label}

    def replay_loss(self, key: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        """Mean cross-entropy with the labels, of a drawn batch."""
        images, labels = self.replayed_batch(key, number, dtype)
        return cross_entropy(at_least_float32(self.logits(images)), labels)
