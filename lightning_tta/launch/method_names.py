"""Methods by their short names wherever a configuration names one: as text, with options, in files and arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_tta.errors import ConfigError
from lightning_tta.methods import find

METHOD, ASIDE, LANGUAGE = "--model.method", "--model.options.", "LanguageAdaptation"
OPTIONS = (METHOD, f"{METHOD}.help", f"{METHOD}.class_path")
OWNERS = ("init_args", "model")
"""Below these keys ``method`` is that of the model."""
PACKAGE = "lightning_tta.methods."


def class_path(name: str) -> str:
    """The import path of a method that is named.

    A file, a user's own class, a mapping and a mistake, of which the parser knows more, come back as they are.
    """
    try:
        return f"{PACKAGE}{find(name).__name__}"
    except ConfigError:
        return name


def name_in_arguments(args: Sequence[str]) -> list[str]:
    """Arguments of a command with ``--model.method tent`` as ``--model.method lightning_tta.methods.Tent``.

    The method comes before its options, whatever the order in which they were given. Options of the method of
    LanguageAdaptation are written ``--model.options.NAME``, as it takes them.
    """
    named: list[str] = []
    for arg in args:
        arg = re.sub(r"^--model\.init_args\.method\b", METHOD, arg)
        option, equals, value = arg.partition("=")
        if equals and option in OPTIONS:
            arg = f"{option}={class_path(value)}"
        elif named and named[-1] in OPTIONS:
            arg = class_path(arg)
        named.append(arg)
    return _with_options_aside(named) if _model_of(named) == LANGUAGE else _method_first(named)


def _method_first(args: list[str]) -> list[str]:
    options = [arg.partition("=")[0] for arg in args]
    places = [place for place, option in enumerate(options) if option in (METHOD, f"{METHOD}.class_path")]
    nested = [place for place, option in enumerate(options) if option.startswith(f"{METHOD}.") and place not in places]
    if not places or not nested or places[0] < nested[0]:
        return args
    first = places[0]
    end = first + 1 + ("=" not in args[first])
    return [*args[: nested[0]], *args[first:end], *args[nested[0] : first], *args[end:]]


def _with_options_aside(args: list[str]) -> list[str]:
    pattern = rf"^{re.escape(METHOD)}\.(?:init_args\.)?(?!class_path\b|help\b)"
    return [re.sub(pattern, ASIDE, arg) for arg in args]


def _model_of(args: Sequence[str]) -> str:
    """The name of the model's class, by the last argument or file that says it; empty where none does."""
    model = ""
    for option, value in _pairs(args):
        if option not in ("--model", "--model.class_path", "--config", "-c"):
            continue
        is_file = value.endswith((".yaml", ".yml")) or option in ("--config", "-c")
        try:
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8") if is_file else value)
            content = content["model"] if option in ("--config", "-c") else content
            model = content if isinstance(content, str) else str(content["class_path"])
        except (OSError, ValueError, yaml.YAMLError, RecursionError, KeyError, TypeError):
            continue  # the parser says what is wrong with it
    return model.rpartition(".")[2]


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        yield option, value if equals else args[place + 1] if place + 1 < len(args) else ""


def name_in(value: Any, owner: str = "", model: Any = None) -> Any:
    """A configuration as it was loaded, with the import path of each model's method in place of its short name.

    Args:
        value: Its content, or a part of it. Nothing in it is changed.
        owner: The key that the part has.
        model: The class that is named beside it. In one of the user's, a ``method`` that is text may be anything.
    """
    if isinstance(value, list):
        return [name_in(each, owner) for each in value]
    if not isinstance(value, dict):
        return value
    if not owner and isinstance(value.get("class_path"), str):  # the method itself, in a file or an argument
        value = {**value, "class_path": class_path(value["class_path"])}
    named = {key: name_in(each, str(key), value.get("class_path")) for key, each in value.items()}
    method = named.get("method") if owner in OWNERS else None
    foreign = isinstance(model, str) and "." in model and not model.startswith("lightning_tta.")
    if isinstance(method, str) and not foreign:
        named["method"] = class_path(method)
    elif isinstance(method, dict) and isinstance(method.get("class_path"), str):
        named["method"] = {**method, "class_path": class_path(method["class_path"])}
    return named
