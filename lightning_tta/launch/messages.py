"""The wording of configuration errors: jsonargparse answers with a tree of types, this module with two lines.

The rules below read the prose of one minor version of jsonargparse, to which ``pyproject.toml`` binds the package.
What no rule knows is said in the library's own words.
"""

from __future__ import annotations

import argparse
import pydoc
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from lightning_tta.errors import ConfigError, LightningTTAError, did_you_mean
from lightning_tta.launch.options import class_options

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, such as [a, b]",
    "dict": "a mapping",
    "NoneType": "null",
}
_EXPECTED = re.compile(
    rf"Expected an? (?:<class '(?P<type>{'|'.join(_TYPES)})'>|typing\.Literal\[(?P<choices>.*)\])"
    r"(?:\. Got value: (?P<value>.*))?$"
)
_NEITHER = "Expected a path but"
_LINE = re.compile(
    r"""(?P<indent>\ *)(?:-\ )?(?=\S)
    (?:Parser\ key\ "(?P<key>.+?)":\s* | Problem\ with\ given\ class_path\ '(?P<kind>.+?)':?)?
    (?P<problem>(?!Does\ not\ validate|Subtypes:|Errors:|Given\ value).*)""",
    re.VERBOSE,
)

REMOVED = {
    "latex": "--latex is gone. Turn report.md into LaTeX: pandoc report.md -o report.tex",
    "picture": "--picture is gone. The command stream lists the stream's batches.",
    "batches": "--batches is gone. The command stream lists the first 20 batches.",
}
"""Options that commands had, and what to do without them."""


def parse(parser: ArgumentParser, args: list[str]) -> Any:
    """The arguments of a command, parsed.

    Raises:
        ConfigError: If they do not parse.
        SystemExit: After ``--help`` and the like.
    """
    parser.exit_on_error = False
    try:
        return parser.parse_args(args)
    except argparse.ArgumentError as error:
        raise explain(error, parser, parser.prog) from None


def our_error(error: BaseException | None) -> LightningTTAError | None:
    """Our error inside the one that jsonargparse makes of whatever a constructor raises."""
    while error is not None and not isinstance(error, LightningTTAError):
        error = error.__cause__ or error.__context__
    return error


def explain(error: argparse.ArgumentError, parser: argparse.ArgumentParser, command: str) -> ConfigError:
    """The same error in short: what was given, what is allowed, and where to read on.

    Args:
        error: From ``parser``, of jsonargparse.
        parser: Knows the options.
        command: How the user calls it.
    """
    problem = _Problem.read(str(error))
    return ConfigError(f"{problem.describe(parser)}\nAll options: {command} {problem.help_option()}")


