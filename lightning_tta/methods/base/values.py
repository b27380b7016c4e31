"""Images as a method's input where the net does not give one class an image: a class a pixel, or values."""

from __future__ import annotations

from torch import Tensor

from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.task import Images
from lightning_tta.metrics import row_measures


class Pixels(Images):
    """Images in, a class for each pixel out: inside a method logits (B, H, W, K), to the user (B, K, H, W)."""

    kind = "pixels"
    additions = frozenset({"statistics"})

    def logits(self, output: object) -> Tensor:
        """What the wrapped net returns."""
        assert isinstance(output, Tensor)
        return output

    def answer(self, logits: Tensor) -> Tensor:
        """Logits (B, K, H, W), in at least float32."""
        return at_least_float32(logits).movedim(-1, 1)

    def measures(self, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Those of all pixels; logits as in :meth:`answer`."""
        return row_measures(logits.movedim(1, -1), None, 1 << 16)


class Values(Images):
    """Images in, values (B, D) out: a regression, without classes."""

    kind = "regression"
    additions = frozenset({"statistics"})

    def logits(self, output: object) -> Tensor:
        """What the wrapped net returns."""
        assert isinstance(output, Tensor)
        return output

    def measures(self, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Mean and spread of the values: entropies are of classes."""
        values = logits.detach()
        return {"mean_value": values.mean(), "value_spread": (values - values.mean(0)).square().mean().sqrt()}


TASKS: dict[str, type[Images]] = {"pixels": Pixels, "regression": Values}
"""By their words."""
