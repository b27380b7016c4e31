"""A sliding window over the stream, for streams of one or a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_tta.errors import InputError, check_range
from lightning_tta.methods.base.state import INPUTS, NOT_YET, State

IMAGES, PLACE = f"{INPUTS}images", f"{INPUTS}place"


class Window:
    """The last N images of a stream, as state of a method.

    Args:
        method: Gets the state: the images (N, C, H, W), allocated at the first batch, and how many of them are new
            since the last step and how many there are at all, two whole numbers.
        images: N, at least 2.

    Attributes:
        size: N.
    """

    def __init__(self, method: State, images: int) -> None:
        check_range("window", images, 2, integer=True)
        self.size = images
        like = next((t for t in method.get_submodule("model").parameters()), torch.zeros(()))
        method.state(IMAGES, torch.full((images, 0), NOT_YET, device=like.device), source=NOT_YET)
        method.state(PLACE, torch.zeros(2, dtype=torch.int64, device=like.device), source=0)
        self._place: tuple[int, int] | None = None  # the host's copy; ``None``: somebody else has written there

    def look_again(self) -> None:
        """Somebody else has written to the state."""
        self._place = None

    def parts(self, method: State, x: Tensor) -> Iterator[tuple[Tensor, slice, bool]]:
        """Take in images (B, C, H, W), in parts of which none goes beyond the end of a window.

        Yields:
            The images of the window so far, with those of the part in it; where those are; and whether the window is
            full, which is when the method is to step.
        """
        for part in self._cut(method, x):
            new, known = self._at(method)
            held = method.value(IMAGES)
            if known and held.shape[1:] != part.shape[1:]:
                raise InputError(
                    f"window={self.size}: an image of {tuple(part.shape[1:])} (C, H, W) among others of "
                    f"{tuple(held.shape[1:])}. Images of a window go through the net together: resize them to one size."
                )
            images = method.sized(IMAGES, part.new_empty(self.size, *part.shape[1:]))
            end = new + len(part)
            full = end == self.size
            yield torch.cat([images[:new], part.to(images), images[end:known]]), slice(new, end), full
            images[new:end].copy_(part)  # only now: the net may have refused it
            self._write(method, 0 if full else end, max(known, end))

    def among(self, method: State, x: Tensor) -> tuple[Tensor, slice]:
        """Images (B, C, H, W) among the others of the window, whether they have come already or come next.

        Returns:
            The last images of the stream with ``x`` at their end, and where ``x`` is. Images of another size, and as
            many as fill a window, are by themselves.
        """
        new, known = self._at(method)
        held = method.value(IMAGES)
        others = x[:0]
        if len(x) < self.size and known and held.shape[1:] == x.shape[1:]:
            others = torch.cat([held[new:known], held[:new]]).to(x)  # the oldest first
            if torch.equal(others[-len(x) :], x):
                others = others[: -len(x)]
            others = others[max(0, len(others) + len(x) - self.size) :]
        return torch.cat([others, x]), slice(len(others), None)

    def _cut(self, method: State, x: Tensor) -> Iterator[Tensor]:
        start = 0
        while start < len(x):
            part = x[start : start + self.size - self._at(method)[0]]
            yield part
            start += len(part)

    def _at(self, method: State) -> tuple[int, int]:
        if self._place is None:
            new, known = method.value(PLACE).tolist()
            self._place = int(new), int(known)
        return self._place

    def _write(self, method: State, new: int, known: int) -> None:
        place = method.value(PLACE)
        place[0].fill_(new)
        place[1].fill_(known)
        self._place = new, known
