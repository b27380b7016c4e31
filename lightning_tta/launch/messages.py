"""The wording of configuration errors: jsonargparse answers with a tree of types, this module with two lines.

The rules below read the prose of one minor version of jsonargparse, to which ``pyproject.toml`` binds the package.
What no rule knows is said in the library's own words.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from jsonargparse import Namespace
from torch import optim
from torch.optim import lr_scheduler

from lightning_tta import data, methods, modules
from lightning_tta.errors import ConfigError, did_you_mean
from lightning_tta.launch.help import class_options
from lightning_tta.launch.trust import find_loaded
from lightning_tta.methods.components.additions import OPTIONS
from lightning_tta.run.options import MOVED, PARTS, where_moved
from lightning_tta.shipped import how_to_copy

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
    r"Expected an? (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<choices>.*)\])(?:\. Got value: (?P<value>.*))?"
)
_NEITHER = "Expected a path but"
_LINE = re.compile(
    r"""(?P<indent>\ *)(?:-\ )?(?:Parser\ key\ "(?P<key>.+?)":|Problem\ with\ given\ class_path\ '(?P<kind>.+?)':?)?
    \s*(?P<problem>.*)""",
    re.VERBOSE,
)
REMOVED = {
    "latex": "--latex is gone. Turn report.md into LaTeX: pandoc report.md -o report.tex",
    "picture": "--picture is gone. The command stream lists the stream's batches.",
    "batches": "--batches is gone. The command stream lists the first 20 batches.",
}
"""Options that commands had, and what to do without them."""


def explain(error: argparse.ArgumentError, parser: argparse.ArgumentParser, command: str) -> ConfigError:
    """The error of ``parser`` in short: what is wrong, what is allowed, and the ``command`` that lists the options."""
    problem, help_option = _read(str(error)), "--help"
    if problem.kind and find_loaded(problem.kind) is not None and not problem.kind.startswith("lightning."):
        short = problem.owner.startswith(("model", "data"))  # found by their short names
        help_option = f"--{problem.owner}.help {problem.kind.rpartition('.')[2] if short else problem.kind}"
    description = _describe(problem, parser)
    if description == where_moved(problem.option.rpartition(".")[2]):
        help_option = "--help"  # the class that is named does not have it any more
    return ConfigError(f"{description}\nAll options: {command} {help_option}")


class _Problem(NamedTuple):
    option: str  # its full name, without dashes
    owner: str  # of the option whose value is a class that has this option; or empty
    kind: str  # that class
    lines: list[str]  # what is wrong, one for each type that the option may have
    value: str | None  # the value, where the tree says it


def _read(text: str) -> _Problem:
    """The first of the deepest lines of jsonargparse's tree, and the keys and classes above it."""
    if "Parser key" not in text:
        return _Problem("", "", "", text.splitlines(), None)
    if called := re.search(r"Got value: Namespace\(class_path='([^']*)'", text):  # a class that is called: a method
        head = rf"\1Problem with given class_path '{called[1]}':\n\1 "
        text = re.sub(r"^( *)Type .*? expects a function or a callable class: ", head, text, flags=re.MULTILINE)
        text = re.sub(r"\.? Got value: Namespace\(.*", "", text)
    lines = [match for line in text.splitlines() if line.strip() and (match := _LINE.fullmatch(line))]
    depth = [len(line["indent"]) for line in lines]
    deepest = max(
        (n for n, line in enumerate(lines) if line["problem"]),
        key=lambda n: (lines[n]["problem"].startswith(_NEITHER), depth[n]),
    )
    branch = [deepest]
    for n in reversed(range(deepest)):
        if depth[n] < depth[branch[0]]:
            branch.insert(0, n)
    option = owner = kind = ""
    for n in branch:
        option = _join([option, lines[n]["key"]])
        if lines[n]["kind"]:
            owner, kind = option, lines[n]["kind"]
    same = takewhile(lambda n: depth[n] == depth[deepest], range(deepest, len(lines)))
    value = re.search(r"Given value: (.*)", text.partition(lines[deepest]["problem"])[2])
    return _Problem(option, owner, kind, [lines[n]["problem"] for n in same], value[1] if value else None)


