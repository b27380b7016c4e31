"""Prompts: embedded tasks, dialects, JSONL files, batches, streams, the protocol."""

import json
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch

from lightning_tta import ConfigError, DataError, PromptData
from lightning_tta.backbones.tokenizer import load_tokenizer
from lightning_tta.data import Protocol
from lightning_tta.data.text import dialects, python_text
from lightning_tta.data.text.arithmetic import Arithmetic
from lightning_tta.data.text.prompts import Keys, read_jsonl


@pytest.fixture
def few_docstrings(monkeypatch):
    """Docstrings of two modules: those of all take a second to read."""
    monkeypatch.setattr(python_text, "MODULES", ["string", "textwrap"])
    python_text.read_corpus.cache_clear()
    yield
    python_text.read_corpus.cache_clear()


def write(folder, *lines, name="prompts.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def batches_of(data):
    return list(data.predict_dataloader())


# --- arithmetic


def test_problems_and_answers_are_right_and_each_is_in_one_split():
    task = Arithmetic(digits=1, operations=["+", "-", "*"], problems=300)
    every = [prompt for split in ("train", "val", "test") for prompt in task.prompts(split)]
    assert sorted(prompt.prompt for prompt in every) == sorted(
        f"{a}{sign}{b}=" for a in range(10) for b in range(10) for sign in "+-*"
    )
    assert all(eval(prompt.prompt[:-1]) == int(prompt.answer) for prompt in every)
    assert [len(task.prompts(split)) for split in ("train", "val", "test")] == [180, 15, 105]


def test_problems_are_the_same_on_every_machine():
    assert [prompt.prompt for prompt in Arithmetic().prompts("test")[:4]] == ["76+34=", "8+9=", "33+0=", "35+52="]
    assert [prompt.prompt for prompt in Arithmetic(seed=1).prompts("test")[:4]] != ["76+34=", "8+9=", "33+0=", "35+52="]
    assert len({prompt.prompt for prompt in Arithmetic(3, problems=50).prompts("train")}) == 30


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spaces", "12 + 7 ="),
        ("zeros", "012+007="),
        ("brackets", "(12)+(7)="),
        ("square", "[12]+[7]="),
        ("operator", "12&7="),
        ("reversed", "21+7="),
        ("words", "onetwo+seven="),
        ("capitals", "ONETWO+SEVEN="),
        ("preamble", "what is 12+7="),
        ("equals", "12+7:"),
        ("decimal", "12.0+7.0="),
        ("question", "12+7=?"),
    ],
)
def test_dialects(name, text):
    assert dialects.ARITHMETIC[name]("12", "+", "7", [True] * 8) == text
    assert dialects.ARITHMETIC[name]("12", "+", "7", [False] * 8) == "12+7="


def test_every_dialect_is_tested():
    cases = next(mark for mark in test_dialects.pytestmark if mark.name == "parametrize").args[1]
    assert {name for name, _ in cases} == set(dialects.ARITHMETIC)


def test_severity_is_the_share_of_places_and_higher_ones_keep_what_was_changed():
    masks = [dialects.changed_places(20_000, severity, "words", 3) for severity in range(1, 6)]
    assert np.abs([mask.mean() for mask in masks] - np.arange(1, 6) / 5).max() < 0.015  # four standard errors
    assert all((high | ~low).all() for low, high in pairwise(masks))
    assert not (masks[1] == dialects.changed_places(20_000, 2, "zeros", 3)).all()


def test_domains_are_the_same_problems_in_other_words():
    data = PromptData(domains=["source", "words@2", "words", "reversed"], num_prompts=50)
    source, some, words, _ = data.domain_prompts
    assert [p.answer for p in source] == [p.answer for p in some] == [p.answer for p in words]
    letters = [sum(map(str.isalpha, "".join(p.prompt for p in prompts))) for prompts in (source, some, words)]
    assert letters[0] == 0 < letters[1] < letters[2]
    assert not any(map(str.isdigit, "".join(p.prompt for p in words)))
    fewer = PromptData(domains=["zeros"], num_prompts=20).domain_prompts[0]
    assert {p.index for p in fewer} < {p.index for p in source}


def test_groups_of_domains():
    assert set(PromptData().domain_names) == set(dialects.ARITHMETIC) - set(dialects.HELD_OUT["arithmetic"])
    assert set(PromptData(domains=["held_out"]).domain_names) == set(dialects.HELD_OUT["arithmetic"])
    assert PromptData("text").domain_names[:2] == ["topics", "zen"]


# --- streams


