"""TLM, SLOT and EM-INF against references in float64, written out from their formulas."""

import pytest
import torch
from test_tokens import adamw, counted_by_hand, entropy_by_hand, pass_by_hand

from language_nets import TinyLM, make_tokens
from lightning_tta import ConfigError, UnsupportedModelError, adapt
from nets import make_net


def prompts(seed=0):
    return make_tokens(batch=4, seed=seed)


def prompt_loss_by_hand(logits, batch):
    """Mean cross-entropy of each prompt's own tokens (B,)."""
    counted, means = counted_by_hand(batch, "prompt"), []
    for row in range(len(logits)):
        terms = [-logits[row, t].log_softmax(-1)[batch["input_ids"][row, t + 1]] for t in counted[row].nonzero()[:, 0]]
        means.append(torch.stack(terms).mean())
    return torch.stack(means)


def test_tlm_takes_the_steps_of_a_reference():
    net = TinyLM().double()
    method = adapt(net, "tlm", lr=0.02, threshold=2.6)
    named = dict(method.model.named_parameters())
    added = {
        layer: [named[f"net.{layer}.parametrizations.weight.0.{part}"].detach().clone() for part in ("down0", "up0")]
        for layer in ("q_proj", "v_proj")
    }
    learned = [*added["q_proj"], *added["v_proj"]]
    moments, kept_somewhere = [[0.0, 0.0] for _ in learned], []
    for step in (1, 2, 3):
        batch = prompts(step)
        for tensor in learned:
            tensor.requires_grad_()
        logits = pass_by_hand(net, batch, added) @ net.lm_head.weight.T
        losses = prompt_loss_by_hand(logits, batch)
        kept = losses > 2.6
        kept_somewhere.append(kept)
        loss = (0.1 * (losses.detach() - 2.6).exp() * losses)[kept].mean()
        gradients = torch.autograd.grad(loss, learned)
        for tensor in learned:
            tensor.requires_grad_(False)
        torch.testing.assert_close(method(batch), logits.detach(), rtol=0, atol=1e-10)
        assert method.stats["loss"] == pytest.approx(loss.item(), abs=1e-10)
        assert method.stats["kept"] == pytest.approx(kept.double().mean().item())
        assert method.stats["prompt_loss"] == pytest.approx(losses.mean().item(), abs=1e-10)
        adamw(learned, gradients, moments, step, [0.02] * 4)
    kept = torch.stack(kept_somewhere)
    assert bool(kept.any() & ~kept.all())
    for now, reference in zip(method.learned, learned, strict=True):
        torch.testing.assert_close(now.detach(), reference, rtol=0, atol=1e-9)


def test_tlm_keeps_nothing_below_the_threshold():
    method = adapt(TinyLM().double(), "tlm", lr=0.02, threshold=50.0)
    before = [tensor.detach().clone() for tensor in method.learned]
    method(prompts())
    assert all(torch.equal(now, was) for now, was in zip(method.learned, before, strict=True))
    assert method.options["task"]["loss_on"] == "prompt"


def slot_by_hand(net, batch, steps=3):
    """Hidden states, and the vector of each prompt alone."""
    z = pass_by_hand(net, batch, {}).detach()
    vectors = []
    for row in range(len(z)):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        vector, moments = torch.zeros(8, dtype=torch.float64), [[0.0, 0.0]]
        for step in range(1, steps + 1):
            vector.requires_grad_()
            loss = prompt_loss_by_hand((z[row : row + 1] + vector) @ net.lm_head.weight.T, one)[0]
            (gradient,) = torch.autograd.grad(loss, [vector])
            vector = vector.detach()
            first, second = moments[0]
            moments[0] = [0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2]
            mean, square = moments[0][0] / (1 - 0.9**step), moments[0][1] / (1 - 0.999**step)
            vector = vector * (1 - 0.1 * 1e-8) - 0.1 * mean / (square.sqrt() + 1e-5)
        vectors.append(vector)
    return z, torch.stack(vectors)[:, None]


