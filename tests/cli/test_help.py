"""Help, and what needs neither torch nor lightning."""

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_tta import Guard, TestTimeAdaptation
from lightning_tta.cli.commands import COMMANDS
from lightning_tta.cli.main import main
from lightning_tta.data.streams import MEANING, STREAM_KINDS
from lightning_tta.launch.help import RARE, short_help
from lightning_tta.methods import find, names

ROOT = Path(__file__).parents[2]
LIGHT = """
import contextlib, io, json, sys
import lightning_tta, lightning_tta.methods
from lightning_tta.cli.main import main
results = []
for args in json.loads(sys.argv[1]):
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as end:
            code = end.code
    results.append((code, out.getvalue() + err.getvalue()))
heavy = [name for name in ("torch", "lightning", "numpy", "jsonargparse", "rich") if name in sys.modules]
print(json.dumps((results, heavy)))
"""


def test_what_answers_at_once_imports_nothing_heavy():
    asked = [["--help"], [], ["--version"], ["pedict"], ["methods"]]
    run = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(asked)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    results, heavy = json.loads(run.stdout)
    assert heavy == []
    assert [code for code, _ in results] == [0, 0, 0, 2, 0]
    overview, same, version, typo, methods = (text for _, text in results)
    assert overview == same
    assert all(f"  {command} " in overview for command in COMMANDS)
    assert version.strip()[0].isdigit()
    assert "Did you mean predict?" in typo
    assert all(re.search(rf"^  {name}\s", methods, re.MULTILINE) for name in names())
    assert "2006.10726)" in methods


def test_one_method_is_imported_where_one_is_asked_for():
    code = (
        "import sys\nfrom lightning_tta.methods import Norm, find\nassert find('norm') is find('Norm') is Norm\n"
        "print(*(n for n in sys.modules if n.startswith('lightning_tta.methods.') and n.count('.') == 2))\n"
        "print('lightning' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules, lightning = run.stdout.splitlines()
    assert not {f"lightning_tta.methods.{name}" for name in names() if name != "norm"} & set(modules.split())
    assert lightning == "False"


def test_methods_describes_one_with_all_its_options(capsys):
    main(["methods", "SingleImageBN"])
    text = capsys.readouterr().out
    kind = find("single_image_bn")
    assert kind.__doc__.split("\n")[0] in text
    assert all(f"--model.method.{option} " in text for option in set(inspect.signature(kind).parameters) - {"model"})


def test_the_description_of_a_method_is_plain_text(capsys):
    main(["methods", "roid"])
    text = capsys.readouterr().out
    assert re.search(r"passes +2 / 1 \(forward / backward a batch\)\n +needs +norm layers\n", text)
    assert "prediction of the batch (Moving)." in text
    assert not re.search(r"``|::|:\w+:`", text)
    assert re.search(r"--model\.method\.diversity_momentum\n +Share of the mean prediction", text)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_fits_on_a_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    for args in (["--help"], ["--config=none.yaml", "-h"]):
        with pytest.raises(SystemExit) as caught:
            main([command, *args])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        lines = text.splitlines()
        assert len(lines) <= 45
        assert max(map(len, lines)) <= 80
        assert f"lightning-tta {command} --help all" in text
        assert "--data.batch_size" in text or command != "predict"
    if command == "predict":
        options = set(inspect.signature(TestTimeAdaptation).parameters) - {
            "removed",
            *(name.removeprefix("model.") for name in RARE),
        }  # rare
        assert {"method", "source_ckpt", "backbone", "reset"} <= options
        assert all(f"--model.{option} " in text for option in options)
        assert text.index("--model.method ") < text.index("--data.stream ") < text.index("--trainer.devices ")


def test_help_lists_the_options_of_callbacks():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_argument("--seed_everything")
    parser.add_argument("--ckpt_path")
    parser.add_lightning_class_args(Guard, "watch")
    assert "  --watch.action " in short_help("predict", parser)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["fit", "--help", "all"], "--trainer.max_steps"),
        (["predict", "--data.help", "DigitsData"], "--data.severity"),
        (["predict", "--model.method.help", "Tent"], "lr_batch_size"),
        (["benchmark", "--help"], "--jobs"),
        (["report", "--help"], "--output"),
        (["export", "--help"], "--process"),
    ],
)
def test_the_other_kinds_of_help(capsys, args, word):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 0
    assert word in capsys.readouterr().out


def test_table_of_streams(capsys):
    main(["streams"])
    text = capsys.readouterr().out
    assert all(kind in text for kind in STREAM_KINDS)
    assert set(MEANING) == set(STREAM_KINDS)


CLOSED = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
from lightning_tta.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("args", [["methods"], ["report", "RUN"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(args, unbuffered, tmp_path):
    protocol = {"data": "digits", "stream": "iid"}
    (tmp_path / "report.json").write_text(json.dumps({"method": "tent", "protocol": protocol}))
    args = [str(tmp_path) if arg == "RUN" else arg for arg in args]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    end = subprocess.run([sys.executable, "-c", CLOSED, *args], env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert end.stderr == ""
    assert end.returncode == (1 if str(tmp_path) in args else 141)  # rich has its own word for it
    assert (tmp_path / "report.html").exists() == (str(tmp_path) in args)


def test_a_broken_pipe_of_something_else_is_raised(monkeypatch):
    def fail(args):
        raise BrokenPipeError("a worker")

    monkeypatch.setitem(COMMANDS, "methods", COMMANDS["methods"]._replace(run=fail))
    with pytest.raises(BrokenPipeError, match="a worker"):
        main(["methods"])


@pytest.mark.parametrize("path", ["file/deeper", "n" * 300])
def test_a_place_that_cannot_be_written_to_is_named(path, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps({"method": "tent", "protocol": {}}))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path), "--output", str(tmp_path / path)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path / "file" if "deeper" in path else path)[:100] in err
    assert err.endswith("Give another path.\n")


def test_an_error_of_the_system_that_says_nothing_of_a_place_is_raised(monkeypatch):
    def fail(args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setitem(COMMANDS, "methods", COMMANDS["methods"]._replace(run=fail))
    with pytest.raises(OSError, match="Input/output error"):
        main(["methods"])


def test_a_terminal_without_the_characters_gets_others():
    code = (
        "import sys\nfrom lightning_tta.cli import main\nsys.argv[1:] = ['--version']\nmain.main()\nprint('1 ± 2 → µ')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    end = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert end.stdout.splitlines()[1] == "1 +- 2 -> ?"


@pytest.mark.parametrize("args", [["predict", "--config"], ["benchmark", "--config"], ["streams"]], ids=" ".join)
def test_a_file_that_is_no_text_and_a_word_too_many_are_refused(args, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as end:
        main([*args, str(path)])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: streams takes no argument" if args == ["streams"] else "error: A file of the config")
    assert len(err.splitlines()) == 1