def test_sorted_stream_has_each_class_in_one_run():
    data = PromptData(stream="label_shift", domains=["source", "spaces"], batch_size=16)
    firsts = [[batch["domain"][n].item(), a[0]] for batch in batches_of(data) for n, a in enumerate(batch["answer"])]
    runs = [(key, len(list(group))) for key, group in groupby(firsts)]
    assert len(runs) == 2 * 9  # sums of two numbers from 0 to 99 begin with 1 to 9, or are 0
    assert max(length for (_, first), length in runs if first == "1") > 1700
    assert sum(length for _, length in runs) == 7000


def test_streams_of_one_class_and_of_one_answer():
    nines = PromptData(classes=["9"], domains=["source", "spaces"])
    answers = [answer for batch in batches_of(nines) for answer in batch["answer"]]
    assert len(answers) > 500
    assert {answer[0] for answer in answers} == {"9"}
    same = PromptData(classes_by="answer", classes=["105"], domains=["source", "reported", "held_out"])
    answers = [answer for batch in batches_of(same) for answer in batch["answer"]]
    assert len(answers) > 500
    assert set(answers) == {"105"}
    lengths = PromptData(classes_by="length", classes=["1"], domains=["source"])
    assert {len(prompt.answer) for prompt in lengths.domain_prompts[0]} == {1}


@pytest.mark.parametrize("kind", ["iid", "mixed", "correlated", "recurring", "ordered"])
def test_every_prompt_comes_once_with_its_own_texts(kind):
    visits = {"visits": 3} if kind == "recurring" else {}
    data = PromptData(stream=kind, domains=["source", "words@3"], num_prompts=30, batch_size=7, **visits)
    seen, runs = [], 3 if visits else 1
    for batch in batches_of(data):
        for n, index in enumerate(batch["index"].tolist()):
            prompt = data.prompt_of(index)
            tokens = batch["input_ids"][n][batch["attention_mask"][n].bool()]
            assert data.tokenizer.decode(tokens) == f"<bos>{prompt.prompt}"
            assert (batch["prompt"][n], batch["answer"][n]) == (prompt.prompt, prompt.answer)
            assert data.stream_domains[batch["domain"][n]].startswith(prompt.domain)
            seen.append(index)
        assert bool(batch["attention_mask"][:, -1].all())  # padding is on the left
        assert bool((batch["attention_mask"].diff(dim=1) >= 0).all())
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 0).all())
    assert sorted(seen) == list(range(60 * runs))
    assert len(data.stream_domains) == 2 * runs
    data.start_at(4)
    assert torch.equal(batches_of(data)[0]["index"], torch.tensor(data.stream.batches[4]))


