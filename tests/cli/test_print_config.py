"""``--print_config=comments``: what it prints runs, and says what each option is."""

import inspect
import re

import pytest
import yaml

from lightning_tta.cli.main import main
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.methods import TTAMethod, available_methods

DATA = ["--data", "DigitsData"]
KEY = re.compile(r"^ *([a-z_]+):")


def args_of(kind):
    """First line of each option's description, in the docstring of the class or of the one it extends."""
    found = {}
    for base in reversed(kind.__mro__):
        _, has_args, rest = (inspect.cleandoc(vars(base).get("__doc__") or "")).partition("Args:\n")
        if has_args and issubclass(base, TTAMethod):
            found.update(re.findall(r"^ {4}(\w+): (.+)$", rest.split("\n\n")[0], re.MULTILINE))
    return found


def comments_of(text):
    """Each key below the method with the comment above it."""
    found, comment = {}, []
    for line in text.split("    method:\n")[1].splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip(" #"))
        elif key := KEY.match(line):
            found.setdefault(key.group(1), "\n".join(comment))
            comment = []
    return found


@pytest.fixture(scope="module")
def parser():
    return run_lightning(["predict", "--model.method=source", *DATA], parse_only=True).parser


def parsed(parser, args):
    """The configuration without the names of its files."""
    config = parser.parse_args(["predict", *args])["predict"].as_dict()
    config.pop("config")
    return config


@pytest.mark.parametrize("name", available_methods())
def test_every_method_prints_what_parses_back(parser, capsys, tmp_path, name):
    kind = available_methods()[name]
    asked = [f"--model.method=lightning_tta.methods.{kind.__name__}", *DATA]
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["predict", *asked, "--print_config=comments"])
    assert not caught.value.code
    text = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert parsed(parser, ["--config", str(path)]) == parsed(parser, asked)
    options = yaml.safe_load(text)["model"]["init_args"]["method"].get("init_args", {})
    assert set(options) == set(inspect.signature(kind).parameters) - {"model"}
    described, comments = args_of(kind), comments_of(text)
    for option in options:
        assert comments[option].startswith(described.get(option, "")), option
        assert comments[option], option
    assert not options or inspect.getdoc(kind).split("\n")[0].rstrip(".:") in text
    assert max(map(len, text.splitlines())) < 2000  # no list of a thousand subclasses


def test_the_printed_file_is_a_configuration_of_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--model.method", "zerosiam", *DATA, "--print_config=comments"])
    assert not caught.value.code
    text = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    config = run_lightning(["predict", "--config", str(path)], parse_only=True).config.predict
    assert config.model.init_args.method.class_path == "lightning_tta.methods.ZeroSiam"
    assert "# Weight of the alignment term, >= 0." in text


@pytest.mark.parametrize("form", [["--model.method=single_image_bn"], ["--model.method", "single_image_bn"]])
def test_a_method_by_its_name(form):
    config = run_lightning(["predict", *form, "--model.method.prior=3", *DATA], parse_only=True).config.predict
    assert config.model.init_args.method.class_path == "lightning_tta.methods.SingleImageBN"
    assert config.model.init_args.method.init_args.prior == 3


def test_help_by_its_name(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--model.method.help", "zerosiam"])
    assert "--method.alpha" in capsys.readouterr().out


def test_help_counts_what_nobody_can_read(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--model.method=source", *DATA, "--print_config=comments"])
    text = capsys.readouterr().out
    assert "lightning_tta.DigitsData" in text.split("\ndata:")[0].splitlines()[-1]
    backbone = text.partition("Name for :func:`lightning_tta.create_backbone`")[2].partition("backbone:")[0]
    assert re.search(r"\d{3} known subclasses\)\n", backbone)
    assert len(backbone) < 600
