"""Adapters against references in plain torch and float64; and what every method and net makes of them."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_tensors_only import NoSynchronisation, in_a_step
from torch import nn

from contract import VARIANTS
from lightning_tta import ConfigError, InputError, UnsupportedModelError, adapt
from lightning_tta.methods.components import adapters
from nets import TokenViT, make_images, make_net, make_stream, max_difference, norm_weights, same
from nets import without_running_statistics as batch_statistics
from replay import use_tape

pytestmark = pytest.mark.usefixtures("one_thread")
SELECTIONS = {
    "lora": {"kind": "lora", "rank": 2, "alpha": 3.0},
    "vida": {"kind": "vida", "ranks": [1, 3], "targets": None},
    "adaptformer": {"kind": "adaptformer", "bottleneck": 4},
    "activations": {"kind": "activations", "share": 1.0, "slope": 2.0, "norm": False},
    "buffer": {"kind": "buffer", "alpha": 0.3},
    "prompt": {"kind": "prompt", "size": 16, "border": 2},
}
NETS = {"adaptformer": ("ln", "vit"), "activations": ("ln", "user", "vit"), "buffer": ("bn", "gn", "user")}
CASES = [(kind, net) for kind in SELECTIONS for net in NETS.get(kind, ("bn", "gn", "ln", "user"))]


class Attention(nn.Module):
    """torch's own attention, whose layers read their weights and call no module."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def low_rank(net, own, x, scales):
    """Logits where each weight has its products: from the names alone."""
    weights = {}
    for name in {name.rpartition(".parametrizations.")[0] for name in own}:
        weight = net.get_submodule(name).weight
        for number, scale in enumerate(scales):
            up, down = (own[f"{name}.parametrizations.weight.0.{side}{number}"] for side in ("up", "down"))
            weight = weight + scale * torch.einsum("or,rc->oc", up, down).reshape(weight.shape)
        weights[f"{name}.weight"] = weight
    return torch.func.functional_call(net, weights, (x,))


def adaptformer(net, own, x):
    x = net.patches(x).flatten(2).transpose(1, 2)
    x = x + F.scaled_dot_product_attention(*net.qkv(net.norm1(x)).chunk(3, dim=-1))
    z = net.norm2(x)
    hidden = (z @ own["mlp.adaptformer_down"].T + own["mlp.adaptformer_down_bias"]).clamp_min(0)
    beside = hidden @ own["mlp.adaptformer_up"].T + own["mlp.adaptformer_up_bias"]
    return net.head(net.norm(x + net.mlp(z) + 0.1 * beside).mean(1))


def activations(net, own, x):
    def run(layer, name, x):
        u = x - own[f"{name}.activation_shift"]
        low, high = (own[f"{name}.activation_{side}"] for side in ("negative", "positive"))
        return layer(u) + (low + (high - low) / (1 + (-2.0 * u).exp())) * u

    x = net.stem[2](run(net.stem[1], "stem.1", net.stem[0](x)))
    x = run(net.stem[4], "stem.4", net.stem[3](x)).flatten(1)
    return net.decide(run(net.hidden[2], "hidden.2", net.hidden[1](net.hidden[0](x))))


def buffer(net, own, x):
    x = F.silu(net.norm1(net.conv1(x)))
    first, second = own["conv2.buffer_scales"]
    added = first * F.conv2d(x, own["conv2.buffer_pointwise"])
    added = added + second * F.conv2d(x, own["conv2.buffer_spatial"], padding=1)
    x = x + own["conv2.buffer_alpha"] * added
    return net.head(F.silu(net.norm2(net.conv2(x))).mean((2, 3)))


def prompt(net, own, x):
    frame = torch.ones(16, 16, dtype=x.dtype)
    frame[2:-2, 2:-2] = 0
    return net(x + frame * own["prompt_pixels"])


REFERENCES = {
    "lora": ("gn", lambda net, own, x: low_rank(net, own, x, [3.0 / 2])),
    "vida": ("ln", lambda net, own, x: low_rank(net, own, x, [1.0, 1.0])),
    "adaptformer": ("ln", adaptformer),
    "activations": ("user", activations),
    "buffer": ("bn", buffer),
    "prompt": ("bn", prompt),
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_three_steps_of_tent(kind):
    net_kind, forward = REFERENCES[kind]
    net = make_net(net_kind).double()
    method = adapt(net, "tent", select=SELECTIONS[kind], lr=0.1, optimizer="sgd", momentum=0.0)
    net = batch_statistics(copy.deepcopy(net))
    own = {n.removeprefix("model."): p.detach().clone().requires_grad_() for n, p in method.adaptable.items()}
    assert own.keys() == set(adapters.adapter_names(method.model))
    start = {name: tensor.detach().clone() for name, tensor in own.items()}
    for images in make_stream(3, batch=6, dtype=torch.float64):
        logits = forward(net, own, images)
        p = logits.softmax(1)
        loss = -(p * p.log()).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(own.values()))
        with torch.no_grad():
            for tensor, gradient in zip(own.values(), gradients, strict=True):
                tensor -= 0.1 * gradient
        assert max_difference(method(images), logits.detach()) < 1e-10
        assert abs(method.stats["loss"] - loss.item()) < 1e-10
        for name, tensor in own.items():
            assert max_difference(method.adaptable[f"model.{name}"].detach(), tensor.detach()) < 1e-10
    assert all((tensor - start[name]).abs().max() > 1e-7 for name, tensor in own.items())