def test_seed_decides_the_order():
    orders = [PromptData(domains=["source"], num_prompts=40, order_seed=seed).stream.batches for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_answers_to_learn_are_marked():
    data = PromptData(train_batch_size=32)
    batch = next(iter(data.train_dataloader()))
    for n, index in enumerate(batch["index"].tolist()):
        prompt = data.prompts("train")[index] if n < 3 else None
        ids, mask, answer = (batch[name][n] for name in ("input_ids", "attention_mask", "answer_mask"))
        text = data.tokenizer.decode(ids[mask.bool() & ~answer]), data.tokenizer.decode(ids[answer])
        assert int(eval(text[0].removeprefix("<bos>")[:-1])) == int(text[1].removesuffix("<eos>"))
        assert prompt is None or text == (f"<bos>{prompt.prompt}", f"{prompt.answer}<eos>")
        assert bool((mask.diff() <= 0).all())  # padding is on the right
    domains = [
        set(batch["domain"].tolist())
        for batch in PromptData(val_domains=["source", "zeros"], train_batch_size=300).val_dataloader()
    ]
    assert domains == [{0}, {0}, {1}, {1}]


# --- text


@pytest.mark.usefixtures("few_docstrings")
def test_text_is_cut_into_pieces_without_answers():
    data = PromptData("text", domains=["source", "zen", "capitals"], piece=50)
    train, test = (data.prompts(split) for split in ("train", "test"))
    assert {len(prompt.prompt) for prompt in train} == {50}
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert data.domain_prompts[1][0].prompt.startswith("The Zen of Python, by Tim Peters\n\nBeautiful")
    assert [p.prompt for p in data.domain_prompts[2]] == [p.prompt.upper() for p in test]
    batch = next(iter(data.train_dataloader()))
    assert not batch["answer_mask"].any()
    assert not data.has_answers
    with pytest.raises(ConfigError, match="orders prompts by their answers, and these have none"):
        _ = PromptData("text", stream="label_shift", domains=["zen"]).stream


def test_dialects_of_text_change_words_and_keep_space():
    text = "Now is  better\nthan never."
    expected = {
        "capitals": "NOW IS  BETTER\nTHAN NEVER.",
        "reversed": "woN si  retteb\nnaht .reven",
        "rot13": "Abj vf  orggre\nguna arire.",
        "spaces": " Now  is   better\n than  never.",
        "no_vowels": "Nw is  bttr\nthn nvr.",
    }
    assert {name: dialects.rewrite(text, name, 5, 0) for name in dialects.TEXT} == expected
    some = [dialects.rewrite("word " * 500, "capitals", 2, seed).count("WORD") for seed in (0, 1)]
    assert all(150 < count < 250 for count in some)
    assert some[0] != some[1]


# --- files


def test_file_with_all_parts(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "12+7=", "answer": 19, "checker": "number", "domain": "sums", "index": 7, "more": [1]},
        "",
        {"prompt": "Which? é", "answer": "B"},
        {"prompt": "free"},
    )
    first, second, third = read_jsonl(path, checker="multiple_choice")
    assert (first.prompt, first.answer, first.checker, first.domain, first.index) == (
        "12+7=",
        "19",
        "number",
        "sums",
        7,
    )
    assert (second.prompt, second.checker, second.domain, second.index) == ("Which? é", "multiple_choice", "prompts", 2)
    assert third.answer == ""
    named = write(tmp_path, {"problem": "p", "solution": "s", "subject": "algebra"}, name="math.jsonl")
    assert read_jsonl(named, Keys("problem", "solution", domain="subject"))[0].domain == "algebra"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"no JSON \(Expecting ',' delimiter in column 15\)"),
        ('["prompt"]', "a JSON object is needed, with 'prompt' in it; got a list"),
        ('{"promt": "a"}', "there is no 'prompt'; there: 'promt'. Did you mean promt"),
        ('{"prompt": ""}', "'prompt' must be a text that is not empty; got ''"),
        ('{"prompt": 3}', "got 3"),
        ('{"prompt": "a", "answer": [1]}', r"'answer' must be a text or a finite number; got \[1\]"),
        ('{"prompt": "a", "answer": NaN}', "finite number; got nan"),
        ('{"prompt": "a", "answer": 1e400, "checker": "number"}', "finite number; got inf"),
        ('{"prompt": "a", "answer": "12", "checker": "multiple_choice"}', "a letter from A to J .* got '12'"),
        ('{"prompt": "a", "answer": "None of these", "checker": "multiple_choice"}', "every output would be wrong"),
        ('{"prompt": "a", "answer": true}', "got True"),
        ('{"prompt": "a", "checker": "nummber"}', "Did you mean number"),
        ('{"prompt": "a", "checker": ["exact"]}', "'checker' must be one of exact, number, multiple_choice"),
        ('{"prompt": "a", "domain": 1}', "'domain' must be a text"),
        ('{"prompt": "a", "index": -1}', "'index' must be a whole number"),
        ('{"prompt": "a", "index": true}', "got True"),
        ('{"prompt": "a", "index": 0}', "index 0 is that of line 1 too"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = write(tmp_path, {"prompt": "right"}, "", line)
    with pytest.raises(DataError, match=rf"prompts.jsonl:3: .*{message}"):
        read_jsonl(path)


def test_wrong_files(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: no UTF-8 text"):
        read_jsonl(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no prompt"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_jsonl(tmp_path)


def test_files_are_a_stream_of_their_domains(tmp_path):
    one = write(
        tmp_path, *({"prompt": f"{n}", "answer": n % 3, "domain": "ab"[n % 2]} for n in range(10)), name="1.jsonl"
    )
    two = write(tmp_path, {"prompt": "x", "answer": "2"}, name="two.jsonl")
    data = PromptData("files", [str(one), str(two)], checker="number", stream="ordered", batch_size=4)
    assert data.stream_domains == ["a", "b", "two"]
    assert [batch["prompt"] for batch in batches_of(data)] == [
        ["0", "2", "4", "6"],
        ["8"],
        ["1", "3", "5", "7"],
        ["9"],
        ["x"],
    ]
    assert batches_of(data)[0]["checker"] == ["number"] * 4
    assert PromptData("files", [str(one)], domains=["b"], num_prompts=2).describe()["images_per_domain"] == [2]
    with pytest.raises(ConfigError, match="the files have no domain 'c'"):
        _ = PromptData("files", [str(one)], domains=["c"]).domain_names
    with pytest.raises(ConfigError, match=r"leaves no prompt of domain 'a'. Its classes by first: '0', '1', '2'"):
        _ = PromptData("files", [str(one)], classes=["7"]).domain_prompts
    trained = PromptData("files", [str(two)], train_files=[str(one)], train_batch_size=4)
    assert len(trained.prompts("train")) == 9
    assert len(trained.prompts("val")) == 1
    assert next(iter(trained.train_dataloader()))["input_ids"].shape[0] == 4


# --- tokenizers


@pytest.fixture
def words(tmp_path):
    """A tokenizer of transformers whose tokens are words, without one for padding."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", "Q", "one", "two", "=", "three"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def test_a_tokenizer_of_transformers(tmp_path, words):
    path = write(tmp_path, {"prompt": "one two =", "answer": "three"}, {"prompt": "two", "answer": "one"})
    words.save_pretrained(tmp_path / "words")
    for tokenizer in (words, str(tmp_path / "words")):
        data = PromptData(
            "files", [str(path)], [str(path)], tokenizer=tokenizer, template="Q {prompt}", stream="ordered"
        )
        (batch,) = batches_of(data)
        assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 6], [2, 2, 1, 3, 5]]  # padded with the end
        assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
        learned = data.encoder.prompt_ids("two"), data.encoder.answer_ids("one")
        assert learned == ([1, 3, 5], [4, 2])
    with pytest.raises(ConfigError, match="chat=True needs a tokenizer with a chat template"):
        PromptData("files", [str(path)], tokenizer=words, chat=True)
    words.chat_template = "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}="
    data = PromptData("files", [str(path)], tokenizer=words, chat=True)
    assert data.encoder.prompt_ids("one") == [1, 0, 4, 6]  # <s> user one =: begun once
    with pytest.raises(ConfigError, match=r"transformers finds no tokenizer there"):
        PromptData(tokenizer=str(tmp_path / "none"))
    (tmp_path / "words/tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"transformers finds no tokenizer there"):
        PromptData(tokenizer=str(tmp_path / "words"))


def test_a_tokenizer_is_fetched_only_where_that_is_allowed(monkeypatch):
    asked = []
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **how: asked.append(how))
    for download in (False, True):
        load_tokenizer("somebody/net", download)
    assert [(how["local_files_only"], how["trust_remote_code"]) for how in asked] == [(True, False), (False, False)]


# --- the protocol


def test_protocol_tells_what_was_asked():
    def hashed(**options):
        data = PromptData(**{"domains": ["source", "words"], "num_prompts": 20, "problems": 200, **options})
        run = {"reset": "never", "predict": "method", "weights": "gpt", "preprocessing": data.preprocessing()}
        return Protocol.from_parts(data.describe(), **run).hash

    changed = [
        *({"seed": 1}, {"severity": 2}, {"operations": ["+", "-"]}, {"digits": 1}, {"num_prompts": 19}),
        *({"order_seed": 1}, {"batch_size": 2}, {"template": "{prompt} "}, {"domains": ["words"]}, {"classes": ["1"]}),
        *({"stream": "mixed"}, {"stream": "label_shift"}, {"stream": "label_shift", "classes_by": "answer"}),
    ]
    hashes = [hashed(**options) for options in changed]
    assert len({hashed(), *hashes}) == len(changed) + 1
    assert hashed() == hashed(train_batch_size=7, num_workers=1, val_domains=["zeros"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sums"}, "task must be one of 'arithmetic', 'text', 'files'; got 'sums'"),
        ({"task": "files"}, "task='files' needs some"),
        ({"files": ["a.jsonl"]}, "do not go with task='arithmetic'"),
        ({"domains": ["word"]}, "no domain 'word'. Did you mean words"),
        ({"domains": ["source@2"]}, "no domain 'source@2'"),
        ({"domains": ["words@6"]}, "severity S from 1 to 5"),
        ({"domains": ["words", "words"]}, "each once"),
        ({"domains": "words"}, "domains must be a list of names"),
        ({"domains": []}, "at least one"),
        ({"val_domains": ["wrong"]}, "val_domains: task='arithmetic' has no domain"),
        ({"stream": "blind_spot"}, "stream must be one of"),
        ({"stream": "iid", "visits": 3}, "visits=3 has no meaning for stream='iid'"),
        ({"template": "Question:"}, "with {prompt} in it"),
        ({"tokenizer": object()}, "tokenizer must be .*; got object"),
        ({"operations": ["/"]}, r"operations must be a list of some of '\+', '-', '\*'; got \['/'\]"),
        ({"digits": 4}, r"digits must be a whole number in \[1, 3\]; got 4"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"severity": 0}, "severity must be"),
        ({"classes": "9"}, "classes must be a list of names"),
        ({"checker": "nearly"}, "checker must be one of"),
        ({"chat": True}, "CharTokenizer has none"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptData(**options)
