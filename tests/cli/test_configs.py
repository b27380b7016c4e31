"""What shipped configurations have in common; that each parses on its own is tested with the command line."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_tta.cli.main import run_lightning

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
# Those of methods are one file a method, all run alike.
NAMED = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "methods"]


def commands_of(path):
    """The arguments of each command in the comment at a file's head; a backslash goes on in the next line."""
    lines = path.read_text().splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    text = re.sub(r"\\\n", " ", "\n".join(head))
    found = re.findall(r"^(?:(?:torchrun|srun) .*?)?(?:lightning-tta|-m lightning_tta) (.*)", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


def test_there_are_some():
    assert sum({"model", "data"} <= set(yaml.safe_load(path.read_text())) for path in NAMED) > 20


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_its_comment_has_a_command_that_names_it_and_parses(path, monkeypatch):
    name = str(path.relative_to(ROOT))
    own = [args for args in commands_of(path) if name in args]
    assert own
    monkeypatch.chdir(ROOT)
    for args in own:
        assert args[args.index(name) - 1] in ("--config", "--model.method")
        if args[0] == "benchmark":
            assert args[:3] == ["benchmark", "--config", name]
        else:
            run_lightning(args, parse_only=True)
