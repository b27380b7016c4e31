"""Wrong input on the command line ends in a few lines that say what to do: no traceback, and nothing is run."""

import re
from argparse import ArgumentError
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_tta import ConfigError
from lightning_tta.cli.main import main
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.launch.messages import explain

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/digits/predict.yaml"
NET = ["--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.num_classes=10"]
RUN = ["predict", f"--config={CONFIG}", *NET, "--model.method=tent", "--data.num_images=20"]
BENCHMARK = ["benchmark", f"--config={ROOT / 'configs/digits/benchmark.yaml'}"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:source_ckpt='none'", "ignore:.*instantiate_classes"),
]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message_of(capsys, args):
    """What the command says: one to three lines, the last thing on the screen."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert 1 <= len(said.splitlines()) <= 3
    assert "Namespace(" not in said
    assert "<class" not in said
    return said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*RUN, "--state.resume=always"], "--state.resume must be one of 'auto', 'restart'; got 'always'"),
        ([*RUN, "--model.resume=auto"], "model.resume is now --state.resume on the command line"),
        ([*RUN, "--data.stream=gradual", "--data.domains=[clean]"], "clean cannot be. Name corruptions"),
        ([*RUN, "--data.visits=3"], r"visits=3 has no meaning for stream='iid'\. Use it with recurring"),
        ([*RUN, "--data.stream=recurring", "--data.visits=0"], r"visits must be a whole number in \[1, inf\); got 0"),
        ([*RUN, "--data.stream=polluted", "--data.polluters=gausian"], "no kind of noise.*Did you mean gaussian"),
        ([*RUN, "--data.function_set=published"], 'computes nothing.*"builtin" or "imagenet_c"'),
        ([*RUN, "--data.domains=[contrasd]"], "Unknown domain 'contrasd'. Did you mean contrast"),
        ([*RUN, "--data.domains=clean"], "--data.domains must be a list, such as .* or null; got 'clean'"),
        ([*RUN, "--data.batch_size=0"], r"batch_size must be a whole number in \[1, inf\); got 0"),
        ([*RUN, "--data.severity=6"], r"severity must be a whole number in \[1, 5\]; got 6"),
        ([*RUN, "--model.method.lr=-1"], r"^--model.method.lr must be a number in \[0, inf\); got -1.0"),
        ([*RUN, "--model.prior", "{kind:", "em}"], "'em}' belongs to no option. Put quotes around a mapping or a list"),
        ([*RUN, "--model.refine", "{kind:", "cofa}"], "'cofa}' belongs to no option. Put quotes around"),
        ([*RUN, "--model.reset_every=0"], "^--model.reset_every must be a whole number"),
        ([*RUN, "--model.sav_every=3"], "has no option 'sav_every'. Did you mean --state.save_every?"),
        ([*RUN, "--data.reset=never"], "DigitsData has no option 'reset'. Did you mean --model.reset?"),
        ([*RUN, "--model.severty=3"], "Did you mean --data.severity?"),
        ([*RUN, "--trainer.logger=CometLogger"], r"^comet.* is not installed, .*\nInstall it: pip install 'comet"),
        ([*RUN, "--trainer.accelerator=gpu"], "Trainer refuses its options: No supported gpu backend found"),
        ([*RUN, "--data.severity=x"], "--data.severity must be a whole number; got 'x'"),
        ([*RUN, "--data.num_images=x"], "--data.num_images must be a whole number or null; got 'x'"),
        (
            [*RUN, "--data.severty=3"],
            "DigitsData has no option 'severty'. Did you mean severity.*--data.help DigitsData",
        ),
        ([*RUN, "--data=Digits"], "--data 'Digits' is neither a file nor a class. Did you mean DigitsData"),
        ([*RUN, "--model.method.rl=1"], "--model.method.rl: Tent has no option 'rl'.*predict --model.method.help Tent"),
        ([*RUN, "--model.method.lr=x"], "--model.method.lr must be a number; got 'x'"),
        (
            [*RUN, "--model.method=Tnet"],
            "'Tnet' is neither a file nor a class. Did you mean tent.*Known: .*come, .*cotta",
        ),
        ([*RUN, "--model.source_ckpt=nothere.ckpt"], "source_ckpt='nothere.ckpt' does not exist. Give a checkpoint"),
        ([*RUN, "--trainer.max_epohcs=1"], "There is no option 'trainer.max_epohcs'. Did you mean trainer.max_epochs"),
        ([*RUN, "--trainer.devices=x"], "Trainer refuses its options: .*devices"),
        (
            [*RUN, "--model.precision=tf32", "--trainer.precision=16-mixed"],
            "--model.precision tf32 and --trainer.precision 16-mixed contradict.*--trainer.precision 32-true;",
        ),
        ([*RUN, "--trainer.precision=17"], "--trainer.precision must be one of 64, 32, 16 or .*; got '17'"),
        ([*RUN, "--trainer.callbacks+=lightning_tta.Gard"], "'lightning_tta.Gard' is neither a file nor a class"),
        (
            [*RUN, "--trainer.callbacks+=lightning_tta.Guard", "--trainer.callbacks.action=explode"],
            "--trainer.callbacks.action must be one of 'warn', .*; got 'explode'.*callbacks.help lightning_tta.Guard",
        ),
        (["predict"], "Missing: --model.method. .* --config"),
        (["predict", "--model.method=tent", "--data.severity=3"], "--data.severity needs .* first: --data DigitsData"),
        (["predict", "--config=nothere.yaml"], "--config: File does not exist: '.*nothere.yaml'"),
        (["fit"], "Missing: --data, --model. .* --config.*lightning-tta fit --help"),
        (["fit", "--bogus"], "There is no option 'bogus'"),
        (["pedict"], "'pedict' is no command. Did you mean predict.*Give one of: fit, .*, benchmark, reproduce"),
        (["--verison"], "'--verison' is no command. Did you mean --version"),
        (["methods", "tnet"], "Unknown method 'tnet'. Did you mean tent"),
        (["stream"], "Missing: --data. .* --config"),
        (["stream", "--data=DigitsData", "--data.severity=6"], r"severity must be a whole number in \[1, 5\]; got 6"),
        (["stream", "--data=DigitsData", "--picture=x.png"], "--picture is gone. The command stream lists"),
        (["stream", "--config=nothere.yaml"], "--config: File does not exist: '.*nothere.yaml'"),
        (["report", "nowhere"], r"nowhere has no report.json or benchmark.json, .*Give a finished run's directory"),
        (["report"], "Missing: RUNS.*lightning-tta report --help"),
        (["export", "nowhere"], "nowhere is no folder. Give the directory of a predict run"),
        (["benchmark"], "Missing: --output, --data, --nets, --streams, --methods"),
        ([*BENCHMARK, "--only=[nope]"], r"only names methods \['nope'\]; there are \['source'"),
        ([*BENCHMARK, "--jobs=many"], "--jobs must be a whole number; got 'many'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_few_lines_say_what_to_do(capsys, monkeypatch, scratch, args, words):
    monkeypatch.chdir(ROOT if args[: len(BENCHMARK)] == BENCHMARK else scratch)  # its nets' files are below configs/
    assert re.search(words, message_of(capsys, args), re.DOTALL)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.statistics=emma"], "^Unknown --model.statistics 'emma'. Did you mean ema.*Available: batch, "),
        (["--model.prior={kind: movin}"], "^Unknown --model.prior 'movin'. Did you mean moving"),
        (["--model.refine=lam"], "^Unknown --model.refine 'lam'. Did you mean lame"),
        (["--model.statistics={kind: ema, momentun: 1}"], "^--model.statistics 'ema' .* Did you mean momentum"),
        (["--model.reservoir={member: 8}"], "^--model.reservoir has no option 'member'. Did you mean members"),
        (["--model.statistics={kind: ema, momentum: 2}"], r"^--model.statistics: momentum must be .*\(0, 1\]; got 2"),
        (["--model.prior={kind: em, window: 0}"], "^--model.prior: window must be a whole number .* got 0"),
        (["--model.statistics={kind: mixed, cross_term: yes please}"], "cross_term must be one of True, False; got"),
        (["--model.gate=pome"], "^Unknown --model.gate 'pome'. Did you mean poem"),
        (["--model.gate={kind: poem, alpha: 2}"], r"^--model.gate: alpha must be a number in \(0, 0.5\]; got 2"),
        (["--model.gate=poem", "--model.reservoir=8"], "exclude each other: both say which state a batch meets"),
        (["--model.window=1"], "^--model.window must be a whole number .* got 1"),
        (["--model.window=8", "--model.refine=lame"], "^--model.window=8 and refine= exclude each other"),
        (["--model.window=8", "--model.reservoir=8"], "goes with neither window= nor a refinement"),
        (["--model.method=memo", "--model.window=8"], "^--model.window=8: 'memo' treats each image on its own"),
        (
            ["--model.method=source", "--model.reservoir=8"],
            "^--model.reservoir remembers states, and 'source' has none",
        ),
        (["--model.method=foa", "--model.statistics=emma"], "^Unknown --model.statistics 'emma'"),  # needs a ViT
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_every_method_takes_is_refused_before_a_net_is_made(capsys, monkeypatch, args, words):
    monkeypatch.setattr("lightning_tta.modules.adaptation.load_source", lambda *_: pytest.fail("weights were loaded"))
    assert re.search(words, message_of(capsys, [*RUN, *args]), re.DOTALL)


def test_what_only_the_net_can_tell_is_left_to_it():
    for value in ("{kind: domains, layer: layer1.0.bn1}", "{kind: balanced, groups: 8}"):  # of a net with ten classes
        run_lightning([*RUN, f"--model.statistics={value}"], parse_only=True)


def test_a_key_of_a_configuration_is_misspelt(capsys, scratch):
    text = CONFIG.read_text()
    for right, wrong, words in (
        ("stream: ", "straem: ", "--data.straem: DigitsData has no option 'straem'. Did you mean stream"),
        ("data:\n", "dta:\n", "There is no option 'dta'. Did you mean data"),
    ):
        (scratch / "typo.yaml").write_text(text.replace(right, wrong))
        assert words in message_of(capsys, ["predict", "--config=typo.yaml", *NET, "--model.method=tent"])
    assert "Did you mean data" in message_of(capsys, ["stream", "--config=typo.yaml"])


def test_a_configuration_that_is_no_text(capsys, scratch):
    (scratch / "weights.pt").write_bytes(b"PK\x03\x04\x80\xff")
    assert "is no UTF-8 text" in message_of(capsys, ["predict", "--config=weights.pt"])


@pytest.mark.parametrize("text", ["data: [1,\n  b", "hello", "\x00\x01"])
def test_a_configuration_that_is_none(capsys, scratch, text):
    (scratch / "broken.yaml").write_text(text)
    message = message_of(capsys, ["predict", "--config=broken.yaml"])
    assert re.search("Problems parsing config: .*(line 3|position 0)|Unexpected config: hello", message)


def test_what_no_rule_knows_is_said_in_the_words_of_the_library():
    parser = ArgumentParser(prog="lightning-tta fit")
    for text, said in (("A new text.", "A new text."), ('Parser key "a.b":\n  A new text.', "--a.b: A new text.")):
        error = explain(ArgumentError(None, text), parser, "lightning-tta fit")
        assert str(error) == f"{said}\nAll options: lightning-tta fit --help"


def test_weights_that_are_a_text_file(capsys, scratch):
    (scratch / "text.ckpt").write_text("hello\n")
    said = message_of(capsys, [*RUN, "--model.source_ckpt=text.ckpt"])
    assert "text.ckpt is not a readable checkpoint" in said
    assert "fetch or save it again" in said


def test_resuming_from_a_text_file(capsys, scratch):
    (scratch / "text.ckpt").write_text("hello\n")
    assert "text.ckpt is not a readable checkpoint" in message_of(capsys, [*RUN, "--ckpt_path=text.ckpt"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["reproduce", "tent", "--check"], "--check needs a value: --check true."),
        (["reproduce", "tent", "--root"], "--root needs a value: --root VALUE."),
        (["report", "x", "--allow_different"], "--allow_different needs a value: --allow_different true."),
        (["reproduce", "tent", "--weights", "net.pt"], "got 'net.pt'. Name an entry: --weights.NAME net.pt."),
        (["reproduce", "tent", "--paths=data"], "got 'data'. Name an entry: --paths.NAME data."),
    ],
)
def test_an_option_without_its_value_or_name_shows_how_it_is_written(capsys, scratch, args, words):
    assert words in message_of(capsys, args)


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ("[1]", "no report"), ("{}", "no report")])
def test_a_report_that_is_none(capsys, scratch, text, words):
    (scratch / "report.json").write_text(text)
    for run in (".", "report.json"):
        said = message_of(capsys, ["report", run])
        assert "report.json" in said
        assert words in said


def test_python_gets_the_same_as_an_error():
    with pytest.raises(ConfigError, match="Tent has no option 'nooption'"):
        run_lightning([*RUN, "--model.method.nooption=1"], parse_only=True)
    with pytest.raises(ConfigError, match="has no option 'nooption'"):
        run_lightning(
            {"subcommand": "predict", "predict": {"data": {"class_path": "DigitsData", "init_args": {"nooption": 1}}}}
        )
