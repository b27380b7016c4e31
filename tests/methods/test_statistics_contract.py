"""What must hold for every kind of statistics in every method: state, odd batches, precisions, tensors only."""

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from test_tensors_only import NoSynchronisation
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta import ConfigError, UnsupportedModelError, adapt, collective
from lightning_tta.backbones.norms import fixed_statistics
from lightning_tta.methods.base.execution import Execution
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.components import class_statistics
from nets import make_images, make_net, make_stream, max_difference, same
from processes import NEEDS_FORK, Processes
from replay import use_tape

pytestmark = [
    pytest.mark.slow,  # many alike
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:statistics='instance' is for nets"),
    pytest.mark.filterwarnings("ignore:.*are too small for that"),
    pytest.mark.filterwarnings("ignore:Where the source is unsure"),
    pytest.mark.filterwarnings("error:A step of"),
]

KINDS = {
    "batch": "batch",
    "source": "source",
    "mixed": {"kind": "mixed", "cross_term": True},
    "ema": {"kind": "ema", "momentum": 0.2},
    "renormalized": {"kind": "renormalized", "momentum": 0.2, "rmax": 3.0, "start": "batch"},
    "balanced": {"kind": "balanced", "eta": 0.4},
    "shared": {"kind": "balanced", "eta": 0.4, "gamma": 0.3, "groups": 2},
    "domains": {"kind": "domains", "eta": 0.3, "domains": 3},
    "median": "median",
    "instance": {"kind": "instance", "k": 0.5, "momentum": 0.1},
    "auto": {"kind": "auto", "images": 1.0, "classes_needed": 1.0},
    "auto in groups": {"kind": "auto", "images": 1.0, "classes_needed": 1.0, "groups": 2},
}
METHODS = {
    "tent": {"lr": 1e-2},
    "source": {},
    "zerosiam": {"lr": 0.1, "predictor_lr": 0.1},
    "sar": {"lr": 1e-2, "entropy_margin": 0.95, "reset_threshold": None},
    "cotta": {"lr": 1e-2, "anchor_threshold": 1.0, "views": 3, "chunk_views": 8, "ema_decay": 0.7},
    "deyo": {"lr": 1e-2, "entropy_margin": 0.95, "plpd_threshold": -0.5, "patches": 2},
    "memo": {"lr": 0.05, "views": 2, "augment": "none"},
    "t3a": {"filter_k": 2},
}
APART = ("source", "ema", "renormalized", "balanced", "shared", "auto")  # kinds for methods that treat each image apart
DEPENDS = ("batch", "mixed", "median")  # predictions of a batch depend on each other until something was seen
NO_NET = ("domains", "instance")
CASES = [  # kinds of the same mechanism are alike in the other methods
    pytest.param(kind, name, marks=[pytest.mark.slow] * (name not in ("tent", "cotta")))
    for kind in KINDS
    for name in METHODS
    if name == "tent"
    or (kind in ("mixed", "renormalized", "shared", "domains", "auto") and (name != "memo" or kind in APART))
]
each = pytest.mark.parametrize(("kind", "name"), CASES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, name="tent", net=None, **options):
    return adapt(make_net("user") if net is None else net, name, statistics=KINDS[kind], **{**METHODS[name], **options})


def normalizing(method):
    """While active, the net runs as in a step."""
    return nullcontext() if method.account is None else method.account.running(method)


def run(method, stream):
    return [method(x) for x in stream]


@each
def test_state(kind, name):
    """Reset is exact; saved, copied and started anew it goes on the same; predictions change nothing."""
    method, stream = build(kind, name), make_stream(5)
    start = copy.deepcopy(method.state_dict())
    first = run(method, stream[:3])
    state, twin, other = copy.deepcopy(method.state_dict()), copy.deepcopy(method), build(kind, name)
    own = [n for n in method.memory if n.startswith("statistics.")]
    assert bool(own) == (kind not in ("batch", "source"))
    moved = [n for n in own if not torch.equal(method.value(n), method.source_value(n).expand_as(method.value(n)))]
    assert set(own) - set(moved) <= {"statistics.groups", "statistics.opened"}
    expected = method.predict(stream[4])
    method.predict(stream[4][:1]), method.predict(stream[3], statistics="batch")
    assert same(method.state_dict(), state)
    other.load_state_dict(state)
    rest = run(method, stream[3:])
    for each in (twin, other):
        assert torch.equal(each.predict(stream[4]), expected)
        assert same(run(each, stream[3:]), rest)
        assert same(each.state_dict(), method.state_dict())
    method.reset()
    assert same(method.state_dict(), start)
    assert same(run(method, stream[:3]), first)


