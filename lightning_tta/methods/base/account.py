"""The statistics with which BatchNorm runs, and the account of them over the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import MomentsRecord, batch_norm_layers, batch_statistics, merged_moments
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.host import host_has
from lightning_tta.methods.base.state import State

MOMENTS, IMAGES = "stream.moments", "stream.images"


Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance (C,) by layer."""


class Account(ABC):
    """With which statistics the BatchNorm layers of a method's net run, and what is kept of them over the stream.

    In every call of a method: :meth:`look`; passes inside :meth:`running`, of which one, the first over the batch as it
    came, is between :meth:`begin` and :meth:`note`; then :meth:`take` or :meth:`drop`. What was noted waits until
    :meth:`take`: only then is the state of the method written.

    Attributes:
        noted: What :meth:`note` kept, and whether it is good: its last tensor, 0-dimensional, bool.
        float32: Names of states that stay in float32 at least.
        synchronized: Whether several processes can adapt as one with it.
        no_plain_net: Why no plain net runs with such statistics; empty where one can.
        images_apart: Whether it is also for methods that treat each image on its own: those run with what was taken in
            of the batch and of those before.
        small_batch: Of fewer images than this the statistics are noise; 0: of any number they are good.
        advice: What a batch of few images means for them, for the warning.
    """

    float32: tuple[str, ...] = ()
    synchronized: bool = True
    no_plain_net: str = ""
    images_apart: bool = True
    small_batch: int = 0
    advice: str = ""
    noted: tuple[Tensor | bool, ...] | None = None

    @abstractmethod
    def running(self, method: State) -> AbstractContextManager[None]:
        """How the net runs in every pass."""

    def look(self, method: State, x: Tensor) -> None:
        """See the usable images of a batch (B, C, H, W), inside :meth:`running`, before the method does."""
        return

    def look_apart(self, method: State, x: Tensor) -> None:
        """See images (B, C, H, W) that are to be predicted each apart from the others; inside :meth:`running`."""
        return

    @abstractmethod
    def begin(self, method: State) -> None:
        """The coming pass is the one to note."""

    @abstractmethod
    def end(self) -> None:
        """It is over, or was broken off."""

    @abstractmethod
    def note(self, method: State, logits: Tensor) -> None:
        """Keep what was seen in the pass that gave these logits, until :meth:`take`."""

    def drop(self, where: Tensor | None = None) -> None:
        """Forget what was noted; only if ``where``, 0-dimensional and bool, is true."""
        if self.noted is not None:
            *seen, good = self.noted
            self.noted = None if where is None else (*seen, good & (_value(where) == 0))

    @abstractmethod
    def take(self, method: State, images: int, skipped: Tensor | int) -> None:
        """Take in what was noted of a batch of ``images``, all processes together, unless a step was ``skipped``."""

    @abstractmethod
    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """With which a plain net runs after the stream so far; empty: nothing was seen; ``None``: the source's.

        Asks the device.
        """

    @abstractmethod
    def renew(self, method: State, model: nn.Module) -> None:
        """The net was moved or converted."""


class StreamAccount(Account):
    """The batch's own statistics; mean and variance over the stream are two tensors in a method's state.

    Of the input of each BatchNorm layer. After a batch of B images with mean m and variance v, where n images were seen
    before::

        w = B / (min(n, horizon) + B)    d = m - mean
        mean <- mean + w d               var <- (1 - w) var + w v + w (1 - w) d^2

    That is the law of total variance: over the first ``horizon`` images exact, whatever the batches, also for one
    image at a time and for a stream sorted by class, whose batches vary less than the stream does. A batch is left out
    whose moments, logits or gradients are not finite. Layers that do not run keep the source's.

    Args:
        method: Has the state; of whose net the layers are.
        model: The net.

    Attributes:
        HORIZON: Images after which older ones fade. A mean over 1,000 images is known to 3 % of a standard deviation,
            and the account follows a stream that changes; the parameters change with it.
    """

    HORIZON: ClassVar[int] = 1000
    float32 = (MOMENTS,)
    images_apart = False
    small_batch = 8
    advice = "normalises BatchNorm layers with the statistics of each batch, which are noise below about 8 images"

    def __init__(self, method: State, model: nn.Module) -> None:
        self.record = MomentsRecord(model)
        layers = batch_norm_layers(model)
        like = next((t for layer in layers.values() for t in _tensors(layer)), torch.zeros(()))
        moments = at_least_float32(like.new_zeros(2, sum(layer.num_features for layer in layers.values())))
        moments[1] = 1
        for name, layer in layers.items():
            if layer.running_mean is not None and layer.running_var is not None:
                moments[:, self.record.places[name]] = torch.stack([layer.running_mean, layer.running_var]).to(moments)
        method.state(MOMENTS, moments)
        method.state(IMAGES, torch.zeros((), dtype=torch.int64, device=moments.device), source=0)

    def running(self, method: State) -> AbstractContextManager[None]:
        """With the batch's own statistics."""
        model = method.get_submodule("model")
        return batch_statistics(model, record=self.record)

    def begin(self, method: State) -> None:
        """Record the coming pass."""
        self.record.begin()

    def end(self) -> None:
        """Record no more."""
        self.record.end()

    def renew(self, method: State, model: nn.Module) -> None:
        """The net was moved or converted."""
        with outside_inference_mode():
            self.record = MomentsRecord(model)

    @torch.no_grad()
    def note(self, method: State, logits: Tensor) -> None:
        """Keep what was recorded in a pass that gave these logits, until :meth:`take`."""
        seen = self.record.result(method.value(MOMENTS), method.value(IMAGES))
        total = _value(seen.sum() + logits.sum())
        self.noted = (seen, total - total == 0)  # not so if one of them is not finite

    @torch.no_grad()
    def take(self, method: State, images: int, skipped: Tensor | int) -> None:
        """Take in what was noted of a batch of ``images``, all processes together, unless a step was ``skipped``."""
        if self.noted is None:
            return
        (seen, good), self.noted = self.noted, None
        assert isinstance(seen, Tensor)
        good = good & ((_value(skipped) if isinstance(skipped, Tensor) else skipped) == 0)
        moments, number = method.value(MOMENTS), method.value(IMAGES)
        before = number.clamp(max=self.HORIZON)
        if isinstance(good, bool):
            if good:
                moments.copy_(merged_moments(moments, seen, images / (_value(before) + images)))
                number.add_(images)
            return
        merged = merged_moments(moments, seen, images / (before.to(moments.dtype) + images))
        moments.copy_(torch.where(good, merged, moments))
        number.add_(good, alpha=images)

    def statistics(self, method: State, model: nn.Module) -> Statistics:
        """Mean and variance by layer, as the layer stores them; empty if nothing was seen. Asks the device."""
        if not bool(method.value(IMAGES) > 0):
            return {}
        moments, statistics = method.value(MOMENTS), {}
        for name, layer in batch_norm_layers(model).items():
            like = next(_tensors(layer), moments)
            mean, var = moments[:, self.record.places[name]].to(like)
            statistics[name] = (mean, var)
        return statistics


def _value(scalar: Tensor) -> Any:
    """A 0-dimensional tensor; the number in it where the host has it anyway: it computes faster than tensors do."""
    return scalar.numpy().item() if host_has(scalar) else scalar


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    return (t for t in (layer.running_mean, layer.weight) if isinstance(t, Tensor))
