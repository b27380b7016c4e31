"""The README's commands: each one parses, and those that are short on the embedded data run in the README's order."""

import argparse
import contextlib
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from lightning_tta.cli.commands import COMMANDS, call, make_parser
from lightning_tta.cli.main import main
from lightning_tta.launch.lightning import run_lightning

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LIGHTNING = ("fit", "validate", "test", "predict")
PLACEHOLDERS = {"CONFIG": "configs/digits/predict.yaml", "ROOT": "."}  # and the reader's own weights:
PLACEHOLDERS |= {"resnet20.safetensors": "none", "resnet26_gn.safetensors": "none"}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
TRAINED = "lightning-tta fit --config configs/digits/source.yaml"  # by the fixture digits_source
SHORTER = {
    "predict": ["--data.domains=[haze,contrast]", "--data.num_images=64", "--data.batch_size=32", *QUIET],
}
LONG = ("benchmark", "configs/trainer/", "tests/measure/", "meta_ttt")


def commands_of(text):
    """Our commands as lists of words: those of fenced bash blocks, and those in single backticks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = []
    for line in (*lines, *(" ".join(span.split()) for span in spans)):
        if line.startswith(("lightning-tta ", "python -m lightning_tta", "python tests/measure/")):
            words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if word in (">", ">>", "&&", "|", ";")), len(words))
            command = [PLACEHOLDERS.get(word, word) for word in words[:end]]
            if command not in found:
                found.append(command)
    return found


ALL = commands_of(TEXT)


class Parsed(Exception):
    """Raised in place of what a script would do after its arguments."""


def check(words, monkeypatch):
    """Raises unless the command exists, takes these arguments, and finds its configuration files."""
    if words[0] == "python":
        module = importlib.import_module(Path(words[1]).stem)
        parse_args = argparse.ArgumentParser.parse_args

        def parse_only(self, args=None, namespace=None):
            parse_args(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", words[1:])
        with contextlib.suppress(Parsed):
            module.main()
        return
    name, *args = words[1:]
    if name in LIGHTNING:
        run_lightning([name, *args], parse_only=True)
    elif name == "stream":
        run_lightning(["predict", "--model.method=source", *args], parse_only=True)
    elif name == "benchmark":
        # what each cell would be given is parsed in test_configs.py
        monkeypatch.setattr("lightning_tta.benchmark.runner.run_lightning", lambda *args, **options: None)
        call("benchmark", args)
    elif name in ("report", "export"):
        make_parser(name)[1].parse_args(args)
    elif name in COMMANDS:
        assert not args or (name, args) == ("methods", ["tent"])
    else:
        main([name, *args])


def asks(words):
    """Whether LightningCLI prints something and ends."""
    return words[1] in LIGHTNING and any(word.endswith("help") or word.startswith("--print_config") for word in words)


def test_there_are_some():
    assert TRAINED.split() in ALL
    assert len(ALL) > 25
    assert {words[1] for words in ALL} >= {
        "fit",
        "predict",
        "benchmark",
        "report",
        "stream",
        "export",
        "tests/measure/cost.py",
    }


@pytest.mark.parametrize("words", ALL, ids=lambda words: " ".join(words[1:])[:80])
def test_it_parses(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if asks(words):
        with pytest.raises(SystemExit) as caught:
            check(words, monkeypatch)
        assert not caught.value.code
        assert len(capsys.readouterr().out) > 200
    else:
        check(words, monkeypatch)


@pytest.mark.parametrize(
    "rotten",
    [
        "lightning-tta fit --config configs/digits/sauce.yaml",
        "lightning-tta fit --config configs/digits/source.yaml --trainer.epochs 3",
        "lightning-tta predict --config configs/digits/predict.yaml --model.method Tnet",
        "lightning-tta predict --config configs/digits/predict.yaml --model.method configs/methods/tnet.yaml",
        "lightning-tta predict --config configs/digits/predict.yaml --model.method tent --model.rate 3",
        "lightning-tta benchmark --config configs/digits/benchmark.yaml --only '[tnet]'",
        "lightning-tta benchmark --config configs/digits/benchmark.yaml --nets.none.fit x.yaml",
        "lightning-tta stream --config configs/digits/none.yaml",
        "lightning-tta report --tex true runs",
        "lightning-tta export",
        "lightning-tta refine --config configs/digits/source.yaml",
        "lightning-tta --print_completion bash",
        "python tests/measure/none.py",
        "python tests/measure/loading.py --pictures 3",
        "python tests/measure/memo_cifar.py",
    ],
)
def test_what_is_wrong_is_found(rotten, monkeypatch):
    monkeypatch.chdir(ROOT)
    (words,) = commands_of(f"```bash\n{rotten}\n```\n")
    with pytest.raises((Exception, SystemExit)) as caught:
        check(words, monkeypatch)
    assert not isinstance(caught.value, SystemExit) or caught.value.code


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_short_ones_run_in_this_order(tmp_path, monkeypatch, capsys, digits_source):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for words in ALL:
        if any(part in " ".join(words) for part in LONG) or "RUN..." in words:
            continue
        if " ".join(words) == TRAINED:
            shutil.copytree(digits_source, "runs/digits/source")
            continue
        shorter = [] if asks(words) else SHORTER.get(words[1], [])
        try:
            main([*words[1:], *shorter])
        except SystemExit as ended:
            if ended.code:  # help and --print_config end with 0
                pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")
    assert (tmp_path / "adapted.safetensors").is_file()
