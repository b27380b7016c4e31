"""Prompts with their answers, and JSONL files of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_tta.data.text.checkers import CHECKERS, chosen_letter
from lightning_tta.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Prompt:
    """What a language model is asked, and what it should answer.

    Attributes:
        prompt: The question, as the net reads it.
        answer: The right answer; empty where there is none.
        checker: What tells whether an output is the answer: a key of :data:`~.checkers.CHECKERS`.
        domain: Which domain it belongs to.
        index: Its number in its file or task.
    """

    prompt: str
    answer: str = ""
    checker: str = "exact"
    domain: str = "source"
    index: int = 0


@dataclass(frozen=True)
class Keys:
    """What a file calls the parts of a prompt; only ``prompt`` must be there."""

    prompt: str = "prompt"
    answer: str = "answer"
    checker: str = "checker"
    domain: str = "domain"
    index: str = "index"


def read_jsonl(path: str | Path, keys: Keys | None = None, checker: str = "exact") -> list[Prompt]:
    """The prompts in a file with one JSON object a line; empty lines and other keys are left out.

    Args:
        path: The file, in UTF-8.
        keys: What it calls the parts.
        checker: That of prompts which name none.

    Returns:
        The prompts in the order of the file. One without a ``domain`` has the name of the file as its domain, one
        without an ``index`` the number of its line, from 0.

    Raises:
        DataError: With file and line: the line is no JSON object, its prompt is missing or empty, a value is of a wrong
            kind, a checker is not known or the answer none for it, or an index is there twice.
    """
    path, keys = Path(path), keys or Keys()
    prompts, lines = list[Prompt](), dict[int, int]()
    for number, text in _lines(path):
        place = f"{path}:{number}"
        prompt = _prompt(text, place, keys, checker, path.stem, number - 1)
        if prompt.index in lines:
            raise DataError(
                f"{place}: {keys.index} {prompt.index} is that of line {lines[prompt.index]} too. Give each prompt its "
                f"own, or leave {keys.index!r} out everywhere."
            )
        lines[prompt.index] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompt. Give a file with one JSON object a line, with {keys.prompt!r} in it.")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        what = "is a folder: name the file in it" if path.is_dir() else "does not exist. Check the path"
        raise DataError(f"The file of prompts {path} {what}.")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: no UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
        if text:
            yield number, text


def _prompt(text: str, place: str, keys: Keys, checker: str, domain: str, index: int) -> Prompt:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        column = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{place}: no JSON ({reason}{column}). Each line must be one object, such as "
            '{"prompt": "12+7=", "answer": "19"}.'
        ) from error
    if not isinstance(entry, dict):
        raise DataError(
            f"{place}: a JSON object is needed, with {keys.prompt!r} in it; got a {type(entry).__name__}. A file with "
            "one list of all prompts must be written with one object a line."
        )
    if keys.prompt not in entry:
        raise DataError(
            f"{place}: there is no {keys.prompt!r}; there: {', '.join(map(repr, entry)) or 'nothing'}."
            f"{did_you_mean(keys.prompt, entry)} Rename it, or say what it is called: --data.prompt_key NAME."
        )
    question = entry[keys.prompt]
    if not isinstance(question, str) or not question:
        raise DataError(f"{place}: {keys.prompt!r} must be a text that is not empty; got {question!r}.")
    named = entry.get(keys.checker, checker)
    if not isinstance(named, str) or named not in CHECKERS:
        raise DataError(
            f"{place}: {keys.checker!r} must be one of {', '.join(CHECKERS)}; got {named!r}."
            f"{did_you_mean(named, CHECKERS)}"
        )
    where, number = entry.get(keys.domain, domain), entry.get(keys.index, index)
    if not isinstance(where, str) or not where:
        raise DataError(f"{place}: {keys.domain!r} must be a text that is not empty; got {where!r}.")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise DataError(f"{place}: {keys.index!r} must be a whole number, 0 or more; got {number!r}.")
    answer = _answer(entry.get(keys.answer), place, keys.answer)
    if answer and named == "multiple_choice" and chosen_letter(answer) is None:
        raise DataError(
            f"{place}: {keys.answer!r} must name a letter from A to J for the checker multiple_choice; got {answer!r}, "
            "with which every output would be wrong. Give the letter, or another checker: exact, number."
        )
    return Prompt(question, answer, named, where, number)


def _answer(value: Any, place: str, key: str) -> str:
    """The answer as text; empty where there is none."""
    if value is None:
        return ""
    no_number = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or no_number:
        raise DataError(
            f"{place}: {key!r} must be a text or a finite number; got {value!r}. Leave it out where none is known."
        )
    return str(value) if str(value).strip() else ""
