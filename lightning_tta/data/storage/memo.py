"""Pixels that were once decoded or corrupted are kept for the rest of the process, up to a limit."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from torch import Tensor

PATIENCE = 2.0  # seconds of work before a progress bar appears


class TensorMemo:
    """Tensors by key; beyond ``limit`` bytes the ones not used for longest are dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def get(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        """The tensor of this key, built when it is not there. Whoever gets it must not write into it."""
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        tensor = build()
        if tensor.nbytes <= self.limit:
            self._tensors[key] = tensor
            while self.nbytes > self.limit:
                self._tensors.popitem(last=False)
        return tensor

    def clear(self) -> None:
        """Drop everything."""
        self._tensors.clear()


MEMO = TensorMemo(limit=2**30)


def with_progress(count: int, text: str) -> Iterator[int]:
    """Yield ``range(count)``; work that takes more than two seconds shows a progress bar, gone at the end."""
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import Progress

    start, bar = time.monotonic(), None
    try:
        for number in range(count):
            if bar is None and time.monotonic() - start > PATIENCE:
                bar = Progress(console=Console(stderr=True), transient=True)
                task = bar.add_task(text, total=count)
                try:
                    bar.start()
                except LiveError:  # somebody else's bar is on the screen
                    bar.disable = True
            if bar is not None:
                bar.update(task, completed=number)
            yield number
    finally:
        if bar is not None:
            bar.stop()
