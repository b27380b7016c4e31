"""Checkers of answers, case by case."""

from fractions import Fraction

import pytest

from lightning_tta import ConfigError
from lightning_tta.data.text.checkers import chosen_letter, is_correct, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("19", 19),
        ("12+7=19.", 19),
        ("it is -4", -4),
        ("5-3", 3),
        ("(2)-3", 3),
        ("x = -0.50", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("1,234,567.5 km", Fraction("1234567.5")),
        ("1,2", 2),
        ("12,3456", 3456),
        ("3/4", Fraction(3, 4)),
        ("6e-2", Fraction(6, 100)),
        ("3 \\times 10^{4}", 30000),
        ("3 x 10^-2", Fraction(3, 100)),
        ("5/0", 5),
        ("none", None),
        ("", None),
        ("- 5", 5),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("The sum is 19.", "19", True),
        ("19, no: 20", "19", False),
        ("1,234.50", "$1234.5", True),
        ("about 18 dollars", "18 dollars", True),
        ("I add 3 and 4. #### 7", "he has 3 + 4\n#### 7", True),
        ("\\boxed{\\frac{1}{2}} and 3 more words", "0.5", True),
        ("\\boxed{\\dfrac12}", "\\frac{1}{2}", True),
        ("-\\frac{3}{4}", "-0.75", True),
        ("\\frac{3}{4}", "-0.75", False),
        ("1\\frac{1}{2}", "1.5", True),
        ("\\boxed{\\text{5 cm}}", "5", True),
        ("12\\text{ cm}^2", "12", True),
        ("50\\%", "50", True),
        ("90^\\circ", "90", True),
        ("\\$3.50", "3.5", True),
        ("0.3333333", "1/3", True),
        ("0.333", "1/3", False),
        ("0", "0", True),
        ("0.0000001", "0", False),
        ("no idea", "0", False),
        ("\\boxed{x^2 + 1}", "x^2+1", True),
        ("x^2+2", "x^2+1", False),
        ("the answer is 2", "x^2", False),
        ("3y", "3x", False),
        ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "(3,\\frac{\\pi}{2})", True),
        ("\\boxed{\\text{Monday}}", "\\text{Monday}", True),
        ("\\text{Friday}", "\\text{Monday}", False),
        ("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{\\sqrt{3}}{2}", True),
        ("so \\boxed{1} or rather \\boxed{2}", "2", True),
        ("\\boxed{12", "12", True),
        ("\u22127", "-7", True),
    ],
)
def test_number(output, answer, right):
    assert is_correct(output, answer, "number") is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("D. because of A", "D"),
        ("A) yes", "A"),
        ("The answer is (B), not (C).", "B"),
        ("Answer: **A**", "A"),
        ("I think that (A) is wrong, so (D)", "D"),
        ("\\boxed{\\text{E}} rather than answer C", "E"),
        ("A dog, so B", "B"),
        ("A dog", None),
        ("I am not sure", None),
        ("Both Beta and Delta", None),
        ("B\nwhich means X", "B"),
        ("answer is a guess; B", "B"),
    ],
)
def test_letter(text, letter):
    assert chosen_letter(text) == letter


def test_multiple_choice_and_exact():
    assert is_correct("It must be (C).", "C", "multiple_choice")
    assert not is_correct("no letter", "no letter either", "multiple_choice")
    assert is_correct(" 19\n", "19")
    assert not is_correct("19.0", "19")
    with pytest.raises(ConfigError, match="checker must be one of 'exact', 'number', 'multiple_choice'; got 'numbr'"):
        is_correct("1", "1", "numbr")
