"""The statistics with which BatchNorm normalises at test time, for every method: ``statistics=``.

Each kind is a class here. All of them start at the source's statistics, and leave the net's own alone.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta import collective
from lightning_tta.backbones.norms import batch_moments, batch_norm_layers, merged_moments, replaced_forwards
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_range, did_you_mean
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import Account, Statistics, StreamAccount
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State

MOMENTS, IMAGES = "statistics.moments", "statistics.images"


class StreamStatistics(Account):
    """Base of the kinds that give each BatchNorm layer a mean and a variance by a rule.

    To write one: implement :meth:`rule`. State for all layers together is :data:`MOMENTS`, means and variances in rows
    (2, C), the layers one after the other, which is what :meth:`rule` noted in the pass over the batch.

    Without gradient through the statistics. A layer that sees one value per channel, which has no variance, keeps what
    it has.

    Args:
        method: Whose net it is; its state gets more tensors.

    Raises:
        UnsupportedModelError: If a BatchNorm layer keeps no running statistics, where all kinds start.

    Attributes:
        places: Where each layer has its channels in the rows.
    """

    float32 = (MOMENTS,)

    def __init__(self, method: TTAMethod) -> None:
        layers = batch_norm_layers(method.model)
        untracked = [name for name, layer in layers.items() if layer.running_mean is None or layer.running_var is None]
        if untracked:
            raise UnsupportedModelError(
                f"BatchNorm layer '{untracked[0]}' keeps no running statistics (track_running_stats=False), so there "
                "are no source statistics to start from. Use statistics='batch'."
            )
        sizes = [layer.num_features for layer in layers.values()]
        ends = list(itertools.accumulate(sizes))
        self.places = {n: slice(end - size, end) for n, end, size in zip(layers, ends, sizes, strict=True)}
        rows = [[layer.running_mean, layer.running_var] for layer in layers.values()]
        moments = [torch.cat([pair[row] for pair in rows]) for row in (0, 1)]  # type: ignore[misc]  # none is None
        method.state(MOMENTS, at_least_float32(torch.stack(moments).detach()))
        self.noted = None
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] | None = None
        self._is_on = False
        self._seen: dict[str, Tensor] = {}

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer does with an input.

        Args:
            method: Has the state.
            name: The layer's.
            x: Its input (B, C, ...), detached.
            old: Its rows (2, C) in :data:`MOMENTS`; in the pass over the batch, of a layer that runs again, what it
                noted before.

        Returns:
            Mean and variance in rows, (2, C), or (2, B, C) of each sample, to normalise with; and rows (2, C) to note.
        """
        raise NotImplementedError

    def running(self, method: State) -> AbstractContextManager[None]:
        """While active, layers normalise with what :meth:`rule` returns."""
        if self._forwards is None:
            layers = batch_norm_layers(method.get_submodule("model"))
            self._forwards = {layer: self._forward(method, name, layer) for name, layer in layers.items()}
        return replaced_forwards(self._forwards)

    def begin(self, method: State) -> None:
        """Note the coming pass."""
        self._is_on, self._seen = True, {}

    def end(self) -> None:
        """Note no more."""
        self._is_on = False

    @torch.no_grad()
    def note(self, method: State, logits: Tensor) -> None:
        """Keep what the layers noted in a pass that gave these logits; of one that did not run, what it has."""
        stored = method.value(MOMENTS)
        rows = [self._seen.get(name, stored[:, place]) for name, place in self.places.items()]
        seen, self._seen = torch.cat(rows, 1), {}
        self.noted = (seen, torch.isfinite(seen.sum() + logits.sum()))

    @torch.no_grad()
    def take(self, method: State, images: int, skipped: Tensor | int) -> None:
        """Write what was noted, if it is finite and no step was skipped."""
        if self.noted is None:
            return
        (*seen, good), self.noted = self.noted, None
        self.write(method, [torch.as_tensor(each) for each in seen], torch.as_tensor(good) & (skipped == 0), images)

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Write what was noted of a batch of ``images``, where it is ``good``, 0-dimensional, bool."""
        method.write(MOMENTS, seen[0], good)

    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """What is stored."""
        return self.split(method.value(MOMENTS), model)

    def split(self, rows: Tensor, model: nn.Module) -> Statistics:
        """Means and variances of rows (2, C), by layer, as the layer has them."""
        layers = batch_norm_layers(model)
        parts = {name: rows[:, place].to(layers[name].running_mean) for name, place in self.places.items()}
        return {name: (mean, var) for name, (mean, var) in parts.items()}

    def renew(self, method: State, model: nn.Module) -> None:
        """The layers' forwards are other ones now."""
        self._forwards = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": None, "_seen": {}}  # which hold these layers, not those of a copy

    def _forward(self, method: State, name: str, layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
        plain, place = layer.forward, self.places[name]

        def forward(x: Tensor) -> Tensor:
            stored = method.value(MOMENTS)
            old = self._seen.get(name, stored[:, place]) if self._is_on else stored[:, place]
            if x.ndim < 2 or x.shape[1] != layer.num_features:
                return plain(x)  # which refuses it
            with torch.no_grad():
                if x.shape[1:].numel() == x.shape[1] and collective.count(x) == 1:
                    rows = old
                else:
                    rows, new = self.rule(method, name, x.detach(), old)
                    if self._is_on:
                        self._seen[name] = new
            return normalized(layer, plain, x, rows)

        return forward


def normalized(layer: _BatchNorm, plain: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """The output of a BatchNorm layer for an input (B, C, ...) that is normalised with given statistics.

    Args:
        layer: In eval mode.
        plain: Its forward.
        x: The input.
        rows: Mean and variance (2, C); or of each sample, (2, B, C).
    """
    like = x if layer.running_mean is None else layer.running_mean
    mean, var = rows.to(like)
    if mean.ndim == 2:
        shape = (*mean.shape, *[1] * (x.ndim - 2))
        x = ((x - mean.view(shape)) * (var.view(shape) + layer.eps).rsqrt()).to(x.dtype)
        mean, var = torch.zeros_like(mean[0]), torch.full_like(var[0], 1 - layer.eps)
    slot = vars(layer)["_buffers"]  # setattr of a module is slow
    before = slot["running_mean"], slot["running_var"]
    slot["running_mean"], slot["running_var"] = mean, var
    try:
        return plain(x)
    finally:
        slot["running_mean"], slot["running_var"] = before


class EMA(StreamStatistics):
    """An exponential moving average over the stream, which starts at the source's: RoTTA's RobustBN.

    ``mean <- (1 - m) mean + m mean_batch``, variance likewise (biased, no cross term), with the batch in it before it
    is predicted. A correlated or class-sorted batch moves it by its share m only; so it survives where the statistics
    of the batch fail.

    Args:
        method: Whose net it is.
        momentum: m, in (0, 1]; authors 0.05 for batches of 64. A smaller batch wants a smaller one: 0.02 at 16.

    Source: Yuan et al., RoTTA, CVPR 2023, arXiv 2303.13899. Differs from the authors' code: no gradient through the
    batch's share.
    """

    def __init__(self, method: TTAMethod, *, momentum: float = 0.05) -> None:
        check_range("momentum", momentum, 0, 1, low_open=True)
        super().__init__(method)
        self.momentum = momentum

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The average with this input in it."""
        new = torch.lerp(old, torch.stack(batch_moments(x)).to(old), self.momentum)
        return new, new


class Mixed(StreamStatistics):
    """A mixture of the source's statistics with those of the batch.

    ``mean = w * source + (1 - w) * batch``, variance likewise. Over the stream, for ``predict`` and ``export``, the
    batch's part is an average as of :class:`~lightning_tta.methods.base.account.StreamAccount`.

    Args:
        method: Whose net it is.
        source_weight: w, in [0, 1].
        cross_term: Whether the variance is that of a population of which a share w has the source's statistics:
            ``+ w (1 - w) (mean_source - mean_batch)^2``.

    Source: Schneider et al., arXiv 2006.16971, without the cross term, with w = N / (N + n) for batches of n images.
    """

    float32 = (MOMENTS,)
    small_batch = 4
    images_apart = False

    def __init__(self, method: TTAMethod, *, source_weight: float = 0.7, cross_term: bool = False) -> None:
        check_range("source_weight", source_weight, 0, 1)
        super().__init__(method)
        self.source_weight, self.cross_term = source_weight, cross_term
        self.advice = f"mixes the statistics of each batch, {1 - source_weight:.0%}, into those of the source"
        method.state(IMAGES, torch.zeros((), dtype=torch.int64, device=method.value(MOMENTS).device), source=0)

    def _mixture(self, method: State, place: slice, rows: Tensor) -> Tensor:
        source = method.source_value(MOMENTS)[:, place]
        weight = 1 - self.source_weight
        return merged_moments(source, rows, weight) if self.cross_term else torch.lerp(source, rows, weight)

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture; to note, the batch's part."""
        batch = torch.stack(batch_moments(x)).to(old)
        return self._mixture(method, self.places[name], batch), batch

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Take the batch's statistics into the average over the stream."""
        moments, number = method.value(MOMENTS), method.value(IMAGES)
        before = number.clamp(max=StreamAccount.HORIZON).to(moments.dtype)
        method.write(MOMENTS, merged_moments(moments, seen[0], images / (before + images)), good)
        method.write(IMAGES, number + images, good)

    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """The mixture with the average over the stream; empty if nothing was seen."""
        if not bool(method.value(IMAGES) > 0):
            return {}
        return self.split(self._mixture(method, slice(None), method.value(MOMENTS)), model)


KINDS: dict[str, Callable[..., Account | None]] = {
    "batch": lambda method: StreamAccount(method, method.model),
    "source": lambda method: None,
    "mixed": Mixed,
    "ema": EMA,
}
"""The kinds, by the word that ``statistics=`` takes."""


def choose(method: TTAMethod, wanted: str | Mapping[str, Any]) -> None:
    """Run a method's BatchNorm layers with other statistics than its own.

    Args:
        method: Before its first batch. A net without BatchNorm is left as it is.
        wanted: One of :data:`KINDS`, or a dict of ``kind`` and the options of its class.

    Raises:
        ConfigError: If the kind or an option is unknown or out of range, or the method chooses statistics itself.
        UnsupportedModelError: If a layer keeps no source statistics and the kind needs them.
    """
    kind, options = read(wanted, "statistics", KINDS)
    if not batch_norm_layers(method.model):
        return
    if method.own_statistics:
        raise ConfigError(
            f"statistics={kind!r} and method '{method.name}' exclude each other: {method.own_statistics}. Leave one of "
            "the two out."
        )
    method.leave_statistics()
    account = KINDS[kind](method, **options)
    if account is not None and method.images_apart and not account.images_apart:
        raise ConfigError(
            f"statistics={kind!r} are of the images of a batch together, which '{method.name}' treats each on its own. "
            "Use statistics='ema' or 'auto'."
        )
    method.take_up(account)


def read(
    wanted: str | Mapping[str, Any], option: str, kinds: Mapping[str, Callable[..., Any]]
) -> tuple[str, dict[str, Any]]:
    """The kind and its options in a word or a dict.

    Raises:
        ConfigError: With what is allowed.
    """
    if not isinstance(wanted, (str, Mapping)) or not isinstance(
        wanted if isinstance(wanted, str) else wanted.get("kind"), str
    ):
        raise ConfigError(f"{option} must be a word, or a dict with 'kind' and its options; got {wanted!r}.")
    kind = wanted if isinstance(wanted, str) else str(wanted["kind"])
    if kind not in kinds:
        raise ConfigError(f"Unknown {option} {kind!r}.{did_you_mean(kind, kinds)} Available: {', '.join(kinds)}.")
    options = {} if isinstance(wanted, str) else {name: value for name, value in wanted.items() if name != "kind"}
    allowed = [name for name in inspect.signature(kinds[kind]).parameters if name != "method"]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ConfigError(
            f"{option} {kind!r} has no option {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], allowed)} Its "
            f"options: {', '.join(allowed) or 'none'}."
        )
    return kind, options
