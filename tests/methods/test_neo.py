"""NEO against the mean of lists of features; what it says of a net that it does not suit; its plain net."""

import warnings

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, DataError, NotPreparedError, UnsupportedModelError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same
from plain import assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10  # float64
SIZES = (6, 1, 9, 4, 12)
OPTIONS = [
    {},
    {"momentum": 0.3},
    {"center": "source"},
    {"center": "source", "momentum": 0.3},
    {"balanced": True},
    {"center": "source", "balanced": True},
]


def source_batches(dtype=torch.float64):
    """Two, of 8 and 5 images."""
    return [{"image": make_images(size, seed=500 + size, dtype=dtype)} for size in (8, 5)]


def lively_net(kind):
    """A net that predicts many classes."""
    net = make_net(kind).double()
    with torch.no_grad():
        net.head.bias -= net.head.weight @ net.features(make_images(50, seed=9, dtype=torch.float64)).mean(0)
    return net


class PlainNEO:
    """All features so far, image by image; their means at each batch."""

    def __init__(self, net, center="raw", momentum=None, balanced=False):
        self.net, self.momentum, self.balanced = net, momentum, balanced
        self.weight, self.bias = net.head.weight.detach(), net.head.bias.detach()
        with torch.no_grad():
            source = torch.cat([net.features(batch["image"]) for batch in source_batches()])
        zero = torch.zeros(source.shape[1], dtype=torch.float64)
        self.mu, self.mu_of = zero, [zero] * len(self.weight)
        if center == "source":
            self.mu = source.mean(0)
            predicted = [int((self.weight @ z + self.bias).argmax()) for z in source]
            of = [[z for z, k in zip(source, predicted, strict=True) if k == c] for c in range(len(self.weight))]
            self.mu_of = [torch.stack(members).mean(0) if members else self.mu for members in of]
        self.seen, self.classes, self.shift = [], [], zero

    def g(self, z):
        return self.weight @ z + self.bias

    def offset(self):
        return self.shift * (len(self.seen) > 1 or self.momentum is not None)

    def __call__(self, images):
        with torch.no_grad():
            features = list(self.net.features(images))
        offset = self.offset()
        self.classes += [int(self.g(z - offset).argmax()) for z in features]
        self.seen += features
        if self.balanced:
            shifts = []
            for k in sorted(set(self.classes)):
                members = [z for z, c in zip(self.seen, self.classes, strict=True) if c == k]
                shifts.append(sum(members) / len(members) - self.mu_of[k])
            self.shift = sum(shifts) / len(shifts)
        elif self.momentum is None:
            self.shift = sum(self.seen) / len(self.seen) - self.mu
        else:
            c = (1 - self.momentum) * (self.shift + self.mu) + self.momentum * sum(features) / len(features)
            self.shift = c - self.mu
        return torch.stack([self.g(z - self.offset()) for z in features])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_batches(kind, options):
    net = lively_net(kind)
    method, reference = adapt(net, "neo", **options), PlainNEO(net, **options)
    if method.needs_source:
        method.prepare(source_batches())
    for number, size in enumerate(SIZES):
        images = make_images(size, seed=number, dtype=torch.float64)
        logits = method(images)
        assert max_difference(logits, reference(images)) < TOLERANCE
        assert max_difference(method.value("shift"), reference.shift) < TOLERANCE
        assert int(method.value("images")) == len(reference.seen)
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 0)
        with torch.no_grad():
            assert max_difference(logits, net(images)) > 1e-3
    if method.balanced:
        assert len(set(reference.classes)) > 1
        plain = PlainNEO(net, **{**options, "balanced": False})
        for number, size in enumerate(SIZES):
            plain(make_images(size, seed=number, dtype=torch.float64))
        assert max_difference(plain.shift, reference.shift) > 1e-3
    probe = make_images(3, seed=77, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([reference.g(z - reference.shift) for z in net.features(probe)])
    for _ in range(2):
        assert max_difference(method.predict(probe), expected) < TOLERANCE
    assert max_difference(method.export()(probe), expected) < TOLERANCE


def test_batches_of_one_are_one_batch_and_the_first_image_is_the_sources():
    net = make_net("gn").double()
    images = make_images(20, dtype=torch.float64)
    one_by_one, together = adapt(net, "neo"), adapt(net, "neo")
    logits = [one_by_one(image[None]) for image in images]
    together(images)
    assert max_difference(one_by_one.value("shift"), together.value("shift")) < 1e-12
    with torch.no_grad():
        assert max_difference(logits[0][0], net(images)[0]) < 1e-12  # not the bias alone
    assert max_difference(logits[-1][0], together.predict(images)[-1]) < 1e-12


@pytest.mark.filterwarnings("ignore:The net's outputs are not all finite")
@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_with_an_image_that_overflows_does_not_enter(balanced):
    net, images = make_net("gn").double(), make_images(6, dtype=torch.float64)
    method = adapt(net, "neo", balanced=balanced)
    method(images[:4])
    before = method.state_dict()["_extra_state"]
    hook = method.model.conv2.register_forward_hook(
        lambda module, inputs, output: torch.cat([output[:1] * torch.inf, output[1:]]) if len(output) == 6 else output
    )
    logits = method(images)
    assert logits[1:].isfinite().all()
    assert method.stats["skipped_steps"] == 1
    assert same(method.state_dict()["_extra_state"], before)
    hook.remove()
    method.model.conv2.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    method(images)
    assert method.stats["skipped_steps"] == 1
    assert same(method.state_dict()["_extra_state"], before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_save_and_reset_in_mid_stream(options):
    methods = [adapt(make_net("bn", seed=seed), "neo", **options) for seed in (0, 5)]
    for method in methods:
        if method.needs_source:
            method.prepare(source_batches(torch.float32))
    assert_goes_on_after_loading(*methods, make_stream(5, batch=7))


def even_net(moved=0.0):
    """Sure of each of its classes about as often, with centered features; ``moved`` away from 0, its bias takes back.

    The function of the pixels is the same for every ``moved``.
    """
    net = make_net("ln").double()
    images = make_images(300, seed=9, dtype=torch.float64)
    with torch.no_grad():
        mean = net.features(images).mean(0)
        net.norm.bias -= mean  # the features are its output's mean
        net.head.bias.zero_()
        direction = net.head.weight[0] / net.head.weight[0].norm()
        net.norm.bias += moved * direction
        net.head.bias -= net.head.weight @ (moved * direction)
    return net, images


@pytest.mark.parametrize("batch", [1, 25, 300])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}], ids=str)
def test_a_net_with_other_features_is_warned_of_once(batch, options):
    """One whose features lie about 0 is not; one that is the same function of the pixels, but lies elsewhere, is."""
    for moved, number in ((0.0, 0), (2.0, 1)):
        net, images = even_net(moved)
        method = adapt(net, "neo", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for part in images.split(batch):
                method(part)
            spread = method.stats["spread"]
            method.reset()
            for part in images.split(batch):
                method(part)
        messages = [str(w.message) for w in caught if "Centering the features" in str(w.message)]
        assert len(messages) == number
        assert (spread < -0.05) == bool(number)
        assert all("center='source'" in message for message in messages)


def test_the_source_form_does_not_see_where_the_features_lie():
    logits = []
    for moved in (0.0, 2.0):
        net, images = even_net(moved)
        method = adapt(net, "neo", center="source")
        method.prepare([{"image": images[:100]}])
        logits.append(method(images[100:120]))
        assert "spread" not in method.stats
    assert max_difference(*logits) < TOLERANCE


def test_spread_is_the_difference_of_entropies():
    net, images = make_net("gn").double(), make_images(40, dtype=torch.float64)
    method = adapt(net, "neo")
    scores, source = [], []
    for part in images.split(10):
        scores.append(method(part).softmax(1))
        with torch.no_grad():
            source.append(net(part).softmax(1))
    entropies = [-float((p * p.log()).sum()) for p in (torch.cat(ps).mean(0) for ps in (scores, source))]
    assert method.stats["spread"] == pytest.approx(entropies[0] - entropies[1], abs=1e-10)


class Scaled(nn.Linear):
    """A layer with a forward of its own, as LoRA's are."""

    def forward(self, x):
        return super().forward(2 * x)


def test_a_head_of_the_users_own():
    net, images = make_net("gn").double(), make_images(8, dtype=torch.float64)
    head = Scaled(12, 5).double()
    head.load_state_dict(net.head.state_dict())
    net.head = head
    with torch.no_grad():
        z = net.features(images)
        expected = head(z - z.mean(0))
    method = adapt(net, "neo")
    assert max_difference(method(images), expected) < TOLERANCE
    assert max_difference(method.export()(images), expected) < TOLERANCE


def test_a_head_without_bias_adapts_and_says_why_it_has_no_plain_net():
    net, images = make_net("gn"), make_images(8)
    net.head.bias = None
    method = adapt(net, "neo")
    method(images)
    with pytest.raises(
        UnsupportedModelError, match=r"'head' has none. Give it one before adapting: model.head.bias = "
    ):
        method.export()
    with torch.no_grad():
        net.head.bias = nn.Parameter(torch.zeros(5))  # as it says
    method = adapt(net, "neo")
    method(images)
    assert max_difference(method.export()(images), method.predict(images)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_in_float32(dtype):
    """Of a net in half precision; and under autocast, whose features may be rounded, but not what is made of them."""
    net = make_net("gn").to(dtype)
    method, seen = adapt(net, "neo"), []
    method.split.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    for images in make_stream(40, batch=8):
        logits = method(images)
    features = torch.cat(seen)
    assert features.dtype == dtype
    assert method.value("shift").dtype == logits.dtype == torch.float32
    assert max_difference(method.value("shift"), features.float().mean(0)) < 1e-5
    weight, bias = net.head.weight.detach().float(), net.head.bias.detach().float()
    expected = (features[-8:].float() - features.float().mean(0)) @ weight.T + bias
    assert max_difference(logits, expected) < 1e-4
    method.half()
    assert method.value("shift").dtype == torch.float32


def test_autocast_does_not_round_the_mean():
    method, seen = adapt(make_net("gn"), "neo"), []
    method.split.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = method(make_images(64))
    z, head = seen[-1], method.split.head
    assert max_difference(logits, (z - z.mean(0)) @ head.weight.detach().T + head.bias.detach()) < 1e-5


def test_source_images():
    net = make_net("gn")
    method = adapt(net, "neo", center="source")
    with pytest.raises(NotPreparedError):
        method(make_images(4))
    broken = torch.cat([make_images(1), make_images(1) * torch.nan])
    for batches in ([], [{"image": broken[1:]}]):
        with pytest.raises(DataError, match="no image with finite features"):
            method.prepare(batches)
    with pytest.raises(DataError, match="must be dicts with 'image'"):
        method.prepare([broken])
    method.prepare([{"image": broken}])
    with torch.no_grad():
        assert max_difference(method.source_mean, net.features(broken[:1])) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center": "target"}, "center must be one of 'auto', 'raw', 'source'; got 'target'"),
        ({"momentum": 0}, "momentum must be .*; got 0"),
        ({"momentum": 0.1, "balanced": True}, "Set momentum=None"),
        ({"balanced": "yes"}, "balanced must be one of True, False"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(make_net("bn"), "neo", **options)