@pytest.mark.parametrize("chunk", [3, 1000])
def test_slot_finds_the_vectors_of_a_reference(chunk):
    net = TinyLM().double()
    method = adapt(net, "slot", descent_steps=3, task={"kind": "tokens", "chunk": chunk})
    assert method.options["task"]["loss_on"] == "prompt"
    for seed in range(3):
        batch = prompts(seed)
        z, vectors = slot_by_hand(net, batch)
        expected = ((z + vectors) @ net.lm_head.weight.T).detach()
        torch.testing.assert_close(method(batch), expected, rtol=0, atol=1e-9)
        assert method.stats["forwards"] == 1
        assert method.stats["prompt_loss"] == pytest.approx(
            prompt_loss_by_hand(z @ net.lm_head.weight.T, batch).mean().item(), abs=1e-10
        )
        torch.testing.assert_close(method.predict(batch), expected, rtol=0, atol=1e-9)
    assert not method.adaptable


def test_slot_answers_with_the_vector_of_each_prompt():
    net = TinyLM().double()
    method, batch = adapt(net, "slot", descent_steps=3), prompts()
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = {**asked, "generated": torch.zeros_like(batch["generated"])}
    _, vectors = slot_by_hand(net, whole)
    answered = method.generate(asked, max_new_tokens=4)
    ids, mask = asked["input_ids"], asked["attention_mask"]
    for _ in range(4):
        z = pass_by_hand(net, {"input_ids": ids, "attention_mask": mask}, {})
        token = ((z + vectors) @ net.lm_head.weight.T)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(answered["input_ids"], ids)
    plain = adapt(net, "source").generate(asked, max_new_tokens=4)
    assert not torch.equal(plain["input_ids"], ids)  # the vectors matter
    assert torch.equal(adapt(net, "source").predict(batch), method.model.net(**asked).detach())  # and leave nothing


def em_inf_by_hand(row, steps=5, kl_weight=0.001, threshold=0.3):
    u, p0, first, second = row.clone(), row.softmax(-1), 0.0, 0.0
    for step in range(1, steps + 1):
        u = u.detach().requires_grad_()
        if entropy_by_hand(u) < threshold:
            break
        loss = entropy_by_hand(u) + kl_weight * (p0 * (p0.log() - u.log_softmax(-1))).sum()
        (gradient,) = torch.autograd.grad(loss, [u])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        u = u.detach() - 0.1 * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return u.detach()


def test_em_inf_moves_each_row_by_itself():
    method = adapt(TinyLM().double(), "em_inf")
    scale = torch.tensor([0.3, 1.0, 2.2, 3.0, 30.0], dtype=torch.float64)[:, None]
    rows = scale * torch.randn(5, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.stack([em_inf_by_hand(row) for row in rows])
    with torch.inference_mode():
        torch.testing.assert_close(method.decode(rows), expected, rtol=0, atol=1e-9)
    assert torch.equal(expected[-1], rows[-1])  # sure already
    assert bool((entropy_by_hand(expected[:3]) < entropy_by_hand(rows[:3])).all())


def test_em_inf_by_temperature_meets_the_entropy():
    method = adapt(TinyLM().double(), "em_inf", search="temperature", ratio=0.5, threshold=0.3)
    scale = torch.tensor([0.5, 1.0, 30.0], dtype=torch.float64)[:, None]
    rows = scale * torch.randn(3, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved, before = method.decode(rows), entropy_by_hand(rows)
    expected = torch.minimum(before, (0.5 * before).clamp_min(0.3))
    torch.testing.assert_close(entropy_by_hand(moved)[:2], expected[:2], rtol=0, atol=1e-9)
    torch.testing.assert_close(moved[2], rows[2], rtol=1e-9, atol=0)
    assert torch.equal(moved.argsort(-1), rows.argsort(-1))


def test_em_inf_is_in_the_answers_and_nowhere_else():
    net, batch = TinyLM().double(), prompts()
    method, plain = adapt(net, "em_inf", lr=3.0, descent_steps=40, threshold=0.0), adapt(net, "source")
    assert torch.equal(method(batch), plain(batch))
    draws = [each.generate(batch, max_new_tokens=6, temperature=1.0, seed=1)["input_ids"] for each in (method, plain)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tlm", {"threshold": -1}, "threshold"),
        ("tlm", {"scale": 0}, "scale"),
        ("slot", {"descent_steps": 0}, "descent_steps"),
        ("slot", {"eps": 0}, "eps"),
        ("em_inf", {"search": "grid"}, "search"),
        ("em_inf", {"ratio": 0}, "ratio"),
        ("slot", {"select": "norm"}, "learns no parameters"),
    ],
)
def test_wrong_options_are_refused(name, options, words):
    with pytest.raises(ConfigError, match=words):
        adapt(TinyLM(), name, **options)


@pytest.mark.parametrize("name", ["tlm", "slot", "em_inf"])
def test_images_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="adapts on tokens"):
        adapt(make_net("gn"), name)


