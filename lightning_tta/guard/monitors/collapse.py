"""Collapse: a net that predicts one class, is sure of everything, or whose logits grow without end."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, astuple
from statistics import median
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_tta.errors import check_choice, check_range
from lightning_tta.guard.monitors.base import Monitor, Seen, Want
from lightning_tta.guard.monitors.earlier import EarlierImages
from lightning_tta.metrics import Window, WindowMeasures

Compare = Literal["history", "source"]
_WINDOWS, _HISTORY = ("_recent", "_source"), ("_past", "_pending")


class Collapse(Monitor):
    """Compares the last batches with the source on the same batches, or with the stream so far.

    **Signals**, over the last ``window`` batches; r is the reference:

    - ``logit_norm``: mean norm above ``norm_ratio`` times r.
    - ``one_class``: share of the most predicted class more than ``share_excess`` above r, and entropy below half of r:
      a stream that becomes sorted by class is no collapse. Against the source: a class whose share is more than
      ``share_excess`` above the source's share of it, and the most predicted class a third of that above r; and the
      same on earlier images.
    - ``no_entropy``: entropy / log K below ``entropy_floor`` and below a quarter of r. Against the history only where
      few classes are predicted, too: a share of 0.9, or a third of ``share_excess`` above r. A net that is sure of
      all classes alike has come to an easier domain.

    **Reference.** ``source``: what the same method predicts from its source weights on the same batches, one forward
    pass a batch. It tells the stream's one class from the net's, and needs ``window / 2`` batches. ``history`` costs
    nothing: the largest share, median entropy and median norm of the last ``history`` healthy windows, but for the
    latest ``window`` of them. It is blind for the first ``2 * window`` batches and takes them for normal; notices a
    collapse only once entropy has fallen too; never finds ``one_class`` where classes come in runs longer than a
    window; and may take a much easier, more sorted domain for a collapse.

    **Earlier images.** On a stream that is sorted by class, a source that is nearly lost is no measure: it may spread
    one class over several, which the method predicts rightly. So ``one_class`` against the source is checked on two
    images of each of the last ``earlier_windows * window`` batches: in one forward pass of the method as it is now, and
    only where the window looks like a collapse. A collapsed net predicts its class for them, too: there is an alarm if
    it does so for more than ``share_excess`` of those that the source gives to other classes, and if the share of the
    most predicted class is a third of that above the source's. With fewer than 8 of other classes the window alone
    decides. The images are of the stream: they stay when the method is reset.

    After an alarm the windows begin anew; the history stays.

    Args:
        compare: The reference.
        window: Batches that are judged together, at least 2. A window should hold images of several classes.
        history: Healthy windows that make the history, at least 1.
        share_excess: How far the most predicted class's share may be above the reference, in (0, 1].
        entropy_floor: Mean entropy that counts as near zero, as a share of log K, in [0, 1].
        norm_ratio: How many times the reference the logit norm may be, above 1.
        earlier_windows: How many windows back images are kept, in float16 on the host, for the check of ``one_class``
            against the source, at least 0; 0: no check.

    Raises:
        ConfigError: If one is out of range.
    """

    name = "collapse"
    gathers = True

    def __init__(
        self,
        compare: Compare = "source",
        window: int = 8,
        history: int = 64,
        share_excess: float = 0.3,
        entropy_floor: float = 0.01,
        norm_ratio: float = 3.0,
        earlier_windows: int = 2,
    ) -> None:
        check_choice("compare", compare, get_args(Compare))
        check_range("window", window, 2, integer=True)
        check_range("history", history, 1, integer=True)
        check_range("share_excess", share_excess, 0, 1, low_open=True)
        check_range("entropy_floor", entropy_floor, 0, 1)
        check_range("norm_ratio", norm_ratio, 1, low_open=True)
        check_range("earlier_windows", earlier_windows, 0, integer=True)
        self.compare, self.window = compare, window
        self.share_excess, self.entropy_floor, self.norm_ratio = share_excess, entropy_floor, norm_ratio
        if compare == "source":
            wants: list[Want] = ["same_source", "predict"]  # predict gives the images, too
            self.wants = frozenset(wants if earlier_windows else wants[:1])  # type: ignore[misc]
        self._earlier = EarlierImages(earlier_windows * window if compare == "source" else 0)
        self._recent, self._source = Window(window), Window(window)
        self._past: deque[WindowMeasures] = deque(maxlen=history)
        self._pending: list[WindowMeasures] = []  # windows that overlap with the present one
        self._now: WindowMeasures | None = None
        self._usual: WindowMeasures | None = None
        self._on_earlier: tuple[float, float] | None = None
        self._reason = ""

    def see(self, seen: Seen) -> None:  # noqa: D102
        self._recent.add(seen.logits)
        if self.compare == "source":
            assert seen.same_source is not None
            self._source.add(seen.same_source)
        self._now, self._usual, self._on_earlier = self._recent.measures(), self._reference(), None
        self._reason = "" if self._usual is None else self._judge(self._now, self._usual, seen)
        if seen.images is not None and seen.same_source is not None:
            self._earlier.add(seen.images, seen.same_source)
        if self._reason:
            self.forget()
        elif len(self._recent.batches) == self.window:
            self._pending.append(self._now)
            if len(self._pending) > self.window:
                self._past.append(self._pending.pop(0))

    def alarm(self) -> str:  # noqa: D102
        return self._reason

    def evidence(self) -> dict[str, Any]:
        """The measures of the window, and the reference; ``earlier``: the two gains on earlier images, if asked for."""
        values, reference = (None if each is None else asdict(each) for each in (self._now, self._usual))
        names = ("share_of_others", "largest_class_share_gain")
        earlier = None if self._on_earlier is None else dict(zip(names, self._on_earlier, strict=True))
        return {"values": values, "reference": reference, "earlier": earlier}

    def values(self) -> dict[str, float]:
        """The window against the reference: class share and entropy (of log K) minus it, norm divided by it."""
        now, usual = self._now, self._usual
        if now is None or usual is None:
            return {}
        return {
            "collapse_share_gain": now.largest_class_share - usual.largest_class_share,
            "collapse_entropy_gain": now.entropy_of_log_k - usual.entropy_of_log_k,
            "collapse_norm_ratio": now.logit_norm / max(usual.logit_norm, 1e-12),
        }

    def forget(self) -> None:  # noqa: D102
        self._recent.batches.clear()
        self._source.batches.clear()
        self._pending.clear()

    def begin(self) -> None:  # noqa: D102
        self.forget()
        self._past.clear()
        self._earlier.clear()
        self._now, self._usual, self._on_earlier, self._reason = None, None, None, ""

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        windows = {name: list(getattr(self, name).batches) for name in _WINDOWS}
        history = {name: list(map(astuple, getattr(self, name))) for name in _HISTORY}
        return windows | history | {"_earlier": self._earlier.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.begin()
        for name in _WINDOWS:
            getattr(self, name).batches.extend(map(tuple, copy.deepcopy(state[name])))
        for name in _HISTORY:
            getattr(self, name).extend(WindowMeasures(*measures) for measures in state[name])
        if "_earlier" in state:  # states of earlier versions have none
            self._earlier.load_state_dict(state["_earlier"])

    def _reference(self) -> WindowMeasures | None:
        """What to compare with; ``None`` while there is too little to go by."""
        if self.compare == "source":
            return self._source.measures() if 2 * len(self._source.batches) >= self.window else None
        if len(self._recent.batches) < self.window or not self._past:
            return None
        shares, entropies, norms = zip(*map(astuple, self._past), strict=True)
        return WindowMeasures(max(shares), median(entropies), median(norms))

    def _judge(self, now: WindowMeasures, usual: WindowMeasures, seen: Seen) -> str:
        """Which signal there is; empty: none."""
        share, usual_share = now.largest_class_share, usual.largest_class_share
        entropy, usual_entropy = now.entropy_of_log_k, usual.entropy_of_log_k
        if self.compare == "source":
            gains = self._recent.shares - self._source.shares
            one_class, few_classes = self._is_excess(float(gains.max()), share - usual_share), True
            one_class = one_class and self._holds_on_earlier(gains, seen)
        else:
            one_class = share > usual_share + self.share_excess and entropy < usual_entropy / 2
            few_classes = share >= 0.9 or share > usual_share + self.share_excess / 3
        if now.logit_norm > self.norm_ratio * usual.logit_norm:
            return "logit_norm"
        if one_class:
            return "one_class"
        no_entropy = entropy < min(self.entropy_floor, usual_entropy / 4)
        return "no_entropy" if no_entropy and few_classes else ""

    def _is_excess(self, of_class: float, of_largest: float) -> bool:
        """Whether a class has gained on the source, and the most predicted class on the source's."""
        return min(of_class, 3 * of_largest) > self.share_excess

    def _holds_on_earlier(self, gains: Tensor, seen: Seen) -> bool:
        """Whether the class that gains most, of gains (K,), gains on earlier images, too, as far as can be said."""
        if seen.predict is None or seen.images is None:
            return True
        self._on_earlier = self._earlier.gains(int(gains.argmax()), len(gains), seen.predict, seen.images)
        return self._on_earlier is None or self._is_excess(*self._on_earlier)
