"""Shell completion: a script for bash or zsh that knows the commands, their options and what those may be.

The script is made once and holds everything, so that Tab need not import torch; what it knows is read from the parsers.
Every option of this package's models, data sets and methods is offered, those of Lightning's own classes (strategies,
loggers) are not: there are thousands.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from jsonargparse import ArgumentParser

import lightning_tta.modules
from lightning_tta.cli.commands import COMMANDS, PARSERS
from lightning_tta.data import data_modules
from lightning_tta.errors import ConfigError
from lightning_tta.methods import available_methods

SHELLS = ("bash", "zsh")
METHOD_OR_FILE = "_lightning_tta_method"
"""A method is named, or read from a file such as ``configs/methods/tent.yaml``: a function of the script."""

FILES = ("--config", "--ckpt_path", "--model.source_ckpt", "--trainer", "--model", "--data", "--output", "--picture")
FOLDERS = ("--data.root", "--trainer.default_root_dir", "--data.cache_dir")
MODELS = {
    "fit": ("SourceClassifier", "MetaTTT"),
    "validate": ("SourceClassifier", "MetaTTT"),
    "test": ("SourceClassifier", "MetaTTT"),
    "predict": ("TestTimeAdaptation",),
}
"""The commands of LightningCLI and the models that they are for."""


def completion_script(shell: str) -> str:
    """The script that makes a shell complete ``lightning-tta``.

    Args:
        shell: ``bash`` or ``zsh``.

    Raises:
        ConfigError: If it is another shell, or the package shtab is missing.
    """
    if shell not in SHELLS:
        raise ConfigError(f"--print_completion {shell or '(nothing)'}: give one of {', '.join(SHELLS)}.")
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            f'--print_completion {shell} needs an optional package: pip install "lightning-tta[completion]".'
        ) from error
    names = " ".join(available_methods())
    body = {"bash": f'compgen -W "{names}" -- "$1"; compgen -f -- "$1"', "zsh": f"compadd {names}; _files"}[shell]
    preamble = f"{METHOD_OR_FILE}() {{ {body}; }}"
    return str(shtab.complete(_tree(shtab.FILE, shtab.DIRECTORY), shell, preamble=preamble))


def _tree(file: Any, folder: Any) -> argparse.ArgumentParser:
    """All commands in one plain parser, which is never given anything to parse."""
    from lightning_tta.cli.main import lightning_parsers

    parsers: dict[str, ArgumentParser] = {**lightning_parsers(), **{name: make() for name, make in PARSERS.items()}}
    tree = argparse.ArgumentParser("lightning-tta")
    tree.add_argument("--version", action="store_true", help="Print the version.")
    tree.add_argument("--print_completion", choices=SHELLS, help="Print this script.")
    commands = tree.add_subparsers(dest="command")
    for name in (*MODELS, *COMMANDS):
        parser = parsers.get(name, ArgumentParser())
        command = commands.add_parser(name, help=_first_line(parser.description))
        for action in (*parser._actions, *_of_our_classes(name)):
            _copy(action, command, file, folder)
    return tree


def _of_our_classes(name: str) -> Iterator[argparse.Action]:
    """What the classes that a command takes by name take themselves."""
    yield from _arguments([getattr(lightning_tta.modules, model) for model in MODELS.get(name, ())], "model")
    if name in MODELS or name == "stream":
        yield from _arguments(data_modules().values(), "data")
    if name == "predict":
        yield from _arguments(available_methods().values(), "model.method")


def _arguments(classes: Iterable[type], prefix: str) -> Iterator[argparse.Action]:
    for kind in classes:
        parser = ArgumentParser()
        parser.add_class_arguments(kind, prefix, skip={"model"} if prefix == "model.method" else None)
        yield from (action for action in parser._actions if action.dest not in ("help", prefix))


def _copy(action: argparse.Action, command: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Enter an option of jsonargparse's as a plain one, unless it is there."""
    known = command._option_string_actions
    flags = [flag for flag in action.option_strings if flag not in known]
    if action.option_strings and not flags:
        return
    choices = _choices(action, flags)
    keywords: dict[str, Any] = {"help": _first_line(action.help), "choices": choices}
    if action.nargs == 0 or "--print_config" in flags:
        keywords = {"help": keywords["help"], "action": "store_true"}
    if not flags:
        keywords["nargs"] = action.nargs
    copy = command.add_argument(*(flags or [action.dest]), **keywords)
    if "--model.method" in flags:
        copy.complete = dict.fromkeys(SHELLS, METHOD_OR_FILE)  # type: ignore[attr-defined]
    elif choices is None and (not flags or any(flag in FOLDERS for flag in flags)):
        copy.complete = folder  # type: ignore[attr-defined]
    elif choices is None and any(flag in FILES for flag in flags):
        copy.complete = file  # type: ignore[attr-defined]


def _choices(action: argparse.Action, flags: list[str]) -> list[str] | None:
    """What may be given: jsonargparse shows the values of a closed type in braces."""
    if action.choices is not None:
        return list(map(str, action.choices))
    if isinstance(action.metavar, str) and action.metavar.startswith("{"):
        return action.metavar.strip("{}").split(",")
    if "--data" in flags or "--data.help" in flags:
        return list(data_modules())
    if "--model" in flags or "--model.help" in flags:
        return sorted({model for models in MODELS.values() for model in models})
    if "--model.method.help" in flags:
        return list(available_methods())
    return None


def _first_line(text: str | None) -> str:
    """A help text for zsh: one line, without what argparse would fill in."""
    lines = (text or "").strip().splitlines() or [""]
    return lines[0].replace("%", "%%").replace("`", "")
