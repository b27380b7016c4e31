"""Prompts are answered and adapted on: the order by hand, one by one, and what is refused."""

import pytest
import torch
from test_tokens import VISIBLE

from language_nets import TinyLM, make_tokens
from lightning_tta import ConfigError, InputError, adapt, answer
from nets import make_net

HOW = {"max_new_tokens": 3}


def build(name, **options):
    return adapt(
        TinyLM().double(), name, **{**VISIBLE[name], "threshold": 0.5} if name == "tlm" else VISIBLE[name], **options
    )


def prompts():
    batch = make_tokens(batch=3, length=6, generated=0)
    return batch | {"index": torch.arange(3)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def learned(method):
    return torch.cat([tensor.detach().flatten() for tensor in method.learned])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "loss_on"), [("tent", "generated"), ("tent", "auto"), ("tlm", "prompt")])
def test_the_order_of_answer_and_step(name, loss_on, when):
    """Answers before the step are the source's; those after it are those of a net that made it on the prompts."""
    task = {"kind": "tokens", "loss_on": loss_on}
    method, by_hand, source = (build(name, task=task) for _ in range(3))
    asked = {key: prompts()[key] for key in ("input_ids", "attention_mask")}
    answered = answer(method, prompts(), when=when, **HOW)
    draft = source.generate(asked, **HOW)
    if when == "before":
        assert same(answered, draft)
        by_hand(draft)
    else:
        by_hand(draft if loss_on == "generated" else asked)
        assert same(answered, by_hand.generate(asked, **HOW))
    assert torch.equal(learned(method), learned(by_hand))
    assert not torch.equal(learned(method), learned(source))


def test_slot_answers_alike_before_and_after():
    first, second = (answer(build("slot"), prompts(), when=when, **HOW) for when in ("before", "after"))
    assert same(first, second)
    assert not same(first, adapt(TinyLM().double(), "source").generate(prompts(), **HOW))


def test_one_by_one_equals_new_methods():
    method = build("tlm")
    method(prompts())  # forgotten at the first reset
    batch = prompts()
    together = answer(method, batch, when="after", reset="prompt", **HOW, temperature=1.0, seed=4, pad=2)
    for row in range(3):
        there = batch["attention_mask"][row].bool()
        alone = {key: batch[key][row : row + 1, there] for key in ("input_ids", "attention_mask")}
        expected = answer(build("tlm"), alone, when="after", **HOW, temperature=1.0, seed=4 + row)
        new = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row, new], expected["input_ids"][0])
        assert torch.equal(together["generated"][row, new], expected["generated"][0])
        assert bool((together["input_ids"][row, ~new] == 2).all())
        assert int((~new).sum()) == row  # the padding of make_tokens


def test_a_reset_before_the_batch():
    method, fresh = build("tlm"), build("tlm")
    method(prompts())
    assert same(
        answer(method, prompts(), when="after", reset="batch", **HOW), answer(fresh, prompts(), when="after", **HOW)
    )
    moved = learned(method)
    answer(method, prompts(), when="after", **HOW)  # goes on from there
    assert not torch.equal(learned(method), moved)


EMPTY = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}


@pytest.mark.parametrize(
    ("batch", "options", "error", "words"),
    [
        (None, {"when": "during"}, ConfigError, "when must be one of"),
        (None, {"reset": "domain"}, ConfigError, "reset must be one of"),
        (None, {"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
        ({"image": 1}, {}, InputError, "Not a batch of tokens"),
        ({"image": 1}, {"reset": "prompt"}, InputError, "Not a batch of prompts"),
        (EMPTY, {}, InputError, "prompt without tokens"),
        (EMPTY, {"reset": "prompt"}, InputError, "prompt without tokens"),
    ],
)
def test_what_is_refused(batch, options, error, words):
    with pytest.raises(error, match=words):
        answer(build("tent"), prompts() if batch is None else batch, **options)
    with pytest.raises(ConfigError, match="is for language models"):
        answer(adapt(make_net("gn"), "tent"), prompts())
