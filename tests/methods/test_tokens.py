"""Methods over the tokens of a language model: references in float64, identities, masks, chunks, state, errors."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from language_nets import TinyLM, make_tokens
from lightning_tta import (
    ConfigError,
    DataError,
    InputError,
    NotPreparedError,
    UnsupportedModelError,
    adapt,
    available_methods,
)
from lightning_tta.methods.base.chunks import chunked
from lightning_tta.methods.components.adapters import LowRank

METHODS = sorted(name for name, kind in available_methods().items() if "tokens" in kind.tasks)
LEARNING = {"tent", "come", "eta", "zerosiam"}
VISIBLE = {"tent": {"lr": 0.02}, "come": {"lr": 0.02}, "eta": {"lr": 0.02, "entropy_margin": 2.0}}
VISIBLE |= {"tlm": {"lr": 0.02, "threshold": 1.0}, "slot": {"descent_steps": 3}}
VISIBLE |= {"eata": VISIBLE["eta"], "zerosiam": {"lr": 0.02, "predictor_lr": 0.05}}


def build(name, dtype=torch.float64, **options):
    return adapt(TinyLM().to(dtype), name, **{**VISIBLE.get(name, {}), **options})


def pass_by_hand(net, batch, added):
    """Hidden states (B, T, D) after the final norm, with LoRA (2 up down) on the query and value projections."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    x = net.embedding.weight[ids] + net.places.weight[(mask.cumsum(1) - 1).clamp_min(0)]

    def linear(name):
        layer = getattr(net, name)
        weight = layer.weight + 2 * added[name][1] @ added[name][0] if name in added else layer.weight
        return x @ weight.T + layer.bias

    length, half = x.shape[1], x.shape[-1] // 2
    mixed = torch.zeros_like(x)
    for head in range(2):
        part = slice(head * half, (head + 1) * half)
        q, k, v = linear("q_proj")[..., part], linear("k_proj")[..., part], linear("v_proj")[..., part]
        scores = torch.einsum("btd,bsd->bts", q, k) / half**0.5
        future = torch.arange(length)[:, None] < torch.arange(length)[None, :]
        scores = torch.where(future[None] | (mask == 0)[:, None, :], torch.tensor(-1e4, dtype=x.dtype), scores)
        mixed[..., part] = torch.einsum("bts,bsd->btd", scores.softmax(-1), v)
    y = x + mixed @ net.o_proj.weight.T + net.o_proj.bias
    centered = y - y.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * net.norm.weight + net.norm.bias


