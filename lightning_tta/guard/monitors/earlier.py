"""A few earlier images of a stream: does the method still predict other classes for them, where its source does?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tta.errors import check_range
from lightning_tta.metrics import class_counts

PER_BATCH = 2
"""So many images of each batch are kept, its first and the one in its middle."""
LEAST = 8
"""Earlier images that the source gives to other classes: of fewer nothing is said."""


class EarlierImages:
    """The latest images of a stream, two of each batch, with the class that the source predicts.

    A stream that is sorted by class shows one class alone, and the share of a class in it says little where the source
    is no measure: a source that is nearly lost may spread one class over several. But what has collapsed predicts its
    class for whatever it is shown. So :meth:`gains` shows the method earlier images, which are of other classes, once
    more. Without draws: the same stream gives the same images.

    Args:
        batches: How many batches back images are kept, at least 0.

    Raises:
        ConfigError: If it is out of range.
    """

    def __init__(self, batches: int) -> None:
        check_range("batches", batches, 0, integer=True)
        self._kept: deque[tuple[Tensor, int]] = deque(maxlen=PER_BATCH * batches)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, images: Tensor, source: Tensor) -> None:
        """Take in two images of a batch (B, C, H, W), B >= 1, in [0, 1], and the source's logits (B, K) of them."""
        if not self._kept.maxlen:
            return
        if self._kept and self._kept[0][0].shape != images.shape[1:]:
            self._kept.clear()  # they are shown to the net together
        places = sorted({0, len(images) // 2})
        self._kept.extend(zip(images[places].half().cpu(), source[places].argmax(-1).tolist(), strict=True))

    @torch.no_grad()
    def gains(
        self, label: int, classes: int, predict: Callable[[Tensor], Tensor], like: Tensor
    ) -> tuple[float, float] | None:
        """How much more the method predicts a class than the source does on the images kept, n of them.

        Args:
            label: The class.
            classes: K, of the net.
            predict: Logits (n, K) of the method as it is now, for images (n, C, H, W); called once, or not at all.
            like: Images (B, C, H, W) of the present batch; their dtype and device are those for the net.

        Returns:
            Share of the class among images that the source gives to another one, in [0, 1]; and the share of the most
            predicted class less that of the source's most predicted class, in (-1, 1). ``None``: the source gives fewer
            than :data:`LEAST` to other classes, or the images of the present batch have another size.
        """
        source = torch.tensor([answer for _, answer in self._kept])
        is_other = source != label
        if int(is_other.sum()) < LEAST or self._kept[0][0].shape != like.shape[1:]:
            return None
        now = predict(torch.stack([image for image, _ in self._kept]).to(like)).argmax(-1).cpu()
        most, usual = (int(class_counts(each, classes).max()) for each in (now, source))
        return float((now[is_other] == label).double().mean()), (most - usual) / len(now)

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """Images (n, C, H, W), float16, on the host, or ``None``; and the source's classes."""
        images = torch.stack([image for image, _ in self._kept]) if self._kept else None
        return {"images": images, "source": [answer for _, answer in self._kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.clear()
        if state["images"] is not None:
            self._kept.extend(zip(state["images"].clone(), state["source"], strict=True))