@pytest.mark.parametrize(("kind", "net_kind"), CASES)
def test_identity_then_steps_then_back(kind, net_kind):
    net, images = make_net(net_kind), make_images(6)
    source = adapt(net, "source").predict(images)
    select = {**SELECTIONS[kind], "alpha": 0.0} if kind == "buffer" else SELECTIONS[kind]
    method = adapt(net, "tent", select=select, lr=1e-2)
    assert method.options["select"] == select
    with method.at_source(), torch.no_grad():
        assert max_difference(method.model(images), source) == 0  # the identity, exactly
    before = copy.deepcopy(method.state_dict())
    twin = copy.deepcopy(method)
    logits = [method(x) for x in make_stream(3)]
    assert not any(torch.equal(before[name], p) for name, p in method.adaptable.items() if "up" in name)
    assert any(not torch.equal(before[name], p) for name, p in method.adaptable.items())
    assert all(
        same(before[name], value)
        for name, value in method.state_dict().items()
        if name not in method.adaptable and name != "_extra_state"
    )
    again = [twin(x) for x in make_stream(3)]
    assert all(map(torch.equal, logits, again))  # a copy shares nothing
    assert same(twin.state_dict(), method.state_dict())
    other = adapt(net, "tent", select=select, lr=1e-2)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other(images), method(images))
    method.reset()
    assert same(before, method.state_dict())
    assert set(net.state_dict()) == set(make_net(net_kind).state_dict())  # the user's own has none


@pytest.mark.parametrize(("kind", "net_kind"), CASES)
def test_export(kind, net_kind):
    net = make_net(net_kind)
    method = adapt(net, "tent", select=SELECTIONS[kind], lr=1e-2)
    for x in make_stream(3):
        method(x)
    images = make_images(5, seed=9)
    expected = method.predict(images)
    if kind in ("lora", "vida"):
        plain = method.export()
        assert plain.state_dict().keys() == net.state_dict().keys()
        assert type(plain) is type(net)
        assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
        make_net(net_kind).load_state_dict(plain.state_dict())
    else:
        with pytest.warns(UserWarning, match="keeps its adapters"):
            plain = method.export()
    with torch.no_grad():
        assert max_difference(plain(images), expected) < 1e-5
    assert max_difference(method.predict(images), expected) == 0  # it still has its own
    assert method(images).isfinite().all()
    adapt(plain, "tent")(images)  # and can be adapted itself
    if kind not in ("lora", "vida"):
        again = adapt(plain, "tent", select="adapters", lr=1e-2)
        assert set(again.adaptable) == set(method.adaptable)
        assert again(images).isfinite().all()
        assert torch.equal(pickle.loads(pickle.dumps(plain))(images), plain(images))


METHODS = ("tent", "eta", "eata", "sar", "deyo", "come", "ostta", "zerosiam", "cotta", "memo")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_learns(name):
    """Only what was selected learns, a few samples or none are no harm, and it comes back."""
    options = VARIANTS.get(name, [{}])[0]
    select = ["norm", {"kind": "lora", "rank": 2}]
    net = make_net("gn")
    method = adapt(net, name, select=select, **options)
    if method.needs_source:
        method.prepare([{"image": make_images(8, seed=50 + i), "label": torch.arange(8) % 5} for i in range(2)])
    expected = {f"model.{n}" for n in (*adapters.adapter_names(method.model), *norm_weights(method.model))}
    mine = {n for n in method.adaptable if n.startswith("model.")}
    assert mine == expected
    before = copy.deepcopy(method.state_dict())
    logits, backwards = [], 0
    for x in make_stream(3, batch=6):
        logits.append(method(x))
        backwards += method.stats["backwards"]
    assert all(u.isfinite().all() for u in logits)
    assert backwards > 0
    assert method(make_images(1)).isfinite().all()
    method.reset()
    assert same(before, method.state_dict())