def counted_by_hand(batch, loss_on="generated"):
    """Position t, for t + 1 named, by a loop."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counts = torch.zeros_like(mask, dtype=torch.bool)
    for row in range(len(ids)):
        number = 0
        for t in range(ids.shape[1] - 1):
            generated = bool(batch["generated"][row, t + 1])
            named = {"generated": generated, "prompt": not generated, "all": True, "first:2": generated}[loss_on]
            if named and mask[row, t] and mask[row, t + 1] and not (loss_on == "first:2" and number == 2):
                counts[row, t] = True
                number += 1
    return counts


def adamw(tensors, gradients, moments, step, rates):
    """AdamW by its formula, without decay."""
    for tensor, gradient, moment, rate in zip(tensors, gradients, moments, rates, strict=True):
        moment[0] = 0.9 * moment[0] + 0.1 * gradient
        moment[1] = 0.999 * moment[1] + 0.001 * gradient**2
        mean, square = moment[0] / (1 - 0.9**step), moment[1] / (1 - 0.999**step)
        tensor.data -= rate * mean / (square.sqrt() + 1e-8)


def entropy_by_hand(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize("loss_on", ["generated", "prompt", "all", "first:2"])
@pytest.mark.parametrize("name", ["zerosiam", "tent"])
def test_three_steps_equal_a_reference(name, loss_on):
    net = TinyLM().double()
    method = adapt(net, name, **VISIBLE[name], task={"kind": "tokens", "loss_on": loss_on})
    lora = dict(method.model.named_parameters())
    added = {
        layer: [lora[f"net.{layer}.parametrizations.weight.0.{part}"].detach().clone() for part in ("down0", "up0")]
        for layer in ("q_proj", "v_proj")
    }
    assert added["q_proj"][0].shape == (8, 8)
    h = torch.eye(8, dtype=torch.float64)
    learned = [*added["q_proj"], *added["v_proj"], *([h] if name == "zerosiam" else [])]
    rates, moments = [0.02] * 4 + [0.05], [[0.0, 0.0] for _ in learned]
    for step in (1, 2, 3):
        batch = make_tokens(seed=step)
        for tensor in learned:
            tensor.requires_grad_()
        z = pass_by_hand(net, batch, added)
        u = z @ net.lm_head.weight.T
        o = (z @ h.T) @ net.lm_head.weight.T
        losses = entropy_by_hand(o)
        if name == "zerosiam":
            p, t = o.softmax(-1), u.detach().softmax(-1)
            losses = losses + (t * (t / p).log()).sum(-1) + (p * (p / t).log()).sum(-1)
        loss = losses[counted_by_hand(batch, loss_on)].mean()
        gradients = torch.autograd.grad(loss, learned)
        for tensor in learned:
            tensor.requires_grad_(False)
        logits = method(batch)
        torch.testing.assert_close(logits, u.detach(), rtol=0, atol=1e-10)
        assert method.stats["loss"] == pytest.approx(loss.item(), abs=1e-10)
        counted = counted_by_hand(batch, loss_on)
        assert method.stats["entropy"] == pytest.approx(entropy_by_hand(u)[counted].mean().item(), abs=1e-10)
        share = u.argmax(-1)[counted].bincount().max() / counted.sum()
        assert method.stats["largest_class_share"] == pytest.approx(share.item())
        adamw(learned, gradients, moments, step, rates[: len(learned)])
        assert not any(g.abs().max() == 0 for g in gradients[1::2])
    now = method.learned
    for tensor, reference in zip(now, learned, strict=True):
        torch.testing.assert_close(tensor.detach(), reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss_on", ["auto", "prompt"])
def test_eatas_penalty_over_tokens_equals_a_reference(loss_on):
    """F from the tokens of two source batches that count, the answers where the loss is on what the net writes."""
    net, alpha = TinyLM().double(), 1e4
    task = {"kind": "tokens", "loss_on": loss_on}
    method = adapt(net, "eata", task=task, lr=0.02, entropy_margin=2.0, fisher_alpha=alpha)
    lora = dict(method.model.named_parameters())
    learned = [
        lora[f"net.{layer}.parametrizations.weight.0.{part}"].detach().clone()
        for layer in ("q_proj", "v_proj")
        for part in ("down0", "up0")
    ]

    def logits_of(batch, tensors):
        return pass_by_hand(net, batch, {"q_proj": tensors[:2], "v_proj": tensors[2:]}) @ net.lm_head.weight.T

    def counted(batch):
        return counted_by_hand(batch, "generated" if loss_on == "auto" else loss_on)

    source = [make_tokens(batch=4, seed=30), make_tokens(batch=2, seed=31, generated=5)]
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "generated": "answer_mask"}
    empty = make_tokens(batch=2, seed=32) | {"generated": torch.zeros(2, 9, dtype=torch.bool)}
    shown = [{new: batch[old] for old, new in names.items()} for batch in [*source, empty][: 2 + (loss_on == "auto")]]
    method.prepare(shown)  # the last one has no answers, and does not count
    start, fisher = [t.clone() for t in learned], [0.0] * 4
    for batch in source:
        tensors = [t.clone().requires_grad_() for t in learned]
        log_p = logits_of(batch, tensors).log_softmax(-1)
        surprise = -log_p.amax(-1)[counted(batch)].mean()
        fisher = [f + g**2 / 2 for f, g in zip(fisher, torch.autograd.grad(surprise, tensors), strict=True)]
    for number, expected in enumerate(fisher):
        torch.testing.assert_close(method.get_buffer(f"fisher_{number}"), expected, rtol=1e-9, atol=1e-18)
    assert fisher[1].max() > 1e-6
    moments, bound = [[0.0, 0.0] for _ in learned], 2 * math.log(11)
    for step in (1, 2, 3):
        batch = make_tokens(seed=step)
        for tensor in learned:
            tensor.requires_grad_()
        entropies = entropy_by_hand(logits_of(batch, learned))[counted(batch)]
        penalty = alpha * sum((f * (t - s) ** 2).sum() for f, t, s in zip(fisher, learned, start, strict=True))
        loss = ((bound - entropies.detach()).exp() * entropies).mean() + penalty
        gradients = torch.autograd.grad(loss, learned)
        for tensor in learned:
            tensor.requires_grad_(False)
        method(batch)
        assert method.stats["loss"] == pytest.approx(loss.item(), rel=1e-10)
        adamw(learned, gradients, moments, step, [0.02] * 4)
    assert penalty.item() > 1e-3
    for tensor, reference in zip(method.learned, learned, strict=True):
        torch.testing.assert_close(tensor.detach(), reference, rtol=0, atol=1e-9)


def test_eata_says_which_source_texts_it_takes():
    method = build("eata", fisher_alpha=1.0)
    with pytest.raises(NotPreparedError, match="'input_ids' and 'attention_mask'"):
        method(make_tokens())
    for wrong in ([{"image": torch.rand(2, 3, 4, 4)}], make_tokens(), [make_tokens()["input_ids"]]):
        with pytest.raises(DataError, match="dicts with 'input_ids' and 'attention_mask'"):
            method.prepare(wrong)
    with pytest.raises(DataError, match="no token whose prediction counts"):
        method.prepare([make_tokens() | {"generated": torch.zeros(3, 9)}])
    with pytest.raises(InputError, match="ids from"):
        method.prepare([{"input_ids": torch.full((2, 4), 99)}])


def test_the_first_step_on_lora_equals_that_of_tent():
    batch = make_tokens()
    tent, zerosiam = build("tent"), build("zerosiam")
    assert torch.equal(tent(batch), zerosiam(batch))
    for a, b in zip(tent.learned, zerosiam.learned[:-1], strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-12)
    after = make_tokens(seed=5)
    assert not torch.equal(tent.predict(after), build("tent").predict(after))


@pytest.mark.parametrize("name", sorted(LEARNING))
def test_positions_that_do_not_count_have_no_gradient(name):
    """Other tokens after the last position that counts, and other padding, change no gradient."""
    batch = make_tokens(generated=0) | {"generated": torch.zeros(3, 9, dtype=torch.bool)}
    batch["generated"][:, 4:6] = True
    other = {key: value.clone() for key, value in batch.items()}
    other["input_ids"][:, 6:] = (other["input_ids"][:, 6:] + 3) % 11
    other["input_ids"][1:, 0] = 7  # padding of all rows but the first
    a, b = build(name), build(name)
    one, two = a(batch), b(other)
    torch.testing.assert_close(one[0, :6], two[0, :6], rtol=0, atol=1e-12)
    for x, y in zip(a.learned, b.learned, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=1e-10)
    assert any(bool((x != y).any()) for x, y in zip(a.learned, build(name).learned, strict=True))


@pytest.mark.parametrize("name", sorted(LEARNING))
def test_two_prompts_with_padding_equal_two_prompts_alone(name):
    """The mean over tokens of two prompts is that of both, each with its number of tokens."""
    batch = make_tokens(batch=2)
    batch["attention_mask"][1, :4] = 0  # the second has five tokens
    alone = [{key: value[row : row + 1, 4 * row :] for key, value in batch.items()} for row in (0, 1)]
    together = build(name, optimizer="sgd", momentum=0.0)
    logits = together(batch)
    moved = [now.detach() - was.detach() for now, was in zip(together.learned, build(name).learned, strict=True)]
    apart = []
    for one in alone:
        method = build(name, optimizer="sgd", momentum=0.0)
        row = len(apart)
        torch.testing.assert_close(method(one)[0], logits[row, 4 * row :], rtol=0, atol=1e-12)
        pairs = zip(method.learned, build(name).learned, strict=True)
        apart.append([now.detach() - was.detach() for now, was in pairs])
    for both, first, second in zip(moved, *apart, strict=True):  # three tokens each
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", sorted(LEARNING))
def test_the_loss_in_chunks_equals_that_in_one(name):
    batch = make_tokens(batch=4, length=12, generated=7)
    methods = [build(name, task={"kind": "tokens", "chunk": chunk}) for chunk in (1, 5, 1000)]
    results = [[method(batch), method(batch)] for method in methods]
    for method, (first, second) in zip(methods[:2], results[:2], strict=True):
        torch.testing.assert_close(first, results[2][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(second, results[2][1], rtol=0, atol=1e-9)
        assert method.stats["loss"] == pytest.approx(methods[2].stats["loss"], abs=1e-9)
    assert not torch.equal(results[2][0], results[2][1])


def test_no_large_tensor_has_a_graph():
    """Of (positions, vocabulary) values only a chunk is kept for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        adapt(TinyLM(vocabulary=500), "zerosiam", task={"kind": "tokens", "chunk": 4})(
            make_tokens(batch=2, length=40, vocabulary=500, generated=20)
        )
    assert max(sizes) < 20 * 500  # 40 positions count; the head itself has 4,000 values
    assert max(sizes) >= 4 * 500


