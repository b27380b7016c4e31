"""The base of the statistics of BatchNorm that follow the stream: a mean and a variance of each layer, by a rule."""

from __future__ import annotations

import itertools
import weakref
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta import collective
from lightning_tta.backbones.norms import batch_norm_layers, merged_moments, moments, replaced_forwards
from lightning_tta.errors import UnsupportedModelError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import Account, Statistics, StreamAccount
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State

MOMENTS, IMAGES = "statistics.moments", "statistics.images"


class StreamStatistics(Account):
    """Base of the kinds that give each BatchNorm layer a mean and a variance by a rule.

    To write one: implement :meth:`rule`. State for all layers together is :data:`MOMENTS`, means and variances in rows
    (2, C), the layers one after the other, which is what :meth:`rule` noted in the pass over the batch. A kind that
    notes other rows overrides :meth:`stored` and :meth:`write`; one with a gradient through its statistics,
    :meth:`enter`.

    Without gradient through the statistics, unless the kind says so. A layer that sees one value per channel, which has
    no variance, keeps what it has.

    Args:
        method: Whose net it is; its state gets more tensors.

    Raises:
        UnsupportedModelError: If a BatchNorm layer keeps no running statistics, where all kinds start.

    Attributes:
        places: Where each layer has its channels in the rows.
        eps: What each layer adds to a variance.
    """

    float32: tuple[str, ...] = (MOMENTS,)

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
        self.eps = {name: layer.eps for name, layer in layers.items()}
        rows = [[layer.running_mean, layer.running_var] for layer in layers.values()]
        stacked = torch.stack([torch.cat([pair[row] for pair in rows]) for row in (0, 1)])  # type: ignore[misc]
        method.state(MOMENTS, at_least_float32(stacked.detach()))
        self.noted = None
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] | None = None
        self._is_on = False
        self._seen: dict[str, Tensor] = {}

    @abstractmethod
    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer does with an input.

        Args:
            method: Has the state.
            name: The layer's.
            x: Its input (B, C, ...), detached.
            old: What :meth:`stored` gives, rows (2, C); in the pass over the batch, of a layer that runs again, what it
                noted before.

        Returns:
            Mean and variance in rows, (2, C), or (2, B, C) of each sample, to normalise with; and rows to note.
        """

    def stored(self, method: State, name: str) -> Tensor:
        """What of the state a layer starts from, (N, C); what :meth:`rule` notes has this shape."""
        return method.value(MOMENTS)[:, self.places[name]]

    def enter(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """The input as it is normalised with ``rows``: the same values, perhaps with another gradient."""
        return x

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

    def seen(self, method: State) -> Tensor:
        """What the layers noted, side by side; of one that did not run, what it has."""
        rows = [self._seen[name] if name in self._seen else self.stored(method, name) for name in self.places]
        self._seen = {}
        return torch.cat(rows, -1)

    @torch.no_grad()
    def note(self, method: State, logits: Tensor) -> None:
        """Keep what the layers noted in a pass that gave these logits."""
        seen = self.seen(method)
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
        reference = weakref.ref(method)  # it holds this; else nets would stay in memory after their methods

        def forward(x: Tensor) -> Tensor:
            method = reference()
            assert method is not None
            if x.ndim < 2 or x.shape[1] != layer.num_features:
                return plain(x)  # which refuses it
            if x.shape[1:].numel() == x.shape[1] and collective.count(x) == 1:
                return normalized(layer, plain, x, method.value(MOMENTS)[:, place])
            with torch.no_grad():
                again = self._is_on and name in self._seen
                old = self._seen[name] if again else self.stored(method, name)
                rows, new = self.rule(method, name, x.detach(), old)
                if self._is_on:
                    self._seen[name] = new
            return normalized(layer, plain, self.enter(name, x, rows), rows)

        return forward


class StreamAverage(StreamStatistics):
    """Base of the kinds whose statistics are of the batch alone: an average of them serves ``predict`` and ``export``.

    It is as of :class:`~lightning_tta.methods.base.account.StreamAccount`.
    """

    images_apart = False

    def __init__(self, method: TTAMethod) -> None:
        super().__init__(method)
        method.state(IMAGES, torch.zeros((), dtype=torch.int64, device=method.value(MOMENTS).device), source=0)

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Take the batch's statistics into the average over the stream."""
        average, number = method.value(MOMENTS), method.value(IMAGES)
        before = number.clamp(max=StreamAccount.HORIZON).to(average.dtype)
        method.write(MOMENTS, merged_moments(average, seen[0], images / (before + images)), good)
        method.write(IMAGES, number + images, good)

    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """The average over the stream; empty if nothing was seen."""
        return super().statistics(method, model) if bool(method.value(IMAGES) > 0) else {}