def _describe(problem: _Problem, parser: argparse.ArgumentParser) -> str:
    """One sentence or two."""
    text, option = " ".join(" ".join(problem.lines).split()), problem.option
    if cut := re.match(r"unrecognized arguments: ([^-].*[}\]])$", text):  # the shell has split '{kind: ema}'
        return f"{cut[1]!r} belongs to no option. Put quotes around a mapping or a list: --OPTION '{{name: value}}'."
    if match := re.match(rf"(?:{_NEITHER} (?=.+? either)|Expected a dot import path string: )(\S+)", text):
        classes = {"model.method": methods.names(), "data": data.every_data_module(), "model": modules.__all__}
        known: Iterable[str] = classes.get(option) or _of_torch(option.rpartition(".")[2])
        if option == "model" and did_you_mean(match[1], methods.names()):  # the class in a mapping inside
            option, known = "model.method", methods.names()
        listed = f" Known: {', '.join(known)}." if known else ""
        question = did_you_mean(match[1], known)
        return f"--{option} {match[1]!r} is neither a file nor a class.{question}{listed}{how_to_copy(match[1])}"
    types = [match for line in problem.lines if (match := _EXPECTED.fullmatch(line))]
    if len(types) == len(problem.lines):
        allowed = [f"one of {t['choices']}" if t["choices"] else _TYPES.get(t["type"], t["type"]) for t in types]
        value = next((match["value"] for match in types if match["value"]), problem.value)
        how = f" Name an entry: --{option}.NAME {value}." if allowed[0] == "a mapping" and value else ""
        return f"--{option} must be {' or '.join(allowed)}; got {value!r}.{how}"
    if match := re.match(r"(?:Option '|.* does not accept option '|unrecognized arguments: --)([^'\s=+]+)", text):
        return _describe_unknown(problem, match[1], parser)
    if match := re.match(r"argument (?:\S+/)?(--\S+): expected one argument", text):
        value = "true" if _is_switch(match[1].removeprefix("--"), parser) else "VALUE"
        return f"{match[1]} needs a value: {match[1]} {value}."
    if match := re.match(r"the following arguments are required: (.*)", text):
        subcommand = parser.prog.split()[-1] + "."
        names = [_join([option, name.removeprefix(subcommand)]) for name in match[1].split(", ")]
        positional = {action.dest for action in parser._actions if not action.option_strings}
        hint = " Give what is missing, or a --config that has it." if "config" in _names(parser) else ""
        return f"Missing: {', '.join(n.upper() if n in positional else f'--{n}' for n in names)}.{hint}"
    missing = re.search(r"File does not exist: '(.*)'", text)
    return (f"--{option}: {text}" if option else text) + (f".{how_to_copy(missing[1])}" if missing else "")


def _of_torch(option: str) -> list[str]:
    """The classes of torch that an option may name."""
    homes = {"optimizer": (optim, optim.Optimizer), "lr_scheduler": (lr_scheduler, lr_scheduler.LRScheduler)}
    home, base = homes.get(option, (None, None))
    every = vars(home).items() if home is not None else ()
    return sorted(n for n, c in every if isinstance(c, type) and base and issubclass(c, base) and c is not base)


def _describe_unknown(problem: _Problem, option: str, parser: argparse.ArgumentParser) -> str:
    name, owner = problem.kind.rpartition(".")[2], problem.owner
    if name in ("LightningDataModule", "LightningModule"):
        example = {"data": "DigitsData", "model": "SourceClassifier"}.get(owner, "CLASS")
        return f"--{owner}.{option} needs to know the class first: --{owner} {example}, or a --config."
    if name == "SourceClassifier" and option == "source_ckpt":
        return (
            "--model.source_ckpt is an option of TestTimeAdaptation (predict) and MetaTTT (fit). For SourceClassifier: "
            "--ckpt_path PATH to evaluate or go on with a training, --model.weights FILE to start one from weights."
        )
    if name == "TestTimeAdaptation" and (sentence := where_moved(option)):
        return sentence
    if name:
        kind = find_loaded(problem.kind)
        known = class_options(kind) if isinstance(kind, type) else ()
        elsewhere = _elsewhere(owner, parser)
        hint = did_you_mean(option, {*known, *elsewhere})
        if (close := re.search(r"mean (\w+)\?", hint)) and close[1] not in known:
            hint = f" Did you mean --{elsewhere[close[1]]}?"
        return f"--{owner}.{option}: {name} has no option {option!r}.{hint}"
    if option in REMOVED:
        return REMOVED[option]
    names, section = _names(parser), option.partition(".")[0]
    if section in PARTS and section not in {name.partition(".")[0] for name in names}:
        return f"--{option} is an option of lightning-tta predict, not of {parser.prog.split()[-1]}."
    if section not in (sections := {name.partition(".")[0] for name in names}):
        option, names = section, sections
    return f"There is no option {option!r}.{did_you_mean(option, names)}"


def _elsewhere(owner: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    """The full names of a run's options that ``owner`` does not have, by their last name, and by former ones."""
    names = {*_names(parser), *class_options(data.ShiftedDataModule, "data")}
    if "state.save_every" in names:  # predict
        names |= {*class_options(modules.TestTimeAdaptation, "model")}
    last = {name.rpartition(".")[2]: name for name in sorted(names) if "." in name}
    return {name: full for name, full in {**MOVED, **last}.items() if full.rpartition(".")[0] != owner}


def name_option(error: ConfigError, config: Namespace) -> ConfigError:
    """The error of a constructor, with the full name of the option in place of its argument's, where that is known."""
    if re.match(whose := rf"(Unknown )?({'|'.join(OPTIONS)})\b(?! must be )(=(?= ))?", str(error)):
        return type(error)(re.sub(whose, r"\1--model.\2", str(error), count=1))
    if not (argument := re.match(r"(\w+) must be ", str(error))):
        return error
    names = [
        name.replace(".init_args", "")
        for name, value in config.items(branches=False)
        if name.rpartition(".")[2] == argument[1] and str(error).endswith(f"got {value!r}.")
    ]
    return type(error)(f"--{names[0]}{str(error)[argument.end(1) :]}") if len(names) == 1 else error


def missing_package(error: ModuleNotFoundError) -> ConfigError:
    """What to install where a class of the configuration needs a package that is not there."""
    required = re.search(r"Requirement '([^']+)' not met", str(error))
    package = required[1] if required else (error.name or str(error)).partition(".")[0]
    return ConfigError(
        f"{package} is not installed, and the configuration needs it.\nInstall it: pip install {shlex.quote(package)}"
    )


def _join(keys: Iterable[str]) -> str:
    return ".".join(filter(None, keys))


def _is_switch(option: str, parser: argparse.ArgumentParser) -> bool:
    return any(action.dest == option and str(action.metavar) == "{true,false}" for action in parser._actions)


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}
