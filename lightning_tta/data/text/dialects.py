"""Shifts of format: the same problem, or the same text, written in another way.

A dialect changes places: the gaps, numbers, digits or words of a prompt. Severity S from 1 to 5 is the share S/5 of the
places that are changed, drawn from a seed: all of them at 5. What is changed at one severity is changed at each higher
one too. The answer of a problem stays the same text.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

VERSION = 1
"""Rises when a dialect writes something in another way: then results do not compare."""
PLACES = 8
"""So many places a problem has at most."""
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIGNS = {"+": "&", "-": "~", "*": "x"}

Mask = Sequence[bool] | npt.NDArray[np.bool_]


def changed_places(count: int, severity: int, name: str, *key: int) -> npt.NDArray[np.bool_]:
    """Which of ``count`` places a dialect changes, each with probability ``severity`` / 5."""
    words = np.random.PCG64([zlib.crc32(name.encode()), *key]).random_raw(count)
    return np.asarray((words >> np.uint64(11)).astype(np.float64) / 2**53 < severity / 5)


def _spaces(a: str, sign: str, b: str, on: Mask) -> str:
    gap = [" " if each else "" for each in on]
    return f"{a}{gap[0]}{sign}{gap[1]}{b}{gap[2]}="


def _zeros(a: str, sign: str, b: str, on: Mask) -> str:
    width = max(len(a), len(b)) + 1
    return f"{a.zfill(width) if on[0] else a}{sign}{b.zfill(width) if on[1] else b}="


def _around(left: str, right: str) -> Callable[[str, str, str, Mask], str]:
    def write(a: str, sign: str, b: str, on: Mask) -> str:
        return f"{f'{left}{a}{right}' if on[0] else a}{sign}{f'{left}{b}{right}' if on[1] else b}="

    return write


def _operator(a: str, sign: str, b: str, on: Mask) -> str:
    return f"{a}{_SIGNS[sign] if on[0] else sign}{b}="


def _reversed(a: str, sign: str, b: str, on: Mask) -> str:
    return f"{a[::-1] if on[0] else a}{sign}{b[::-1] if on[1] else b}="


def _words(a: str, sign: str, b: str, on: Mask, make: Callable[[str], str] = str) -> str:
    def write(number: str, places: Mask) -> str:
        pieces = [make(_WORDS[int(d)]) if each else d for d, each in zip(number, places, strict=False)]
        return "".join(pieces)

    return f"{write(a, on[:4])}{sign}{write(b, on[4:])}="


def _capitals(a: str, sign: str, b: str, on: Mask) -> str:
    return _words(a, sign, b, on, str.upper)


def _decimal(a: str, sign: str, b: str, on: Mask) -> str:
    return f"{f'{a}.0' if on[0] else a}{sign}{f'{b}.0' if on[1] else b}="


def _framed(before: str, after: str) -> Callable[[str, str, str, Mask], str]:
    def write(a: str, sign: str, b: str, on: Mask) -> str:
        return f"{before}{a}{sign}{b}{after}" if on[0] else f"{a}{sign}{b}="

    return write


ARITHMETIC: dict[str, Callable[[str, str, str, Mask], str]] = {
    "spaces": _spaces,  # 12 + 7 =
    "zeros": _zeros,  # 012+007=
    "brackets": _around("(", ")"),  # (12)+(7)=
    "operator": _operator,  # 12&7=
    "reversed": _reversed,  # 21+7=
    "words": _words,  # onetwo+seven=
    "capitals": _capitals,  # ONETWO+SEVEN=
    "preamble": _framed("what is ", "="),  # what is 12+7=
    "square": _around("[", "]"),  # [12]+[7]=
    "equals": _framed("", ":"),  # 12+7:
    "decimal": _decimal,  # 12.0+7.0=
    "question": _framed("", "=?"),  # 12+7=?
}
"""How a problem is written: from both numbers, the sign, and which places are changed, bool (8,)."""

TEXT: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "reversed": lambda word: word[::-1],
    "rot13": lambda word: codecs.encode(word, "rot13"),
    "spaces": lambda word: f" {word}",
    "no_vowels": lambda word: re.sub("(?i)(?<=.)[aeiou]", "", word),  # a word keeps its first letter
}
"""How a word is written."""

HELD_OUT = {"arithmetic": ("square", "equals", "decimal", "question"), "text": ("no_vowels",)}
"""For choosing options; the other dialects are for reporting."""


def rewrite(text: str, name: str, severity: int, *key: int) -> str:
    """A text in a dialect of :data:`TEXT`; ``key`` tells texts apart."""
    pieces = re.split(r"(\s+)", text)
    on = changed_places(len(pieces), severity, name, *key)
    return "".join(
        TEXT[name](piece) if n % 2 == 0 and piece and changed else piece
        for n, (piece, changed) in enumerate(zip(pieces, on, strict=True))
    )
