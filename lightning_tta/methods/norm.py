"""BatchNorm statistics from the test stream: no loss, no gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta.backbones.norms import batch_moments, batch_norm_layers, batch_statistics, bn_statistics
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.methods.base.description import About
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

    about = About(
        does="BatchNorm statistics of the stream: of the batch, mixed with the source's, or a moving average",
        learns="none",
        passes="1 / 0",
        needs="BatchNorm",
        holds="moving averages",
        suits="shuffled, batches of many classes",
        formula="code and paper",
        paper="arXiv 2006.10963, 2006.16971",
    )

    synchronized = True
    tasks = frozenset({"images", "pixels", "regression"})
    uses_batch_statistics = True

    def __init__(self, model: nn.Module, *, source_weight: float = 0.0, momentum: float | None = None) -> None:
        self.uses_batch_statistics = momentum is None  # else their average is the account of the stream
        super().__init__(model)
        check_range("source_weight", source_weight, 0, 1)
        if momentum is not None:
            check_range("momentum", momentum, 0, 1, low_open=True)
        layers = batch_norm_layers(self.model)
        if not layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no BatchNorm layer, so there are no batch statistics to adapt. For "
                "GroupNorm or LayerNorm nets use 'tent' or 'zerosiam', for quantised nets 't3a' or 'lame', or 'source' "
                "for no adaptation."
            )
        untracked = [name for name, layer in layers.items() if layer.running_mean is None]
        if untracked and (source_weight > 0 or momentum is not None):
            raise UnsupportedModelError(
                f"BatchNorm layer '{untracked[0]}' keeps no running statistics (track_running_stats=False). Use "
                "source_weight=0 and momentum=None, the batch's own statistics."
            )
        self.source_weight, self.momentum = source_weight, momentum
        if source_weight > 0 or momentum is not None:
            self.own_statistics = "source_weight and momentum say which they are"
        self.small_batch = 8 if source_weight == 0 and momentum is None else 0
        self._ema_names: dict[str, str] = {}
        if momentum is not None:
            for number, (name, layer) in enumerate(layers.items()):
                self._ema_names[name] = f"ema_{number}"
                self.register_buffer(f"ema_{number}", _source_moments(layer))
            for ema_name in self._ema_names.values():
                self.state(ema_name, self.get_buffer(ema_name))
        self._updating = False

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Take in the batch's statistics and predict with them."""
        if self.momentum is None:
            return self.infer(x)
        averages = list(self.adaptable.values())
        before = torch.cat([ema.flatten() for ema in averages])
        finite: Tensor | None = None
        self._updating = True
        try:
            logits = self.logits(x)
            now = torch.cat([ema.flatten() for ema in averages])
            finite = now.isfinite().all()
            self.count("skipped_steps", ~finite)
        finally:  # the net overflowed on this batch, or refused it half way
            self._updating = False
            if finite is None or not self.known(finite):
                kept = before if finite is None else torch.where(finite, now, before)
                parts = torch.split(kept, [ema.numel() for ema in averages])
                torch._foreach_copy_(averages, [p.view_as(e) for p, e in zip(parts, averages, strict=True)])
        return logits

    def running(self) -> AbstractContextManager[None]:
        """With the statistics of the batch, mixed with the source's, or with their moving average."""
        if self.momentum is None:
            return batch_statistics(self.model, self.source_weight, record=self.record)
        return bn_statistics(self.model, self._average)

    def stream_statistics(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """The mixture of the source with the account of the stream, or with the moving average."""
        layers = batch_norm_layers(self.model)
        if self.momentum is not None:
            return {name: self._mixture(name, layer) for name, layer in layers.items()}
        stream = super().stream_statistics()
        if not stream or not self.source_weight:
            return stream
        weight = self.source_weight
        mixed = {n: torch.lerp(torch.stack(stream[n]), _source_moments(layer), weight) for n, layer in layers.items()}
        return {name: (mean, var) for name, (mean, var) in mixed.items()}

    def _average(self, name: str, layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        ema = self.get_buffer(self._ema_names[name])
        if self._updating:
            assert self.momentum is not None
            ema.lerp_(torch.stack(batch_moments(x)).to(ema), self.momentum)
        return self._mixture(name, layer)

    def _mixture(self, name: str, layer: _BatchNorm) -> tuple[Tensor, Tensor]:
        ema = self.get_buffer(self._ema_names[name])
        mean, var = torch.lerp(ema, _source_moments(layer), self.source_weight) if self.source_weight else ema
        return mean, var


def _source_moments(layer: _BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.stack([layer.running_mean, layer.running_var])