def normalized(layer: _BatchNorm, plain: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """The output of a BatchNorm layer for an input (B, C, ...) that is normalised with given statistics.

    Args:
        layer: In eval mode.
        plain: Its forward.
        x: The input.
        rows: Mean and variance (2, C); or of each sample, (2, B, C).
    """
    like = x if layer.running_mean is None else layer.running_mean
    if rows.ndim == 3:
        x = _normalized_apart(x, rows[0], rows[1], layer.eps)
        mean, var = like.new_zeros(x.shape[1]), like.new_full((x.shape[1],), 1 - layer.eps)
    else:
        mean, var = rows.to(like)
    slot = vars(layer)["_buffers"]  # setattr of a module is slow
    before = slot["running_mean"], slot["running_var"]
    slot["running_mean"], slot["running_var"] = mean, var
    try:
        return plain(x)
    finally:
        slot["running_mean"], slot["running_var"] = before


def _normalized_apart(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Each sample of x (B, C, ...) with its own mean and variance (B, C)."""
    if x.ndim > 2 and x.is_contiguous() and x.dtype == mean.dtype:  # torch's kernel, all (sample, channel) as channels
        flat = x.view(1, x.shape[0] * x.shape[1], -1)
        return batch_norm(flat, mean.flatten(), var.flatten(), None, None, False, 0.0, eps).view_as(x)
    shape = (*mean.shape, *[1] * (x.ndim - 2))
    return ((x - mean.view(shape)) * (var.view(shape) + eps).rsqrt()).to(x.dtype)


def instance_moments(x: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C) of each sample of x (B, C, ...), in at least float32; 0 of one value."""
    if x.shape[2:].numel() == 1:
        x = at_least_float32(x.reshape(x.shape[:2]))
        return x, torch.zeros_like(x)
    return moments(x, range(2, x.ndim), unbiased=unbiased)


class _ThroughMoments(Function):
    """The identity, whose gradient is that of an input which its batch's moments normalise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, through_mean: bool) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        ctx.set_materialize_grads(False)
        ctx.through_mean = through_mean
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None
        x, mean, scale = ctx.saved_tensors
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        wide = gradient.to(mean.dtype)
        normed = (x - mean.view(shape)) * scale.view(shape)
        slope = (wide * normed).mean(dims).view(shape)
        result = wide - normed.mul_(slope)
        if ctx.through_mean:
            result -= wide.mean(dims).view(shape)
        return result.to(x.dtype), None, None, None


def through_moments(x: Tensor, mean: Tensor, var: Tensor, eps: float, *, through_mean: bool = True) -> Tensor:
    """The input itself, whose gradient goes through the moments with which its batch would be normalised.

    Whatever fixed statistics it is normalised with afterwards: with h the gradient by the input of that, and x^ the
    input as the batch's moments normalise it, the gradient by x is ``h - mean(h) - x^ mean(h x^)``.

    Args:
        x: (B, C, ...).
        mean: (C,), of the batch; where processes are joined, of all of them.
        var: (C,), mean squared distance from ``mean``.
        eps: What the layer adds to it.
        through_mean: Whether ``mean`` follows x, as a mean does; else it is constant, without the term ``mean(h)``.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    if collective.is_joined():  # autograd's own way: sums over processes have gradients
        assert through_mean
        center, square, _ = collective.moments(x, [0, *range(2, x.ndim)])
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = ((square + eps) / (var + eps)).rsqrt()  # 1, with a graph
        return ((x - center.view(shape)) * scale.view(shape) + mean.view(shape)).to(x.dtype)
    result: Tensor = _ThroughMoments.apply(x, mean, (var + eps).rsqrt(), through_mean)
    return result
