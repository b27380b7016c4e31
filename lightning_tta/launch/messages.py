"""What is wrong with the arguments of a command, in two lines: jsonargparse's own account is a tree of types."""

from __future__ import annotations

import argparse
import difflib
import inspect
import pydoc
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from lightning_tta.errors import ConfigError, LightningTTAError
from lightning_tta.run.options import where_moved

_NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "Given value type:")
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

MODE = "yaml, None is null"
"""The parser mode of :class:`~lightning_tta.cli.main.TTACLI`."""


def _load(text: str) -> Any:
    """YAML, and ``None`` is null: jsonargparse 4.53 hands the null of a nested option on as that text."""
    value = get_loader("yaml")(text)
    return None if isinstance(value, str) and value.strip() == "None" else value


set_loader(MODE, _load, exceptions=(yaml.YAMLError,))


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
        raise explained(error, parser, parser.prog) from None


def instantiate(parser: ArgumentParser, values: Any) -> Any:
    """The objects that parsed arguments name.

    Raises:
        LightningTTAError: As their constructors raise it.
    """
    try:
        return parser.instantiate_classes(values)
    except (ValueError, TypeError) as error:
        raise our_error(error) or error from None


def our_error(error: BaseException | None) -> LightningTTAError | None:
    """Our error inside the one that jsonargparse makes of whatever a constructor raises."""
    while error is not None and not isinstance(error, LightningTTAError):
        error = error.__cause__ or error.__context__
    return error


def explained(error: argparse.ArgumentError, parser: argparse.ArgumentParser, command: str) -> ConfigError:
    """The same in short: what was given, what is allowed, and where to read on.

    Args:
        error: From ``parser``, of jsonargparse.
        parser: Knows the options.
        command: How the user calls it.
    """
    account = _Account.read(str(error))
    return ConfigError(f"{account.said(parser)}\nAll options: {command} {account.help_option()}")


def closest(name: str, known: Iterable[str]) -> str:
    """A question that names the most similar of the known names, or nothing."""
    lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), sorted(lower), n=1, cutoff=0.7)
    return f" Did you mean {lower[found[0]]}?" if found else ""


