"""What README and docs tell the reader to type.

Each command parses, and those that are short run in the pages' order. Each Python block runs, those of a page one after
the other.
"""

import argparse
import contextlib
import glob
import importlib
import itertools
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from lightning_tta.cli import choose
from lightning_tta.cli.commands import COMMANDS, call, make_parser
from lightning_tta.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in path.parts
}
LIGHTNING = ("fit", "validate", "test", "predict")
JOURNEYS = [page for page in PAGES if "journeys" in page]  # run as a whole, each in an empty folder
PLACEHOLDERS = {"CONFIG": "configs/digits/predict.yaml", "ROOT": "."}  # and the reader's own weights:
PLACEHOLDERS |= {"efficientnet_lite0.safetensors": "none"}
PLACEHOLDERS |= {"resnet20.safetensors": "none", "resnet26_gn.safetensors": "none"}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
TRAINED = "lightning-tta fit --config configs/digits/source.yaml"  # by the fixture digits_source
SHORTER = ["--data.domains=[haze,contrast]", "--data.num_images=64", "--data.batch_size=32"]  # of the digits
NOT_RUN = ("benchmark", "configs/trainer/", "tests/measure/", "meta_ttt", "--process")  # long, or of several processes
NOT_RUN += ("data/weights/Standard.pt", "--download")  # the reader's own; and what would be fetched
NOT_RUN += ("configs/pacs", "configs/imagenet", "configs/memo", "configs/cifar10")  # data that are not here
NOT_RUN += ("configs/language",)  # minutes
NOT_RUN += ("lightning-tta weights", "lightning-tta reproduce")  # of a package that is not installed; of data


def blocks_of(text, language):
    """The fenced blocks of a language; not those after a comment that says why they are not run."""
    fence = rf"^(?P<indent> *)```{language}\n(?P<block>.*?)^(?P=indent)```"
    text = re.sub(
        rf"<!-- not run: [^>]+ -->\n+{fence.replace('^(?P<indent> *)', '(?P<indent>)', 1)}", "", text, flags=re.M | re.S
    )
    return [textwrap.dedent(match["block"]) for match in re.finditer(fence, text, re.MULTILINE | re.DOTALL)]


def commands_of(text):
    """Our commands as lists of words: those of fenced bash blocks, and those in single backticks."""
    lines = [line for block in blocks_of(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = []
    for line in (*lines, *(" ".join(span.split()) for span in spans)):
        if line.startswith(("lightning-tta ", "python -m lightning_tta ", "python tests/measure/")):
            words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if word in (">", ">>", "&&", "|", ";")), len(words))
            command = [PLACEHOLDERS.get(word, word) for word in words[:end]]
            if command not in found:
                found.append(command)
    return found


ALL = commands_of("\n\n".join(text for page, text in PAGES.items() if page not in JOURNEYS))


class Parsed(Exception):
    """Raised in place of what a script would do after its arguments."""


def check(words, monkeypatch, parse):
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
        parse([name, *args])
    elif name == "stream":
        parse(["predict", "--model.method=source", *args])
    elif name == "choose" and args:
        _, rest = choose.make_parser().parse_known_args(args)
        parse(["predict", "--model.method=source", *rest])
    elif name == "doctor" and args:
        _, rest = argparse_of_doctor().parse_known_args(args)
        parse(["predict", "--model.method=source", *rest])
    elif name == "benchmark":
        checks = "lightning_tta.benchmark.runner.check_configurations"  # of cells: test_configs.py has them all
        monkeypatch.setattr(checks, lambda cells: itertools.repeat(parse(next(iter(cells)))))
        call("benchmark", args)
    elif name in ("report", "export", "init", "reproduce", "weights") and (args or name != "weights"):
        make_parser(name)[1].parse_args(args)
    elif name in COMMANDS:
        assert not args or (name, args) == ("methods", ["tent"])
    else:
        main([name, *args])


def argparse_of_doctor():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    return parser


