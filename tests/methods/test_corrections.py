"""prior= and refine= of any method, against plain loops in float64."""

import copy
import math

import pytest
import torch
from test_lame import plain_affinity

from contract import VARIANTS
from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.guard.watch import Watch
from lightning_tta.methods.base.execution import Execution
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.components import refinements
from nets import make_images, make_net, make_stream, max_difference, same
from replay import use_tape

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*normalises BatchNorm layers", "ignore:Where the source is unsure"),
]
EXACT = 1e-10  # float64
SKEWED = [0.1, 0.3, 0.2, 0.15, 0.25]
KINDS = [
    {"prior": {"kind": "em", "window": 6}},
    {"prior": {"kind": "moving", "momentum": 0.5}},
    {"prior": "markov"},
    {"refine": "lame"},
    {"refine": "cofa"},
    {"prior": "em", "refine": "lame"},
]
METHODS = ["source", "tent", "t3a", "cotta"]


def double(kind="gn"):
    return make_net(kind).double()


def stream(sizes, seed=0):
    return [make_images(size, seed=seed + number, dtype=torch.float64) for number, size in enumerate(sizes)]


def build(name, kind="bn", dtype=torch.float32, **options):
    return adapt(make_net(kind).to(dtype), name, **VARIANTS.get(name, [{}])[0], **options)


# Expectation maximisation


def plain_em(rows, source, counts, iterations):
    """Shares of the classes in ``rows``, lists of probabilities."""
    prior = list(source)
    for _ in range(iterations):
        sums = [counts * s for s in source]
        for row in rows:
            shares = [p * q / s for p, q, s in zip(row, prior, source, strict=True)]
            for k, share in enumerate(shares):
                sums[k] += share / sum(shares)
        prior = [total / (len(rows) + counts) for total in sums]
    return prior


@pytest.mark.parametrize("source", ["stream", "uniform", SKEWED], ids=str)
@pytest.mark.parametrize(
    ("window", "counts", "iterations", "temperature"),
    [(100, 0, 7, 1), (7, 2.5, 20, 1.5), (3, None, 1, 2), (1, 1, 3, 0.5)],
)
def test_em(window, counts, iterations, temperature, source):
    net = double()
    options = {"window": window, "pseudo_counts": counts, "iterations": iterations, "source_prior": source}
    options["temperature"] = temperature
    method = adapt(net, "source", prior={"kind": "em", **options})
    c = 5 if counts is None else counts
    s, rows, total, seen = [0.2] * 5 if isinstance(source, str) else source, [], [c / 5] * 5, c
    for images in stream([4, 1, 5, 3, 4]):
        logits = net(images).detach()
        new = (logits / temperature).softmax(1).tolist()
        rows = [*rows, *new][-window:]
        if source == "stream":
            if seen - c > 10 * window:  # older ones fade
                total = [(10 * window + c) / seen * t for t in total]
                seen = 10 * window + c
            total = [t + sum(row[k] for row in new) for k, t in enumerate(total)]
            seen += len(new)
            s = [t / seen for t in total]
        prior = plain_em(rows, s, c, iterations)
        ratio = torch.tensor(
            [temperature * math.log(q / p) for q, p in zip(prior, s, strict=True)], dtype=torch.float64
        )
        assert max_difference(method(images), logits + ratio) < EXACT
        other = make_images(3, seed=99, dtype=torch.float64)
        assert max_difference(method.predict(other), net(other).detach() + ratio) < EXACT
    assert ratio.abs().max() > (1e-3 if window < 100 or source != "stream" else -1)


def test_the_mean_of_the_stream_fades():
    net = double()
    method = adapt(net, "source", prior={"kind": "em", "window": 1, "pseudo_counts": 0, "temperature": 1})
    mean, number = torch.zeros(5, dtype=torch.float64), 0
    for images in stream([15, 15, 15]):
        p = net(images).detach().softmax(1)
        number = min(number, 10)
        mean = (number * mean + p.sum(0)) / (number + 15)
        number += 15
        method(images)
    assert max_difference(method.value("prior.average"), mean) < EXACT


