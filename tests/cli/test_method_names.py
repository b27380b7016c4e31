"""A method may have its short name, with options or without, wherever a configuration names one."""

import pytest
import yaml

from lightning_tta import ConfigError, LanguageAdaptation
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.launch.method_names import class_path, name_in
from lightning_tta.methods import find
from lightning_tta.methods.single_image_bn import SingleImageBN
from lightning_tta.methods.zerosiam import ZeroSiam

MODELS = {"TestTimeAdaptation": "DigitsData", "LanguageAdaptation": "PromptData"}
SHORT = ["ZeroSiam", "zerosiam", "single_image_bn", "SingleImageBN"]
FILES = {  # the model of a file
    "init_args": lambda model, method: {"class_path": f"lightning_tta.{model}", "init_args": {"method": method}},
    "short class": lambda model, method: {"class_path": model, "init_args": {"method": method}},
}
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture(scope="module")
def parse():
    """The method of a parsed configuration; one parser for all."""
    cli = run_lightning(["predict", "--data=DigitsData", "--model.method=source"], parse_only=True)

    def parse(*args):
        cli.parse_arguments(cli.parser, ["predict", *args])
        return cli.config["predict"]["model"]["init_args"]

    return parse


def options_of(model, method):
    """The options that reach the method: with LanguageAdaptation they are a dict of their own, or beside the class."""
    beside = method.get("init_args", {}) if isinstance(method, dict) else getattr(method, "init_args", {})
    return {**dict(beside), **(model.get("options") or {})}


def class_of(method):
    """The class that a parsed method names."""
    path = method if isinstance(method, str) else method["class_path"]
    return find(path.rpartition(".")[2])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SHORT[:2])
@pytest.mark.parametrize("shape", FILES)
def test_in_a_file_with_options(parse, tmp_path, model, name, shape):
    method = {"class_path": name, "init_args": {"alpha": 0.25}}
    content = {"model": FILES[shape](model, method), "data": {"class_path": MODELS[model]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    given = parse(f"--config={tmp_path / 'run.yaml'}")
    assert class_of(given["method"]) is ZeroSiam
    assert options_of(given, given["method"])["alpha"] == 0.25


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SHORT)
def test_in_a_file_as_text(parse, tmp_path, model, name):
    content = {"model": FILES["init_args"](model, name), "data": {"class_path": MODELS[model]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    given = parse(f"--config={tmp_path / 'run.yaml'}")
    assert class_of(given["method"]) in (ZeroSiam, SingleImageBN)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SHORT[:2])
@pytest.mark.parametrize(
    "args",
    [
        ["--model.method", "NAME", "--model.method.alpha", "0.25"],
        ["--model.method=NAME", "--model.method.alpha=0.25"],
        ["--model.method={class_path: NAME, init_args: {alpha: 0.25}}"],
        ["--model.method", '{"init_args": {"alpha": 0.25}, "class_path": "NAME"}'],
        ["--model.method.class_path=NAME", "--model.method.init_args.alpha=0.25"],
        ["--model.method.alpha=0.25", "--model.method=NAME"],
    ],
    ids=lambda args: " ".join(args).replace("--model.", ""),
)
def test_in_arguments(parse, model, name, args):
    given = parse(f"--model={model}", f"--data={MODELS[model]}", *(each.replace("NAME", name) for each in args))
    assert class_of(given["method"]) is ZeroSiam
    assert options_of(given, given["method"])["alpha"] == 0.25


@pytest.mark.parametrize("model", MODELS)
def test_arguments_change_what_a_file_says(parse, tmp_path, model):
    method = {"class_path": "zerosiam", "init_args": {"alpha": 0.25, "steps": 2}}
    content = {"model": FILES["init_args"](model, method), "data": {"class_path": MODELS[model]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    given = parse(f"--config={tmp_path / 'run.yaml'}", "--model.method.alpha=0.5")
    options = options_of(given, given["method"])
    assert class_of(given["method"]) is ZeroSiam
    assert (options["alpha"], options["steps"]) == (0.5, 2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.method=zerosiam", "--model.method.alhpa=0.5"], r"no option 'alhpa'.*alpha"),
        (["--model.method={class_path: zerosaim, init_args: {alpha: 0.5}}"], r"zerosaim.*Did you mean zerosiam"),
        (["--model.method=zerosaim"], r"zerosaim.*Did you mean zerosiam"),
    ],
)
def test_a_mistake_is_said_before_weights_are_read(parse, model, args, words):
    def run():
        given = parse(f"--model={model}", f"--data={MODELS[model]}", "--model.source_ckpt=nowhere", *args)
        LanguageAdaptation(given["method"], given.get("options"), source_ckpt="nowhere")

    with pytest.raises(ConfigError, match=words):
        run()


def test_what_is_wrong_with_a_method_over_tokens_is_said_first():
    for method, options, words in (
        ("zerosiam", {"lr": -1}, "lr"),
        ("zerosiam", {"steps": 0.5}, "steps"),
        ("my_package.Tent", {}, "no method of this package"),
        ({"class_path": "my_package.Tent"}, {}, "no method of this package"),
        ("lightning_tta.methods.zerosiam.ZeroSiam", {"rate": 1}, "no option 'rate'"),
    ):
        with pytest.raises(ConfigError, match=words):
            LanguageAdaptation(method, options, source_ckpt="nowhere")


def test_numbers_of_a_methods_file_are_numbers(tmp_path):
    (tmp_path / "mine.yaml").write_text("{class_path: zerosiam, init_args: {lr: -4e-4}}")
    with pytest.raises(ConfigError, match=r"lr.*-0\.0004"):
        LanguageAdaptation(str(tmp_path / "mine.yaml"), source_ckpt="nowhere")


def test_a_file_of_a_method_may_have_its_short_name(parse, tmp_path):
    (tmp_path / "mine.yaml").write_text("{class_path: single_image_bn, init_args: {prior: 3}}")
    given = parse("--data=DigitsData", f"--model.method={tmp_path / 'mine.yaml'}")
    assert class_of(given["method"]) is SingleImageBN
    assert given["method"]["init_args"]["prior"] == 3


def test_nothing_else_is_changed():
    for other in ("tent.yaml", "my.Tent", "tnet", "{class_path: tent}"):
        assert class_path(other) == other
    own = {"model": {"class_path": "my.Module", "init_args": {"method": "norm"}}, "data": {"method": "tent"}}
    assert name_in(own) == own  # what the user's own module calls a method
    candidates = {"model": {"init_args": {"method": {"class_path": "Auto", "init_args": {"candidates": ["tent"]}}}}}
    assert name_in(candidates)["model"]["init_args"]["method"]["init_args"] == {"candidates": ["tent"]}
