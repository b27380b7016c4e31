"""A step is tensors only: it asks the host nothing, and gives the same where empty passes cannot be left out."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contract import SUPPORTED, VARIANTS, build, run, spread
from lightning_tta import available_methods
from lightning_tta.draws import random_integers, random_normals, random_orders, random_words
from nets import KINDS, kind_for, kinds_of, make_images, make_net, make_stream, max_difference, same, without_account

pytestmark = pytest.mark.usefixtures("one_thread")

ASKS_NOTHING = tuple(name for name, kind in available_methods().items() if not kind.step_on_host)
CASES = [(name, options) for name in ASKS_NOTHING for options in VARIANTS.get(name, [{}])]
IDS = [f"{name}-{number}" for name in ASKS_NOTHING for number in range(len(VARIANTS.get(name, [{}])))]
ON_NETS = [  # those that a net of the kind has no use for are left out
    pytest.param(name, options, kind, id=f"{number}-{kind}")
    for name, options, kind, number in spread(
        (
            (name, options, kind, number)
            for (name, options), number in zip(CASES, IDS, strict=True)
            for kind in kinds_of(name)
            if (name, options, kind) in SUPPORTED
        ),
        2,
    )
]
SYNCHRONISES = tuple("_local_scalar_dense nonzero masked_select unique _unique equal is_nonzero bincount".split())


class HostIsAsked(AssertionError):
    pass


class NoSynchronisation(TorchDispatchMode):
    """Raises where an operation's result, or its shape, would have to come back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()  # x[mask]: as long as the mask says
        if name.startswith(SYNCHRONISES) or any(m is not None and m.dtype == torch.bool for m in masks):
            raise HostIsAsked(func.name())
        return func(*args, **(kwargs or {}))


def in_a_step(method, x):
    """One step, as forward() takes it."""
    with method.hold(), torch.enable_grad(), method.running():
        method._batch_size = len(x)
        return method.step(x)


def parts_that_ask_nothing(method):
    """A list that gets the names of the parts that coming steps give to be replayed; one that asks the host raises."""
    parts = []

    def replayed(name, function, *tensors):
        parts.append(name)
        with NoSynchronisation():
            return function(*tensors)

    method.replayed = replayed
    return parts


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(("name", "options", "kind"), ON_NETS)
def test_no_step_asks_the_host(name, options, kind, skips):
    method = build(name, options, kind)
    method.skips_when_empty = skips
    with NoSynchronisation():
        logits = [in_a_step(method, images) for images in make_stream(3)]
    assert all(torch.isfinite(u).all() for u in logits)


ASKS = [name for name, kind in available_methods().items() if kind.step_on_host and "images" in kind.tasks]


@pytest.mark.parametrize("name", ASKS)
def test_no_part_of_a_step_asks_the_host(name):
    """Of methods that ask between parts."""
    method = build(name, VARIANTS.get(name, [{}])[0], kind_for(name, "bn"))
    parts = parts_that_ask_nothing(method)
    for skips in (True, False):
        method.skips_when_empty = skips
        for images in make_stream(2, batch=6):
            assert torch.isfinite(in_a_step(method, images)).all()
    assert parts


def test_on_a_gpu_too():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.set_sync_debug_mode exists for CUDA alone")
    for name, options in CASES:
        method, stream = build(name, options, "bn").cuda(), [images.cuda() for images in make_stream(3)]
        in_a_step(method, stream[0])  # what torch sets up at the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            for images in stream[1:]:
                in_a_step(method, images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


ASKS = [bool, float, torch.Tensor.item, torch.nonzero, torch.unique, lambda t: torch.ones(1)[t > 0]]


@pytest.mark.parametrize("ask", [*ASKS, lambda t: torch.bincount(t.long())])
def test_the_mode_finds_what_asks(ask):
    x = torch.ones(1)
    with NoSynchronisation(), pytest.raises(HostIsAsked):
        ask(x)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "kind"), [*ON_NETS, ("cotta", VARIANTS["cotta"][1], "bn")])
def test_masked_passes_give_what_skipped_ones_give(name, options, kind):
    """On a CPU passes that keep nothing are left out; elsewhere they run, masked. Odd batches are among them."""
    skipping, masking = (build(name, options, kind, net=make_net(kind).double()) for _ in range(2))
    masking.skips_when_empty = False
    stream = make_stream(6, batch=3, dtype=torch.float64)
    stream[2] = stream[2][:1].repeat(3, 1, 1, 1) * 0 + 0.5  # one grey image, three times
    stream[4][0] = 1e30 / 1e30
    for images in stream:
        assert max_difference(skipping(images), masking(images)) < 1e-12
        shared = skipping.stats.keys() - {"forwards", "backwards"}  # a pass that ran may have more to say
        assert shared <= masking.stats.keys()
        for key in shared:
            assert skipping.stats[key] == pytest.approx(masking.stats[key], rel=1e-9, abs=1e-12)
        for one, other in zip(skipping.adaptable.values(), masking.adaptable.values(), strict=True):
            assert max_difference(one.detach(), other.detach()) < 1e-12
        for key, value in skipping.memory.items():
            assert (value is None) == (masking.memory[key] is None)
            if value is not None:
                scale = max(1.0, value.double().abs().max().item())
                assert max_difference(value.double(), masking.memory[key].double()) < 1e-12 * scale


