"""Watches a method with monitors and acts: warn, reset, roll back, or stop adapting. Knows no trainer."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from inspect import ismethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tta.errors import (
    ConfigError,
    DataError,
    InputError,
    NotPreparedError,
    check_choice,
    check_range,
    did_you_mean,
)
from lightning_tta.evidence.labels import read_names
from lightning_tta.guard.gathering import GATHER, Gathering
from lightning_tta.guard.monitors.base import Monitor, TakesLabels
from lightning_tta.guard.monitors.collapse import Compare
from lightning_tta.guard.monitors.kinds import make_monitors
from lightning_tta.guard.seeing import HeadCall, Sight
from lightning_tta.methods.base.method import PredictWith, TTAMethod
from lightning_tta.methods.base.state import put_back, size, take
from lightning_tta.methods.components.wanted import Wanted, listed

Alarm = tuple[str, str, dict[str, Any]]
"""A monitor's name, the reason, and what it went by."""
Action = Literal["warn", "reset", "rollback", "stop"]
EVENTS = 256
"""Alarms that a watch remembers, at most, or as many as its history has batches, for each monitor."""
INFORMING = ("poem", "drift", "aetta")
"""Monitors whose alarms are noted and change nothing, unless ``act_on`` says otherwise.

The first two speak of the stream, not of the method. AETTA's rule alarms on many healthy runs where the stream changes.
"""
WATCH = "watch"
"""Of an alarm of the watch itself: the name in the place of a monitor's."""
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
_LATER: dict[str, Any] = {"next_image": 0, "_monitors_prepared": True}  # what states of earlier versions lack
_GATHERED: dict[str, Any] = {"gathered": {"batches": 1, "parts": []}}  # the same
_OF_COLLAPSE = ("compare", "window", "history", "share_excess", "entropy_floor", "norm_ratio")
_WATCHES: weakref.WeakKeyDictionary[TTAMethod, weakref.ref[Watch]] = weakref.WeakKeyDictionary()


MonitorsWanted = str | dict[str, Any] | list[str | dict[str, Any]]


def _collapse_alone() -> MonitorsWanted:
    return ["collapse"]


