"""English text that comes with Python itself, so that nothing need be downloaded."""

from __future__ import annotations

import ast
import codecs
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

from lightning_tta.errors import DataError, check_choice

MODULES = """argparse configparser contextlib csv difflib doctest enum fractions functools gettext imaplib inspect
ipaddress mailbox optparse pathlib pickle pickletools random shutil smtplib socket statistics string subprocess tarfile
tempfile textwrap threading turtle typing""".split()
"""Modules of the standard library whose docstrings are read; one that a version of Python lacks is left out."""
CORPORA = ("docstrings", "topics", "zen")
"""The texts that there are."""


@cache
def read_corpus(name: str) -> str:
    """A text in ASCII: about 410 kB of ``docstrings``, 440 kB of ``topics`` (of Python's help), 1 kB of ``zen``.

    Another version of Python has a slightly different text, which the digest of the data tells.

    Raises:
        ConfigError: On another name.
        DataError: If this Python comes without its sources.
    """
    check_choice("corpus", name, CORPORA)
    text = {"docstrings": _docstrings, "topics": _topics, "zen": _zen}[name]()
    if not text:
        raise DataError(f"This Python comes without the text {name!r}: its standard library has no source files.")
    return text.encode("ascii", "ignore").decode()


def cut(text: str, length: int) -> list[str]:
    """Pieces of ``length`` characters, one after the other; a shorter last one is left out, unless it is the first."""
    pieces = [text[start : start + length] for start in range(0, len(text), length)]
    return pieces[:-1] if len(pieces) > 1 and len(pieces[-1]) < length else pieces


def _source(module: str) -> str:
    """The source of a module, which is not run; empty where there is none."""
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path.read_text("utf-8") if path is not None and path.suffix == ".py" and path.is_file() else ""


def _docstrings() -> str:
    texts = list[str]()
    for module in MODULES:
        for node in ast.walk(ast.parse(_source(module))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                texts.append(text)
    return "\n\n".join(texts)


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(re.sub(r" +", " ", inspect.cleandoc(topics[name])) for name in sorted(topics))


def _zen() -> str:
    """The poem of ``import this``, which would print it; its module holds it as rot13."""
    for node in ast.walk(ast.parse(_source("this"))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return codecs.decode(node.value.value, "rot13")
    return ""