@pytest.mark.parametrize("name", ["tent", "eta", "sar", "deyo", "eata", "eata_c", "roid", "cmf"])
def test_a_masked_step_changes_nothing(name):
    keep_all = {"tent": {}, "roid": {"prior_correction": "none"}, "cmf": {"prior_correction": "none"}}
    options = keep_all.get(name, {"source_filter": True, "entropy_margin": 1e-9})
    method = build(name, {"lr": 0.1, **options}, "bn")
    method.skips_when_empty = False
    run(method, make_stream(1))
    before = copy.deepcopy(method.state_dict())
    images, descend = make_images(4), method.descend
    if name in keep_all:  # its step is masked where the loss is not finite
        method.descend = lambda losses, *rest: descend(losses * float("inf"), *rest)
    method(images)
    assert method.stats["backwards"] >= 1
    assert "loss" not in method.stats or name in keep_all
    assert same(without_account(method.state_dict()), without_account(before))


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_cotta_asks_once(kind, threshold, skips):
    """Whether the anchor is sure; what comes before and after is tensors only."""
    method = build("cotta", {**VARIANTS["cotta"][1], "anchor_threshold": threshold}, kind)
    method.skips_when_empty = skips
    parts = parts_that_ask_nothing(method)
    for images in make_stream(2):
        assert torch.isfinite(in_a_step(method, images)).all()
    views = ["pass of views", "step with views"]
    assert (
        parts == 2 * {0.0: ["sure step"], 1e-6: ["anchor pass", "sure step"], 1.0: ["anchor pass", *views]}[threshold]
    )


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("cotta", {**VARIANTS["cotta"][1], "anchor_threshold": 0.0}, "head"),
        ("t3a", {"filter_k": 50}, "conv2"),
        ("t3a", {"filter_k": None}, "conv2"),
        ("adanpc", {"k": 5, "threshold": 0.0}, "conv2"),
        ("norm", {"momentum": 0.3}, "conv2"),
    ],
    ids=str,
)
def test_a_batch_that_overflows_changes_nothing(name, options, layer, skips):
    method = build(name, options, "bn")
    run(method, make_stream(2))
    method.skips_when_empty = skips
    before = copy.deepcopy(method.state_dict())
    images = make_images(4)

    def overflow(module, inputs, output):
        """The first image's."""
        return torch.cat([output[:1] * torch.inf, output[1:]])

    hook = method.model.get_submodule(layer).register_forward_hook(overflow)
    method(images)
    hook.remove()
    assert method.stats["skipped_steps"] == 1
    assert same(without_account(method.state_dict()), without_account(before))
    method(images)
    assert method.stats["skipped_steps"] == 0
    assert not same(without_account(method.state_dict()), without_account(before))


def test_words_are_the_halves_of_integers_in_any_parts():
    key = torch.tensor([7, 3])
    number = 2**18 + 5  # several chunks of a CPU
    words = random_words(key, number)
    assert torch.equal(words[:-1], random_integers(key, number // 2).view(torch.int32))
    assert torch.equal(words[1000:1007], random_words(key, 7, start=1000))
    share = (words.double() * 2**-32 + 0.5)[:100_000]
    assert abs(share.mean() - 0.5) < 0.005
    assert abs((share < 0.01).double().mean() - 0.01) < 0.001


def test_normal_numbers():
    key = torch.tensor([7, 3])
    numbers = random_normals(key, 200, 500)
    assert torch.equal(numbers.flatten()[10:20], random_normals(key, 10, start=10))
    expected = torch.distributions.Normal(0, 1)
    for x in (-2.0, -1.0, 0.0, 0.5, 1.5, 3.0):
        assert abs((numbers < x).double().mean() - expected.cdf(torch.tensor(x))) < 0.005
    assert numbers.abs().max() < 5.5
    assert abs((numbers[:, 1:] * numbers[:, :-1]).mean()) < 0.01


def test_draws_are_uniform_and_each_its_own():
    key = torch.tensor([7, 3])
    numbers = random_integers(key, 200, 50)
    assert numbers.unique().numel() == numbers.numel()
    assert abs((numbers > 0).double().mean() - 0.5) < 0.02
    assert not same(numbers, random_integers(key + torch.tensor([0, 1]), 200, 50))
    assert not same(numbers, random_integers(key + torch.tensor([1, 0]), 200, 50))
    orders = random_orders(key, 4000, 4)
    assert same(orders.sort(1).values, torch.arange(4).expand(4000, 4).contiguous())
    firsts = torch.bincount(orders[:, 0], minlength=4) / 4000
    assert (firsts - 0.25).abs().max() < 0.03
