"""BatchNorm statistics of nets that a method keeps beside each other, which follow passes over a memory of images."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.passes import safe_checkpoints
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import Statistics
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.stream_statistics import MOMENTS, StreamStatistics


class Prefixed:
    """A method as the statistics of one of its nets see it: the names of their states begin with that of the net.

    Args:
        method: The method.
        net: The net's name.
    """

    def __init__(self, method: TTAMethod, net: str) -> None:
        self._method, self.net = weakref.ref(method), net  # the method holds it

    @property
    def method(self) -> TTAMethod:
        """The method."""
        method = self._method()
        assert method is not None
        return method

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefixed:
        return Prefixed(memo.get(id(self.method), self.method), self.net)

    def __reduce__(self) -> tuple[type[Prefixed], tuple[TTAMethod, str]]:
        return Prefixed, (self.method, self.net)

    def state(self, name: str, tensor: Tensor, **settings: Any) -> Tensor:
        """As of the method."""
        self.method.keep_wide(f"{self.net}.{name}")
        return self.method.state(f"{self.net}.{name}", tensor, **settings)

    def value(self, name: str) -> Tensor:
        """As of the method."""
        return self.method.value(f"{self.net}.{name}")

    def source_value(self, name: str) -> Tensor:
        """As of the method."""
        return self.method.source_value(f"{self.net}.{name}")

    def write(self, name: str, value: Tensor, where: Tensor | None = None) -> None:
        """As of the method."""
        self.method.write(f"{self.net}.{name}", value, where)

    @property
    def layout(self) -> int:
        """As of the method."""
        return self.method.layout

    @layout.setter
    def layout(self, number: int) -> None:
        self.method.layout = number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


def check_tracked(
    method: TTAMethod, use: str = "a method that takes the statistics of each batch, as 'cotta' or 'tent'"
) -> None:
    """Refuse a net with a BatchNorm layer that has no source statistics.

    Raises:
        UnsupportedModelError: With what to use.
    """
    other = "a method that takes the statistics of each batch, as 'cotta' or 'tent'"
    for name, layer in batch_norm_layers(method.model).items():
        if layer.running_mean is None or layer.running_var is None:
            raise UnsupportedModelError(
                f"BatchNorm layer '{name}' keeps no running statistics (track_running_stats=False), where those of "
                f"'{method.name}' start. Use {use or other}."
            )


class MemoryStatistics(StreamStatistics):
    """Mean and variance of each BatchNorm layer, an average that starts at the source's.

    With mean and variance (biased) m_b of the images that are in the memory, and gradient through them::

        kept <- (1 - momentum) kept + momentum m_b
        a pass over the memory is normalised with (1 - share) kept + share m_b; any other pass with what is kept

    A layer that gets one value per channel, which has no variance, keeps what it has. RoTTA's RobustBN has
    ``share = momentum``, BatchNorm in training mode ``share = 1`` and ``unbiased``. A net without BatchNorm has none of
    it.

    Args:
        method: Whose net it is.
        net: Name of the net, of which there may be several.
        momentum: In [0, 1].
        share: In [0, 1]; ``None``: the momentum.
        unbiased: Whether what is kept is of the unbiased variance, as torch has it.

    Raises:
        UnsupportedModelError: If a BatchNorm layer has no source statistics.
    """

    def __init__(
        self,
        method: TTAMethod,
        net: str = "net",
        *,
        momentum: float,
        share: float | None = None,
        unbiased: bool = False,
    ) -> None:
        check_range("bn_momentum", momentum, 0, 1)
        check_tracked(method)
        self.method = cast(State, Prefixed(method, net))
        self.momentum, self.share = momentum, momentum if share is None else share
        self.unbiased = unbiased
        self.weights: Tensor | None = None
        self._old: Tensor | None = None
        self.is_empty = not batch_norm_layers(method.model)
        if not self.is_empty:
            super().__init__(cast(TTAMethod, self.method))

    def build(self) -> None:
        """Make the layers' forwards, while no others are in place."""
        if not self.is_empty:
            self.running(self.method)

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """While active, passes are normalised with what is kept."""
        with self._active(None):
            yield

    @contextmanager
    def moving(self, weights: Tensor, *, again: bool = False) -> Iterator[None]:
        """While active, a pass over images (M, ...) moves the statistics.

        Args:
            weights: (M,), bool: which images count.
            again: It goes on from where the last such pass was, of which nothing is kept yet.
        """
        if self.is_empty:
            yield
            return
        before = self._seen if again else {}
        self.begin(self.method)
        self._seen = before
        try:
            with safe_checkpoints(recompute=False), self._active(weights):  # the backward pass is outside
                yield
        finally:
            self.end()

    @contextmanager
    def _active(self, weights: Tensor | None) -> Iterator[None]:
        before, self.weights = self.weights, weights
        try:
            if self.is_empty:
                yield
            else:
                with self.running(self.method):
                    yield
        finally:
            self.weights = before

    @torch.no_grad()
    def keep(self, where: Tensor) -> None:
        """Write what the last moving pass made of them, where a condition, 0-dimensional and bool, is true."""
        if not self.is_empty:
            self.method.write(MOMENTS, self.seen(self.method), where)

    def kept(self) -> Statistics | None:
        """What is kept, by layer; ``None`` without BatchNorm."""
        return None if self.is_empty else self.statistics(self.method, self.method.get_submodule("model"))

    def rows(self, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer normalises an input of the memory with, and what it keeps; with gradient by x.

        Args:
            name: The layer's.
            x: Its input (M, C, ...).
            old: What was kept, (2, C).

        Returns:
            (2, C), or (2, M, C) of each image; and (2, C).
        """
        moments, number = self.moments(x)
        moments = moments.to(old)
        new = torch.lerp(old, torch.where(number > 1, moments, old), self.share)
        bessel = number / (number - 1).clamp(min=1) if self.unbiased else 1.0
        kept = torch.stack([moments[0], moments[1] * bessel])
        return new, torch.where(number > 1, torch.lerp(old, kept, self.momentum), old)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance in rows (2, C) of the images that count, and of how many values each is."""
        assert self.weights is not None
        x, dims = at_least_float32(x), [0, *range(2, x.ndim)]
        counts = self.weights.view(-1, *(1,) * (x.ndim - 1)) > 0
        number = (self.weights > 0).sum() * (x[0].numel() // x.shape[1])
        mean = torch.where(counts, x, 0).sum(dims) / number
        deviation = torch.where(counts, x - mean.view(-1, *(1,) * (x.ndim - 2)), 0)
        return torch.stack([mean, deviation.square().sum(dims) / number]), number

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept, or for a pass over the memory :meth:`rows`."""
        if self.weights is None:
            return old, old
        self._old = old
        return self.rows(name, x, old)

    def enter(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """The same values, with the gradient of a layer whose statistics follow x."""
        old, self._old = self._old, None
        if self.weights is None or old is None or not (torch.is_grad_enabled() and x.requires_grad):
            return x
        (mean, var), eps = self.rows(name, x, old)[0], self.eps[name]
        shape = (*(mean.shape if rows.ndim == 3 else (1, -1)), *(1,) * (x.ndim - 2))
        scale = ((rows[1] + eps) / (var + eps)).sqrt()  # 1, with a graph
        result: Tensor = ((x - mean.view(shape)) * scale.view(shape) + rows[0].view(shape)).to(x.dtype)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self.is_empty else {**super().__getstate__(), "weights": None, "_old": None}