@each
def test_the_statistics_are_those_of_the_pass_over_the_batch(kind, name):
    """Second passes, views and shuffled images are not in them: they end where those of the source do."""
    if kind == "source" or (kind == "batch" and name in ("source", "memo", "t3a")):
        return
    options = {"lr": 0.0} if "lr" in METHODS[name] else {}
    if name == "zerosiam":
        options["predictor_lr"] = 0.0
    plain, method = build(kind, "source"), build(kind, name, **options)
    for x in make_stream(3):
        plain(x), method(x)
    for state, value in plain.memory.items():
        if state.startswith(("statistics.", "stream.")):
            assert torch.equal(method.value(state), value), state


@every_kind
def test_passes_are_counted(kind):
    extra = {"balanced": 1, "shared": 1, "domains": 2, "auto": 1, "auto in groups": 1}.get(kind, 0)
    method = build(kind, steps=2)
    method(make_images(4))
    assert method.stats["forwards"] == 2 * (1 + extra)
    assert build(kind, "source")(make_images(4)).isfinite().all()


@every_kind
def test_images_and_batches_that_are_not_finite(kind):
    method, stream = build(kind), make_stream(3)
    run(method, stream[:1])
    twin, bad = copy.deepcopy(method), stream[1].clone()
    bad[2, 0, 3, 3] = torch.nan
    kept = torch.tensor([0, 1, 3])
    assert torch.equal(method(bad)[kept], twin(stream[1][kept]))  # as if it were not in the batch
    assert same(method.state_dict(), twin.state_dict())
    method(torch.full_like(bad, torch.inf))
    assert same(method.state_dict(), twin.state_dict())
    hook = method.model.get_submodule("stem.2").register_forward_hook(
        lambda module, inputs, output: torch.cat([output[:1] * torch.inf, output[1:]])
    )
    method(stream[2])
    hook.remove()
    assert same(method.state_dict(), twin.state_dict())
    assert same(run(method, stream), run(twin, stream))


@every_kind
def test_nothing_keeps_a_method_alive(kind):
    """Its net would stay in memory beside the next one's."""
    method = adapt(make_net("bn"), "tent", statistics=KINDS[kind])
    method(make_images(8))
    reference = weakref.ref(method)
    gc.disable()
    try:
        del method
        assert reference() is None
    finally:
        gc.enable()


@every_kind
def test_one_image(kind):
    """Layers of vectors have one value a channel then, and keep what they have."""
    method = build(kind)
    for x in make_stream(3, batch=1):
        assert method(x).isfinite().all()
        assert method.predict(x).isfinite().all()
    if kind not in ("batch", "source"):
        vectors = method.value("statistics.moments")[:, 9:]
        if kind not in DEPENDS:
            assert torch.equal(vectors, method.source_value("statistics.moments")[:, 9:])


@every_kind
def test_predictions_apart(kind):
    """Once something was seen, an image is predicted alone as among others, and as the plain net predicts it."""
    method, x = build(kind, net=make_net("user").double()), make_images(5, seed=9, dtype=torch.float64)
    run(method, make_stream(3, dtype=torch.float64))
    together = method.predict(x)
    assert max_difference(torch.cat([method.predict(one) for one in x.split(1)]), together) < 1e-11
    if kind in NO_NET:
        with pytest.raises(UnsupportedModelError, match="statistics="):
            method.export()
    else:
        assert max_difference(method.export()(x).detach(), together) < 1e-11


@every_kind
def test_views_have_the_labels_and_statistics_of_their_group(kind):
    method, views = build(kind, net=make_net("user").double()), make_stream(3, dtype=torch.float64)
    if kind == "source":
        return
    run(method, make_stream(2, seed=1, dtype=torch.float64))
    account = method.account
    with method.hold(), torch.no_grad(), normalizing(method):
        account.look(method, views[0])
        together = method.logits(torch.cat(views), groups=3, accounted=False)
        apart = torch.cat([method.logits(view, accounted=False) for view in views])
        account.drop()
    assert max_difference(together, apart) < 1e-12