def test_a_shuffled_stream_that_fits_the_window_is_left_alone():
    """The estimate over all images is their own mean prediction, which stands for the source."""
    net, images = double(), make_images(9, dtype=torch.float64)
    method = adapt(net, "source", prior={"kind": "em", "pseudo_counts": 0})
    assert max_difference(method(images), net(images).detach()) < EXACT


class Table(torch.nn.Module):
    """Logits (M, K) of M kinds of images, told apart by their first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x):
        return self.logits[(x[:, 0, 0, 0] * (len(self.logits) - 1)).round().long()]


@pytest.mark.parametrize("source", ["uniform", [0.2, 0.5, 0.3]], ids=str)
def test_a_calibrated_net_whose_labels_have_shifted(source):
    """The estimate is the stream's distribution, and the predictions are its true posterior."""
    given = torch.tensor([[7, 2, 1], [2, 6, 2], [1, 1, 8]], dtype=torch.float64) / 10  # kind of image, given the class
    target = torch.tensor([6, 3, 1], dtype=torch.float64) / 10
    s = torch.tensor([1 / 3] * 3 if source == "uniform" else source, dtype=torch.float64)
    net = Table((given * s[:, None]).T.log())
    numbers = (100 * (target @ given)).round().long()
    kinds = torch.arange(3).repeat_interleave(numbers)
    assert numbers.sum() == 100
    images = (kinds / 2).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).double()
    prior = {"kind": "em", "window": 100, "pseudo_counts": 0, "iterations": 2000, "source_prior": source}
    prior["temperature"] = 1
    method = adapt(net, "source", prior=prior)
    logits = method(images)
    estimate = method.value("prior.factors") * s
    assert max_difference(estimate, target) < 1e-6
    posterior = (given * target[:, None] / (target @ given)).T
    assert max_difference(logits.softmax(1), posterior[kinds]) < 1e-6
    assert max_difference(net(images).softmax(1), posterior[kinds]) > 0.1


def test_em_of_more_images_than_the_window():
    net, images = double(), make_images(9, dtype=torch.float64)
    methods = [adapt(net, "source", prior={"kind": "em", "window": 4, "source_prior": "uniform"}) for _ in range(2)]
    methods[0](images)
    methods[1](images[-4:])
    assert max_difference(*(method.value("prior.factors") for method in methods)) < EXACT


# ROID's


@pytest.mark.parametrize("form", ["probabilities", "logits"])
@pytest.mark.parametrize(("momentum", "source"), [(1.0, "uniform"), (0.3, "uniform"), (0.3, SKEWED)])
def test_moving(form, momentum, source):
    net = double()
    options = {"momentum": momentum, "form": form, "source_prior": source}
    method = adapt(net, "source", prior={"kind": "moving", **options})
    s = [0.2] * 5 if source == "uniform" else source
    average = s
    for images in stream([4, 1, 9]):
        logits = net(images).detach()
        rows = logits.softmax(1).tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        average = [(1 - momentum) * q + momentum * m for q, m in zip(average, mean, strict=True)]
        smoothing = max(momentum / len(rows), 1 / 5) / max(average)
        smoothed = [(q + smoothing) / (1 + smoothing * 5) / (5 * p) for q, p in zip(average, s, strict=True)]
        factors = torch.tensor(smoothed, dtype=torch.float64)
        expected = logits * factors if form == "logits" else (logits.softmax(1) * factors).log()
        found = method(images)
        found, expected = (found, expected) if form == "logits" else (found.softmax(1), expected.softmax(1))
        assert max_difference(found, expected) < EXACT


