"""SANTA against two plain nets, its losses written out with loops, in float64; prototypes, and what it needs."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lightning_tta import ConfigError, DataError, adapt
from lightning_tta.methods.components import drawing
from nets import (
    KINDS,
    make_images,
    make_net,
    make_stream,
    max_difference,
    norm_weights,
    same,
    without_running_statistics,
)
from plain import TOLERANCE, PlainSGD, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPERATURE = 0.3


def source(batches=3, dtype=torch.float64):
    return [
        {"image": make_images(8, seed=50 + n, dtype=dtype), "label": (torch.arange(8) + n) % 5} for n in range(batches)
    ]


def view_of(images):
    return (images * 0.7).roll(2, -1)


@pytest.fixture
def known(monkeypatch):
    """A view that a reference can make."""
    monkeypatch.setattr(drawing, "jitter", lambda images, key: view_of(images))


class PlainSANTA:
    def __init__(self, net, projector, lr, anchor_weight=1.0, contrast_weight=1.0, prototypes="source"):
        self.source_net = net
        self.net, self.anchor = (without_running_statistics(copy.deepcopy(net)) for _ in range(2))
        self.projector = copy.deepcopy(projector).requires_grad_(True)
        self.sgd = PlainSGD(norm_weights(self.net), lr)
        self.projector_sgd = PlainSGD(dict(self.projector.named_parameters()), lr)
        self.anchor_weight, self.contrast_weight, self.from_source = (
            anchor_weight,
            contrast_weight,
            prototypes == "source",
        )

    def prepare(self, batches):
        with torch.no_grad():  # with running statistics
            rows = [
                (z, int(y))
                for batch in batches
                for z, y in zip(self.source_net.features(batch["image"]), batch["label"], strict=True)
            ]
        self.prototypes = {c: [z for z, y in rows if y == c] for c in range(5)}
        self.prototypes = {c: sum(m) / len(m) for c, m in self.prototypes.items() if m}

    def contrast(self, z, z_view):
        prototypes = self.prototypes if self.from_source else None
        if prototypes is None:
            rows, length = self.net.head.weight.detach(), sum(one.detach().norm() for one in z) / len(z)
            prototypes = {c: row / row.norm() * length for c, row in enumerate(rows)}
        nearest = [
            max(prototypes, key=lambda c: cosine_similarity(prototypes[c], one.detach(), dim=0).item()) for one in z
        ]
        vectors = [self.projector(v) for v in (*(prototypes[c] for c in nearest), *z, *z_view)]
        vectors = [v / v.norm() for v in vectors]
        number, total = len(z), 0.0
        for i, a in enumerate(vectors):
            others = sum((a @ b / TEMPERATURE).exp() for j, b in enumerate(vectors) if j != i)
            positive = [
                (a @ b / TEMPERATURE).exp() for j, b in enumerate(vectors) if j != i and j % number == i % number
            ]
            total = total - sum((p / others).log() for p in positive) / 2
        return total / (3 * number)

    def __call__(self, images):
        with torch.no_grad():
            a = self.anchor(images).softmax(1)
        z, z_view = self.net.features(images), self.net.features(view_of(images))
        logits = self.net.head(z)
        p, q = logits.softmax(1), self.net.head(z_view).softmax(1)
        anchored = -((p * a.log()).sum() + (q * a.log()).sum()) / 2 / len(p)
        loss = self.anchor_weight * anchored
        contrast = self.contrast(z, z_view) if self.contrast_weight else None
        if contrast is None:
            self.sgd.step(self.sgd.gradients(loss))
            return logits.detach(), loss.item(), anchored.item(), None
        loss = loss + self.contrast_weight * contrast
        gradients = torch.autograd.grad(loss, [*self.sgd.tensors.values(), *self.projector_sgd.tensors.values()])
        self.sgd.step(gradients[: len(self.sgd.tensors)])
        self.projector_sgd.step(gradients[len(self.sgd.tensors) :])
        return logits.detach(), loss.item(), anchored.item(), contrast.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more", [{}, {"anchor_weight": 2.0, "contrast_weight": 0.5, "prototypes": "classifier"}, {"contrast_weight": 0.0}]
)
def test_three_steps(kind, more, known):
    net = make_net(kind).double()
    method = adapt(net, "santa", lr=0.05, optimizer="sgd", projector=6, temperature=TEMPERATURE, **more)
    reference = PlainSANTA(net, method.projector, 0.05, **more)
    assert method.needs_source == (not more)
    if method.needs_source:
        method.prepare(source()), reference.prepare(source())
    for images in make_stream(3, batch=5, dtype=torch.float64):
        expected, loss, anchored, contrast = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert method.stats["anchor_loss"] == pytest.approx(anchored, abs=TOLERANCE)
        assert method.stats.get("contrast_loss") == (contrast and pytest.approx(contrast, abs=TOLERANCE))
        assert (method.stats["forwards"], method.stats["backwards"]) == (3, 1)
        assert_same_sgd(method, reference.sgd)
        if contrast:
            assert_same_sgd(method, reference.projector_sgd, "projector", "projector.")
    assert reference.sgd.moved() > 1e-5
    assert ("projector" in method.optimizers) == (more.get("contrast_weight") != 0)


def test_without_a_projector(known):
    net = make_net("gn").double()
    method = adapt(net, "santa", lr=0.05, optimizer="sgd", projector=None, temperature=TEMPERATURE)
    reference = PlainSANTA(net, torch.nn.Identity(), 0.05)
    method.prepare(source()), reference.prepare(source())
    images = make_images(5, dtype=torch.float64)
    assert method(images).isfinite().all()
    z, z_view = net.features(images), net.features(view_of(images))
    assert method.stats["contrast_loss"] == pytest.approx(reference.contrast(z, z_view).item(), abs=TOLERANCE)


def test_a_class_without_source_images_is_nobodys_nearest(known):
    net = make_net("ln").double()
    method = adapt(net, "santa", lr=0.05, optimizer="sgd", projector=6, temperature=TEMPERATURE)
    reference = PlainSANTA(net, method.projector, 0.05)
    batches = [{**batch, "label": batch["label"] % 3} for batch in source()]
    with pytest.warns(UserWarning, match=r"2 of the net's 5 classes have no source image \(3, 4\)"):
        method.prepare(batches)
    reference.prepare(batches)
    images = make_images(6, dtype=torch.float64)
    with torch.no_grad():  # as far from all images as can be
        reference.prototypes = {1: -net.features(images).mean(0)}
        method.source_prototypes.zero_()[1] = reference.prototypes[1]
    _, loss, *_ = reference(images)
    method(images)
    assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)


def test_views_differ_from_step_to_step(monkeypatch):
    keys, plain = [], drawing.jitter
    monkeypatch.setattr(drawing, "jitter", lambda images, key: keys.append(key.tolist()) or plain(images, key))
    method = adapt(make_net("bn"), "santa", prototypes="classifier", seed=3, steps=2)
    for images in make_stream(2):
        method(images)
    assert keys == [[3, 0], [3, 1], [3, 2], [3, 3]]
    method.reset()
    method(make_images(4))
    assert keys[4:] == keys[:2]


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_one_image(num_classes):
    method = adapt(make_net("gn", num_classes), "santa", prototypes="classifier")
    for images in make_stream(3, batch=1):
        assert method(images).isfinite().all()
        assert method.stats["contrast_loss"] < 1.5  # three vectors: at most about log 2 and the angle between them
    assert method.stats["skipped_steps"] == 0


def test_labels_are_needed_but_for_the_classifiers_prototypes():
    images = [{"image": make_images(4)}]
    with pytest.raises(DataError, match="needs labelled source images"):
        adapt(make_net("bn"), "santa").prepare(images)
    method = adapt(make_net("bn"), "santa", prototypes="classifier")
    method.prepare(images)
    assert same([b.shape for n, b in method.named_buffers() if "prototypes" in n], [])


def test_save_and_reset_in_mid_stream():
    method, other = (adapt(make_net("bn", seed=seed), "santa", projector=6, lr=0.01) for seed in (0, 5))
    method.prepare(source(dtype=torch.float32)), other.prepare(source(1, dtype=torch.float32))
    assert_goes_on_after_loading(method, other, make_stream(4, batch=5), same_options=False)


@pytest.mark.parametrize(
    "wrong",
    [{"anchor_weight": -1}, {"contrast_weight": -1}, {"temperature": 0}, {"projector": 0}, {"prototypes": "rows"}],
    ids=str,
)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "santa", **wrong)
