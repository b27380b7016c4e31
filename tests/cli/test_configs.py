"""Every shipped configuration, the command in its comment and every method's options parse, all by one parser."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_tta.cli.commands import call
from lightning_tta.launch.lightning import check_configurations
from lightning_tta.methods import find, names

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ALL = sorted(CONFIGS.rglob("*.yaml"))
NAMED = [path for path in ALL if path.parent.name != "methods"]  # those of methods are all run alike
DIGITS = ["predict", "--data", "DigitsData"]
NET = ["--model.source_ckpt=none", "--model.backbone=cifar/resnet20"]
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


def commands_of(path):
    """The arguments of each command in the comment at a file's head; a backslash goes on in the next line."""
    lines = path.read_text().splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    text = re.sub(r"\\\n", " ", "\n".join(head))
    found = re.findall(r"^(?:(?:torchrun|srun) .*?)?(?:lightning-tta|-m lightning_tta) (.*)", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


def test_there_are_some():
    assert sum({"model", "data"} <= set(yaml.safe_load(path.read_text())) for path in NAMED) > 20
    assert sum("methods" in yaml.safe_load(path.read_text()) for path in NAMED) > 5


def each_file():
    """One test a file; those of a benchmark's many cells are ``slow``, but for the main one."""
    for path in ALL:
        slow = "methods:" in path.read_text() and path != CONFIGS / "digits/benchmark.yaml"
        yield pytest.param(path, id=str(path.relative_to(CONFIGS)), marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("path", list(each_file()))
def test_every_config_parses(parse, path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    if path.parent.name == "methods" or "lightning_tta.methods." in text:
        parse([*DIGITS, *NET, f"--model.method={path}"])
    elif path.parent.name == "trainer":
        parse(["fit", f"--config={CONFIGS / 'digits/source.yaml'}", f"--config={path}"])
    elif "methods:" in text:
        parsed, is_study = [], path.parent.name == "studies"  # of a study one cell is parsed: they are many

        def check(configurations):
            for args in configurations:
                parsed.append(parsed[0] if parsed and is_study else parse(args))
                yield parsed[-1]

        monkeypatch.setattr("lightning_tta.benchmark.runner.check_configurations", check)
        weights = yaml.safe_load(text)["nets"].items()  # the user's own: not in the repository
        given = [f"--nets.{label}.source_ckpt=none" for label, net in weights if "source_ckpt" in net]
        assert call("benchmark", [f"--config={path}", *given]).cells
        assert len(parsed) >= len(yaml.safe_load(text)["methods"])
    elif "TestTimeAdaptation" in text or "LanguageAdaptation" in text:
        parse(["predict", f"--config={path}", "--model.method=source"])
    else:
        parse(["fit", f"--config={path}"])


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_its_comment_has_a_command_that_names_it_and_parses(parse, path, monkeypatch):
    name = str(path.relative_to(ROOT))
    commands = [args for args in commands_of(path) if name in args]
    assert commands
    monkeypatch.chdir(ROOT)
    for args in commands:
        assert args[args.index(name) - 1] in ("--config", "--model.method")
        if args[0] == "benchmark":
            assert args[:3] == ["benchmark", "--config", name]
        else:
            parse(args)


@pytest.mark.parametrize("name", names())
def test_every_method_has_a_config_with_all_its_options(name):
    content = yaml.safe_load((CONFIGS / f"methods/{name}.yaml").read_text())
    assert set(content.get("init_args", {})) == set(inspect.signature(find(name)).parameters) - {"model"}


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("null", ["null", "None"])
def test_options_can_be_null(parse, name, null):
    parameters = inspect.signature(find(name)).parameters.values()
    options = [parameter.name for parameter in parameters if "None" in str(parameter.annotation)]
    given = [f"--model.method.{option}={null}" for option in options]
    model = parse([*DIGITS, f"--model.method={name}", *given, "--model.reset_every", null])["model"]["init_args"]
    assert model["reset_every"] is None
    assert [model["method"]["init_args"][option] for option in options] == [None] * len(options)


def test_one_parser_checks_several_configurations():
    every = [[*DIGITS, f"--model.method={name}"] for name in ("tent", "norm")]
    classes = [config["model"]["init_args"]["method"]["class_path"] for config in check_configurations(every)]
    assert classes == ["lightning_tta.methods.Tent", "lightning_tta.methods.Norm"]
    with pytest.raises(ValueError, match="Did you mean batch_size"):
        list(check_configurations([*every, [*DIGITS, "--model.method=tent", "--data.batch_sise=3"]]))