# LAME and COFA


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
@pytest.mark.parametrize("name", ["tent", "zerosiam", "t3a", "source", "memo", "cotta"])
def test_lame_on_any_method(name, affinity):
    """What the method predicts and the features of its pass over the batch, refined sample by sample."""
    options = {"source": {}}.get(name, VARIANTS.get(name, [{}])[0])
    twin = adapt(double("bn"), name, **options)
    method = adapt(double("bn"), name, **options, refine={"kind": "lame", "affinity": affinity, "neighbours": 2})
    for images in stream([6, 5]):
        calls = []
        handle = twin.model.head.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(inputs))
        logits = twin(images)
        handle.remove()
        passes = [z for (z,) in calls if len(z) == len(images)]  # CoTTA's last one is the student's
        z = (twin.model.features(images) if name == "memo" else passes[-2 if name == "cotta" else 0]).detach()
        p = logits.softmax(1)
        w, y, old = plain_affinity(z, affinity, 2), p, None
        for count in range(1, 101):
            pull = w @ y
            y = p * pull.exp()
            y = y / y.sum(1, keepdim=True)
            energy = float((y * (y / p).log()).sum() - (y * pull).sum())
            if count > 2 and abs(energy - old) <= 1e-8 * abs(old):
                break
            old = energy
        assert max_difference(method(images).softmax(1), y) < 1e-9
        assert max_difference(y, p) > 1e-3
    assert same(method.adaptable, twin.adaptable)  # the net learns the same
    assert method.stats["forwards"] == twin.stats["forwards"] + (name == "memo")


def test_lame_on_source_is_lame():
    images = make_images(7)
    assert torch.equal(build("source", refine="lame")(images), build("lame")(images))
    assert torch.equal(build("source", refine="lame").predict(images), build("lame")(images))


@pytest.mark.parametrize("kind", ["gn", "ln", "user"])
def test_cofa(kind):
    """From features and head, image by image over the whole stream."""
    net = double(kind)
    method, before, taken = adapt(net, "source", refine="cofa"), None, 0

    def surprise(u):
        return -sum(p * math.log(p) for p in u.softmax(0).tolist())

    for images in stream([4, 1, 1, 5]):
        expected = []
        with torch.no_grad():
            for z in net.features(images):
                own = net.head(z)
                mean = own if before is None else net.head((z + before) / 2)
                taken += surprise(mean) < surprise(own)
                expected.append(mean if surprise(mean) < surprise(own) else own)
                before = z
        last = method.value("refine.last").clone()
        assert max_difference(method(images), torch.stack(expected)) < EXACT
        assert not same(method.value("refine.last"), last)
    assert 0 < taken < 11
    with torch.no_grad():
        own = net.head(net.features(images[:1]))[0]
        mean = net.head((net.features(images[:1])[0] + before) / 2)
    expected = mean if surprise(mean) < surprise(own) else own
    assert max_difference(method.predict(images)[0], expected) < EXACT
    assert max_difference(method.predict(images[:1])[0], expected) < EXACT  # it keeps nothing


# What holds for all


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_reset_save_load_and_copy(name, options):
    method = build(name, **options)
    source = copy.deepcopy(method.state_dict())
    first = [method(images).clone() for images in make_stream(2)]
    saved, more = copy.deepcopy(method.state_dict()), make_stream(2, seed=3)
    twin = copy.deepcopy(method)
    then = [method(images).clone() for images in more]
    state = copy.deepcopy(method.state_dict())
    assert same([twin(images) for images in more], then)
    loaded = build(name, **options)
    loaded.load_state_dict(saved)
    assert same([loaded(images) for images in more], then)
    assert same(loaded.state_dict(), state)
    method.reset()
    again = [method(images) for images in make_stream(2)]
    assert same(again, first)
    assert same(method.state_dict(), saved)
    fresh = build(name, **options)
    fresh.reset()
    assert same(fresh.state_dict(), source)
    method.load_state_dict(source)  # from before the first batch, when the number of classes was not known
    assert same([method(images) for images in make_stream(2)], first)
    assert same(method.state_dict(), saved)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_double_precision_in_the_middle_of_a_stream(options):
    method, other = build("tent", **options), build("tent", **options)
    for images in make_stream(2):
        method(images), other(images)
    method.double()
    for images in make_stream(2, seed=3):
        assert max_difference(method(images.double()), other(images).double()) < 1e-3


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_predict_changes_nothing(name, options):
    method, images = build(name, **options), make_images(5, seed=7)
    fresh = method.predict(images)
    assert torch.isfinite(fresh).all()
    for batch in make_stream(2):
        method(batch)
    state, logits = copy.deepcopy(method.state_dict()), method.predict(images)
    assert torch.equal(method.predict(images), logits)
    assert same(method.state_dict(), state)
    if "refine" not in options:  # with the stream's statistics and prior, each image for itself
        torch.testing.assert_close(method.predict(images[2:3]), logits[2:3])


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_one_image_at_a_time(options):
    method = build("source", **options)
    logits = [method(images) for images in make_stream(4, batch=1)]
    assert all(torch.isfinite(u).all() for u in logits)


