"""AdaNPC against lists of features, image by image, in float64; its bounds, and what source data it refuses."""

import math

import pytest
import torch

from lightning_tta import ConfigError, DataError, UnsupportedModelError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same
from plain import TOLERANCE, assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"k": 6, "temperature": 0.02, "threshold": 0.45, "source_per_class": 3, "stream_per_class": 2}


def source(batches=3, size=8, dtype=torch.float64):
    return [
        {"image": make_images(size, seed=50 + n, dtype=dtype), "label": (torch.arange(size) + n) % 5}
        for n in range(batches)
    ]


class PlainAdaNPC:
    """Lists of (feature, label), searched and sorted in Python."""

    def __init__(self, net, *, k, temperature, threshold, source_per_class, stream_per_class, second_softmax=False):
        self.net, self.k, self.temperature, self.threshold = net, k, temperature, threshold
        self.source_size, self.stream_size, self.second = source_per_class, stream_per_class, second_softmax
        self.source, self.stream = [], []

    def unit(self, images):
        with torch.no_grad():
            return [z / z.norm() for z in self.net.features(images)]

    def prepare(self, batches):
        for batch in batches:
            for z, y in zip(self.unit(batch["image"]), batch["label"].tolist(), strict=True):
                if sum(label == y for _, label in self.source) < self.source_size:
                    self.source.append((z, y))

    def shares(self, z):
        ranked = sorted(((float(z @ b), y) for b, y in self.source + self.stream), reverse=True)[: self.k]
        weights = [math.exp(similarity / self.temperature) for similarity, _ in ranked]
        return [sum(w for w, (_, y) in zip(weights, ranked, strict=True) if y == c) / sum(weights) for c in range(5)]

    def __call__(self, images):
        features = self.unit(images)
        shares = [self.shares(z) for z in features]
        self.sure = 0
        for z, v in zip(features, shares, strict=True):
            sureness = max(math.exp(a) / sum(math.exp(b) for b in v) for a in v) if self.second else max(v)
            if sureness >= self.threshold:
                self.sure += 1
                label = v.index(max(v))
                self.stream.append((z, label))
                members = [i for i, (_, y) in enumerate(self.stream) if y == label]
                if len(members) > self.stream_size:
                    self.stream.pop(members[0])
        return torch.tensor(shares, dtype=torch.float64).add(1e-5).log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"threshold": 0.3, "stream_per_class": 3},
        {"second_softmax": True, "threshold": 0.25},
        {"k": 500, "temperature": 1.0, "threshold": 0.2},
    ],
    ids=str,
)
def test_five_batches(kind, more):
    net = make_net(kind).double()
    options = {**OPTIONS, **more}
    method, reference = adapt(net, "adanpc", **options), PlainAdaNPC(net, **options)
    method.prepare(source()), reference.prepare(source())
    sure = 0
    for images in make_stream(5, batch=9, dtype=torch.float64):
        predicted = method.predict(images)
        expected = reference(images)
        assert max_difference(predicted, expected) < TOLERANCE  # predicted before it joins
        assert max_difference(method(images), expected) < TOLERANCE
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 0)
        assert method.stats["joined"] == pytest.approx(reference.sure / 9)
        assert method.stats["held"] == len(reference.stream)
        bank = method.memory["features"]
        held = bank[bank.norm(dim=1) > 0.5]
        wanted = torch.stack([z for z, _ in reference.stream]) if reference.stream else held
        assert len(held) == len(wanted)
        assert ((held @ wanted.T) > 1 - 1e-9).any(0).all()
        sure += reference.sure
    assert 0 < sure <= 45
    if not more:
        assert sure > len(reference.stream)  # some have given way
        assert sure < 45


def test_nothing_joins_above_one():
    method = adapt(make_net("gn"), "adanpc", **{**OPTIONS, "threshold": 1.1})
    method.prepare(source(dtype=torch.float32))
    for images in make_stream(2):
        method(images)
    assert method.stats["joined"] == method.stats["held"] == 0
    assert not method.memory["features"].any()


def test_more_of_a_class_than_it_has_room_for():
    """Of one batch the last ones stay, in whatever order they are written."""
    net = make_net("gn").double()
    method = adapt(net, "adanpc", **{**OPTIONS, "threshold": 0.0, "stream_per_class": 2})
    method.prepare(source())
    image = make_images(1, dtype=torch.float64)
    images = torch.cat([(image + 1e-3 * n).clamp(0, 1) for n in range(7)])
    labels = method.predict(images).argmax(1)
    assert (labels == labels[0]).all()
    method(images)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(net.features(images[-2:]))
    held = method.memory["features"]
    held = held[held.norm(dim=1) > 0.5]
    assert held.shape == wanted.shape
    assert all(any(max_difference(a, b) < 1e-12 for b in held) for a in wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("label"), r"needs labelled source images.*integers from 0 to 4.*got keys \['image'\].*'t3a'"),
        (lambda b: b.update(label=b["label"] + 1), r"labels from 1 to 5.*classes that the net knows"),
        (lambda b: b.update(label=b["label"] - 1), "labels from -1 to 3"),
        (lambda b: b.update(label=b["label"].float()), r"\(8,\) and torch.float32"),
        (lambda b: b.update(label=b["label"][:3]), r"\(3,\).*for 8 images"),
        (lambda b: b["image"].fill_(torch.nan), "no image with finite features"),
    ],
)
def test_source_data_without_use_is_refused(change, message):
    batch = source(1)[0]
    change(batch)
    method = adapt(make_net("gn").double(), "adanpc", **OPTIONS)
    with pytest.raises(DataError, match=message):
        method.prepare([batch])
    assert not method.prepared


def test_labels_stay_with_their_images_where_some_are_broken():
    whole, broken = (adapt(make_net("gn").double(), "adanpc", **OPTIONS) for _ in range(2))
    batches = source()
    whole.prepare(batches)
    for batch in batches:
        batch["image"] = torch.cat([torch.full_like(batch["image"][:2], torch.inf), batch["image"]])
        batch["label"] = torch.cat([torch.tensor([4, 4]), batch["label"]])
    broken.prepare(batches)
    assert same(dict(whole.named_buffers()), dict(broken.named_buffers()))


def test_classes_without_images_are_named():
    method = adapt(make_net("gn", 7).double(), "adanpc", **OPTIONS)
    with pytest.warns(UserWarning, match=r"2 of the net's 7 classes have no source image \(5, 6\)"):
        method.prepare(source())
    assert (method(make_images(6, dtype=torch.float64))[:, 5:] == math.log(1e-5)).all()


def test_save_and_reset_in_mid_stream():
    method, other = (adapt(make_net("bn", seed=seed), "adanpc", **OPTIONS) for seed in (0, 5))
    method.prepare(source(dtype=torch.float32)), other.prepare(source(1, dtype=torch.float32))
    assert_goes_on_after_loading(method, other, make_stream(5, batch=7), same_options=False)


def test_no_plain_net():
    method = adapt(make_net("bn"), "adanpc")
    with pytest.raises(UnsupportedModelError, match=r"vote of stored features.*'t3a'"):
        method.export()


@pytest.mark.parametrize(
    "wrong",
    [{"k": 0}, {"temperature": 0}, {"threshold": -0.1}, {"source_per_class": 0}, {"stream_per_class": 1.5}],
    ids=str,
)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "adanpc", **wrong)
