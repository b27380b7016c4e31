"""Watches a method for collapse and acts: warn, reset, roll back, or stop adapting. Knows no trainer."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.methods.base.method import PredictWith, TTAMethod
from lightning_tta.methods.base.state import put_back, size, take
from lightning_tta.metrics import Window, WindowMeasures

Action = Literal["warn", "reset", "rollback", "stop"]
Compare = Literal["history", "source"]
EVENTS = 256
"""Alarms that a watch remembers, at most, or as many as its history has batches."""
STATE_KEY = "watch"
"""Where the state dict of a watched method has what the watch has seen."""
_STATE = (
    "events",
    "dropped_events",
    "stopped",
    "on_probation",
    "forwards",
    "next_batch",
    "_proven",
    "_healthy",
    "_candidate",
    "_since",
)
_WINDOWS, _HISTORY = ("_recent", "_source"), ("_past", "_pending")
_WATCHES: weakref.WeakKeyDictionary[TTAMethod, weakref.ref[Watch]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class WatchSettings:
    """What :class:`Watch` takes for a collapse, and what it does then.

    Attributes:
        action: ``warn``, ``reset`` (to the source), ``rollback`` (to the last healthy snapshot) or ``stop`` (the same,
            and only predict from then on).
        compare: What is normal: ``source`` (what the source predicts: one more forward pass a batch) or ``history``
            (the stream so far: no cost, later and less sure).
        window: Batches that are judged together, at least 2. A window should hold images of several classes.
        history: Healthy batches that make the history, at least 1.
        share_excess: How far the most predicted class's share may be above the reference, in (0, 1].
        entropy_floor: Mean entropy that counts as near zero, as a share of log K, in [0, 1].
        norm_ratio: How many times the reference the logit norm may be, above 1.
        snapshot_every: Batches from snapshot to snapshot, at least 1.
        retries: Alarms within ``history`` batches after which reset and rollback stop adapting, at least 1; ``None``:
            no limit.
        probation: The source predicts until so many batches, at least 0, went by without alarm, from the start and
            after each alarm; ``None``: two windows with ``source``, none with ``history`` or ``warn``.

    Raises:
        ConfigError: If one is out of range.
    """

    action: Action = "rollback"
    compare: Compare = "source"
    window: int = 8
    history: int = 64
    share_excess: float = 0.3
    entropy_floor: float = 0.01
    norm_ratio: float = 3.0
    snapshot_every: int = 16
    retries: int | None = 3
    probation: int | None = None

    def __post_init__(self) -> None:
        check_choice("action", self.action, get_args(Action))
        check_choice("compare", self.compare, get_args(Compare))
        lowest = {"window": 2, "history": 1, "snapshot_every": 1, "retries": 1, "probation": 0}
        for name, low in lowest.items():
            if getattr(self, name) is not None or name not in ("retries", "probation"):
                check_range(name, getattr(self, name), low, integer=True)
        if self.probation and self.compare == "history":
            raise ConfigError("During probation the source predicts: use compare='source', or leave out probation.")
        check_range("share_excess", self.share_excess, 0, 1, low_open=True)
        check_range("entropy_floor", self.entropy_floor, 0, 1)
        check_range("norm_ratio", self.norm_ratio, 1, low_open=True)

    @property
    def first_probation(self) -> int:
        """Batches of a probation without an alarm before it."""
        default = 2 * self.window if self.compare == "source" and self.action != "warn" else 0
        return default if self.probation is None else self.probation


class Watch:
    """A method that is watched: has its interface, and looks at every batch that the method adapted on.

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
    - ``no_entropy``: entropy / log K below ``entropy_floor`` and below a quarter of r. Against the history only where
      few classes are predicted, too: a share of 0.9, or a third of ``share_excess`` above r. A net that is sure of
      all classes alike has come to an easier domain.

    **Reference.** ``source``: what the same method predicts from its source weights on the same batches, one forward
    pass a batch. It tells the stream's one class from the net's, and needs ``window / 2`` batches; a very unsure source
    makes no good measure. ``history`` costs nothing: the largest share, median entropy and median norm of the last
    ``history`` healthy windows, but for the latest ``window`` of them. It is blind for the first ``2 * window`` batches
    and takes them for normal; notices a collapse only once entropy has fallen too; never finds ``one_class`` where
    classes come in runs longer than a window; and may take a much easier, more sorted domain for a collapse.

    **Probation.** No signal is as quick as harm. So the source predicts while the method adapts unseen, from the start
    and after each alarm, for ``probation`` batches, twice as many for each alarm within the last ``history`` batches.
    Only with ``source``, whose predictions are there anyway.

    **Actions.** ``warn`` only notes. ``reset``: back to the source. ``rollback``: back to the last healthy snapshot
    (declared tensors, optimizers, memory, counters). ``stop``: the same, and from then on only predict. The batch that
    raised the alarm is predicted again after the action. A snapshot is taken every ``snapshot_every`` batches and is
    healthy once ``window`` further batches went by without alarm: two are kept, in memory. If ``retries`` alarms came
    within the last ``history`` batches, reset and rollback stop adapting as well, at the source.

    **Threads.** As of the method, one call runs at a time; ``with watch.hold()`` makes several one. Calls that change
    the method should all go through the watch: after one that did not, it warns, and what it has seen begins anew.

    Args:
        method: Used and changed in place. Whatever is not named here is the method's: ``watch.name``, ``watch.model``.
        action: As in :class:`WatchSettings`.
        settings: The others of :class:`WatchSettings`.

    Attributes:
        settings: The settings.
        events: One dict an alarm: ``batch``, ``reason``, ``values`` and ``reference`` (entropy, share, norm),
            ``action`` as carried out. The latest 256, or as many as ``history`` has batches.
        dropped_events: How many alarms there were before them.
        on_event: If set, called with each of them.
        stopped: Whether the method only predicts by now.
        on_probation: Batches so far for which the source predicted.
        forwards: Forward passes so far for the source's predictions.
        next_batch: Number of the next batch; counted here, unless somebody who skips batches sets it.

    Raises:
        ConfigError: If a setting is out of range, or ``method`` is no method. Later, if a setting is assigned to.
    """

    def __init__(self, method: TTAMethod, action: Action = "rollback", **settings: Any) -> None:
        if not isinstance(method, TTAMethod):
            raise ConfigError(
                "Watch wraps a method, such as Watch(lightning_tta.adapt(model, 'tent')), not a net; got a "
                f"{type(method).__name__}."
            )
        other = _WATCHES.get(method)
        if other is not None and other() is not None:
            warnings.warn(
                f"This method ('{method.name}') has a watch already. Two watches do not see each other's batches, and "
                "undo each other's actions. Use the one there is, or delete it first.",
                stacklevel=2,
            )
        _WATCHES[method] = weakref.ref(self)
        self.method = method
        self.settings = WatchSettings(action, **settings)
        self.events: list[dict[str, Any]] = []
        self.dropped_events = 0
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        self.stopped = False
        self.on_probation = self.forwards = self.next_batch = 0
        self._proven = 0  # batches without alarm
        self._recent, self._source = Window(self.settings.window), Window(self.settings.window)
        self._past: deque[WindowMeasures] = deque(maxlen=self.settings.history)
        self._pending: list[WindowMeasures] = []  # windows that overlap with the present one
        self._healthy: dict[str, Any] | None = None
        self._candidate: dict[str, Any] | None = None  # taken at the first batch, when the method is prepared
        self._since = 0  # batches since the candidate was taken
        self._only_predicts = False  # on the last batch
        self._revision = method.revision  # of the method, when this watch last changed it
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_is_made") and (name not in vars(self) or name in ("settings", "method")):
            raise ConfigError(
                f"A watch's {name!r} cannot be set: "
                + (
                    "settings are given when it is made. Make a new one: Watch(method, ...)."
                    if name in ("settings", "method", *WatchSettings.__dataclass_fields__)
                    else "it has no such attribute. Those of the method are set on watch.method."
                )
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "method":  # not yet there, while a copy is made
            raise AttributeError(name)
        return getattr(self.method, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with self.method.hold():  # not in the middle of a batch
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    # The method's interface

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) for images (B, C, H, W): adapted on and looked at, or predicted once stopped.

        They are those of the method, or of the source on probation, or those after an action.
        """
        with self.method.hold():
            self._only_predicts = self.stopped
            if self.stopped:
                self.next_batch += 1
                return self.method.predict(images, statistics="batch")
            self._begin_if_changed()
            try:
                return self._review(images, self.method(images))
            finally:
                self._revision = self.method.revision

    forward = __call__

    def predict(self, images: Tensor, *, statistics: PredictWith = "stream") -> Tensor:
        """Logits (B, K) without adapting, as ``method.predict`` gives them: the source's on probation."""
        with self.method.hold():
            if self._is_on_probation():
                return self._predict_source(images, statistics)
            return self.method.predict(images, statistics=statistics)

    def reset(self) -> None:
        """Return the method to the source: a new beginning, whose history still counts."""
        with self.method.hold():
            self.method.reset()
            self._begin()

    @property
    def stats(self) -> dict[str, float]:
        """The method's, and ``guard_alarms``; ``only_predicted`` is 1 for a batch that it did not adapt on."""
        with self.method.hold():
            stats = {"only_predicted": 1.0} if self._only_predicts else self.method.stats
            return {**stats, "guard_alarms": float(len(self.events) + self.dropped_events)}

    def unread_stats(self) -> dict[str, Tensor | float]:
        """The same, where it is: nobody waits for the device."""
        with self.method.hold():
            stats = {"only_predicted": 1.0} if self._only_predicts else self.method.unread_stats()
            return {**stats, "guard_alarms": float(len(self.events) + self.dropped_events)}

    def state_dict(self) -> dict[str, Any]:
        """The method's state, and under ``watch`` what was seen; plain data and tensors."""
        with self.method.hold():
            seen: dict[str, Any] = {name: getattr(self, name) for name in _STATE}
            seen["events"] = list(self.events)
            seen |= {name: list(getattr(self, name).batches) for name in _WINDOWS}
            seen |= {name: list(map(astuple, getattr(self, name))) for name in _HISTORY}
            return {**self.method.state_dict(), STATE_KEY: {**seen, "settings": asdict(self.settings)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`.

        Raises:
            ConfigError: If it is no state of a watch with these settings, or does not fit the method. Nothing has
                changed.
        """
        mine, seen = asdict(self.settings), copy.deepcopy(state.get(STATE_KEY))
        seen = (
            {"dropped_events": 0, "settings": mine, **seen} if isinstance(seen, Mapping) else {}
        )  # earlier ones lack these
        if not {*_STATE, *_WINDOWS, *_HISTORY} <= seen.keys():
            raise ConfigError(
                "This is no state of a watch, but perhaps of a method alone: load it before the method is watched, "
                "method.load_state_dict(state). A watch loads what its own state_dict() gave."
            )
        theirs = seen["settings"]
        others = [
            f"{name}={value!r}, here {mine.get(name)!r}" for name, value in theirs.items() if mine.get(name) != value
        ]
        if others:
            raise ConfigError(f"This state is of a watch with other settings: {'; '.join(others)}. Use the same.")
        with self.method.hold():
            self.method.load_state_dict({name: value for name, value in state.items() if name != STATE_KEY})
            self._forget()
            self._past.clear()
            for name in _STATE:
                setattr(self, name, seen[name])
            for name in _WINDOWS:
                getattr(self, name).batches.extend(map(tuple, seen[name]))
            for name in _HISTORY:
                getattr(self, name).extend(WindowMeasures(*measures) for measures in seen[name])
            self._revision = self.method.revision

    # What was seen

    def report(self) -> dict[str, Any]:
        """For the run's report."""
        names = ("events", "dropped_events", "stopped", "on_probation", "forwards")
        seen = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return {"settings": asdict(self.settings), **seen}

    def sizes(self) -> dict[str, int]:
        """Bytes kept: the two snapshots."""
        return {"healthy": size(self._healthy), "candidate": size(self._candidate)}

    # Internals

    def _review(self, images: Tensor, logits: Tensor) -> Tensor:
        """Look at a batch that the method has just adapted on, and act."""
        self.next_batch += 1
        mask = (logits != 0).any(1)  # rows of zeros: images left out
        tensors = (logits[mask], *self.method.adaptable.values())
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            return self._act(images, logits, "non_finite")
        if not mask.any():
            return logits
        self._recent.add(logits[mask])
        source = None
        if self.settings.compare == "source":
            source = self._predict_source(images)
            self.forwards += 1
            self._source.add(source[mask])
        measures, reference = self._recent.measures(), self._reference()
        reason = None if reference is None else self._judge(measures, reference)
        if reason is not None:
            return self._act(images, logits, reason, measures, reference)
        self._accept(measures)
        if source is None or not self._is_on_probation():
            return logits
        self.on_probation += 1
        return source

    @torch.no_grad()
    def _predict_source(self, images: Tensor, statistics: PredictWith = "batch") -> Tensor:
        with self.method.at_source():
            return self.method.predict(images, statistics=statistics)

    def _is_on_probation(self) -> bool:
        length = self.settings.first_probation * 2 ** self._recent_alarms()
        return length > 0 and not self.stopped and self._proven <= length

    def _recent_alarms(self) -> int:
        return sum(self.next_batch - 1 - event["batch"] < self.settings.history for event in self.events)

    def _reference(self) -> WindowMeasures | None:
        """What to compare with; ``None`` while there is too little to go by."""
        if self.settings.compare == "source":
            return self._source.measures() if 2 * len(self._source.batches) >= self.settings.window else None
        if len(self._recent.batches) < self.settings.window or not self._past:
            return None
        shares, entropies, norms = zip(*map(astuple, self._past), strict=True)
        return WindowMeasures(max(shares), median(entropies), median(norms))

    def _judge(self, now: WindowMeasures, reference: WindowMeasures) -> str | None:
        """Which signal there is; the class's documentation has the rules."""
        share, usual_share = now.largest_class_share, reference.largest_class_share
        entropy, usual_entropy = now.entropy_of_log_k, reference.entropy_of_log_k
        if self.settings.compare == "source":
            gained = float((self._recent.shares - self._source.shares).max())
            one_class, few_classes = min(gained, 3 * (share - usual_share)) > self.settings.share_excess, True
        else:
            one_class = share > usual_share + self.settings.share_excess and entropy < usual_entropy / 2
            few_classes = share >= 0.9 or share > usual_share + self.settings.share_excess / 3
        if now.logit_norm > self.settings.norm_ratio * reference.logit_norm:
            return "logit_norm"
        if one_class:
            return "one_class"
        no_entropy = entropy < min(self.settings.entropy_floor, usual_entropy / 4)
        return "no_entropy" if no_entropy and few_classes else None

    def _accept(self, measures: WindowMeasures) -> None:
        """A healthy batch: a window of history, perhaps a snapshot."""
        window = self.settings.window
        self._proven += 1
        if len(self._recent.batches) == window:
            self._pending.append(measures)
            if len(self._pending) > window:
                self._past.append(self._pending.pop(0))
        self._since += 1
        if self._since == window:
            self._healthy = self._candidate
        if self._since >= max(window, self.settings.snapshot_every):
            self._candidate, self._since = take(self.method), 0

    def _act(
        self,
        images: Tensor,
        logits: Tensor,
        reason: str,
        values: WindowMeasures | None = None,
        reference: WindowMeasures | None = None,
    ) -> Tensor:
        """Note an alarm, carry out the action, and predict the batch again where that changed the method."""
        batch, action, retries = self.next_batch - 1, self.settings.action, self.settings.retries or math.inf
        gives_up = action in ("reset", "rollback") and self._recent_alarms() + 1 >= retries
        event = {
            "batch": batch,
            "reason": reason,
            "values": None if values is None else asdict(values),
            "reference": None if reference is None else asdict(reference),
            "action": "reset and stop" if gives_up else action,
        }
        self.events.append(event)
        excess = len(self.events) - max(EVENTS, self.settings.history)
        if excess > 0:
            del self.events[:excess]
            self.dropped_events += excess
        self._proven = 0
        warnings.warn(f"Guard: {reason} at batch {batch}: {event['action']}.", stacklevel=4)
        if self.on_event is not None:
            self.on_event(event)
        if action == "warn":
            self._forget()
            return logits
        if action == "reset" or gives_up:
            self.method.reset()
        else:
            assert self._healthy is not None
            put_back(self.method, self._healthy)
        self.stopped = gives_up or action == "stop"
        self._begin()
        return self.method.predict(images, statistics="batch")

    def _forget(self) -> None:
        self._recent.batches.clear()
        self._source.batches.clear()
        self._pending.clear()

    def _begin_if_changed(self) -> None:
        """At the first batch, and after changes that the watch did not see."""
        if self._candidate is not None and self._revision == self.method.revision:
            return
        if self._candidate is not None:
            warnings.warn(
                f"The watched method ('{self.method.name}') was called, reset or loaded without its watch, so what the "
                "watch has seen says nothing about it and begins anew. Use the watch in its place: watch(images), "
                "watch.reset(), watch.load_state_dict(state).",
                stacklevel=4,
            )
        self._begin()

    def _begin(self) -> None:
        """Another state than before: what was seen of the old one says nothing about it."""
        self._forget()
        self._healthy = self._candidate = take(self.method)
        self._since = 0
        self._revision = self.method.revision
