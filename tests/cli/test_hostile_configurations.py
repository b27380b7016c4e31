"""No configuration runs a program: it names classes of declared kinds, and all the rest is data."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_tta.cli.commands import make_parser
from lightning_tta.cli.main import main
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.launch.trust import LARGEST, MODE, close_parsers

CONFIGS = Path(__file__).parents[2] / "configs/digits"
FIT = ["fit", f"--config={CONFIGS}/source.yaml", "--trainer.fast_dev_run=true", "--trainer.logger=false",
       "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.callbacks=null"]  # fmt: skip
PREDICT = ["predict", f"--config={CONFIGS}/predict.yaml", "--data.num_images=8", "--trainer.accelerator=cpu"]
NET = ["--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.num_classes=10"]
LIBRARY = """
import pathlib
from torch import nn

def run(command="x", **rest):
    pathlib.Path("pwned").touch()

class Callable:
    def __init__(self, command="x"):
        run()
    def __call__(self, *args):
        return 1.0

class Plain(Callable):
    __call__ = None
"""
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def scratch(tmp_path, tmp_path_factory, monkeypatch):
    """The current folder; a library that is installed elsewhere."""
    monkeypatch.chdir(tmp_path)
    library = tmp_path_factory.mktemp("library")
    (library / "evil.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(library))
    yield tmp_path
    sys.modules.pop("evil", None)


def call(path, **arguments):
    return json.dumps({"class_path": path, "init_args": arguments or {"command": "a"}})


POPEN = call("subprocess.Popen", args="touch pwned", shell=True)
SYSTEM = call("os.system", command="touch pwned")
SCHEDULE = '{"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": %s}}'
LAMBDA = '[{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": %s}}]'
LOGGER = '{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "x"}, "dict_kwargs": {"comment": %s}}'
HOSTILE = {
    "an option of a net": [*FIT, f'--model.backbone_options={{"x": {POPEN}}}'],
    "in a list in an option": [*FIT, f'--model.backbone_options={{"x": [[{SYSTEM}]]}}'],
    "a class that is no kind": [*FIT, f'--model.backbone_options={{"x": {call("evil.Plain")}}}'],
    "a function as optimizer": [*FIT, f"--model.optimizer={call('evil.run')}"],
    "the system as optimizer": [*FIT, f"--model.optimizer={SYSTEM}"],
    "a class as optimizer": [*FIT, f"--model.optimizer={call('evil.Callable')}"],
    "a function in a schedule": [*FIT, "--model.lr_scheduler=" + SCHEDULE % call("evil.run")],
    "a class in a schedule": [*FIT, "--model.lr_scheduler=" + SCHEDULE % call("evil.Callable")],
    "a function in a callback": [*FIT[:-1], "--trainer.callbacks=" + LAMBDA % call("evil.run")],
    "a program in a callback": [*FIT[:-1], "--trainer.callbacks=" + LAMBDA % POPEN],
    "a function as callback": [*FIT[:-1], f"--trainer.callbacks=[{call('evil.run')}]"],
    "an option of a logger": [*FIT[:3], *FIT[4:], "--trainer.logger=" + LOGGER % call("evil.Plain")],
    "a plugin": [*FIT, f"--trainer.plugins=[{call('evil.Plain')}]"],
    "a strategy": [*FIT, f"--trainer.strategy={POPEN}"],
    "the data": [*FIT, f"--data={POPEN}"],
    "the model": [*FIT, f"--model={call('evil.run')}"],
    "a net": [*FIT, "--model.backbone=os.system", '--model.backbone_options={"command": "touch pwned"}'],
    "a net of a library": [*FIT, "--model.backbone=evil.run", '--model.backbone_options={"command": "x"}'],
    "a net as class": [*PREDICT, NET[0], "--model.method=tent", f"--model.backbone={POPEN}"],
    "a net as function": [*PREDICT, NET[0], "--model.method=tent", f"--model.backbone={call('evil.run')}"],
    "a function of torch": [
        *PREDICT,
        NET[0],
        "--model.method=tent",
        "--model.backbone=" + call(f"{torch.fx.graph_module.__name__}.reduce_graph_module", body={}, import_block="1"),
    ],
    "a method": [*PREDICT, *NET, f"--model.method={call('evil.run')}"],
    "a method by name": [*PREDICT, *NET, "--model.method=os.system"],
    "an option of a net in predict": [
        *PREDICT,
        *NET,
        "--model.method=tent",
        f"--model.backbone_options={{x: {POPEN}}}",
    ],
    "python in yaml": ["fit", "--config=python.yaml"],
}


@pytest.mark.parametrize("args", HOSTILE.values(), ids=HOSTILE)
def test_fit_and_predict(scratch, args):
    (scratch / "python.yaml").write_text("model: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert not list(scratch.rglob("pwned"))


@pytest.mark.parametrize("place", ["trainer", "model", "data", "net", "method", "run"])
def test_benchmark(scratch, place):
    config = yaml.safe_load((CONFIGS / "benchmark.yaml").read_text())
    evil = {"class_path": "subprocess.Popen", "init_args": {"args": "touch pwned", "shell": True}}
    config |= {
        "output": "out",
        "seeds": [0],
        "jobs": 1,
        "nets": {"bn": {"source_ckpt": "none", "backbone": "cifar/resnet20"}},
    }
    config["streams"] = {"iid": {"kind": "iid"}}
    config["methods"] = {"norm": {"class_path": "Norm"}}
    for key, inside in (("trainer", "callbacks"), ("model", "backbone_options"), ("run", "state")):
        if place == key:
            config[key] = {inside: {"x": evil}}
    if place == "data":
        config["data"] = evil
    if place == "net":
        config["nets"]["bn"]["backbone_options"] = {"x": evil}
    if place == "method":
        config["methods"]["norm"] = evil
    (scratch / "benchmark.yaml").write_text(yaml.dump(config))
    with pytest.raises(SystemExit):
        main(["benchmark", "--config=benchmark.yaml"])
    assert not list(scratch.rglob("pwned"))


def test_the_option_is_named(capsys):
    with pytest.raises(SystemExit):
        main(HOSTILE["a function in a schedule"])
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert said.startswith(
        "--model.lr_scheduler.lr_lambda names evil.run, which a configuration may not call. Allowed:"
    )


def test_every_option_of_any_type_keeps_a_mapping():
    """Walks the options of all commands: whatever takes any value takes a class as data."""
    close_parsers()
    cli = run_lightning(["predict", "--model.method=norm", "--data=DigitsData"], parse_only=True)
    parsers = [*cli._subcommand_parsers.values(), *(make_parser(name)[1] for name in ("benchmark", "report", "export"))]
    tried = 0
    for parser in parsers:
        for action in parser._actions:
            kind = str(getattr(action, "_typehint", ""))
            if "Any" not in kind and "object" not in kind:
                continue
            small = ArgumentParser(exit_on_error=False, parser_mode=MODE)
            small.add_argument("--option", type=action._typehint)
            payload = {"class_path": "evil.Plain", "init_args": {"command": "a"}}
            value = {"a": {"b": payload}} if kind.count("dict") > 1 else {"a": payload}
            parsed = small.instantiate(small.parse_object({"option": value}))
            assert "evil.Plain" in str(parsed)
            tried += 1
    assert tried >= 5
    assert not Path("pwned").exists()


def bomb(depth):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(12), "aliases stand for 1.2e"),
        ("a: &a [*a]", "an alias names itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "nest"),
    ],
    ids=["aliases of aliases", "an alias of itself", "depth"],
)
@pytest.mark.parametrize("command", ["fit", "predict", "benchmark"])
def test_a_configuration_that_explodes(capsys, scratch, text, words, command):
    (scratch / "bomb.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main([command, "--config=bomb.yaml"])
    assert words in capsys.readouterr().err
    assert LARGEST == 1_000_000


@pytest.mark.parametrize("text", ["{x: 1, y: {a: 1, b: 2, a: 3}}", "x: 1\ny: {}\nx: 3", '{"x": 1, "x": 2}'])
def test_a_key_that_is_there_twice(text):
    close_parsers()
    parser = ArgumentParser(parser_mode=MODE, exit_on_error=False)
    parser.add_argument("--x", type=int)
    parser.add_argument("--y", type=dict)
    with pytest.raises(Exception, match=r"the key '[ax]' is there twice, in line [13] again"):
        parser.parse_string(text)
    with pytest.raises(Exception, match=r"Parser key \"y\""):
        parser.parse_args(["--y={a: 1, b: 2, a: 3}"])
    assert parser.parse_args(["--y={a: {b: 1}, c: {b: 1}}"]).y == {"a": {"b": 1}, "c": {"b": 1}}


def test_aliases_within_reason_are_read(scratch):
    (scratch / "fine.yaml").write_text("a: &a {x: [1, 2]}\nb: *a\n")
    parser = ArgumentParser(parser_mode=MODE)
    parser.add_argument("--config", action="config")
    parser.add_argument("--a", type=dict)
    parser.add_argument("--b", type=dict)
    assert parser.parse_args(["--config=fine.yaml"]).b == {"x": [1, 2]}
