"""Accuracy from what the source and dropout together think of a method's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tta.errors import DataError, NotPreparedError, check_range
from lightning_tta.evidence.accuracy import consensus_accuracy, consensus_sums, fit_temperature
from lightning_tta.guard.monitors.base import Monitor, Seen, Want
from lightning_tta.guard.monitors.estimator import HALF_LIFE, LOW_ACCURACY, Fall, labelled_logits


class Consensus(Monitor):
    """The source, the source with the method's statistics, and dropout rate the predictions, relative to the source.

    :func:`~lightning_tta.evidence.accuracy.consensus_accuracy` of means over the stream, in which a sample counts half
    after ``half_life`` further ones: so single images do as well as batches. Passes: two of the source, one where the
    net has no BatchNorm; none where another part of the guard has made them anyway.

    ``prepare`` needs held-out source images with labels, and of them all that the stream has: logits of the source,
    both ways, and features. There the estimate is the source's accuracy.

    Args:
        half_life: In images, at least 1.
        floor: An estimate below this, in [0, 1], raises ``low_accuracy``
            (:class:`~lightning_tta.guard.monitors.estimator.Fall`); ``None``: none does.
        fall: A fall by more than this, in [0, 1], does; ``None``: none does.
        seed: Of the dropout's draws.

    Raises:
        ConfigError: If one is out of range.
    """

    name: ClassVar[str] = "consensus"
    wants: ClassVar[frozenset[Want]] = frozenset({"source", "same_source", "features"})
    needs_source: ClassVar[bool] = True
    gathers: ClassVar[bool] = True

    def __init__(
        self, *, half_life: int = HALF_LIFE, floor: float | None = None, fall: float | None = None, seed: int = 0
    ) -> None:
        check_range("half_life", half_life, 1, integer=True)
        check_range("seed", seed, 0, integer=True)
        self.half_life, self.seed = half_life, seed
        self.rule = Fall(floor, fall)
        self.anchor: dict[str, float] = {}
        self.weight, self.batches = 0.0, 0
        self.sums: Tensor | None = None
        self.accuracy: float | None = None
        self._alarm = ""

    def prepare(self, batches: Iterable[Seen]) -> None:
        """See held-out source images with labels.

        Raises:
            DataError: If none has a label, or features are missing.
        """
        batches = [seen for seen in batches if len(seen.logits)]
        self.anchor = {}
        logits, labels = labelled_logits(self.name, batches)
        temperature = fit_temperature(logits, labels)
        total: Tensor | None = None
        for number, seen in enumerate(batches):
            sums = self._sums(seen, number, temperature)
            if sums is None:
                raise DataError(
                    "The monitor 'consensus' needs the features of the source images, the inputs of the last linear "
                    "layer, beside the logits; got none."
                )
            total = sums if total is None else total + sums
        assert total is not None
        means = (total / sum(len(seen.logits) for seen in batches)).tolist()
        self.anchor = {
            "accuracy": float((logits.argmax(1) == labels).double().mean()),
            "temperature": temperature,
            **dict(zip(("source", "same_source", "dropout"), means, strict=False)),
        }

    def _sums(self, seen: Seen, number: int, temperature: float) -> Tensor | None:
        source = seen.source if seen.source is not None or self.anchor else seen.logits
        same = source if seen.same_source is None else seen.same_source
        if source is None or same is None or seen.features is None or seen.head is None:
            return None
        key = torch.tensor([self.seed, number])
        return consensus_sums(
            seen.logits, source, same, seen.features, seen.head, key, temperature=temperature
        ).cpu()  # one question to the device

    def see(self, seen: Seen) -> None:
        """Take in a batch; one without the source's logits or without features changes nothing.

        Raises:
            NotPreparedError: If nothing was prepared.
        """
        if not self.anchor:
            raise NotPreparedError(
                "The monitor 'consensus' must see held-out source images with labels before the stream: call its "
                "prepare()."
            )
        self._alarm = ""
        sums = self._sums(seen, self.batches, self.anchor["temperature"]) if len(seen.logits) else None
        if sums is None or not sums.isfinite().all():
            return
        self.batches += 1
        old = 0.5 ** (len(seen.logits) / self.half_life)
        self.weight = old * self.weight + 1 - old
        share = (1 - old) * sums / len(seen.logits)
        self.sums = share if self.sums is None else old * self.sums + share
        accuracy = consensus_accuracy((self.sums / self.weight).tolist(), self.anchor)
        self.accuracy = accuracy
        if self.rule(accuracy):
            self._alarm = LOW_ACCURACY

    def alarm(self) -> str:
        """``low_accuracy``, where the rule says so."""
        return self._alarm

    def estimate(self) -> float | None:
        """The estimate for the last images."""
        return self.accuracy

    def values(self) -> dict[str, float]:
        """The estimate, and what each of the three thinks of the predictions."""
        if self.accuracy is None or self.sums is None:
            return {}
        names = ("source", "same_source", "dropout")
        means = (self.sums[: len(names)] / self.weight).tolist()
        return {
            "consensus_accuracy": self.accuracy,
            **{f"consensus_{name}": mean for name, mean in zip(names, means, strict=True)},
        }

    def forget(self) -> None:
        """Begin anew: what was averaged is of another method."""
        self.weight, self.sums, self.accuracy = 0.0, None, None
        self.rule.last.clear()
        self._alarm = ""

    def begin(self) -> None:
        """Begin anew, with the first draws; what was prepared stays."""
        self.batches = 0
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """The means, the draws so far, and the source's numbers."""
        return {
            "weight": self.weight,
            "sums": None if self.sums is None else self.sums.clone(),
            "accuracy": self.accuracy,
            "batches": self.batches,
            "recent": list(self.rule.last),
            "anchor": dict(self.anchor),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.begin()
        self.weight, self.batches, self.accuracy = state["weight"], state["batches"], state["accuracy"]
        self.sums = None if state["sums"] is None else state["sums"].clone()
        self.anchor = dict(state["anchor"])
        self.rule.last.extend(state["recent"])
