"""Predict runs over prompts: what the report says is checked by hand, resets, order of answer and step, resume."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from scipy.stats import binom

from lightning_tta import (
    ConfigError,
    FinishedError,
    LanguageAdaptation,
    NotPreparedError,
    PromptData,
    StateKeeper,
    StreamInput,
    WeightsError,
    adapt,
)
from lightning_tta.backbones.gpt import create_gpt
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.report import terminal
from lightning_tta.report.runs import read
from lightning_tta.run.answers import number_of
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")

VISIBLE = {"lr": 0.05, "predictor_lr": 0.05}
NEW = 4
WORDS = ["one", "two!", "3 + 4", "five six", "7", "eight"]


def small_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = create_gpt(layers=1, width=16, heads=2)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(8 if parameter.ndim == 2 else 1)
    return net


def greedy(net, prompt):
    """Ids of the answer, and of each of its tokens the logits, one prompt alone, without a cache."""
    ids, rows = net.tokenizer.encode(prompt), []
    begin = len(ids)
    for _ in range(NEW):
        with torch.no_grad():
            rows.append(net(torch.tensor([ids]))[0, -1].double())
        ids.append(int(rows[-1].argmax()))
        if ids[-1] == net.tokenizer.eos_token_id:
            break
    return ids[begin:], torch.stack(rows)


def text_of(net, ids):
    return net.tokenizer.decode(ids, skip_special_tokens=True)


def files(tmp_path, net):
    """Prompts in two domains; the right answers of half of them are what the net writes by itself."""
    lines = []
    for n, word in enumerate(WORDS):
        answer = text_of(net, greedy(net, word)[0]) if n % 2 == 0 else "no"
        lines.append({"prompt": word, "answer": answer, "domain": "a" if n < 3 else "b"})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run(tmp_path, data, method="zerosiam", callbacks=(), **options):
    options = {"net": small_net(), "max_new_tokens": NEW, "reset": "domain", **options}
    if method in ("zerosiam", "tent"):
        options.setdefault("options", VISIBLE if method == "zerosiam" else {"lr": 0.05})
    module = LanguageAdaptation(method, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.predict(module, data, return_predictions=False)
    return module.run.directory.path


def data_of(tmp_path, **options):
    return PromptData("files", [files(tmp_path, small_net())], **{"batch_size": 2, **options})


def lines_of(directory):
    with (directory / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def report_of(directory):
    return json.loads((directory / "report.json").read_text())


def test_report_and_answers_by_hand(tmp_path):
    net, directory = small_net(), run(tmp_path, data_of(tmp_path), "source")
    report, lines = report_of(directory), lines_of(directory)
    by_prompt = {line["prompt"]: line for line in lines}
    assert sorted(by_prompt) == sorted(WORDS)
    entropies, norms, answers = {}, {}, {}
    for n, word in enumerate(WORDS):
        ids, z = greedy(net, word)
        log_p = z - z.exp().sum(-1, keepdim=True).log()
        entropies[word] = float(-(log_p.exp() * log_p).sum(-1).mean())
        norms[word] = float(z.square().sum(-1).sqrt().mean())
        answers[word] = text_of(net, ids)
        line = by_prompt[word]
        assert line["answer"] == answers[word]
        assert line["domain"] == ("a" if n < 3 else "b")
        assert line["correct"] == str(int(n % 2 == 0))
        assert (line["prediction"] == line["label"]) == (n % 2 == 0)
        assert float(line["entropy"]) == pytest.approx(entropies[word], rel=1e-4)
        chosen = log_p[range(len(ids)), ids].sum()
        assert float(line["confidence"]) == pytest.approx(math.exp(chosen), rel=1e-4)
    assert report["accuracy"] == 0.5
    low, high = report["accuracy_interval"]
    assert 1 - binom.cdf(2, 6, low) == pytest.approx(0.025)
    assert binom.cdf(3, 6, high) == pytest.approx(0.025)
    assert report["domains"]["a"]["accuracy"] == pytest.approx(2 / 3)
    assert report["entropy"] == pytest.approx(sum(entropies.values()) / 6, rel=1e-5)
    assert report["logit_norm"] == pytest.approx(sum(norms.values()) / 6, rel=1e-5)
    inner = sum(norms[word] for word in WORDS[3:]) / 3
    assert report["domains"]["b"]["logit_norm"] == pytest.approx(inner, rel=1e-5)
    counts = [list(answers.values()).count(text) for text in answers.values()]
    assert report["largest_class_share"] == max(counts) / 6
    assert report["most_frequent_answer"] in {
        t for t, c in zip(answers.values(), counts, strict=True) if c == max(counts)
    }
    assert report["generated_tokens"] == sum(len(greedy(net, word)[0]) for word in WORDS)
    assert (report["prompts"], report["images"], report["batches"], report["resets"]) == (6, 6, 4, 1)
    assert (report["forwards"], report["backwards"]) == (4, 0)
    assert report["protocol"]["preprocessing"]["generation"]["max_new_tokens"] == NEW
    (group,) = read([directory]).groups
    assert group.runs[0].predictions_problem == ""
    hits = group.runs[0].hits_in("a")["a"][1]
    assert hits.sum() == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("loss_on", ["auto", "generated"])
def test_answers_are_those_of_the_method_by_hand(tmp_path, when, loss_on):
    data = data_of(tmp_path)
    directory = run(tmp_path, data, when=when, task={"loss_on": loss_on})
    method, answers, domain = adapt(small_net(), task={"kind": "tokens", "loss_on": loss_on}, **VISIBLE), [], 0
    how = {"max_new_tokens": NEW, "stop": [2]}
    for batch in data.predict_dataloader():
        if int(batch["domain"][0]) != domain:
            method.reset()
            domain = int(batch["domain"][0])
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        open_prompts = {**prompts, "generated": torch.zeros_like(prompts["input_ids"])}
        if when == "before":
            answered = method.generate(open_prompts, **how)
            method(answered)
        else:
            method(prompts if loss_on == "auto" else method.generate(open_prompts, **how))
            answered = method.generate(open_prompts, **how)
        for ids, new in zip(answered["input_ids"], answered["generated"], strict=True):
            answers.append(text_of(small_net(), ids[new]))
    assert [line["answer"] for line in lines_of(directory)] == answers
    source = [line["answer"] for line in lines_of(run(tmp_path, data, "source"))]
    assert answers != source


def test_episodic_prompts_do_not_depend_on_the_batch(tmp_path):
    options = {"reset": "prompt", "when": "after"}
    one, four = (run(tmp_path, data_of(tmp_path, batch_size=size), **options) for size in (1, 4))
    a, b = ({line["index"]: line for line in lines_of(directory)} for directory in (one, four))
    assert {n: line["answer"] for n, line in a.items()} == {n: line["answer"] for n, line in b.items()}
    assert report_of(one)["resets"] == report_of(four)["resets"] == 5
    assert report_of(four)["backwards"] == 6
    assert report_of(four)["protocol"]["reset"] == "prompt"
    source = {line["index"]: line["answer"] for line in lines_of(run(tmp_path, data_of(tmp_path), "source"))}
    assert {n: line["answer"] for n, line in b.items()} != source


class Kill(Callback):
    def __init__(self, after):
        self.after = after

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if pl_module.run.batches == self.after:
            raise RuntimeError("killed")


@pytest.mark.parametrize("options", [{"reset": "never"}, {"reset": "prompt", "temperature": 1.0}])
def test_a_killed_run_goes_on_as_if_it_was_not(tmp_path, options):
    whole = run(tmp_path / "whole", data_of(tmp_path), callbacks=[StateKeeper(save_every=1)], **options)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", data_of(tmp_path), callbacks=[StateKeeper(save_every=1), Kill(2)], **options)
    cut = run(tmp_path / "cut", data_of(tmp_path), callbacks=[StateKeeper(save_every=1)], **options)
    assert cut.name == whole.name
    assert (cut / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    times = ("seconds", "seconds_per_batch", "seconds_per_token", "wall_seconds", "peak_memory_mb")
    a, b = ({name: v for name, v in report_of(each).items() if name not in times} for each in (cut, whole))
    assert a == b
    with pytest.raises(FinishedError):
        run(tmp_path / "cut", data_of(tmp_path), **options)


def test_a_batch_that_cannot_be_used_is_skipped(tmp_path):
    class Damaged(PromptData):
        def predict_dataloader(self):
            for number, batch in enumerate(super().predict_dataloader()):
                yield batch | ({"input_ids": batch["input_ids"] + 1000} if number == 1 else {})

    data = Damaged("files", [files(tmp_path, small_net())], batch_size=2)
    with pytest.warns(UserWarning, match="skipped"):
        directory = run(tmp_path, data, callbacks=[StreamInput(on_bad_batch="skip")])
    report = report_of(directory)
    assert (report["skipped_batches"], report["images"]) == (1, 5)
    assert [line["answer"] for line in lines_of(directory) if line["prediction"] == "-1"] == [""]


def test_a_loader_of_ones_own(tmp_path):
    net = small_net()
    ids = torch.tensor([net.tokenizer.encode(word.ljust(8)) for word in WORDS])
    loader = [{"input_ids": ids[n : n + 3], "attention_mask": torch.ones_like(ids[:3])} for n in (0, 3)]
    report = report_of(run(tmp_path, torch.utils.data.DataLoader(loader, batch_size=None), "tent"))
    assert report["accuracy"] is report["accuracy_interval"] is None
    assert (report["images"], report["protocol"]["stream"]) == (6, "custom")


def test_equal_answers_have_equal_numbers():
    assert number_of("144") == 104185719266626  # files of runs hold them
    assert 0 <= number_of("") < 2**48
    assert number_of("19") != number_of("20")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"net": None}, ConfigError, "Which net"),
        ({"source_ckpt": "a.ckpt"}, ConfigError, "Which net"),
        ({"method": "zerosim"}, ConfigError, "Did you mean zerosiam"),
        ({"method": {"lr": 0.1}}, ConfigError, "--model.options.lr"),
        ({"method": "missing.yaml"}, ConfigError, "cannot be read"),
        ({"method": "source", "options": {"lr": 1}}, ConfigError, "no option 'lr'"),
        ({"method": "memo", "options": {}}, TypeError, "adapts on images"),
        ({"when": "never"}, ConfigError, "when must be one of"),
        ({"reset": "epoch"}, ConfigError, "reset must be one of"),
        ({"task": {"loss_on": "half"}}, ConfigError, "loss_on must be one of"),
        ({"temperature": -1.0}, ConfigError, "temperature"),
        ({"net": "no/folder"}, WeightsError, "is no folder"),
    ],
)
def test_what_is_wrong_is_said_before_the_run(options, error, words):
    with pytest.raises(error, match=words):
        LanguageAdaptation(**{"net": small_net() if options.get("source_ckpt") is None else "x", **options})


def test_a_run_shows_training_prompts_to_a_method_that_needs_them(tmp_path):
    options = {"method": "eata", "options": {"fisher_alpha": 1e4, "entropy_margin": 2.0, "lr": 0.05}}
    with pytest.raises(NotPreparedError, match=r"EATA must see source data.*train_files.*fisher_alpha=0"):
        run(tmp_path / "without", data_of(tmp_path), **options)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(20)))
    data = data_of(tmp_path, train_files=[str(train)])
    held = run(tmp_path / "held", data, callbacks=[StreamInput(source_images=7)], **options)
    method = adapt(small_net(), "eata", **options["options"])
    batches = list(data.source_batches(7))
    assert [len(batch["index"]) for batch in batches] == [2, 2, 2, 1]  # as large as the stream's
    method.prepare(batches)
    losses = []
    for number, batch in enumerate(data.predict_dataloader()):
        if number and not bool((batch["domain"] == 0).all()):
            break
        method(
            method.generate(
                {name: batch[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=NEW, stop=[2]
            )
        )
        losses.append(method.stats["loss"])
    logged = [json.loads(line)["loss"] for line in (held / "batches.jsonl").read_text().splitlines()]
    assert logged[: len(losses)] == pytest.approx(losses)
    assert len(losses) > 1


def test_another_tokenizer_than_the_nets_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="other ids"):
        run(tmp_path, data_of(tmp_path), net=create_gpt("abc", layers=1, width=8, heads=1))


def test_ends_that_no_token_is_are_refused(tmp_path):
    size = len(small_net().tokenizer)
    with pytest.raises(ConfigError, match=rf"stop has {size}, 999, and the net's tokens are 0 to {size - 1}"):
        run(tmp_path, data_of(tmp_path), stop=[2, size, 999])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random Llama of transformers, and a tokenizer of words that knows a chat, saved to a folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama")
    words = ["<s>", "</s>", "[UNK]", "[USER]", "[ASSISTANT]", *map(str, range(40)), *"+=.?:{}\\", "Please", "boxed"]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = "{% for m in messages %}[USER] {{ m['content'] }} {% endfor %}[ASSISTANT]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.LlamaConfig(
        vocab_size=len(words), num_key_value_heads=2, initializer_range=0.5, **sizes, **ids
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def command(llama, tmp_path, method, *more):
    """The command in the head of the configuration, with a small net and files, and its report."""
    prompts = []
    for name in ("math_500", "college_math", "aime24", "minerva"):
        prompts.append(tmp_path / f"{name}.jsonl")
        rows = [{"prompt": f"{n} + {n + 3} = ?", "answer": str(2 * n + 3)} for n in range(3)]
        prompts[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = "[" + ", ".join(map(str, prompts)) + "]"
    config = Path(__file__).parents[2] / "configs/language/llama.yaml"
    run_lightning(
        [
            *("predict", "--config", str(config), "--model.method", method, "--model.net", str(llama)),
            *("--data.tokenizer", str(llama), "--data.files", names, "--model.max_new_tokens", "5"),
            *("--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.enable_progress_bar", "false", *more),
        ]
    )
    return directory_of(tmp_path / "llama")


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_one_command_for_a_llama(llama, tmp_path, capsys):
    rates = ["--model.options.lr", "0.05", "--model.options.predictor_lr", "0.05", "--model.reset", "never"]
    directories = [
        command(llama, tmp_path / name, name, *(rates if name == "zerosiam" else rates[-2:]))
        for name in ("source", "zerosiam")
        if (tmp_path / name).mkdir() is None
    ]
    source, zerosiam = map(report_of, directories)
    assert list(source["domains"]) == ["math_500", "college_math", "aime24", "minerva"]
    assert source["protocol"]["hash"] == zerosiam["protocol"]["hash"]
    assert zerosiam["options"]["select"]["targets"] == r".*\.(q_proj|v_proj)"
    assert zerosiam["options"]["task"] == {"kind": "tokens", "loss_on": "generated", "chunk": 128}
    assert (zerosiam["prompts"], zerosiam["backwards"]) == (12, 12)
    assert zerosiam["protocol"]["preprocessing"]["chat"] is True
    assert any(path.name.startswith("events.out") for path in directories[1].iterdir())
    assert "LanguageAdaptation" in (directories[1] / "config.yaml").read_text()
    a, b = ([line["answer"] for line in lines_of(directory)] for directory in directories)
    assert a[0] == b[0]  # nothing was learned before the first answer
    assert a != b
    capsys.readouterr()
    terminal.report(directories, output=tmp_path / "page")
    assert "Answers" in capsys.readouterr().out
    page = (tmp_path / "page/report.md").read_text()
    assert "| aime24" in page
    assert "most frequent answer %" in page


def test_a_tokenizer_of_another_net_is_refused(llama, tmp_path):
    module = {"net": str(llama), "options": {}}
    with pytest.raises(ConfigError, match="is no net of characters"):
        run(tmp_path, data_of(tmp_path), "source", **module)
    (llama / "copy").mkdir()
    with pytest.raises(WeightsError, match="has no causal language model"):
        LanguageAdaptation("source", net=str(llama / "copy"))
