"""The small language model beside the same equations in NumPy; padding, cache, lengths, tokens."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from lightning_tta.backbones.gpt import CachedOutput, CharGPT
from lightning_tta.backbones.tokenizer import CharTokenizer, Tokenizer
from lightning_tta.errors import ConfigError, InputError
from nets import max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-12


@pytest.fixture
def net():
    """A net in float64 whose every parameter matters: GPT-2's start has attention that is nearly even."""
    net = CharGPT(13, layers=2, width=16, heads=2).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net


def reference(net, ids):
    """Logits (T, V) of one text, written out."""
    weights = {name: value.numpy() for name, value in net.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def turn(x):  # features n and n + 4 of 8 are a complex number, which position t turns by t / 10000^(n/4)
        turned = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * np.arange(len(x))[:, None] * 1e4 ** (-np.arange(4) / 4))
        return np.concatenate([turned.real, turned.imag], 1)

    x = weights["embed_tokens.weight"][ids]
    for layer in range(2):
        name, heads = f"layers.{layer}", []
        h = norm(x, f"{name}.attention_norm")
        q, k, v = (h @ weights[f"{name}.attention.{kind}_proj.weight"].T for kind in "qkv")
        for columns in (slice(0, 8), slice(8, 16)):
            scores = turn(q[:, columns]) @ turn(k[:, columns]).T / np.sqrt(8)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            shares = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(shares / shares.sum(1, keepdims=True) @ v[:, columns])
        x = x + np.concatenate(heads, 1) @ weights[f"{name}.attention.o_proj.weight"].T
        h = norm(x, f"{name}.mlp_norm") @ weights[f"{name}.up_proj.weight"].T
        x = x + (h * (1 + erf(h / np.sqrt(2))) / 2) @ weights[f"{name}.down_proj.weight"].T
    return norm(x, "norm") @ weights["lm_head.weight"].T


def test_logits_are_those_of_the_equations(net):
    ids = torch.randint(13, (7,))
    assert np.abs(net(ids[None])[0].detach().numpy() - reference(net, ids.numpy())).max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_two_prompts_padded_together_equal_two_alone(net, side):
    texts = [torch.randint(13, (length,)) for length in (5, 9)]
    ids, mask = torch.randint(13, (2, 12)), torch.zeros(2, 12, dtype=torch.int64)  # what padding holds is no matter
    places = []
    for row, text in enumerate(texts):
        start = {"left": 12 - len(text), "right": 0, "both": 2}[side]
        places.append(slice(start, start + len(text)))
        ids[row, places[row]], mask[row, places[row]] = text, 1
    logits = net(ids, mask)
    assert logits.isfinite().all()
    for row, text in enumerate(texts):
        assert max_difference(logits[row, places[row]], net(text[None])[0]) < TOLERANCE


def test_padding_gets_no_gradient(net):
    ids = torch.tensor([[3, 4, 5, 6], [12, 12, 3, 7]])  # 12 is padding, and nothing else
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    net(ids, mask)[mask.bool()].square().sum().backward()
    assert net.embed_tokens.weight.grad[12].eq(0).all()
    assert net.embed_tokens.weight.grad[3].ne(0).any()


@pytest.mark.parametrize("padded", [False, True])
def test_token_by_token_with_a_cache_equals_one_pass(net, padded):
    ids, mask = torch.randint(13, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    if padded:
        mask[0, :3] = 0
    given = {"attention_mask": mask} if padded else {}
    expected, past, pieces = net(ids, **given), None, []
    for start, end in ((0, 5), (5, 6), (6, 8)):
        seen = {"attention_mask": mask[:, :end]} if padded else {}
        output = net(ids[:, start:end], **seen, past_key_values=past, use_cache=True)
        assert isinstance(output, CachedOutput)
        pieces.append(output.logits)
        past = output.past_key_values
    assert past.length == 8
    assert max_difference(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_later_tokens_change_nothing_before(net):
    ids = torch.randint(13, (1, 6))
    other = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % 13], 1)
    assert torch.equal(net(ids)[:, :4], net(other)[:, :4])
    assert not torch.equal(net(ids)[:, 4:], net(other)[:, 4:])


def test_size_and_names():
    net = CharGPT(100)
    assert 800_000 < sum(parameter.numel() for parameter in net.parameters()) < 830_000
    names = {name.rpartition(".")[2] for name, layer in net.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"}
    assert net.get_output_embeddings() is net.lm_head
    assert net.lm_head.bias is None
    assert net.lm_head.weight is not net.embed_tokens.weight
    assert CharGPT(**CharGPT(10, 1, 8, 2, tie_weights=True).config).lm_head.weight.shape == (10, 8)
    tied = CharGPT(10, 1, 8, 2, tie_weights=True)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("options", [{"width": 12, "heads": 4}, {"layers": 0}, {"vocab_size": 0}, {"heads": 1.5}])
def test_wrong_sizes(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CharGPT(**{"vocab_size": 10, **options})


def test_wrong_shapes(net):
    ids = torch.randint(13, (2, 4))
    with pytest.raises(InputError, match=r"attention_mask must be \(2, 4\).*got \(2, 3\)"):
        net(ids, torch.ones(2, 3))
    with pytest.raises(InputError, match=r"int64 \(B, T\).*got torch.float32 \(2, 4\)"):
        net(ids.float())
    past = net(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"\(2, 8\).*of past and input_ids"):
        net(ids, torch.ones(2, 4), past)


def test_characters():
    tokenizer = CharTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    text = "12+7=19;\n~"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    ids = tokenizer.encode("aé")
    assert ids == [1, tokenizer.encode("a", False)[0], 3]
    assert tokenizer.decode([0, *ids, 2]) == "<pad><bos>a\ufffd<eos>"
    assert tokenizer.decode(torch.tensor([0, *ids, 2]), skip_special_tokens=True) == "a\ufffd"
    assert max(tokenizer.encode("~", False)) == len(tokenizer) - 1 == 99
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    with pytest.raises(ConfigError, match="each character once"):
        CharTokenizer("aba")