def test_em_inf_by_temperature_ends_at_a_hundredth():
    method = adapt(TinyLM().double(), "em_inf", search="temperature", threshold=1e-6)
    tie = torch.tensor([[2.0, 2.0, -1.0]], dtype=torch.float64)  # its entropy stays at ln 2 or more
    torch.testing.assert_close(method.decode(tie), tie / 0.01, rtol=1e-9, atol=0)


VISIBLE = {"tlm": {"lr": 0.02, "threshold": 0.5, "optimizer": "sgd", "momentum": 0.0}, "slot": {"descent_steps": 3}}


def build(name, **options):
    return adapt(TinyLM().double(), name, **VISIBLE[name], **options)


def moved(method):
    """What a method has learned, as changes."""
    return [now.detach() - was.detach() for now, was in zip(method.learned, build("tlm").learned, strict=True)]


@pytest.mark.parametrize("name", ["tlm", "slot"])
def test_answers_and_padding_have_no_part(name):
    batch = prompts()
    other = {key: value.clone() for key, value in batch.items()}
    other["input_ids"][:, 6:] = (other["input_ids"][:, 6:] + 3) % 11  # written by the net
    other["input_ids"][1:, 0] = 7  # padding of all rows but the first
    a, b = build(name), build(name)
    one, two = a(batch), b(other)
    for row in range(4):
        torch.testing.assert_close(one[row, row % 4 : 6], two[row, row % 4 : 6], rtol=0, atol=1e-10)
    assert a.stats["prompt_loss"] == pytest.approx(b.stats["prompt_loss"], abs=1e-12)
    if name == "tlm":
        torch.testing.assert_close(moved(a), moved(b), rtol=0, atol=1e-12)
        assert any(bool(change.any()) for change in moved(a))


@pytest.mark.parametrize("name", ["tlm", "slot"])
def test_two_prompts_with_padding_equal_two_alone(name):
    batch = make_tokens(batch=2)
    batch["attention_mask"][1, :4] = 0
    alone = [{key: value[row : row + 1, 4 * row :] for key, value in batch.items()} for row in (0, 1)]
    together, apart = build(name), [build(name), build(name)]
    logits = together(batch)
    for row in (0, 1):
        torch.testing.assert_close(apart[row](alone[row])[0], logits[row, 4 * row :], rtol=0, atol=1e-9)
    if name == "tlm":
        for both, first, second in zip(moved(together), *map(moved, apart), strict=True):
            torch.testing.assert_close(both, (first + second) / 2, rtol=1e-9, atol=1e-13)


def test_the_loss_of_tlm_in_chunks_equals_that_in_one():
    methods = [build("tlm", task={"kind": "tokens", "chunk": chunk}) for chunk in (1, 5, 1000)]
    results = [(method(prompts()), method(prompts(1))) for method in methods]
    for method, (first, second) in zip(methods[:2], results[:2], strict=True):
        torch.testing.assert_close(first, results[2][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(second, results[2][1], rtol=0, atol=1e-9)
        assert method.stats["loss"] == pytest.approx(methods[2].stats["loss"], abs=1e-9)


@pytest.mark.parametrize("name", ["tlm", "slot"])
def test_a_prompt_of_one_token_says_nothing(name):
    net, batch = TinyLM().double(), make_tokens(batch=1, length=5, generated=4)
    method = build(name)
    plain = net(batch["input_ids"], batch["attention_mask"]).detach()
    torch.testing.assert_close(method(batch), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(method.predict(batch), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["tlm", "slot"])
def test_no_large_tensor_has_a_graph(name):
    largest = {}
    for chunk in (4, 1000):
        sizes = []
        method = adapt(TinyLM(vocabulary=500), name, task={"kind": "tokens", "chunk": chunk})
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            method(make_tokens(batch=2, length=40, vocabulary=500))
        largest[chunk] = max(sizes)
    assert largest[4] < 20 * 500 < largest[1000]  # 71 positions count; the head itself has 4,000 values
