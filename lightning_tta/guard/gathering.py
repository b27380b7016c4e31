"""Monitors that need several images to say something get them together, however few come at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_tta.errors import check_range
from lightning_tta.guard.monitors.base import Monitor, Seen, Want
from lightning_tta.guard.seeing import HeadCall, Sight

GATHER = 16
"""Images that monitors which gather look at together, by default."""
_TENSORS = ("logits", "source", "same_source", "features")


@dataclass(frozen=True)
class _Part:
    """An answered batch that waits; of its images ``None`` where nobody wants a pass over them."""

    images: Tensor | None
    seen: Seen


class Gathering:
    """Shows answered batches to the monitors of a sight.

    A share of the predictions, or a mean, of one image says nothing, and a pass over one image costs as much as one
    over several. So monitors that say so (``Monitor.gathers``) look once for every ``images`` images; batches of as
    many are shown as they come. All others look at each batch.

    What the source predicts of gathered images is with the statistics that the method would use: those of its window;
    otherwise of each batch as it came.

    Args:
        sight: Makes what there is to see.
        images: How many, at least 1.

    Attributes:
        waiting: Images that monitors have not looked at. While there are some, nothing is known of what the method
            learned from them: a state is to be proven only where there are none.
        batches: Batches of the last look.

    Raises:
        ConfigError: If ``images`` is out of range.
    """

    def __init__(self, sight: Sight, images: int = GATHER) -> None:
        check_range("gather", images, 1, integer=True)
        self.sight, self.images, self.batches = sight, images, 1
        self._parts: list[_Part] = []

    @property
    def waiting(self) -> int:  # noqa: D102
        return sum(len(part.seen.logits) for part in self._parts)

    def show(
        self,
        images: Tensor,
        logits: Tensor,
        calls: Sequence[HeadCall],
        index: Sequence[int | str] | None,
        *,
        source: Tensor | None = None,
        same_source: Tensor | None = None,
    ) -> list[Monitor]:
        """Show a batch, arguments as of :meth:`~lightning_tta.guard.seeing.Sight.seen`; who has looked at something."""
        monitors = self.sight.monitors
        whole = not self._parts and len(images) >= self.images
        later = [] if whole else [monitor for monitor in monitors if monitor.gathers]
        now = [monitor for monitor in monitors if monitor not in later]
        wants = _wanted(now) | (_wanted(later) & {"features"})
        seen = self.sight.seen(images, logits, calls, index, same_source, source=source, wants=wants)
        for monitor in now:
            monitor.see(seen)
        if not later:
            self.batches = 1
            return now
        wants = _wanted(later)
        needs = wants & {"source", "same_source", "predict"}
        self._parts.append(_Part(images if needs else None, replace(seen, predict=None, images=None)))
        if self.waiting < self.images:
            return now
        together, self.batches, self._parts = self._together(wants), len(self._parts), []
        for monitor in later:
            monitor.see(together)
        return monitors

    def forget(self) -> None:
        """The method is another from here on: what it answered before says nothing of it."""
        self._parts = []

    @torch.no_grad()
    def _together(self, wants: frozenset[Want]) -> Seen:
        sight, all_seen = self.sight, [part.seen for part in self._parts]
        images = [part.images for part in self._parts if part.images is not None]
        is_of_one_size = len({image.shape[1:] for image in images}) == 1
        source, same_source, features = (_joined(all_seen, name) for name in _TENSORS[1:])

        def passes(run: Callable[[Tensor], Tensor], at_a_time: bool) -> Tensor:
            return run(torch.cat(images)) if at_a_time else torch.cat([run(each) for each in images])

        if source is None and "source" in wants:
            source = passes(sight.source, is_of_one_size)
        if same_source is None and "same_source" in wants:
            if source is not None and sight.is_alike:
                same_source = source
            else:
                same_source = passes(sight.same_source, is_of_one_size and sight.is_apart)
                sight.forwards += 1 if is_of_one_size and sight.is_apart else len(images)
        shows = "predict" in wants and is_of_one_size
        logits = _joined(all_seen, "logits")
        assert logits is not None
        head = all_seen[-1].head
        return Seen(
            logits,
            source=source,
            same_source=same_source,
            features=features,
            head=sight.method.split.head if features is not None and head is None else head,
            predict=sight.predict if shows else None,
            images=torch.cat(images) if shows else None,
            index=[name for seen in all_seen for name in seen.index or ()] or None,
        )

    def state_dict(self) -> dict[str, Any]:
        """What waits, and the batches of the last look."""
        parts = []
        for part in self._parts:
            tensors = {name: getattr(part.seen, name) for name in _TENSORS}
            tensors["images"] = part.images
            index = None if part.seen.index is None else list(part.seen.index)
            parts.append({**{n: None if t is None else t.clone() for n, t in tensors.items()}, "index": index})
        return {"batches": self.batches, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        like = next(iter(self.sight.method.model.parameters()), torch.zeros(()))
        self.batches, self._parts = state["batches"], []
        for part in state["parts"]:
            there = {
                name: tensor.to(like.device) for name in (*_TENSORS, "images") if (tensor := part[name]) is not None
            }
            images = there.pop("images", None)
            self._parts.append(_Part(images, Seen(**there, index=part["index"])))


def _wanted(monitors: Sequence[Monitor]) -> frozenset[Want]:
    return frozenset().union(*(monitor.wants for monitor in monitors))


def _joined(parts: Sequence[Seen], name: str) -> Tensor | None:
    """A tensor of all parts; ``None`` if one of them lacks it."""
    tensors = [getattr(part, name) for part in parts]
    return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)
