"""Problems of arithmetic with exact answers: the same ones for a seed, on every machine, without a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from lightning_tta.data.streams import permutation
from lightning_tta.data.text.dialects import ARITHMETIC, PLACES, changed_places
from lightning_tta.data.text.prompts import Prompt
from lightning_tta.errors import ConfigError, check_range

Split = Literal["train", "val", "test"]
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
SHARES = {"train": 0.6, "val": 0.05, "test": 0.35}
"""Of all problems; much for the test, so that a stream of one class of answers can be long."""


class Arithmetic:
    """``12+7=`` with the answer ``19``: both numbers from 0 to 10^digits - 1, each problem in one split only.

    Args:
        digits: Digits of the numbers at most, 1 to 3.
        operations: Some of ``+``, ``-`` and ``*``.
        problems: At most so many problems in all splits together, a random choice; by default 10,000 an operation.
        seed: Seed of the choice, of the split, and of the places that dialects change.
    """

    def __init__(
        self, digits: int = 2, operations: Sequence[str] = ("+",), problems: int | None = None, seed: int = 0
    ) -> None:
        check_range("digits", digits, 1, 3, integer=True)
        check_range("seed", seed, 0, integer=True)
        if isinstance(operations, str) or not operations or not set(operations) <= set(OPERATIONS):
            raise ConfigError(
                f"operations must be a list of some of {', '.join(map(repr, OPERATIONS))}; got {operations!r}."
            )
        if problems is not None:
            check_range("problems", problems, 20, integer=True)
        self.operations, self.seed, self.bound = list(dict.fromkeys(operations)), seed, 10**digits
        self.problems = problems or 10_000 * len(self.operations)

    def numbers(self, split: Split) -> list[tuple[int, str, int]]:
        """The problems of a split: first number, sign, second number."""
        pairs = self.bound**2
        members = _members(len(self.operations) * pairs, self.problems, self.seed)[split]
        return [(n % pairs // self.bound, self.operations[n // pairs], n % self.bound) for n in members]

    def prompts(
        self, split: Split, dialect: str | None = None, severity: int = 5, domain: str = "source"
    ) -> list[Prompt]:
        """The problems of a split in the source's format, or in a dialect of :data:`~.dialects.ARITHMETIC`.

        ``domain`` is what the prompts say of themselves.
        """
        problems = self.numbers(split)
        write = ARITHMETIC[dialect] if dialect else _in_source_format
        on = changed_places(len(problems) * PLACES, severity, dialect or "", self.seed).reshape(-1, PLACES).tolist()
        return [
            Prompt(write(str(a), sign, str(b), on[n]), str(OPERATIONS[sign](a, b)), domain=domain, index=n)
            for n, (a, sign, b) in enumerate(problems)
        ]


@lru_cache(maxsize=8)
def _members(every: int, count: int, seed: int) -> dict[str, list[int]]:
    """The numbers of the problems in each split."""
    chosen = permutation(every, seed)[:count]
    ends = np.round(np.cumsum([*SHARES.values()])[:-1] * len(chosen)).astype(np.int64)
    return {name: part.tolist() for name, part in zip(SHARES, np.split(chosen, ends), strict=True)}


def _in_source_format(a: str, sign: str, b: str, on: Sequence[bool]) -> str:
    return f"{a}{sign}{b}="
