"""Ctrl-C and SIGTERM: a stream ends after the batch that is being done, everything else at once, and says so.

Python's own KeyboardInterrupt comes in the middle of a batch, where a state cannot be saved.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Trainer

from lightning_tta.errors import Interrupted

ECHO = 0.1
"""Seconds in which a second Ctrl-C is taken for the first: a launcher passes on what its processes got themselves."""
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
SHOW_CURSOR = "\x1b[?25h\n"
"""A progress bar hides the cursor of a terminal."""


class _Received:
    """The first signal that this process got, and what a handler must know."""

    number: int | None = None
    at = 0.0
    waits = False  # something looks at `number` after every batch
    depth = 0
    process = 0


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Received.process:  # a forked worker of a data loader: the run ends it
        return
    if _Received.number is None:
        _Received.number, _Received.at = number, time.monotonic()
        if not _Received.waits:
            raise Interrupted(number)
    elif number == signal.SIGINT and time.monotonic() - _Received.at > ECHO:
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
            sys.stderr.flush()
        os._exit(128 + number)


@contextmanager
def listening(*numbers: int) -> Iterator[None]:
    """While this lasts, these signals raise :class:`~lightning_tta.errors.Interrupted`, now or after the batch.

    A second Ctrl-C ends the process at once. Handlers of the user's own, and signals that are ignored, stay as they
    are; a thread other than the main one gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler in DEFAULTS}
    if _Received.depth == 0:
        _Received.number, _Received.process = None, os.getpid()
    _Received.depth += 1
    try:
        for number in before:
            signal.signal(number, _handle)
        yield
    finally:
        _Received.depth -= 1
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def waiting() -> Iterator[None]:
    """While this lasts, Ctrl-C (and SIGTERM, where it is listened to) waits until somebody asks for it."""
    with listening(signal.SIGINT):
        before, _Received.waits = _Received.waits, True
        try:
            yield
        finally:
            _Received.waits = before


def ask(number: int) -> None:
    """End the run of this process after its batch, as if it had got this signal."""
    if _Received.waits and _Received.number is None:
        _Received.number, _Received.at = number, time.monotonic()


def received(trainer: Trainer) -> int | None:
    """The signal that is to end this run; SIGTERM is noted by Lightning too."""
    if _Received.depth and _Received.number is not None:
        return _Received.number
    return signal.SIGTERM if trainer.received_sigterm else None