@dataclass
class _Account:
    """The first branch of jsonargparse's tree.

    Attributes:
        keys: From the outside in.
        kind: The class whose options these are, as it was given.
        depth: How many of the keys lead to that class.
        findings: What is wrong.
        given: The value, where it is told apart from the findings.
    """

    keys: list[str] = field(default_factory=list)
    kind: str = ""
    depth: int = 0
    findings: list[str] = field(default_factory=list)
    given: str | None = None

    @classmethod
    def read(cls, text: str) -> _Account:
        """Take the tree's lines one by one, up to where the first branch with a finding ends."""
        made = re.search(r"Got value: Namespace\(class_path='([^']*)'", text)  # a class that is called, a method
        head = f"Problem with given class_path '{made[1]}':\n" if made else ""
        text = re.sub(r"Type .*? expects a function or a callable class: ", head, text)
        text = re.sub(r"\.? Got value: Namespace\(.*", "", text)
        account, level = cls(), -1
        for line in text.splitlines():
            words = line.strip().removeprefix("- ")
            if account.findings and len(line) - len(line.lstrip()) < level:
                if words.startswith("Given value:"):
                    account.given = words.removeprefix("Given value:").strip()
                if not words.startswith("Given value type:"):
                    break
            key = re.match(r'Parser key "(.+?)":\s*', words)
            kind = re.match(r"Problem with given class_path '(.+?)'", words)
            if kind and account.kind and account.findings:
                break
            if kind:
                account.kind, account.depth = kind[1], len(account.keys)
            elif key:
                account.keys += key[1].split(".")
                words = words[key.end() :]
            if words and not kind and not words.startswith(_NOISE):
                level = level if account.findings else len(line) - len(line.lstrip())
                account.findings.append(words)
        account.findings = account.findings or text.split()
        return account

    def said(self, parser: argparse.ArgumentParser) -> str:
        """One sentence or two."""
        name, text = ".".join(self.keys), " ".join(self.findings)
        if found := re.search(r"Expected a path but (.+?) either not accessible or invalid", text):
            known = _classes(name)
            listed = f" Known: {', '.join(known)}." if known else ""
            return f"--{name} {found[1]!r} is neither a file nor a class.{closest(found[1], known)}{listed}"
        types = [found for finding in self.findings if (found := _EXPECTED.match(finding))]
        if len(types) == len(self.findings):
            allowed = [f"one of {found['choices']}" if found["choices"] else _TYPES[found["type"]] for found in types]
            value = next((found["value"] for found in types if found["value"]), self.given)
            return f"--{name} must be {' or '.join(allowed)}; got {value!r}."
        if found := re.match(r"(?:Option|.* does not accept option) '(.+?)'", text):
            return self._unknown(found[1], parser)
        if found := re.match(r"unrecognized arguments: --(\S+)", text):
            return self._unknown(re.split(r"[=+]", found[1])[0], parser)
        if found := re.match(r"the following arguments are required: (.*)", text):
            place = parser.prog.split()[-1] + "."  # a subcommand's name
            missing = [".".join([*self.keys, argument.removeprefix(place)]) for argument in found[1].split(", ")]
            plain = {action.dest for action in parser._actions if not action.option_strings}
            hint = " Give what is missing, or a --config that has it." if "config" in _names(parser) else ""
            return f"Missing: {', '.join(key.upper() if key in plain else f'--{key}' for key in missing)}.{hint}"
        text = re.sub(r' in "<unicode string>",', ",", text)
        text = text.replace("Problems parsing config:", "The --config is no YAML file:")
        text = text.replace(
            "Unexpected config:", "The --config must hold options, as configs/digits/predict.yaml; it is:"
        )
        return f"--{name}: {text}" if name else text

    def _unknown(self, option: str, parser: argparse.ArgumentParser) -> str:
        place = "".join(f"{key}." for key in self.keys[: self.depth])
        if self.kind.rpartition(".")[2] in ("LightningDataModule", "LightningModule"):
            example = {"data": "DigitsData", "model": "SourceClassifier"}.get(self.keys[0], "CLASS")
            return f"--{place}{option} needs to know the class first: --{self.keys[0]} {example}, or a --config."
        if self.kind.endswith("TestTimeAdaptation") and (sentence := where_moved(option)):
            return sentence
        if self.kind:
            hint = closest(option, _options_of(self.kind))
            return f"--{place}{option}: {self.kind.rpartition('.')[2]} has no option {option!r}.{hint}"
        known = _names(parser)
        if "init_args" in option:  # of a configuration's part that there is not
            option = option.partition(".")[0]
            known = {name.partition(".")[0] for name in known}
        return f"There is no option {option!r}.{closest(option, known)}"

    def help_option(self) -> str:
        """The option that lists what is allowed."""
        if not self.kind or pydoc.locate(self.kind) is None or self.kind.startswith("lightning."):
            return "--help"
        name = self.kind.rpartition(".")[2] if self.keys[0] in ("data", "model") else self.kind
        return f"--{'.'.join(self.keys[: self.depth])}.help {name}"


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def _classes(name: str) -> list[str]:
    """What an option that takes a class may be, of this package."""
    import lightning_tta.modules
    from lightning_tta.data import data_modules
    from lightning_tta.methods import available_methods

    return {
        "model.method": list(available_methods()),
        "data": list(data_modules()),
        "model": lightning_tta.modules.__all__,
    }.get(name, [])


def _options_of(kind: str) -> set[str]:
    """Names of the arguments of a class, those that it hands on to its bases too."""
    found = pydoc.locate(kind)
    bases = inspect.getmro(found) if isinstance(found, type) else ()
    makers = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]
    return {name for maker in makers for name in inspect.signature(maker).parameters} - {"self", "args", "kwargs"}
