"""Whether what a language model wrote is the answer: exactly, as a number, or as the letter of a choice."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from lightning_tta.errors import check_choice

_NUMBER = re.compile(
    r"""(?<![\d.])(?P<value>(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+))
    (?:[eE](?P<e>[-+]?\d{1,4})|\s*(?:\\times|[*x\u00d7])\s*10\^\{?(?P<power>[-+]?\d{1,4})\}?)?
    (?:\s*/\s*(?P<below>\d+(?:\.\d+)?))?""",
    re.VERBOSE,
)
_FRACTION = re.compile(r"(?:(?<![\d.])(\d+)\s*)?\\frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}(?:\^\{?\d\}?)?")
_EXPRESSION = re.compile(r"[\\^_{}()\[\]=<>]|\d[a-zA-Z]\b|\b[a-zA-Z]\s*[-+*/]|[-+*/]\s*[a-zA-Z]\b")
_LAYOUT = re.compile(r"\\(?:left|right|[,;:! $%])|\^\{?\\circ\}?|\\circ|\\degree|[$%°]")
_LETTER = "[A-J]"


def check_exact(output: str, answer: str) -> bool:
    """Whether both are the same text, apart from white space at the ends."""
    return output.strip() == answer.strip()


def check_number(output: str, answer: str) -> bool:
    r"""Whether the last number of the output is that of the answer: ``1,234.50``, ``$1234.5`` and ``2469/2`` are equal.

    Of a text with ``\boxed{...}`` what is in the last box counts, of one with ``####`` what follows. Commas between
    thousands, signs of currency, percent and degrees, and words for units are left out; ``\frac{1}{2}``, ``1/2``,
    ``0.5`` and ``5e-1`` are one number; up to 1e-6 of their size numbers are equal. Where the answer is no number but
    an expression, such as ``x^2+1`` or ``(3, \pi)``, the texts are compared, without white space and layout. So another
    form of the same expression counts as wrong.
    """
    expected, given = _plain(_final(answer)), _plain(_final(output))
    if _EXPRESSION.search(expected) or (wanted := last_number(expected)) is None:
        return _compact(expected) == _compact(given)
    number = last_number(given)
    return number is not None and abs(number - wanted) <= Fraction(1, 10**6) * abs(wanted)


def check_multiple_choice(output: str, answer: str) -> bool:
    """Whether both name the same letter from A to J, see :func:`chosen_letter`."""
    letter = chosen_letter(answer)
    return letter is not None and chosen_letter(output) == letter


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; ``None`` where there is none. A hyphen behind a word or digit is no sign."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    number = Fraction(found["value"].replace(",", ""))
    number *= Fraction(10) ** int(found["e"] or found["power"] or 0)
    below = Fraction(found["below"] or 1)
    return number / below if below else number


def chosen_letter(text: str) -> str | None:
    r"""The letter that a text chooses, in capitals; ``None`` where it names none.

    In this order: the last ``\boxed{B}``; the last "answer is (B)" or "answer: B"; the text or its first line is the
    letter, as ``b``, ``(B)`` or ``B. words``; the last ``(B)``; the last capital letter alone. There, ``A`` and ``I``
    may be words and do not count.
    """
    text = _WORDS.sub(r"\1", text).strip()
    places = (
        rf"(?i)\\boxed\s*\{{\s*\(?({_LETTER})\)?\s*\.?\s*\}}",
        rf"(?i:answer|choice|option)\b(?i:\s+is)?\s*:?[\s*]*\(?({_LETTER})\b\)?",
        rf"(?i)\A\s*\(?({_LETTER})(?:\)|[.:](?=\s|\Z)|\s*(?=\n|\Z))",
        rf"\(({_LETTER})\)",
        r"(?<![\w'])([B-HJ])(?![\w'])",
    )
    for place in places:
        if letters := re.findall(place, text):
            return str(letters[-1]).upper()
    return None


def _final(text: str) -> str:
    r"""What is in the last ``\boxed{...}``, else what follows ``####``, else all."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return text.rpartition("####")[2].strip()
    start, depth = text.index("{", start) + 1, 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end].strip()
    return text[start:].strip()  # it was cut short


def _plain(text: str) -> str:
    """Without layout and units, fractions as ``a/b``."""
    text = re.sub(r"\\[dt]frac", r"\\frac", text.replace("\u2212", "-").replace("\u2009", " "))
    text = _FRACTION.sub(_written_out, text)
    text = _LAYOUT.sub("", text)
    unit = _WORDS.sub("", text).strip()
    return (unit if re.search(r"\d", unit) else _WORDS.sub(r"\1", text)).strip().rstrip(".")


def _written_out(found: re.Match[str]) -> str:
    whole, above, below = int(found[1] or 0), int(found[2] or found[3]), int(found[4] or found[5])
    return f" {whole * below + above}/{below}" if found[1] else f"{above}/{below}"


def _compact(text: str) -> str:
    return re.sub(r"\s", "", text)


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "exact": check_exact,
    "number": check_number,
    "multiple_choice": check_multiple_choice,
}
"""By name: what tells from an output and an answer whether the output is right."""


def is_correct(output: str, answer: str, checker: str = "exact") -> bool:
    """Whether an output is the answer, by a checker of :data:`CHECKERS`.

    Raises:
        ConfigError: On another checker.
    """
    check_choice("checker", checker, tuple(CHECKERS))
    return CHECKERS[checker](output, answer)
