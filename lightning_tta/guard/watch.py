"""Watches a method for collapse and acts: warn, reset, roll back, or stop adapting. Knows no trainer."""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import put_back, size, take
from lightning_tta.run.windows import Measures, gained, measure, pool

Action = Literal["warn", "reset", "rollback", "stop"]
Compare = Literal["history", "source"]


class Watch:
    """Runs a method and looks at every batch that it adapted on.

    ::

        watch = Watch(lightning_tta.adapt(model, "tent"), action="rollback")
        logits = watch(images)   # as method(images)
        watch.events             # what happened

    **Signals**, over the last ``window`` batches; r is the reference:

    - ``non_finite``: logits of a good image, or a tensor that the method may change. At once.
    - ``logit_norm``: mean norm above ``norm_ratio`` times r.
    - ``one_class``: share of the most predicted class more than ``share_excess`` above r, and entropy below half of r:
      a stream that becomes sorted by class is no collapse. Against the source: a class whose share is more than
      ``share_excess`` above the source's share of it, and the most predicted class a third of that above r.
    - ``no_entropy``: entropy / log K below ``entropy_floor`` and below a quarter of r.

    **Reference.** ``source`` costs a forward pass a batch: what the same method predicts from its source weights on the
    same batches. It knows whether it is the stream or the net that has one class, and needs ``window / 2`` batches; a
    source that is itself very unsure makes no good measure. ``history`` costs nothing: the largest share, median
    entropy and median norm of the last ``history`` healthy windows, but for the latest ``window`` of them. It is blind
    for the first ``2 * window`` batches, takes what it saw there for normal, notices a collapse only once entropy has
    fallen too, never finds ``one_class`` where the classes come in runs longer than a window, and may take a change to
    a much easier, more sorted domain for a collapse.

    **Probation.** No signal is as quick as harm. So the source predicts, while the method adapts unseen, until
    ``probation`` batches went by without alarm, from the start and after each alarm, and twice as many for each alarm
    within the last ``history`` batches: a method that fails at once costs nothing, a good one so many batches of its
    gain. Only with ``source``, whose predictions are there anyway.

    **Actions.** ``warn`` only notes. ``reset``: back to the source. ``rollback``: back to the last healthy snapshot
    (declared tensors, optimizers, memory, counters). ``stop``: the same, and from then on only predict. The batch that
    raised the alarm is predicted again after the action. A snapshot is taken every ``snapshot_every`` batches and is
    healthy once ``window`` further batches went by without alarm: two are kept, in memory. If ``retries`` alarms came
    within the last ``history`` batches, reset and rollback stop adapting as well, at the source.

    Args:
        method: Used and changed in place. Prepared, where it needs source data.
        action: What to do on an alarm.
        compare: The reference, see above.
        probation: Batches, at least 0; ``None``: two windows with ``source``, none with ``history`` or ``warn``.
        window: Batches, at least 2. A window should hold images of several classes.
        history: Batches, at least 1.
        share_excess: Share of images, in (0, 1].
        entropy_floor: Share of log K, in [0, 1].
        norm_ratio: Above 1.
        snapshot_every: Batches, at least 1.
        retries: At least 1; ``None``: no limit.

    Attributes:
        events: One dict an alarm: ``batch``, ``reason``, ``values`` and ``reference`` (entropy, share, norm),
            ``action`` as carried out.
        on_event: If set, called with each of them.
        stopped: Whether the method only predicts by now.
        on_probation: Batches so far for which the source predicted.
        forwards: Forward passes so far for the source's predictions.
    """

    def __init__(
        self,
        method: TTAMethod,
        action: Action = "rollback",
        *,
        compare: Compare = "source",
        window: int = 8,
        history: int = 64,
        share_excess: float = 0.3,
        entropy_floor: float = 0.01,
        norm_ratio: float = 3.0,
        snapshot_every: int = 16,
        retries: int | None = 3,
        probation: int | None = None,
    ) -> None:
        self.method, self.action, self.compare = method, action, compare
        self.window, self.history, self.retries = window, history, retries
        self.share_excess, self.entropy_floor, self.norm_ratio = share_excess, entropy_floor, norm_ratio
        self.snapshot_every, self.probation = snapshot_every, probation
        self.check(**self.settings)
        self.events: list[dict[str, Any]] = []
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        self.stopped = False
        self.on_probation = self.forwards = 0
        self._proven = 0  # batches without alarm
        self._batch = -1
        self._recent: deque[Measures] = deque(maxlen=window)
        self._source: deque[Measures] = deque(maxlen=window)
        self._past: deque[tuple[float, float, float]] = deque(maxlen=history)
        self._pending: list[tuple[float, float, float]] = []  # windows that overlap with the present one
        self._healthy = self._candidate = take(method)
        self._since = 0  # batches since the candidate was taken

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, for the record."""
        names = ("action", "compare", "window", "history", "share_excess", "entropy_floor", "norm_ratio")
        return {name: getattr(self, name) for name in (*names, "snapshot_every", "retries", "probation")}

    @staticmethod
    def check(**settings: Any) -> None:
        """Refuse arguments out of range.

        Raises:
            ConfigError: With what is allowed.
        """
        check_choice("action", settings["action"], ("warn", "reset", "rollback", "stop"))
        check_choice("compare", settings["compare"], ("history", "source"))
        check_range("window", settings["window"], 2, integer=True)
        for name, least in (("history", 1), ("snapshot_every", 1), ("retries", 1), ("probation", 0)):
            if settings[name] is not None or name not in ("retries", "probation"):
                check_range(name, settings[name], least, integer=True)
        if settings["probation"] and settings["compare"] == "history":
            raise ConfigError("During probation the source predicts: use compare='source', or leave out probation.")
        check_range("share_excess", settings["share_excess"], 0, 1, low_open=True)
        check_range("entropy_floor", settings["entropy_floor"], 0, 1)
        check_range("norm_ratio", settings["norm_ratio"], 1, low_open=True)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) for images (B, C, H, W): adapted on and looked at, or predicted once stopped."""
        return self.method.predict(images) if self.stopped else self.review(images, self.method(images))

    def reset(self) -> None:
        """Return the method to the source: a new beginning, whose history still counts."""
        self.method.reset()
        self._begin()

    def review(self, images: Tensor, logits: Tensor, batch: int | None = None) -> Tensor:
        """Look at a batch that the method has just adapted on, and act.

        Args:
            images: (B, C, H, W).
            logits: What the method returned for them, (B, K).
            batch: Its number in the stream; by default counted here.

        Returns:
            The logits, or the source's on probation, or those after the action.
        """
        source = None
        self._batch = self._batch + 1 if batch is None else batch
        used = logits[(logits != 0).any(1)]  # zeros: left out
        if bool(torch.isfinite(used).all()) and self._finite():
            if not len(used):
                return logits
            self._recent.append(measure(used))
            if self.compare == "source":
                with torch.no_grad(), self.method.at_source():
                    source = self.method.predict(images)
                self.forwards += 1
                self._source.append(measure(source[(logits != 0).any(1)]))
            values, reference = pool(self._recent), self._reference()
            reason = self._judge(values, reference)
        else:
            values, reference, reason = None, None, "non_finite"
        if reason is None:
            self._keep(values)
            if source is None or self._proven > self._probation * 2 ** self._alarms_lately():
                return logits
            self.on_probation += 1
            return source
        return self._act(images, logits, reason, values, reference)

    def report(self) -> dict[str, Any]:
        """For the run's report."""
        seen = {name: copy.deepcopy(getattr(self, name)) for name in ("events", "stopped", "on_probation", "forwards")}
        return {"settings": self.settings, **seen}

    def sizes(self) -> dict[str, int]:
        """Bytes kept: the two snapshots."""
        return {"healthy": size(self._healthy), "candidate": size(self._candidate)}

    def state_dict(self) -> dict[str, Any]:
        """Everything, to go on from here; plain data and tensors."""
        state = ((name, getattr(self, name)) for name in _STATE)
        return {name: list(value) if isinstance(value, deque) else value for name, value in state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        for name in _STATE:
            value = copy.deepcopy(state[name])
            own = getattr(self, name)
            setattr(self, name, deque(map(tuple, value), own.maxlen) if isinstance(own, deque) else value)

    # Internals -------------------------------------------------------------------------------------------------------

    def _finite(self) -> bool:
        return all(torch.stack([t.isfinite().all() for t in self.method.adaptable.values()] or [torch.tensor(True)]))

    @property
    def _probation(self) -> int:
        usual = 2 * self.window if self.compare == "source" and self.action != "warn" else 0
        return usual if self.probation is None else self.probation

    def _alarms_lately(self) -> int:
        return sum(self._batch - event["batch"] < self.history for event in self.events)

    def _reference(self) -> tuple[float, float, float] | None:
        """Share, entropy and norm to compare with; ``None`` while there is too little to go by."""
        if self.compare == "source":
            return pool(self._source) if 2 * len(self._source) >= self.window else None
        if len(self._recent) < self.window or not self._past:
            return None
        shares, entropies, norms = zip(*self._past, strict=True)
        return max(shares), median(entropies), median(norms)

    def _judge(self, values: tuple[float, float, float], reference: tuple[float, float, float] | None) -> str | None:
        if reference is None:
            return None
        (share, ent, norm), (usual_share, usual_ent, usual_norm) = values, reference
        if norm > self.norm_ratio * usual_norm:
            return "logit_norm"
        if self.compare == "source":
            excess = min(gained(self._recent, self._source), 3 * (share - usual_share))
            one_class = excess > self.share_excess
        else:
            one_class = share > usual_share + self.share_excess and ent < usual_ent / 2
        if one_class:
            return "one_class"
        if ent < self.entropy_floor and ent < usual_ent / 4:
            return "no_entropy"
        return None

    def _keep(self, values: tuple[float, float, float] | None) -> None:
        """A healthy batch: a window of history, perhaps a snapshot."""
        self._proven += 1
        if values is not None and len(self._recent) == self.window:
            self._pending.append(values)
            if len(self._pending) > self.window:
                self._past.append(self._pending.pop(0))
        self._since += 1
        if self._since == self.window:
            self._healthy = self._candidate
        if self._since >= max(self.window, self.snapshot_every):
            self._candidate, self._since = take(self.method), 0

    def _act(self, images: Tensor, logits: Tensor, reason: str, values: Any, reference: Any) -> Tensor:
        again = self.action in ("reset", "rollback") and self._alarms_lately() + 1 >= (self.retries or math.inf)
        names = ("largest_class_share", "entropy_of_log_k", "logit_norm")
        event = {
            "batch": self._batch,
            "reason": reason,
            "values": None if values is None else dict(zip(names, values, strict=True)),
            "reference": None if reference is None else dict(zip(names, reference, strict=True)),
            "action": "reset and stop" if again else self.action,
        }
        self.events.append(event)
        self._proven = 0
        warnings.warn(f"Guard: {reason} at batch {self._batch}: {event['action']}.", stacklevel=4)
        if self.on_event is not None:
            self.on_event(event)
        if self.action == "warn":
            self._forget()
            return logits
        if self.action == "reset" or again:
            self.method.reset()
        else:
            put_back(self.method, self._healthy)
        self.stopped = again or self.action == "stop"
        self._begin()
        return self.method.predict(images)

    def _forget(self) -> None:
        for seen in (self._recent, self._source, self._pending):
            seen.clear()

    def _begin(self) -> None:
        """Another state than before: what was seen of the old one says nothing about it."""
        self._forget()
        self._healthy, self._candidate, self._since = take(self.method), take(self.method), 0


_STATE = (
    *("events", "stopped", "on_probation", "forwards", "_proven", "_batch"),
    *("_recent", "_source", "_past", "_pending", "_healthy", "_candidate", "_since"),
)
