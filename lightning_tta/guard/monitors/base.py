"""The interface of all monitors: what they may see of a batch, and what they say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Want = Literal["source", "same_source", "features", "predict"]


@dataclass(frozen=True)
class Seen:
    """What there is to see of a batch that was answered. Tensors lie where the net is, and have no graph.

    A monitor gets what its ``Monitor.wants`` names, and ``None`` for the rest: each of them may cost a pass.

    Attributes:
        logits: What was answered (B, K), finite; images that were left out are left out here, too.
        source: Logits (B, K) of the source net on the same images, with the source's BatchNorm statistics.
        same_source: Logits (B, K) that the same method gives from its source weights, with the statistics of the batch
            where the method takes those. The same tensor as ``source`` where both are alike.
        features: Inputs (B, D) of the net's last linear layer in the pass that gave ``logits``.
        head: That layer; ``head(features)`` are logits of the net, which a method may have changed further.
        predict: Logits (B, K) of the method for other images (B, C, H, W), without adapting; each call is a pass.
        images: The images (B, C, H, W) in [0, 1]; there where ``predict`` is.
        index: What the stream calls each sample, of length B.
        labels: Classes (B,), int64, of held-out source images, in :meth:`Monitor.prepare` alone; below 0: not known.
    """

    logits: Tensor
    source: Tensor | None = None
    same_source: Tensor | None = None
    features: Tensor | None = None
    head: nn.Linear | None = None
    predict: Callable[[Tensor], Tensor] | None = None
    images: Tensor | None = None
    index: Sequence[int | str] | None = None
    labels: Tensor | None = None


class Monitor(ABC):
    """Looks at every batch, and says what it has seen: an alarm, an estimate of accuracy, numbers for a log.

    Knows no trainer, and changes nothing. Its state is plain numbers and tensors on the host, of bounded size; it asks
    the device once a batch. A batch of one image, and of logits that are all alike, is no error.

    Attributes:
        name: By which it is chosen.
        wants: What it needs of :class:`Seen` beside ``logits``.
        needs_source: Whether :meth:`prepare` must run before the stream.
        gathers: Whether it needs several images to say something, or passes over them: it does not see batches of a few
            images as they come, but gathered (:class:`~lightning_tta.guard.gathering.Gathering`).
    """

    name: ClassVar[str]
    wants: ClassVar[frozenset[Want]] = frozenset()
    needs_source: ClassVar[bool] = False
    gathers: ClassVar[bool] = False

    def prepare(self, batches: Iterable[Seen]) -> None:  # noqa: B027  # most need nothing
        """See held-out source images, once before the stream; ``logits`` are those of the source.

        Raises:
            DataError: If there are too few.
        """

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Take in a batch."""

    def alarm(self) -> str:
        """The reason of the alarm that the last batch raised, as one word of a file; empty: none.

        An alarm is raised once; after it the monitor goes on, or begins anew, as its class says.
        """
        return ""

    def evidence(self) -> dict[str, Any]:
        """What the alarm went by, in plain values, for its line in a file; ``values`` and ``reference`` by custom."""
        return {"values": self.values(), "reference": None}

    def estimate(self) -> float | None:
        """Estimated accuracy of the method's answers by now, in [0, 1]; ``None``: it makes none, or not yet."""
        return None

    @property
    def is_estimator(self) -> bool:
        """Whether it is of a kind that estimates accuracy."""
        return type(self).estimate is not Monitor.estimate

    def values(self) -> dict[str, float]:
        """Numbers for logs, by name, each beginning with the monitor's name."""
        return {}

    def forget(self) -> None:  # noqa: B027  # of some the stream is all that counts
        """The method is another from here on (a reset, a return to a snapshot); what is known of the stream stays."""

    def begin(self) -> None:  # noqa: B027
        """A new stream: all that was seen is forgotten, but not what :meth:`prepare` saw."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that it knows, what :meth:`prepare` saw included, in plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""


@runtime_checkable
class TakesLabels(Protocol):
    """A monitor that takes labels that come late, such as ``labels``."""

    def tell(self, index: Sequence[int | str] | Tensor, labels: Sequence[int] | Tensor) -> object:
        """Take labels (B,) of samples that it has seen, by what the stream calls each."""