def test_of_memo_and_zerosiam():
    """MEMO's episodes come one after the other; ZeroSiam's two optimizers hold what is theirs."""
    options = VARIANTS["memo"][1]
    with pytest.raises(ConfigError, match=r"without select="):
        adapt(make_net("gn"), "memo", select="lora", **options)
    memo = adapt(make_net("gn"), "memo", select="lora", **{**options, "together": None})
    images = make_images(3)
    alone = torch.cat(
        [adapt(make_net("gn"), "memo", select="lora", **{**options, "together": None})(x[None]) for x in images]
    )
    assert max_difference(memo(images), alone) < 1e-6
    assert not memo.can_together
    zerosiam = adapt(make_net("gn"), "zerosiam", select="lora")
    held = {name: len(o.param_groups[0]["params"]) for name, o in zerosiam.optimizers.items()}
    assert held == {"model": 4, "predictor": 1}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_step_is_tensors_only(kind, monkeypatch):
    use_tape(monkeypatch)
    net = make_net(REFERENCES[kind][0])
    method = adapt(net, "tent", select=SELECTIONS[kind], lr=1e-2, capture=True)
    plain = adapt(net, "tent", select=SELECTIONS[kind], lr=1e-2)
    for images in make_stream(5):
        assert torch.equal(method(images), plain(images))
    assert list(method.capture_report().values()) == ["recorded"]
    with NoSynchronisation():
        in_a_step(plain, make_images(4))


@pytest.mark.parametrize(("kind", "net_kind"), CASES)
def test_the_state_that_the_net_was_given_with(kind, net_kind):
    """By which a run is known again."""
    net = make_net(net_kind)
    method = adapt(net, "tent", select=["norm", SELECTIONS[kind]])
    assert same(adapters.given_state(method.model, method.choice), dict(net.state_dict()))
    assert same(adapters.given_state(net), dict(net.state_dict()))
    with_adapters = copy.deepcopy(net)
    adapters.put_in(with_adapters, SELECTIONS[kind])
    method = adapt(with_adapters, "tent", select="adapters")
    assert same(adapters.given_state(method.model, method.choice), dict(with_adapters.state_dict()))