@dataclass(frozen=True)
class WatchSettings:
    """What :class:`Watch` looks at, and what it does on an alarm.

    Attributes:
        action: ``warn``, ``reset`` (to the source), ``rollback`` (to the last healthy snapshot) or ``stop`` (the same,
            and only predict from then on).
        compare: Of ``collapse``: what is normal: ``source`` (what the source predicts: one more forward pass a batch)
            or ``history`` (the stream so far: no cost, later and less sure).
        window: Batches that ``collapse`` judges together, and that a snapshot must go without alarm; at least 2. A
            window should hold images of several classes.
        history: Healthy windows that make the history of ``collapse``; also the batches in which alarms are counted
            for ``retries``; at least 1.
        share_excess: Of ``collapse``: how far the most predicted class's share may be above the reference, in (0, 1].
        entropy_floor: Of ``collapse``: mean entropy that counts as near zero, as a share of log K, in [0, 1].
        norm_ratio: Of ``collapse``: how many times the reference the logit norm may be, above 1.
        snapshot_every: Batches from snapshot to snapshot, at least 1.
        retries: Batches with an alarm that acts, within ``history`` batches, after which reset and rollback stop
            adapting, at least 1; ``None``: no limit.
        probation: The source predicts until so many batches, at least 0, went by without alarm, from the start and
            after each alarm; ``None``: two windows with ``collapse`` against the source, none otherwise, or with
            ``warn``.
        monitors: Names, or dicts of ``kind`` and its options, one of each kind; options of ``collapse`` are by default
            the ones above.
        act_on: Names of the monitors whose alarms act, or one name; those of the others are noted. ``None``: all but
            ``poem`` and ``drift``, whose alarms say that the stream has changed, not that the method is worse, and
            ``aetta``, whose estimate falls with the stream, too.
        gather: Images, at least 1, that monitors which need several look at together
            (:class:`~lightning_tta.guard.gathering.Gathering`). Where batches have fewer, all numbers of batches above
            are of so many images together.

    Raises:
        ConfigError: If one is out of range, or there is no such monitor.
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
    monitors: MonitorsWanted = field(default_factory=_collapse_alone)
    act_on: str | list[str] | None = None
    gather: int = GATHER

    def __post_init__(self) -> None:
        check_choice("action", self.action, get_args(Action))
        lowest = {"window": 2, "history": 1, "snapshot_every": 1, "retries": 1, "probation": 0, "gather": 1}
        for name, low in lowest.items():
            if getattr(self, name) is not None or name not in ("retries", "probation"):
                check_range(name, getattr(self, name), low, integer=True)
        if self.probation and self.compare == "history":
            raise ConfigError("During probation the source predicts: use compare='source', or leave out probation.")
        monitors = self.make_monitors()
        for acting in listed(self.act_on):
            check_choice("act_on", acting, (*monitors,))
        defaults = {each.name: each.default for each in fields(self)}
        idle = [] if "collapse" in monitors else [n for n in _OF_COLLAPSE if n not in ("window", "history")]
        for name in idle:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is of monitor 'collapse', which is not among monitors: "
                    f"{', '.join(monitors) or 'none'}. Add it, or leave {name} out."
                )

    def make_monitors(self) -> dict[str, Monitor]:
        """New monitors, by name.

        Raises:
            ConfigError: If one is wanted twice, or does not exist, or an option is wrong.
        """
        wanted: list[Wanted] = []
        for each in listed(self.monitors):
            if each == "collapse" or (isinstance(each, Mapping) and each.get("kind") == "collapse"):
                options = {} if isinstance(each, str) else each
                each = {"kind": "collapse", **{name: getattr(self, name) for name in _OF_COLLAPSE}, **options}
            wanted.append(each)
        monitors = make_monitors(wanted)
        by_name = {monitor.name: monitor for monitor in monitors}
        if len(by_name) < len(monitors):
            raise ConfigError(f"monitors={self.monitors!r} names a monitor twice. Name each once.")
        return by_name

    def acts(self, monitor: str) -> bool:
        """Whether alarms of a monitor act."""
        return monitor not in INFORMING if self.act_on is None else monitor in listed(self.act_on)

    @property
    def first_probation(self) -> int:
        """Batches of a probation without an alarm before it."""
        collapse = self.make_monitors().get("collapse")
        shown = collapse is not None and "same_source" in collapse.wants and self.action != "warn"
        return (2 * self.window if shown else 0) if self.probation is None else self.probation


def check_names_of_settings(reader: str, options: Iterable[str]) -> None:
    """Refuse options that are no settings; ``reader`` is who got them.

    Raises:
        ConfigError: With those that there are.
    """
    known = [each.name for each in fields(WatchSettings)]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{reader} has no option {name!r}.{did_you_mean(name, known)} Its settings: {', '.join(known)}."
            )


class Watch:
    """A method that is watched: has its interface, and shows every batch that was answered to monitors.

    ::

        watch = Watch(lightning_tta.adapt(model, "tent"), action="rollback", monitors=["collapse", "poem", "aetta"])
        watch.prepare(source_batches)  # where the method or a monitor needs it: watch.needs_source
        logits = watch(images)         # as method(images)
        watch.events                   # what happened
        watch.estimates                # accuracy by now, as monitors estimate it

    **Alarms.** Each monitor says what it looks for (:data:`~lightning_tta.guard.monitors.kinds.MONITORS`). The watch
    itself looks for ``non_finite``: logits of a good image, or a tensor that the method may change. Monitors get only
    finite logits.

    **Probation.** No signal is as quick as harm. So the source predicts while the method adapts unseen, from the start
    and after each alarm that acts, for ``probation`` batches, twice as many for each such alarm within the last
    ``history`` batches. Monitors see what the method would have answered.

    **Batches of a few images.** Monitors that need several images to say something get them gathered, ``gather`` at a
    time; until they have looked at them, no batch counts as healthy. So windows, probation and snapshots are then of as
    many times ``gather`` images, and what an alarm undoes goes back to before the first of the gathered ones.

    **Actions.** ``warn`` only notes. ``reset``: back to the source. ``rollback``: back to the last healthy snapshot
    (declared tensors, optimizers, memory, counters). ``stop``: the same, and from then on only predict. The batch that
    raised the alarm is predicted again after the action. A snapshot is taken every ``snapshot_every`` batches and is
    healthy once ``window`` further batches went by without alarm: two are kept, in memory. If alarms came in
    ``retries`` of the last ``history`` batches, reset and rollback stop adapting as well, at the source. An alarm of a
    monitor that is not to act (``act_on``) is noted as ``inform``, as are all once the method has stopped: only
    monitors that compare it with its source (``collapse``, ``consensus``) see nothing then.

    **Threads.** As of the method, one call runs at a time; ``with watch.hold()`` makes several one. Calls that change
    the method should all go through the watch: after one that did not, it warns, and what it has seen begins anew.

    Args:
        method: Used and changed in place. Whatever is not named here is the method's: ``watch.name``, ``watch.model``.
        action: As in :class:`WatchSettings`.
        settings: The others of :class:`WatchSettings`.

    Attributes:
        settings: The settings.
        monitors: By name.
        events: One dict an alarm: ``batch``, ``monitor``, ``reason``, ``values`` and ``reference`` (of ``collapse``:
            entropy, share, norm), ``action`` as carried out. The latest 256, or as many as ``history`` has batches,
            for each monitor.
        dropped_events: How many alarms there were before them.
        numbers: What monitors say of the last batch, by name, and under ``<monitor>_accuracy`` their estimates.
        on_event: If set, called with each of them.
        stopped: Whether the method only predicts by now.
        on_probation: Batches so far for which the source predicted.
        forwards: Forward passes so far for monitors and probation.
        next_batch: Number of the next batch; counted here, unless somebody who skips batches sets it.
        next_image: Number of the next image, counted here: its index, unless the call gives another.

    Raises:
        ConfigError: If a setting is out of range, or ``method`` is no method. Later, if a setting is assigned to.
        UnsupportedModelError: If a monitor wants features, and the net does not end in a linear layer.
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
        check_names_of_settings("Watch", settings)
        self.settings = WatchSettings(action, **settings)
        self.monitors = self.settings.make_monitors()
        self._sight = Sight(method, self.monitors.values())
        self._gathering = Gathering(self._sight, self.settings.gather)
        self.events: list[dict[str, Any]] = []
        self.dropped_events = 0
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        self.stopped = False
        self.on_probation = self.next_batch = self.next_image = 0
        self.next_index: Sequence[int | str] | None = None  # of the next call, from somebody who cannot give it there
        self._proven = 0  # batches without alarm
        self._first_probation = self.settings.first_probation
        self._monitors_prepared = not any(monitor.needs_source for monitor in self.monitors.values())
        self.numbers: dict[str, float] = {}
        self._healthy: dict[str, Any] | None = None
        self._candidate: dict[str, Any] | None = None  # taken at the first batch, when the method is prepared
        self._since = 0  # batches since the candidate was taken
        self._only_predicts = False  # on the last batch
        self._revision = method.revision  # of the method, when this watch last changed it
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_is_made") and (name not in vars(self) or name in ("settings", "method", "monitors")):
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
        value = getattr(self.method, name)
        if not ismethod(value) or value.__self__ is not self.method:
            return value

        @wraps(value)
        def call(*args: Any, **options: Any) -> Any:
            result = value(*args, **options)
            return self if result is self.method else result  # as of watch.to(device), watch.eval()

        return call

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with self.method.hold():  # not in the middle of a batch
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_revision": self._revision - self.method.revision}  # a copy of the method counts anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self)["_revision"] += self.method.revision
        _WATCHES[self.method] = weakref.ref(self)

    # The method's interface

    def __call__(self, images: Tensor, index: Sequence[int | str] | Tensor | None = None) -> Tensor:
        """Logits (B, K) for images (B, C, H, W): adapted on and looked at, or predicted once stopped.

        They are those of the method, or of the source on probation, or those after an action.

        Args:
            images: (B, C, H, W) in [0, 1].
            index: What to call each image in :meth:`tell`; ``None``: numbers, from 0 with the first image of all.

        Raises:
            InputError: If ``images`` are none, or ``index`` is of another length. Nothing has changed.
            NotPreparedError: If the method or a monitor needs source data and has not seen any.
        """
        with self.method.hold():
            self._check_prepared()
            if not isinstance(images, Tensor):
                return self.method(images)  # it refuses them
            given, self.next_index = self.next_index if index is None else index, None
            index = None if given is None else read_names(given)
            if index is not None and images.ndim and len(index) != len(images):
                raise InputError(f"index must name each of the {len(images)} images; it has {len(index)} entries.")
            self._only_predicts = self.stopped
            self.numbers = {}
            if not self.stopped:
                self._begin_if_changed()
            self._sight.look(self._looking())
            run = self._predict_as_stopped if self.stopped else self.method
            try:
                logits, calls = self._sight.answer(images, run)
                names = range(self.next_image, self.next_image + len(images)) if index is None else index
                self.next_image += len(images)
                return self._review(images, logits, calls, names)
            finally:
                self._revision = self.method.revision

    forward = __call__

    def predict(self, images: Tensor, *, statistics: PredictWith = "stream") -> Tensor:
        """Logits (B, K) without adapting, as ``method.predict`` gives them: the source's on probation."""
        with self.method.hold():
            if self._is_on_probation():
                return self._sight.same_source(images, statistics)
            return self.method.predict(images, statistics=statistics)

    def reset(self) -> None:
        """Return the method to the source: a new beginning, whose history still counts."""
        with self.method.hold():
            self.method.reset()
            self._begin()

    @property
    def needs_source(self) -> bool:
        """Whether :meth:`prepare` must run before the stream: for the method, or a monitor."""
        return self.method.needs_source or any(monitor.needs_source for monitor in self.monitors.values())

    @property
    def prepared(self) -> bool:
        """Whether it has, or need not."""
        return self.method.prepared and self._monitors_prepared

    def prepare(
        self,
        source_batches: Iterable[Mapping[str, Tensor]],
        held_out_batches: Iterable[Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Show source data to the method, and to the monitors that need it; once, before the stream.

        Args:
            source_batches: Batches {image (B, C, H, W) in [0, 1], label (B,)}, as of the method.
            held_out_batches: For the monitors, images that the source was not trained on: it is surer of those that it
                was trained on, and a monitor would take any new image for a shift. ``None``: the same.

        Raises:
            DataError: If both need data, and they are an iterator, which gives them once; or they are too few.
        """
        wanting = [monitor for monitor in self.monitors.values() if monitor.needs_source]
        shows_method = not self.method.prepared or not wanting
        if shows_method and wanting and held_out_batches is None and hasattr(source_batches, "__next__"):
            raise DataError(
                f"'{self.method.name}' and the monitors both look at the source batches, and an iterator gives them "
                f"once: got a {type(source_batches).__name__}. Give a list of batches, or a DataLoader."
            )
        with self.method.hold():
            if shows_method:
                self.method.prepare(source_batches)
            if wanting:
                self._monitors_prepared = False  # if one refuses, others have begun anew
                self._sight.look(wanting)
                seen = self._sight.prepared(source_batches if held_out_batches is None else held_out_batches)
                for monitor in wanting:
                    monitor.prepare(seen)
            self._monitors_prepared = True
            if self._candidate is not None:
                self._begin()

    @property
    def estimates(self) -> dict[str, float]:
        """Accuracy of the method's answers by now, in [0, 1], by the monitors that estimate it."""
        with self.method.hold():
            return self._estimates()

    def tell(self, index: Sequence[int | str] | Tensor, labels: Sequence[int] | Tensor) -> None:
        """Labels that have become known, for the monitors that take them; the method never gets them.

        Args:
            index: What the images were called, see :meth:`__call__`.
            labels: Class of each.

        Raises:
            ConfigError: If there is no such monitor.
            InputError: If these are no names or no classes, or there are not as many labels as names.
        """
        takers = [monitor for monitor in self.monitors.values() if isinstance(monitor, TakesLabels)]
        if not takers:
            raise ConfigError(
                f"None of the monitors ({', '.join(self.monitors) or 'none'}) takes labels. Make the watch with "
                "monitors=[..., 'labels']."
            )
        names = read_names(index)
        try:
            classes = torch.as_tensor(labels).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"Labels must be whole numbers, one for each image; got {type(labels).__name__} {labels!r:.60}."
            ) from None
        if classes.shape != (len(names),):
            raise InputError(f"Give one label for each image; got {tuple(classes.shape)} for {len(names)} images.")
        with self.method.hold():
            for taker in takers:
                taker.tell(names, classes)

    @property
    def forwards(self) -> int:
        """Forward passes so far for monitors and probation."""
        return self._sight.forwards

    @property
    def stats(self) -> dict[str, float]:
        """The method's, the numbers and estimates of monitors, and ``guard_alarms``.

        ``only_predicted`` is 1 for a batch that the method did not adapt on, ``source_answered`` for one on probation.
        """
        with self.method.hold():
            stats = {"only_predicted": 1.0} if self._only_predicts else self.method.stats
            return {**stats, **self.numbers, "guard_alarms": float(len(self.events) + self.dropped_events)}

    def unread_stats(self) -> dict[str, Tensor | float]:
        """The same, where it is: nobody waits for the device."""
        with self.method.hold():
            stats = {"only_predicted": 1.0} if self._only_predicts else self.method.unread_stats()
            return {**stats, **self.numbers, "guard_alarms": float(len(self.events) + self.dropped_events)}

    def state_dict(self) -> dict[str, Any]:
        """The method's state, and under ``watch`` what was seen; plain data and tensors."""
        with self.method.hold():
            seen: dict[str, Any] = {name: getattr(self, name) for name in (*_STATE, *_LATER)}
            seen |= {"events": list(self.events), "settings": asdict(self.settings)}
            seen["gathered"] = self._gathering.state_dict()
            seen["monitors"] = {name: monitor.state_dict() for name, monitor in self.monitors.items()}
            return {**self.method.state_dict(), STATE_KEY: seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`.

        Raises:
            ConfigError: If it is no state of a watch with these settings, or does not fit the method. Nothing has
                changed.
        """
        mine, seen = asdict(self.settings), copy.deepcopy(state.get(STATE_KEY) if isinstance(state, Mapping) else None)
        seen = _renewed(seen, mine) if isinstance(seen, Mapping) else {}
        if not {*_STATE, "monitors"} <= seen.keys():
            raise ConfigError(
                "This is no state of a watch, but perhaps of a method alone: load it before the method is watched, "
                "method.load_state_dict(state). A watch loads what its own state_dict() gave."
            )
        theirs = seen["settings"]
        others = [
            f"{name}={value!r}, here {mine.get(name)!r}" for name, value in theirs.items() if mine.get(name) != value
        ]
        if not others and seen["monitors"].keys() != self.monitors.keys():  # early versions did not say their settings
            others.append(f"monitors={[*seen['monitors']]}, here {[*self.monitors]}")
        if others:
            raise ConfigError(f"This state is of a watch with other settings: {'; '.join(others)}. Use the same.")
        for name, monitor in self.settings.make_monitors().items():  # others first: all or nothing
            try:
                monitor.load_state_dict(seen["monitors"][name])
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise ConfigError(
                    f"What this state has of monitor '{name}' is none of it ({type(error).__name__}: {error}). A watch "
                    "loads what its own state_dict() gave."
                ) from error
        with self.method.hold():
            self.method.load_state_dict({name: value for name, value in state.items() if name != STATE_KEY})
            for name in (*_STATE, *_LATER):
                setattr(self._sight if name == "forwards" else self, name, seen[name])
            for name, monitor in self.monitors.items():
                monitor.load_state_dict(seen["monitors"][name])
            self._gathering.load_state_dict(seen["gathered"])
            self.numbers = {}
            self._revision = self.method.revision

    # What was seen

    def report(self) -> dict[str, Any]:
        """For the run's report."""
        names = ("events", "dropped_events", "stopped", "on_probation", "forwards")
        seen = {name: copy.deepcopy(getattr(self, name)) for name in names}
        monitors = {
            name: {
                "acts": self.settings.acts(name),
                "values": monitor.values(),
                "estimates": monitor.is_estimator,
                "estimate": monitor.estimate(),
            }
            for name, monitor in self.monitors.items()
        }
        return {"settings": asdict(self.settings), **seen, "monitors": monitors}

    def sizes(self) -> dict[str, int]:
        """Bytes kept: the two snapshots."""
        return {"healthy": size(self._healthy), "candidate": size(self._candidate)}

    # Internals

    def _check_prepared(self) -> None:
        if not self._monitors_prepared:
            names = ", ".join(repr(name) for name, monitor in self.monitors.items() if monitor.needs_source)
            raise NotPreparedError(
                f"Monitor {names} must see source images before the stream: call watch.prepare(source_batches) with "
                "batches {'image': (B, C, H, W) in [0, 1]}, best of images that the source was not trained on."
            )

    def _looking(self) -> list[Monitor]:
        """The monitors that see the next batch; once stopped, the method is its source, or what proved healthy."""
        monitors = self.monitors.values()
        return [monitor for monitor in monitors if not (self.stopped and "same_source" in monitor.wants)]

    def _estimates(self) -> dict[str, float]:
        values = {name: monitor.estimate() for name, monitor in self.monitors.items()}
        return {name: value for name, value in values.items() if value is not None}

    def _predict_as_stopped(self, images: Tensor) -> Tensor:
        return self.method.predict(images, statistics="batch")

    def _review(self, images: Tensor, logits: Tensor, calls: Sequence[HeadCall], index: Sequence[int | str]) -> Tensor:
        """Show a batch that was just answered to the monitors, and act."""
        self.next_batch += 1
        if self.stopped and not self._sight.monitors:
            return logits
        mask = (logits != 0).any(1)  # rows of zeros: images left out
        tensors = (logits[mask], *self.method.adaptable.values())
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            return logits if self.stopped else self._act(images, logits, [(WATCH, "non_finite", {})])
        if not mask.any():
            return logits
        source, length = None, self._probation()
        if self._proven < length:
            source = self._sight.same_source(images)
            self._sight.forwards += 1
        rows: Callable[[Tensor], Tensor] = (lambda tensor: tensor) if mask.all() else (lambda tensor: tensor[mask])
        names = [name for name, usable in zip(index, mask.tolist(), strict=True) if usable]
        same = None if source is None else rows(source)
        shown = self._gathering.show(rows(images), rows(logits).detach(), calls, names, same_source=same)
        alarms: list[Alarm] = []
        for monitor in shown:
            self.numbers |= monitor.values()
            if reason := monitor.alarm():
                alarms.append((monitor.name, reason, monitor.evidence()))
        acting = [alarm for alarm in alarms if self.settings.acts(alarm[0]) and not self.stopped]
        for alarm in alarms:
            if alarm not in acting:
                self._note(alarm, "inform", stacklevel=4)
        if acting:
            return self._act(images, logits, acting)
        self.numbers |= {f"{name}_accuracy": value for name, value in self._estimates().items()}
        if self.stopped:
            return logits
        if not self._gathering.waiting:
            self._accept()
        if source is None or self._proven > length:
            return logits
        self.on_probation += 1
        self.numbers["source_answered"] = 1.0
        return source

    def _probation(self) -> int:
        """Batches without alarm for which the source predicts, as things are."""
        return 0 if self.stopped else self._first_probation * int(2 ** self._recent_alarms())

    def _is_on_probation(self) -> bool:
        return 0 < self._probation() >= self._proven

    def _recent_alarms(self) -> int:
        """Of the last batches before this one, or as many times those that were gathered, those with an alarm."""
        last, history = self.next_batch - 1, self.settings.history * self._gathering.batches
        acted = {event["batch"] for event in self.events if event["action"] != "inform"}
        return sum(last - batch < history for batch in acted)

    def _accept(self) -> None:
        """A healthy batch: perhaps a snapshot."""
        window = self.settings.window
        self._proven += 1
        self._since += 1
        if self._since == window:
            self._healthy = self._candidate
        if self._since >= max(window, self.settings.snapshot_every):
            self._candidate, self._since = take(self.method), 0

    def _note(self, alarm: Alarm, action: str, stacklevel: int) -> None:
        """Remember an alarm, warn and tell of it."""
        monitor, reason, evidence = alarm
        event = {"batch": self.next_batch - 1, "monitor": monitor, "reason": reason}
        event |= {"values": None, "reference": None, **evidence, "action": action}
        self.events.append(event)
        excess = len(self.events) - max(EVENTS, self.settings.history) * max(1, len(self.monitors))
        if excess > 0:
            del self.events[:excess]
            self.dropped_events += excess
        warnings.warn(f"Guard: {reason} at batch {event['batch']}: {action}.", stacklevel=stacklevel)
        if self.on_event is not None:
            self.on_event(event)

    def _act(self, images: Tensor, logits: Tensor, alarms: Sequence[Alarm]) -> Tensor:
        """Note alarms, carry out the action, and predict the batch again where that changed the method."""
        action, retries = self.settings.action, self.settings.retries or math.inf
        gives_up = action in ("reset", "rollback") and self._recent_alarms() + 1 >= retries
        for alarm in alarms:
            self._note(alarm, "reset and stop" if gives_up else action, stacklevel=5)
        self._proven = 0
        if action == "warn":
            if alarms[0][0] == WATCH:
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
        self._gathering.forget()
        for monitor in self.monitors.values():
            monitor.forget()

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


def _renewed(seen: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved, with what earlier versions lacked; they had one monitor, whose state lay beside the others."""
    seen = {"dropped_events": 0, "settings": mine, **_LATER, **_GATHERED, **seen}
    seen["settings"] = asdict(WatchSettings()) | seen["settings"]
    of_collapse = {name: seen.pop(name) for name in ("_recent", "_source", "_past", "_pending") if name in seen}
    return {"monitors": {"collapse": of_collapse}, **seen} if len(of_collapse) == 4 else seen
