"""BatchNorm statistics from the test stream: no loss, no gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta.backbones.norms import batch_moments, batch_norm_layers, batch_statistics, bn_statistics
from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.methods.base.method import TTAMethod


class Norm(TTAMethod):
    """Minimises nothing: BatchNorm normalises with statistics of the test stream.

    Without ``momentum``: ``mean = w * source + (1 - w) * batch``, variance likewise, ``w = source_weight``. With
    ``w = 0`` these are the batch statistics of training mode. With ``momentum`` m, an exponential moving average that
    starts at the source and includes the current batch: ``ema = (1 - m) * ema + m * batch``; then
    ``mean = w * source + (1 - w) * ema``.

    Parameters touched: none; the layers' own running statistics neither. State: the EMA. Per batch: one forward
    pass. A layer that sees one value per channel keeps its source statistics.

    Args:
        model: A classifier with BatchNorm layers.
        source_weight: Weight on the source statistics, in [0, 1]. Often used: 0.9 at batch size 1; N / (N + 1) for a
            prior of N images.
        momentum: Weight of the new batch in the EMA, in (0, 1]; ``None`` for no memory.

    Raises:
        UnsupportedModelError: If the net has no BatchNorm layer, or one without the source statistics asked for.

    Source: Nado et al., arXiv 2006.10963; Schneider et al., arXiv 2006.16971 (mixing). Differs from them: the mixture
    uses the biased batch variance, so that ``source_weight = 0`` is its exact limit.
    """

    parallel = frozenset({"replicas", "synchronised"})

    def __init__(self, model: nn.Module, *, source_weight: float = 0.0, momentum: float | None = None) -> None:
        super().__init__(model)
        check_range("source_weight", source_weight, 0, 1)
        if momentum is not None:
            check_range("momentum", momentum, 0, 1, low_open=True)
        layers = batch_norm_layers(self.model)
        if not layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no BatchNorm layer, so there are no batch statistics to adapt. For "
                "GroupNorm or LayerNorm nets use 'tent' or 'zerosiam', or 'source' for no adaptation."
            )
        untracked = [name for name, layer in layers.items() if layer.running_mean is None]
        if untracked and (source_weight > 0 or momentum is not None):
            raise UnsupportedModelError(
                f"BatchNorm layer '{untracked[0]}' keeps no running statistics (track_running_stats=False). Use "
                "source_weight=0 and momentum=None, the batch's own statistics."
            )
        self.source_weight = source_weight
        self.momentum = momentum
        self._slots: dict[str, str] = {}
        if momentum is not None:
            for number, (name, layer) in enumerate(layers.items()):
                self._slots[name] = f"ema_{number}"
                assert layer.running_mean is not None
                assert layer.running_var is not None
                self.register_buffer(f"ema_{number}", torch.stack([layer.running_mean, layer.running_var]))
            self.declare({slot: getattr(self, slot) for slot in self._slots.values()}, prefix="")

    @torch.no_grad()
    def adapt(self, images: Tensor) -> Tensor:
        """Take in the batch's statistics and predict with them."""
        if self.momentum is None:
            return self.infer(images)
        kept = {name: ema.clone() for name, ema in self.adaptable.items()}
        whole = False
        try:
            with bn_statistics(self.model, self._update_ema):
                logits = as_logits(self.model(images))
            whole = all(bool(ema.isfinite().all()) for ema in self.adaptable.values())
        finally:
            if not whole:  # the net overflowed on this batch, or refused it half way
                self._counts["skipped_steps"] += 1
                for name, ema in self.adaptable.items():
                    ema.copy_(kept[name])
        return logits

    def infer(self, images: Tensor) -> Tensor:
        """A forward pass with the statistics as they are (EMA), or with this batch's own."""
        if self.momentum is None:
            with batch_statistics(self.model, self.source_weight):
                return as_logits(self.model(images))
        with bn_statistics(self.model, lambda name, layer, x: self._mixed(name, layer)):
            return as_logits(self.model(images))

    def _update_ema(self, name: str, layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        ema = getattr(self, self._slots[name])
        assert self.momentum is not None
        ema.lerp_(torch.stack(batch_moments(x)).to(ema), self.momentum)
        return self._mixed(name, layer)

    def _mixed(self, name: str, layer: _BatchNorm) -> tuple[Tensor, Tensor]:
        ema = getattr(self, self._slots[name])
        assert layer.running_mean is not None
        assert layer.running_var is not None
        source = torch.stack([layer.running_mean, layer.running_var])
        mean, var = torch.lerp(ema, source, self.source_weight)
        return mean, var