class Odd(nn.Module):
    """Layers without weights, one of timm with an activation inside, one of vectors; one runs twice."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.plain = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6, affine=False)
        self.act, self.vectors = act, nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.act(self.plain(self.conv(x)))
        x = self.act(x.roll(1, 2) + 0.5)
        return self.head(self.vectors(x.mean((2, 3))))


def odd_net():
    timm_norms = pytest.importorskip("timm.layers.norm_act")
    torch.manual_seed(0)
    net = Odd(timm_norms.BatchNormAct2d(6))
    for layer in (net.plain, net.act, net.vectors):
        layer.running_mean.normal_(std=0.2)
        layer.running_var.uniform_(0.3, 1.0)
    return net.eval()


@every_kind
def test_odd_layers(kind):
    """The layer that runs twice takes in both inputs, one after the other."""
    method = build(kind, net=odd_net(), lr=1e-3)
    for x in make_stream(3):
        assert method(x).isfinite().all()
    if kind == "ema":
        moments, source = (torch.split(f("statistics.moments")[0], 6)[1] for f in (method.value, method.source_value))
        assert max_difference(moments, source) > 1e-2
    if kind in ("balanced", "shared"):  # the sums that are followed are those of the rows
        mean, var = method.value("statistics.classes")
        moments = torch.stack([mean.mean(0), var.mean(0) + mean.var(0, correction=0)])
        assert max_difference(method.value("statistics.moments"), moments) < 1e-6


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precisions(kind, dtype):
    method, plain = build(kind, optimizer="sgd").to(dtype), build(kind, optimizer="sgd")
    for x in make_stream(3):
        logits, expected = method(x.to(dtype)), plain(x)
    tolerance = 1e-5 if dtype == torch.float64 else 0.3
    assert (logits.float() - expected).abs().max() < tolerance
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    states = {n: t for n, t in method.memory.items() if n.startswith("statistics.") and t.is_floating_point()}
    assert all(t.dtype == wide for t in states.values())
    method.reset()
    assert method(make_images(4).to(dtype)).isfinite().all()


@every_kind
@pytest.mark.parametrize("name", ["tent", "sar", "t3a"])
def test_a_step_asks_the_host_nothing(kind, name):
    method = build(kind, name)
    method.skips_when_empty = False
    with recording():
        for x in make_stream(3):
            with method.hold(), torch.enable_grad(), normalizing(method), NoSynchronisation():
                logits = method._adapted(x)
            assert logits.isfinite().all()


@each
def test_captured_steps(kind, name, monkeypatch):
    if name == "memo":
        pytest.skip("its statistics are taken before its parts, which is plain")
    use_tape(monkeypatch)
    with recording():
        plain, captured = build(kind, name), build(kind, name)
        plain.execution = Execution(capture=False)
        stream = make_stream(6)
        stream[4] = 0.3 + 0.1 * stream[4]
        for x in stream:
            expected, logits = plain(x.clone()), captured(x)
            assert same(logits, expected)
            assert same(captured.memory, plain.memory)
            assert same(captured.adaptable, plain.adaptable)
            assert captured.stats["forwards"] == plain.stats["forwards"]
        assert "recorded" in captured.capture_report().values()


@pytest.mark.parametrize("kind", list(KINDS))
def test_nets_without_batch_norm(kind):
    stream = make_stream(2)
    plain = adapt(make_net("gn"), "tent", lr=1e-2)
    said = pytest.warns(UserWarning, match="has no effect: ConvNet has no BatchNorm")
    with nullcontext() if kind.startswith("auto") else said:  # auto is for any net
        method = build(kind, net=make_net("gn"))
    assert same(run(method, stream), run(plain, stream))
    assert same(method.memory, plain.memory)


@pytest.mark.parametrize("kind", ["domains", "instance", "median", "mixed", "batch"])
def test_refused_where_each_image_is_apart(kind):
    with pytest.raises(ConfigError, match=r"and method 'memo' exclude each other"):
        build(kind, "memo")


def test_instance_warns_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        method = build("instance")
        run(method, make_stream(2))
    assert sum("instance-aware" in str(each.message) for each in seen) == 1


BAD = {
    "rmax": ({"kind": "renormalized", "rmax": 0.5}, "rmax"),
    "gamma": ({"kind": "balanced", "gamma": 2}, "gamma"),
    "no flag": ({"kind": "mixed", "cross_term": "no"}, "cross_term must be one of True, False; got 'no'"),
    "eta": ({"kind": "balanced", "eta": 0}, "eta"),
    "groups": ({"kind": "balanced", "groups": 6}, "groups=6 is more than the 5 classes"),
    "layer": ({"kind": "domains", "layer": "stem.4"}, "no BatchNorm layer 'stem.4'"),
    "domains": ({"kind": "domains", "domains": 1}, "domains"),
    "k": ({"kind": "instance", "k": -1}, "k"),
}


@pytest.mark.parametrize(("wanted", "message"), BAD.values(), ids=BAD)
def test_wrong_options(wanted, message):
    with pytest.raises(ConfigError, match=message):
        adapt(make_net("user"), "tent", statistics=wanted)


def test_classes_of_nets_without_a_linear_layer():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(UnsupportedModelError, match="'classes': K"):
        adapt(net, "tent", statistics="balanced")
    method = adapt(net, "source", statistics={"kind": "balanced", "classes": 4, "groups": 2})
    assert method.value("statistics.groups").tolist() == [0, 1, 0, 1]
    assert method(make_images(4)).isfinite().all()
    wrong = adapt(net, "source", statistics={"kind": "balanced", "classes": 3})
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(UnsupportedModelError, match="gives 4 logits"):
        wrong(make_images(4))
    assert same(wrong.state_dict(), before)


def test_a_layer_that_does_not_run_cannot_tell_domains_apart():
    net = make_net("user")
    net.spare = nn.BatchNorm2d(3).eval()
    method = adapt(net, "source", statistics={"kind": "domains", "layer": "spare"})
    with pytest.raises(UnsupportedModelError, match="'spare', which tells domains apart, does not run"):
        method(make_images(4))
    assert adapt(net, "source", statistics="balanced")(make_images(4)).isfinite().all()


SYNCHRONISED = (
    "batch",
    "source",
    "mixed",
    "ema",
    "renormalized",
    "balanced",
    "shared",
    "instance",
    "auto",
    "auto in groups",
)
SIZES = (6, 5, 1, 7, 4)


def together(kind, rank=0, world=1):
    method, results = build(kind, net=make_net("user").double()), []
    for number, size in enumerate(SIZES):
        batch = make_images(size, seed=number, dtype=torch.float64)
        if number == 3:
            batch[4:] = torch.nan  # all that the second process has
        part = batch.tensor_split(world)[rank]
        with collective.joined(world, present=len(part) > 0):
            x = part if len(part) else batch[:1]
            results.append(torch.cat([method(x), method.predict(x, statistics="batch")], 1)[: len(part)])
    return results, {**method.memory, **{n: t.detach() for n, t in method.adaptable.items()}}


@NEEDS_FORK
def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    def work(rank):
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=rank, world_size=2)
        torch.save({kind: together(kind, rank, 2) for kind in SYNCHRONISED}, tmp_path / f"out.{rank}")
        distributed.destroy_process_group()

    Processes(work, tmp_path / "out").succeed()
    parts = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    for kind in SYNCHRONISED:
        expected, state = together(kind)
        for number, logits in enumerate(expected):
            found = torch.cat([part[kind][0][number] for part in parts])
            assert max_difference(found, logits) < 1e-10, kind
        for name, value in state.items():
            first, second = (part[kind][1][name] for part in parts)
            assert torch.equal(first, second), (kind, name)
            assert max_difference(first, value) < 1e-10, (kind, name)


@every_kind
def test_what_cannot_be_joined_says_so(kind):
    assert ("synchronised" in build(kind).parallel) == (kind in SYNCHRONISED)


@pytest.mark.parametrize("kind", ["balanced", "domains", "instance", "median"])
def test_a_window(kind):
    """One image at a time, adapted on by eights: where batches of eight would have brought it."""
    method, plain = (build(kind, net=make_net("user").double(), **more) for more in ({"window": 8}, {}))
    for batch in make_stream(2, batch=8, dtype=torch.float64):
        for x in batch.split(1):
            assert method(x).isfinite().all()
        plain(batch)
    for name, value in plain.memory.items():
        assert max_difference(method.value(name).double(), value.double()) < 1e-11


def test_the_net_is_left_alone():
    for kind in KINDS:
        net = make_net("user")
        before = copy.deepcopy(net.state_dict())
        method = build(kind, "source", net=net, in_place=True)
        run(method, make_stream(2))
        assert same(net.state_dict(), before)
        layers = {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}
        assert not any("forward" in vars(layer) for layer in layers.values())
        stored = method.stream_statistics()
        with nullcontext() if stored is None else fixed_statistics(net, stored):
            assert net(make_images(2)).isfinite().all()
        assert same(net.state_dict(), before)


@pytest.mark.parametrize("kind", ["batch", "ema", "balanced", "domains"])
def test_half_precision_in_the_middle_of_a_stream_rounds_no_statistics(kind):
    """They stay in float32, with the values that they have; one above 65,504 does not become infinite."""
    method = build(kind, optimizer="sgd")
    run(method, make_stream(2))
    names = [n for n in method.memory if n.startswith(("statistics.", "stream."))]
    method.value(next(n for n in names if n.endswith("moments")))[1, 0] = 7e4
    before = {name: method.value(name).clone() for name in names}
    method.bfloat16().half()
    assert all(same(method.value(name), before[name]) for name in names)


@pytest.mark.parametrize("kind", ["balanced", "domains", "auto"])
def test_batches_of_ever_other_sizes_keep_no_more_memory(kind, monkeypatch):
    """What is kept in place for each size is bounded; the statistics are the same."""
    method, plain = build(kind), build(kind)
    sizes = [make_images(1 + number % 7, seed=number) for number in range(20)]
    expected = run(plain, sizes)
    monkeypatch.setattr(class_statistics, "PLACES", 20)
    layout = method.layout
    assert same(run(method, sizes), expected)
    assert method.layout > layout or kind == "auto"  # what was recorded with the old places is not used any more
    assert len(method.account._places) <= 20
