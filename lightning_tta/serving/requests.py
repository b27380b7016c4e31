"""Requests that wait for an answer, gathered into micro-batches."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_tta.errors import ClosedError, InputError, QueueFullError, check_range

T = TypeVar("T")


@dataclass
class Request(Generic[T]):
    """Images (B, C, H, W) of one caller, where the answer goes, and when they came."""

    images: Tensor
    future: Future[T] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> Any:
        """Requests of one kind can be gathered: the shape of an image, and its dtype."""
        return (*self.images.shape[1:], self.images.dtype)


class Requests(Generic[T]):
    """Requests from many threads, for one that takes them: in the order in which they came, those of a kind together.

    A micro-batch is due once there are ``max_batch`` images of the kind of the oldest request, or this one has waited
    for ``max_wait`` seconds. A request is never split.

    Args:
        max_batch: Images of a micro-batch, and of a request, at most.
        max_wait: Seconds that a request waits for others.
        max_queue: Images that may wait, at most; at least ``max_batch``.
    """

    def __init__(self, max_batch: int, max_wait: float, max_queue: int) -> None:
        check_range("max_batch", max_batch, 1, integer=True)
        check_range("max_wait_ms", 1000 * max_wait, 0)
        check_range("max_queue", max_queue, max_batch, integer=True)
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._waiting: deque[Request[T]] = deque()
        self._images: Counter[Any] = Counter()  # that wait, by kind
        self._total = 0
        self._closed = False
        self._change = threading.Condition()

    def put(self, images: Tensor) -> Future[T]:
        """Let images (B, C, H, W) wait; their answer comes into what is returned.

        Raises:
            InputError: If they are more than ``max_batch``.
            QueueFullError: If too many wait already.
            ClosedError: After :meth:`close`.
        """
        number = len(images)
        if number > self.max_batch:
            raise InputError(
                f"A request of {number} images; at most max_batch={self.max_batch} go in one. Send several requests."
            )
        request: Request[T] = Request(images)
        with self._change:
            if self._closed:
                raise ClosedError("This shadow is closed and answers no more. Make a new one.")
            if self._total + number > self.max_queue:
                raise QueueFullError(
                    f"{self._total} images wait for an answer, and max_queue is {self.max_queue}: requests come faster "
                    "than they are answered. Try again later; or raise max_queue, or serve from more machines."
                )
            self._waiting.append(request)
            self._images[request.kind] += number
            self._total += number
            if len(self._waiting) == 1 or self._images[request.kind] >= self.max_batch:
                self._change.notify()
        return request.future

    def take(self) -> list[Request[T]]:
        """Wait for the next micro-batch; empty after :meth:`close`, once all were taken.

        Requests whose caller has gone are left out.
        """
        with self._change:
            while True:
                if not self._waiting:
                    if self._closed:
                        return []
                    self._change.wait()
                    continue
                oldest = self._waiting[0]
                left = oldest.since + self.max_wait - time.monotonic()
                if left <= 0 or self._closed or self._images[oldest.kind] >= self.max_batch:
                    if taken := self._gather(oldest.kind):
                        return taken
                    continue
                self._change.wait(left)

    def _gather(self, kind: Any) -> list[Request[T]]:
        taken: list[Request[T]] = []
        others: deque[Request[T]] = deque()
        images, full = 0, False
        for request in self._waiting:
            number = len(request.images)
            full = full or (request.kind == kind and images + number > self.max_batch)  # later ones do not overtake
            if request.kind != kind or full:
                others.append(request)
                continue
            self._images[kind] -= number
            self._total -= number
            if request.future.set_running_or_notify_cancel():
                taken.append(request)
                images += number
        if not self._images[kind]:
            del self._images[kind]  # of kinds there may be any number
        self._waiting = others
        return taken

    def wait(self) -> bool:
        """Whether one is there, or comes within ``max_wait``."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed, self.max_wait)
            return bool(self._waiting)

    def close(self) -> None:
        """Take no more; what waits is still given out."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def refuse(self, error: Exception) -> None:
        """Answer all that wait with an error."""
        with self._change:
            waiting, self._waiting = self._waiting, deque()
            self._images.clear()
            self._total = 0
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)

    @property
    def closed(self) -> bool:
        """Whether no more are taken."""
        return self._closed

    @property
    def images(self) -> int:
        """How many wait."""
        return self._total

    def __bool__(self) -> bool:
        return bool(self._waiting)


def joined(requests: list[Request[T]]) -> Tensor:
    """Images (B, C, H, W) of all, copied: a caller may write to its own again once it has its answer."""
    return torch.cat([request.images for request in requests])
