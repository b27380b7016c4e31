"""Files that grow with a stream: whole lines, which are gathered and written now and then."""

from __future__ import annotations

import time
from typing import IO

PATIENCE = 1.0
"""Seconds after which lines that were gathered are written with the next one."""


class GrowingFile:
    """Gathers text and writes it about once a second, in whole pieces, so that a batch costs no call of the system.

    What must be on the disk is flushed: before a state is saved that counts it, and where the run ends in any way.

    Args:
        file: What it is written to.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self._pieces: list[str] = []
        self._written = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written."""
        return not self._pieces and self.file.tell() == 0

    def write(self, text: str) -> int:
        """Add whole lines."""
        self._pieces.append(text)
        if time.monotonic() - self._written >= PATIENCE:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Write what was gathered, and hand it to the system."""
        self._written = time.monotonic()
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self.file.write("".join(pieces))
            self.file.flush()

    def close(self) -> None:
        """Write what was gathered, and close the file."""
        try:
            self.flush()
        finally:
            self.file.close()
