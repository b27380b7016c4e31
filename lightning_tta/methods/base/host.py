"""What the host knows of a tensor's value without waiting for a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class _Local(threading.local):
    recording = False


_LOCAL = _Local()


@contextmanager
def recording() -> Iterator[None]:
    """While active, in this thread, no value counts as known: what is recorded must hold for all later values."""
    before, _LOCAL.recording = _LOCAL.recording, True
    try:
        yield
    finally:
        _LOCAL.recording = before


def is_recording() -> bool:
    """Whether a step is being recorded in this thread."""
    return _LOCAL.recording


def host_has(tensor: Tensor) -> bool:
    """Whether the host can read this tensor at no cost."""
    return tensor.device.type == "cpu" and not _LOCAL.recording
