"""The options of a class, from its signature and docstrings and those of its bases."""

from __future__ import annotations

import argparse
import inspect
import re

from jsonargparse import ArgumentParser

from lightning_tta import methods
from lightning_tta.launch.text import columns, without_markup


def class_options(kind: type, key: str = "") -> dict[str, argparse.Action]:
    """The arguments of a class, and of the bases that it hands arguments on to, as options: ``key.argument``.

    The net that a method wraps is none of them.
    """
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(kind, key or None, skip={"model"})
    return {name: option for name, option in options_of(parser).items() if name != key}


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser by name, without those that show the help of a class."""
    return {action.dest: action for action in parser._actions if not action.dest.endswith(".help")}


def describe_method(name: str) -> str:
    """The docstring of a method, and all its options."""
    kind = methods.find(name)
    text = re.sub(r"Args:\n(?: .*\n|\n)*", "", f"{inspect.getdoc(kind)}\n").strip()
    rows = []
    for option, action in class_options(kind, "model.method").items():
        rows.append((f"--{option}", f"{without_markup(action.help or '')} (default: {action.default})"))
    return f"{kind.__name__}: {text}\n\n{columns(rows, left=32)}"
