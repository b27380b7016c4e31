"""A few images of a stream with two predictions: the source's and the adapted one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_tta.backbones.split import as_logits
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.task import float_dtype

BATCHES = 2
SIDE, LINE = 96, 12  # pixels


class StreamPictures:
    """Draws some images of the first batches.

    Args:
        count: How many images of a batch; 0 draws nothing.
    """

    def __init__(self, count: int) -> None:
        self.count, self.left = count, 0

    def begin(self, wanted: bool) -> None:
        """Begin a stream; draw nothing unless somebody wants it."""
        self.left = BATCHES if wanted and self.count else 0

    def draw(
        self, method: TTAMethod, images: Tensor, adapted: Tensor, labels: Tensor, names: Sequence[str] | None
    ) -> NDArray[np.uint8] | None:
        """The next batch's strip (H, W, 3), or ``None`` when enough were drawn.

        Args:
            method: Its net, put back to the source for one pass, says what the source predicts.
            images: (B, C, H, W) in [0, 1], on the method's device.
            adapted: Predictions (B,) of the method.
            labels: (B,), -1 where unknown.
            names: Names of the classes.
        """
        if not self.left:
            return None
        self.left -= 1
        usable = images[: self.count].detach().float().nan_to_num(0, 0, 0).clamp(0, 1)
        source, usable = _source_prediction(method, usable), usable.cpu()

        def name(number: Tensor) -> str:
            k = int(number)
            return "?" if k < 0 else names[k][:10] if names is not None and k < len(names) else str(k)

        strip = Image.new("RGB", (len(usable) * (SIDE + 4), SIDE + 3 * LINE + 2), "white")
        pen = ImageDraw.Draw(strip)
        for place, image in enumerate(usable):
            pixels = (255 * image.expand(3, -1, -1) if len(image) == 1 else 255 * image[:3]).round().byte()
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            left = place * (SIDE + 4)
            strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, 0))
            lines = (("label", labels[place]), ("source", source[place]), ("adapted", adapted[place]))
            for row, (what, number) in enumerate(lines):
                wrong = what != "label" and int(labels[place]) >= 0 and int(number) != int(labels[place])
                text = f"{what} {name(number)}{' (wrong)' if wrong else ''}"
                pen.text((left + 1, SIDE + row * LINE), text, fill="black")
        return np.asarray(strip)


@torch.no_grad()
def _source_prediction(method: TTAMethod, images: Tensor) -> Tensor:
    """What the plain net predicts from its source weights; all that the method has learned or drawn is as before."""
    own_draws = torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])
    with own_draws, method.at_source():
        return as_logits(method.model(images.to(float_dtype(method.model)))).argmax(1).cpu()