class Overflows(torch.nn.Module):
    """Its features of an image with a pixel of 1 in a corner are not numbers."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, net.head

    def forward(self, x):
        z = self.net.features(x)
        return self.head(torch.where(x[:, 0, 0, 0, None] == 1, z * math.nan, z))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("damage", ["pixel", "overflow", "all"])
@pytest.mark.filterwarnings("ignore:The net's outputs are not all finite")
def test_an_image_that_is_not_finite_leaves_no_trace(options, damage):
    method = adapt(Overflows(make_net("gn")), "source", **options)
    clean = adapt(Overflows(make_net("gn")), "source", **options)
    for number, images in enumerate(make_stream(3, batch=5)):
        images[:, 0, 0, 0] = 0.5
        good = [0, 2, 3] if number == 1 else [0, 1, 2, 3, 4]
        good = [] if number == 1 and damage == "all" else good
        broken = images.clone()
        bad = [place for place in range(5) if place not in good]
        broken[bad, 0, 0, 0] = math.nan if damage == "pixel" else 1.0
        logits = method(broken)
        if good:
            torch.testing.assert_close(logits[good], clean(images[good]))
    assert same(method.memory, clean.memory)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("name", [*METHODS, "zerosiam"])
def test_captured_steps_are_the_plain_ones(name, options, monkeypatch):
    use_tape(monkeypatch)
    with recording():
        plain, captured = build(name, **options), build(name, **options)
        plain.execution = Execution(capture=False)
        for images in make_stream(6):
            assert same(captured(images.clone()), plain(images))
            assert same(captured.memory, plain.memory)
    assert "recorded" in captured.capture_report().values()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_half_precision_and_inference_mode(options):
    method = build("source", "gn", dtype=torch.bfloat16, **options)
    with torch.inference_mode():
        method(make_images(4))
    logits = method(make_images(4, seed=1))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert all(value is None or value.dtype != torch.bfloat16 for value in method.half().memory.values())


def test_the_order_is_prior_then_refinement():
    images = make_images(6)
    method = build("source", refine="lame", prior={"kind": "em", "pseudo_counts": 1, "source_prior": "uniform"})
    assert list(method.options) == ["prior", "refine"]
    prior = build("source", prior={"kind": "em", "pseudo_counts": 1, "source_prior": "uniform"})
    logits, z = prior(images), prior.model.features(images)
    from lightning_tta.methods.components.refinements import agree

    assert torch.equal(method(images), agree(z, logits, "knn", 5, lambda condition: bool(condition))[0])


def test_on_probation_the_source_predicts_uncorrected():
    net, images = make_net("gn"), make_images(4)
    method = adapt(net, "source", prior={"kind": "em", "source_prior": "uniform"})
    watch = Watch(method)
    for batch in make_stream(3):
        watch(batch)
    with method.at_source():
        assert torch.equal(method.predict(images), net(images))
    assert not torch.equal(method.predict(images), net(images))


# A plain net


@pytest.mark.parametrize("name", ["source", "tent", "t3a"])
@pytest.mark.parametrize(
    "form", [{"kind": "em", "window": 6}, {"kind": "moving"}, {"kind": "moving", "form": "logits"}], ids=str
)
def test_a_plain_net_has_the_prior_in_its_head(name, form):
    method, images = build(name, prior=form), make_images(6, seed=9)
    for batch in make_stream(3):
        method(batch)
    net = method.export()
    torch.testing.assert_close(net(images), method.predict(images))
    plain = build(name)
    for batch in make_stream(3):
        plain(batch)
    assert max_difference(plain.predict(images), method.predict(images)) > 1e-3


def test_what_no_plain_net_does_is_refused():
    for options, what in (({"refine": "lame"}, "refine='lame'"), ({"refine": "cofa"}, "refine='cofa'")):
        method = build("tent", **options)
        method(make_images(8))
        with pytest.raises(UnsupportedModelError, match=what):
            method.export()
    net = make_net("gn")
    net.head = torch.nn.Linear(12, 5, bias=False)
    method = adapt(net, "source", prior="em")
    with pytest.raises(UnsupportedModelError, match="has no bias"):
        method.export()
    method = adapt(torch.nn.Sequential(make_net("gn"), torch.nn.LogSoftmax(1)), "source", prior="em")
    with pytest.raises(ConfigError, match="has seen no images"):
        method.export()
    method(make_images(4))
    with pytest.raises(UnsupportedModelError, match="is not the output of its head"):
        method.export()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "emm"}, "Did you mean em"),
        ({"prior": 3}, "must be a word"),
        ({"prior": {"window": 3}}, "must be a word"),
        ({"prior": {"kind": "em", "windows": 3}}, "Did you mean window"),
        ({"prior": {"kind": "em", "window": 0}}, "window must be"),
        ({"prior": {"kind": "em", "pseudo_counts": -1}}, "pseudo_counts must be"),
        ({"prior": {"kind": "em", "temperature": 0}}, "temperature must be"),
        ({"prior": {"kind": "em", "iterations": 0}}, "iterations must be"),
        ({"prior": {"kind": "em", "source_prior": [0.5, 0.6]}}, "whose sum is 1"),
        ({"prior": {"kind": "em", "source_prior": [1.0, 0.0]}}, "above 0"),
        ({"prior": {"kind": "em", "source_prior": "flat"}}, "must be 'uniform'"),
        ({"prior": {"kind": "em", "source_prior": None}}, "must be 'uniform'"),
        ({"prior": {"kind": "moving", "momentum": 0}}, "momentum must be"),
        ({"prior": {"kind": "moving", "form": "odds"}}, "form must be"),
        ({"refine": "lam"}, "Did you mean lame"),
        ({"refine": {"kind": "lame", "affinity": "cosine"}}, "affinity must be"),
        ({"refine": {"kind": "lame", "neighbours": 0}}, "neighbours must be"),
        ({"refine": {"kind": "cofa", "head": "head"}}, "has no option 'head'"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(make_net("gn"), "source", **options)


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="refines its predictions so already"):
        adapt(make_net("gn"), "lame", refine="lame")
    no_head = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 16), torch.nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        adapt(no_head, "source", refine="lame")
    logits = adapt(no_head, "source", refine="cofa", prior="em")(make_images(3))
    assert logits.shape == (3, 5)
    method = adapt(torch.nn.Sequential(make_net("gn"), torch.nn.LogSoftmax(1)), "source", refine="lame")
    with pytest.raises(UnsupportedModelError, match="is not the output of its head"):
        method(make_images(4))
    method = adapt(make_net("gn"), "source", prior={"kind": "em", "source_prior": [0.5, 0.5]})
    with pytest.raises(ConfigError, match="it has 2, and the net has 5 logits"):
        method(make_images(4))


@pytest.mark.parametrize(("name", "options"), [("pea", {}), ("view_averaging", {"views": 4}), ("zero", {"views": 8})])
def test_methods_whose_passes_are_of_views(name, options):
    """The neighbours are the images, and not their views."""
    plain, method = (adapt(make_net("bn"), name, **options, **more) for more in ({}, {"refine": "lame"}))
    for each in (plain, method):
        if each.needs_source:
            each.prepare([{"image": make_images(16, seed=9)}])
    images = make_images(6, seed=3)
    for _ in range(2):  # before and after a batch
        logits, refined = plain.predict(images), method.predict(images)
        with torch.no_grad():
            features = method.model.features(images)
        expected = refinements.agree(features, logits, "knn", 5, lambda condition: False)[0]
        torch.testing.assert_close(refined, expected, atol=1e-5, rtol=1e-5)
        plain(images), method(images)