@pytest.mark.parametrize("name", METHODS)
def test_reset_and_state_are_exact(name):
    method, stream = build(name, torch.float32), [make_tokens(seed=seed) for seed in range(4)]
    before = copy.deepcopy(method.state_dict())
    first = [method(batch) for batch in stream[:2]]
    middle = copy.deepcopy(method.state_dict())
    rest = [method(batch) for batch in stream[2:]]
    resumed = build(name, torch.float32)
    resumed.load_state_dict(middle)
    assert all(torch.equal(resumed(batch), logits) for batch, logits in zip(stream[2:], rest, strict=True))
    method.reset()
    after = method.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], torch.Tensor))
    assert all(torch.equal(method(batch), logits) for batch, logits in zip(stream[:2], first, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_net_is_the_users_own_class(name):
    method, batch = build(name), make_tokens()
    method(batch)
    if name in ("slot", "em_inf"):
        with pytest.raises(UnsupportedModelError, match="Deploy the method itself"):
            method.export()
        return
    net = method.export()
    assert type(net) is TinyLM
    assert net.state_dict().keys() == TinyLM().state_dict().keys()
    given = batch["input_ids"], batch["attention_mask"]
    torch.testing.assert_close(net(*given), method.predict(batch), rtol=0, atol=1e-12)


def test_a_batch_without_counted_positions_changes_nothing():
    batch = make_tokens() | {"generated": torch.zeros(3, 9, dtype=torch.bool)}
    for name in sorted(LEARNING):
        method = build(name)
        before = [tensor.detach().clone() for tensor in method.learned]
        method(batch)
        assert all(torch.equal(now, was) for now, was in zip(method.learned, before, strict=True))
        assert "entropy" not in method.stats


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_do_not_depend_on_padding(side):
    method = build("zerosiam")
    method(make_tokens())
    prompts = make_tokens(batch=2, length=6, generated=0)
    prompts["attention_mask"][:] = 1
    prompts["attention_mask"][1, slice(None, 2) if side == "left" else slice(-2, None)] = 0
    together = method.generate(prompts, max_new_tokens=5)
    for row in (0, 1):
        kept = prompts["attention_mask"][row].bool()
        ids = prompts["input_ids"][row, kept][None]
        by_hand = []
        for _ in range(5):
            by_hand.append(method.predict({"input_ids": ids})[0, -1].argmax())
            ids = torch.cat([ids, by_hand[-1].view(1, 1)], 1)
        assert together["input_ids"][row, together["generated"][row]].tolist() == [int(token) for token in by_hand]
        assert together["attention_mask"][row].sum() == kept.sum() + 5


def test_answers_end_at_a_stop_and_learn_as_generated():
    method, prompts = build("zerosiam"), make_tokens(batch=3, length=5, generated=0)
    free = method.generate(prompts, max_new_tokens=6)
    stop = int(free["input_ids"][0, 6])  # the second new token of the first prompt
    ended = method.generate(prompts, max_new_tokens=6, stop=[stop], pad=2)
    new = ended["generated"][0]
    answer = ended["input_ids"][0, new].tolist()
    assert answer.index(stop) == len(answer) - 1 <= 1
    assert bool((ended["input_ids"][0, 5 + len(answer) :] == 2).all())
    assert torch.equal(ended["attention_mask"][0, 5:].bool(), new[5:])
    method(ended)
    assert method.stats["backwards"] == 1


def test_draws_follow_the_seed_and_the_temperature():
    method, prompts = build("source"), make_tokens(batch=40, length=4, generated=0)
    prompts["attention_mask"][:] = 1
    draws = [method.generate(prompts, max_new_tokens=3, temperature=5.0, seed=seed)["input_ids"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    cold = method.generate(prompts, max_new_tokens=3, temperature=1e-6)["input_ids"]
    assert torch.equal(cold, method.generate(prompts, max_new_tokens=3)["input_ids"])


def test_a_model_of_transformers_answers_with_its_cache_and_adapts():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes)
    llama = transformers.LlamaForCausalLM(config).double().eval()
    method = adapt(llama, "zerosiam", lr=0.02, predictor_lr=0.02)
    assert {name.rpartition(".parametrizations")[0].rpartition(".")[2] for name in method.adaptable} >= {"q_proj"}
    prompts = make_tokens(generated=0)
    answers = method.generate(prompts, max_new_tokens=4)
    method.model.__dict__["_takes"] -= {"use_cache", "past_key_values"}
    assert not method.model.can_cache
    assert torch.equal(method.generate(prompts, max_new_tokens=4)["input_ids"], answers["input_ids"])
    before = method.predict(answers)
    method(answers)
    assert not torch.equal(before, method.predict(answers))
    assert type(method.export()) is transformers.LlamaForCausalLM


def test_an_answer_computes_the_weights_of_lora_once(monkeypatch):
    method, prompts, calls = build("zerosiam"), make_tokens(generated=0), []
    plain = LowRank.forward
    monkeypatch.setattr(LowRank, "forward", lambda self, weight: (calls.append(1), plain(self, weight))[1])
    method(make_tokens())
    calls.clear()
    first = method.generate(prompts, max_new_tokens=5)
    assert len(calls) == 2  # query and value
    method(first)
    second = method.generate(prompts, max_new_tokens=5)  # with the weights after the step
    ids, mask = (second[name][:, : prompts["input_ids"].shape[1]] for name in ("input_ids", "attention_mask"))
    for _ in range(5):
        token = method.predict({"input_ids": ids, "attention_mask": mask})[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(second["input_ids"], ids)
    assert not any("forward" in vars(module) for module in method.model.modules())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_adapters_of_a_net_in_half_precision_learn_in_float32(precision):
    method = build("tent", precision, lr=1e-5)
    assert {tensor.dtype for tensor in method.learned} == {torch.float32}
    before = [tensor.detach().clone() for tensor in method.learned]
    logits = method(make_tokens())
    assert logits.dtype == precision
    assert any(bool((now != was).any()) for now, was in zip(method.learned, before, strict=True))


def test_what_learns_can_be_chosen():
    assert build("tent").options["select"]["targets"] == r".*\.(q_proj|v_proj)"
    assert {name.rpartition(".")[0] for name in build("tent", select="norm").adaptable if "optim" not in name} == {
        "model.net.norm"
    }
    assert build("tent").options["task"] == {"kind": "tokens", "loss_on": "auto", "chunk": 64}
    assert build("tent").options["optimizer"] == "adamw"


IDS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.rand(2, 3, 8, 8), "Not a batch of tokens: Tensor"),
        ({"image": 1}, "keys 'image'"),
        ({"input_ids": IDS.float()}, "torch.float32"),
        ({"input_ids": IDS[0]}, r"\(4,\)"),
        ({"input_ids": IDS[:, :0]}, r"\(2, 0\)"),
        ({"input_ids": IDS + 11}, r"in \[0, 10\]; this batch has ids from 11 to 11"),
        ({"input_ids": IDS - 1}, "from -1"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :2]}, r"like input_ids, \(2, 4\); got \(2, 2\)"),
        ({"input_ids": IDS, "attention_mask": IDS + 2}, "0 and 1 alone"),
        ({"input_ids": IDS, "attention_mask": IDS}, "prompt without tokens"),
        ({"input_ids": IDS, "atention_mask": IDS + 1}, "'atention_mask': did you mean 'attention_mask'"),
        ({"input_ids": IDS, "generate": IDS.bool()}, "'generate': did you mean 'generated'"),
        ({"input_ids": IDS.repeat(1, 20)}, r"cannot take token ids \(2, 80\) .* more tokens than it has positions"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(batch, words):
    method = build("tent")
    before = copy.deepcopy(method.state_dict())
    for call in (method, method.predict, *([method.generate] if isinstance(batch, dict) else [])):
        with pytest.raises(InputError, match=words):
            call(batch)
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("cached", [False, True])
def test_an_answer_that_leaves_the_positions_is_refused(cached):
    if cached:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=6)
        net, last = transformers.GPT2LMHeadModel(config), 6
    else:
        net, last = TinyLM(), 64
    batch = {"input_ids": torch.ones(2, last - 2, dtype=torch.int64)}
    method = adapt(net, "tent")
    assert method.generate(batch, max_new_tokens=3)["input_ids"].shape == (2, last + 1)
    with pytest.raises(InputError, match=f"after {last - 2} tokens and 3 new ones.* max_new_tokens=3 at most"):
        method.generate(batch, max_new_tokens=4)


@pytest.mark.parametrize("name", ["max_tokens", "tempreature"])
def test_an_unknown_option_of_an_answer_is_refused(name):
    with pytest.raises(ConfigError, match=f"no option '{name}'. Did you mean"):
        build("tent").generate(make_tokens(), **{name: 1})


class Both(TinyLM):
    """Attention to all tokens, as in a masked language model."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask) + super().forward(input_ids.flip(1), attention_mask).flip(1)


@pytest.mark.parametrize("kind", ["by hand", "BERT"])
def test_a_net_that_sees_later_tokens_is_refused(kind):
    if kind == "BERT":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=11, **sizes)
        net = transformers.BertForMaskedLM(config)
        decoder = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=11, is_decoder=True, **sizes))
        assert adapt(decoder, "tent")(make_tokens()).shape == (3, 9, 11)
    else:
        net = Both()
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        adapt(net, "tent")


def test_wrong_tasks_and_methods_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown task 'tokns'\. Did you mean tokens"):
        build("tent", task="tokns")
    with pytest.raises(ConfigError, match=r"loss_on must be one of .*; got 'half'"):
        build("tent", task={"kind": "tokens", "loss_on": "half"})
    with pytest.raises(ConfigError, match="chunk"):
        build("tent", task={"kind": "tokens", "chunk": 0})
    with pytest.raises(UnsupportedModelError, match="'memo' adapts on images, and the task of TinyLM is tokens"):
        build("memo")
    with pytest.raises(ConfigError, match="window= is for images with one class each"):
        build("tent", window=4)
    with pytest.raises(ConfigError, match="source_filter"):
        build("tent", source_filter=True)
    with pytest.raises(UnsupportedModelError, match="takes no argument 'input_ids'"):
        adapt(torch.nn.Linear(2, 3), "tent", task="tokens")
    with pytest.raises(InputError, match=r"needs batch\['generated'\]"):
        build("tent", task={"kind": "tokens", "loss_on": "generated"})(make_tokens(generated=0))
    with pytest.raises(ConfigError, match="is for language models"):
        adapt(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)), "source").generate({})


def test_rows_that_do_not_count_never_reach_the_function():
    x, rows = torch.randn(3, 4, 2), torch.tensor([[True, False, True, False]] * 3)
    x[~rows] = torch.nan
    seen = []
    y = chunked(lambda z: (seen.append(len(z)), F.relu(z).sum(-1))[1], [x.requires_grad_()], rows, 4)
    assert seen == [4, 2]
    assert torch.equal(y != 0, rows & (y > 0))
    assert bool(torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all())