class _Problem(NamedTuple):
    """The deepest branch of jsonargparse's tree."""

    option: str  # its full name, without dashes
    owner: str  # of the option whose value is a class that has this option; or empty
    kind: str  # that class, as it was given
    lines: list[str]  # what is wrong, one for each type that the option may have
    value: str | None  # what was given, where the tree says so

    @classmethod
    def read(cls, text: str) -> _Problem:
        called = re.search(r"Got value: Namespace\(class_path='([^']*)'", text)  # a class that is called: a method
        if called:
            head = rf"\1Problem with given class_path '{called[1]}':\n\1 "
            text = re.sub(r"^( *)Type .*? expects a function or a callable class: ", head, text, flags=re.MULTILINE)
            text = re.sub(r"\.? Got value: Namespace\(.*", "", text)
        path: list[tuple[int, str, str]] = []  # to the line at hand: indentation, key, class
        deepest, branch, lines = -1, path, [] if "Parser key" in text else text.splitlines()
        for line in filter(None, map(_LINE.fullmatch, [] if lines else text.splitlines())):
            depth = len(line["indent"])
            while path and path[-1][0] >= depth:
                path.pop()
            if line["key"] or line["kind"]:
                path.append((depth, line["key"] or "", line["kind"] or ""))
            if line["problem"].startswith(_NEITHER):
                depth = len(text)  # says more than what the types of the option make of the value
            if line["problem"] and depth == deepest and path == branch:
                lines.append(line["problem"])
            elif line["problem"] and depth > deepest:
                deepest, branch, lines = depth, list(path), [line["problem"]]
        classes = [number for number, (_, _, kind) in enumerate(branch) if kind]
        keys = [key for _, key, _ in branch]
        given = re.search(r"Given value: (.*)", text.partition(lines[0])[2])
        return cls(
            option=_join(keys),
            owner=_join(keys[: classes[-1]]) if classes else "",
            kind=branch[classes[-1]][2] if classes else "",
            lines=lines,
            value=given[1] if given else None,
        )

    def describe(self, parser: argparse.ArgumentParser) -> str:
        """One sentence or two."""
        text = " ".join(" ".join(self.lines).split())
        if match := re.match(rf"{_NEITHER} (.+?) either", text):
            known = _classes(self.option)
            listed = f" Known: {', '.join(known)}." if known else ""
            return f"--{self.option} {match[1]!r} is neither a file nor a class.{did_you_mean(match[1], known)}{listed}"
        types = [match for line in self.lines if (match := _EXPECTED.match(line))]
        if len(types) == len(self.lines):
            allowed = [f"one of {match['choices']}" if match["choices"] else _TYPES[match["type"]] for match in types]
            value = next((match["value"] for match in types if match["value"]), self.value)
            return f"--{self.option} must be {' or '.join(allowed)}; got {value!r}."
        if match := re.match(r"(?:Option '|.* does not accept option '|unrecognized arguments: --)([^'\s=+]+)", text):
            return self._describe_unknown(match[1], parser)
        if match := re.match(r"the following arguments are required: (.*)", text):
            subcommand = parser.prog.split()[-1] + "."
            names = [_join([self.option, name.removeprefix(subcommand)]) for name in match[1].split(", ")]
            positional = {action.dest for action in parser._actions if not action.option_strings}
            hint = " Give what is missing, or a --config that has it." if "config" in _names(parser) else ""
            return f"Missing: {', '.join(n.upper() if n in positional else f'--{n}' for n in names)}.{hint}"
        return f"--{self.option}: {text}" if self.option else text

    def _describe_unknown(self, option: str, parser: argparse.ArgumentParser) -> str:
        if not self.kind and option in REMOVED:
            return REMOVED[option]
        if self.kind.rpartition(".")[2] in ("LightningDataModule", "LightningModule"):
            example = {"data": "DigitsData", "model": "SourceClassifier"}.get(self.owner, "CLASS")
            return f"--{self.owner}.{option} needs to know the class first: --{self.owner} {example}, or a --config."
        if self.kind:
            kind = pydoc.locate(self.kind)
            known = class_options(kind) if isinstance(kind, type) else ()
            name = self.kind.rpartition(".")[2]
            return f"--{self.owner}.{option}: {name} has no option {option!r}.{did_you_mean(option, known)}"
        names, section = _names(parser), option.partition(".")[0]
        if section not in (sections := {name.partition(".")[0] for name in names}):
            option, names = section, sections
        return f"There is no option {option!r}.{did_you_mean(option, names)}"

    def help_option(self) -> str:
        """The option that lists what is allowed."""
        if not self.kind or pydoc.locate(self.kind) is None or self.kind.startswith("lightning."):
            return "--help"
        short = self.owner.startswith(("model", "data"))  # found by their short names
        return f"--{self.owner}.help {self.kind.rpartition('.')[2] if short else self.kind}"


def _join(keys: Iterable[str]) -> str:
    return ".".join(filter(None, keys))


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def _classes(option: str) -> Iterable[str]:
    """The classes of this package that an option may name."""
    from lightning_tta import data, methods, modules

    return {"model.method": methods.names(), "data": data.data_modules(), "model": modules.__all__}.get(option, ())
