"""What happened in a server: the latest in memory, all as JSON lines in a file."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

REMEMBERED = 256
"""Events in memory, at most."""


class EventLog:
    """Appends one JSON object a line: ``time`` (seconds since 1970), ``event``, and what belongs to it.

    Safe to be called from many threads. The file is opened for each line, so it may be moved away at any time. A line
    that a kill has cut off is removed at the next start.

    Args:
        path: The file; ``None``: none.

    Attributes:
        events: The latest of them.
        lost: Lines that the operating system refused to write.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.events: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.lost = 0
        self._lock = threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_to_whole_lines(path)

    def __call__(self, event: str, **values: Any) -> None:
        """Note an event."""
        entry = {"time": round(time.time(), 3), "event": event, **_plain(values)}
        with self._lock:
            self.events.append(entry)
            if self.path is None:
                return
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(entry, allow_nan=False) + "\n")
            except OSError:  # a full disk must not end the service
                self.lost += 1


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_to_whole_lines(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = end = file.seek(0, 2)
        while end > 0:
            start = max(end - 2**16, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)