def test_torchs_own_attention():
    net = Attention().eval()
    images = make_images(4)
    method = adapt(net, "tent", select={"kind": "lora", "targets": "attention"}, lr=1e-2)
    assert {name.removeprefix("model.").partition(".param")[0] for name in method.adaptable} == {
        "layer.self_attn",
        "layer.self_attn.out_proj",
    }
    with torch.no_grad():
        assert max_difference(method.predict(images), net(images)) < 1e-6
    before = {name: p.detach().clone() for name, p in method.adaptable.items()}
    method(images)
    method(images)
    assert not any(torch.equal(p, before[name]) for name, p in method.adaptable.items())
    plain = method.export()
    assert plain.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        assert max_difference(plain(images), method.predict(images)) < 1e-5
    everything = adapt(net, "tent", select="lora")  # and the layers of the MLP, not the head
    assert {name.partition(".param")[0] for name in everything.adaptable} == {
        f"model.{name}"
        for name in ("patches", "layer.self_attn", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2")
    }


def test_structure_of_a_transformer():
    net = TokenViT(5).eval()
    assert adapters.mlp_blocks(net) == {f"blocks.{number}.mlp": 8 for number in range(3)}
    assert adapters.attention_layers(net) == [f"blocks.{number}.qkv" for number in range(3)]
    method = adapt(net, "tent", select={"kind": "activations", "share": 0.34})
    learned = {name.rpartition(".")[0].removeprefix("model.") for name in method.adaptable}
    norms = {name.rpartition(".")[0] for name in norm_weights(net)}
    assert learned == {"blocks.0.mlp.1", *norms}  # LayerNorm learns with them
    assert "model.stem.3.weight" not in adapt(make_net("user"), "tent", select="activations").adaptable


def test_one_pass_finds_all_places(monkeypatch):
    passes, tried = [], adapters.try_pass
    monkeypatch.setattr(adapters, "try_pass", lambda *args, **more: passes.append(args) or tried(*args, **more))
    adapt(make_net("vit"), "tent", select={"kind": "lora", "targets": "attention"})
    assert len(passes) == 1


def test_two_layers_of_one_width_are_no_mlp():
    net = nn.Sequential(nn.Flatten(2), nn.Linear(256, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(18, 5)).eval()
    assert adapters.mlp_blocks(net) == {}
    net[0][2] = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
    assert adapters.mlp_blocks(net) == {"0.2": 6}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.ReLU(inplace=True), True),
        (nn.GELU(), True),
        (nn.Hardswish(), True),
        (nn.Tanh(), True),
        (nn.Sigmoid(), False),
        (nn.Hardsigmoid(), False),
        (nn.Identity(), False),
        (nn.Dropout().eval(), False),
        (nn.Softmax(1), False),
        (nn.Flatten(), False),
        (nn.PReLU(), False),
        (nn.MaxPool2d(2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_activation_is(layer, expected):
    assert adapters.is_activation(layer) is expected


def test_activations_that_write_to_their_input():
    def make(inplace):
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace), nn.Flatten(), nn.Linear(6 * 14 * 14, 5)
        )
        net.load_state_dict(state) if state else None
        return net.eval()

    state = {}
    state = make(False).state_dict()
    results = []
    for inplace in (False, True):
        method = adapt(make(inplace), "tent", select="activations", lr=1e-2)
        results.append(torch.stack([method(x) for x in make_stream(3)]))
    assert torch.equal(*results)


def test_a_choice_is_of_one_method():
    """The next one on the same net, or on a copy of it, selects what it always does."""
    net = make_net("gn")
    adapt(net, "tent", select="lora", in_place=True)
    for other in (adapt(net, "tent"), adapt(net, "tent", select="norm")):
        assert set(other.adaptable) == {f"model.{name}" for name in norm_weights(make_net("gn"))}
    assert len(adapt(net, "tent", select="adapters").adaptable) == 4


def test_user_frozen_parameters_stay_so():
    net = make_net("gn")
    net.conv1.requires_grad_(False)
    method = adapt(net, "tent", select=["all", "lora"])
    assert "model.conv1.parametrizations.weight.original" not in method.adaptable
    assert "model.conv1.parametrizations.weight.0.up0" in method.adaptable
    method(make_images(4))
    plain = method.export()
    assert {n for n, p in plain.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    frozen = adapt(make_net("gn").requires_grad_(False), "tent", select=["all", "lora"])  # a net for inference
    assert "model.conv1.parametrizations.weight.original" in frozen.adaptable


WRONG = {
    "unknown kind": ({"kind": "lore"}, "Did you mean|Available: lora"),
    "unknown option": ({"kind": "lora", "rnak": 2}, "has no option 'rnak'"),
    "unknown word": ("nrom", "Available: norm, early_norm, all, adapters, lora"),
    "not a pattern": ("(", "Unknown select"),
    "none": ([], r"got \[\]"),
    "neither word nor list": (3, "got 3"),
    "targets that are no pattern": ({"kind": "lora", "targets": "("}, "targets must be a pattern"),
    "targets that are no text": ({"kind": "buffer", "targets": 3}, "targets must be a pattern"),
    "three sides": ({"kind": "prompt", "size": [16, 16, 16]}, "size is the side"),
    "two prompts": ([{"kind": "prompt", "size": 16}] * 2, "The net has an adapter"),
    "rank": ({"kind": "lora", "rank": 0}, "rank must be"),
    "ranks": ({"kind": "vida", "ranks": [1]}, "ranks must be two"),
    "two on one": (["buffer", {"kind": "buffer"}], "has an adapter already"),
    "size": ("prompt", "does not say how large"),
    "border": ({"kind": "prompt", "size": 16, "border": 8}, "border must be"),
}


@pytest.mark.parametrize(("select", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(select, message):
    with pytest.raises(ConfigError, match=message):
        adapt(make_net("gn"), "tent", select=select)


UNFIT = {
    "no mlp": ("adaptformer", "gn", "has no MLP"),
    "functions": ("activations", "bn", "runs no activation as a module"),
    "no convolution": ({"kind": "buffer", "targets": "head"}, "bn", "no two-dimensional convolution"),
    "no layer": ({"kind": "lora", "targets": "nothing"}, "bn", "has no layer for the adapters"),
    "no attention": ({"kind": "vida"}, "bn", "has no layer for the adapters"),
    "none there": ("adapters", "bn", "has none"),
}


@pytest.mark.parametrize(("select", "kind", "message"), UNFIT.values(), ids=UNFIT)
def test_nets_without_a_place(select, kind, message):
    net = make_net(kind)
    with pytest.raises(UnsupportedModelError, match=message):
        adapt(net, "tent", select=select)


def test_methods_that_learn_nothing_and_images_of_another_size():
    for name in ("neo", "source", "t3a", "norm"):
        with pytest.raises(ConfigError, match=r"select=.*learns no parameters"):
            adapt(make_net("bn"), name, select="lora")
    method = adapt(make_net("bn"), "tent", select=SELECTIONS["prompt"])
    with pytest.raises(InputError, match=r"'size': 20"):
        method(make_images(2, size=20))
    assert method(make_images(2)).isfinite().all()


def test_a_quantised_net_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(make_net("gn"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match=r"No gradient reaches.*which is quantised"):
        adapt(net, "tent", select="lora")


def test_in_half_precision():
    method = adapt(make_net("gn"), "tent", select="lora", optimizer="sgd", lr=0.5)
    with pytest.warns(UserWarning, match="bfloat16"):
        method.bfloat16()
    assert method(make_images(4)).isfinite().all()