def asks(words):
    """Whether LightningCLI prints something and ends."""
    return words[1] in LIGHTNING and any(word.endswith("help") or word.startswith("--print_config") for word in words)


def test_there_are_some():
    assert TRAINED.split() in ALL
    assert len(ALL) > 40
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
def test_it_parses(words, monkeypatch, capsys, parse):
    monkeypatch.chdir(ROOT)
    if asks(words):
        with pytest.raises(SystemExit) as caught:
            check(words, monkeypatch, parse)
        assert not caught.value.code
        assert len(capsys.readouterr().out) > 200
    else:
        check(words, monkeypatch, parse)


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
def test_what_is_wrong_is_found(rotten, monkeypatch, parse):
    monkeypatch.chdir(ROOT)
    (words,) = commands_of(f"```bash\n{rotten}\n```\n")
    with pytest.raises((Exception, SystemExit)) as caught:
        check(words, monkeypatch, parse)
    assert not isinstance(caught.value, SystemExit) or caught.value.code


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of a reader who has photos of three classes, weights, and the configurations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    generator = torch.Generator().manual_seed(0)
    for folder in ("photos/train", "photos/test", "night", "rain"):
        for name in ("cat", "dog", "owl"):
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(256, (40, 48, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{number}.png")
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "my_resnet18.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_short_ones_run_in_this_order(reader, capsys, digits_source):
    shutil.copytree(digits_source, "runs/digits/source")
    for words in ALL:
        if any(part in " ".join(words) for part in NOT_RUN) or "RUN..." in words:
            continue
        if " ".join(words) in (
            TRAINED,
            *(f"lightning-tta {name}" for name in ("init", "doctor", "choose")),
        ):  # configs/ is there; no data
            continue
        shorter = {"fit": [*QUIET, "--trainer.max_epochs=1"], "predict": QUIET}.get(words[1], [])
        shorter = [*shorter, *(SHORTER if words[1] == "predict" and "configs/digits/predict.yaml" in words else [])]
        try:
            main([*words[1:], *([] if asks(words) else shorter)])
        except SystemExit as ended:
            if ended.code:  # help and --print_config end with 0
                pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")
    assert (reader / "adapted.safetensors").is_file()
    assert len(list((reader / "runs").rglob("report.json"))) >= 4


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "reader")
@pytest.mark.parametrize(
    "page", [page for page, text in PAGES.items() if blocks_of(text, "python") and page not in JOURNEYS]
)
def test_python_blocks_run(page):
    net = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10)),
    ).eval()
    names = {"__name__": "reader", "model": net, "digits_net": net, "images": torch.rand(4, 3, 32, 32)}
    names["batches"] = list(torch.rand(4, 8, 3, 32, 32))
    for block in blocks_of(PAGES[page], "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", JOURNEYS)
def test_a_journey_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)
    for block in blocks_of(PAGES[page], "python"):
        text = block.replace("max_epochs=10", "max_epochs=1")
        (tmp_path / block.split()[1]).write_text(text)  # its first line is "# name.py"
    commands = [line for block in blocks_of(PAGES[page], "bash") for line in block.replace("\\\n", " ").splitlines()]
    assert 4 <= len(commands) <= 6
    for command in commands:
        words = [str(name) for word in shlex.split(command) for name in (glob.glob(word) or [word])]
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        else:
            shorter = {"fit": ["--trainer.max_epochs=1", *QUIET], "predict": QUIET}.get(words[1], [])
            main([*words[1:], *shorter])
    out = capsys.readouterr().out
    for line in re.findall(r"^\d+ of \d+ photos are predicted as by the method$", PAGES[page], re.MULTILINE):
        assert line in out
    sys.modules.pop("my_net", None)


def test_blocks_of():
    blocks = ["```python\n1\n```", "<!-- not run: it fetches -->\n```python\n2\n```", "   ```python\n   3\n   ```"]
    assert blocks_of("\n".join([*blocks, "```bash\n4\n```\n"]), "python") == ["1\n", "3\n"]
