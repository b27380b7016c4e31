"""RoTTA against two plain nets, a memory made of lists and torch's Adam; its memory, and what it asks the host."""

import copy
import math

import pytest
import torch
from test_tensors_only import in_a_step, parts_that_ask_nothing

from contract import VARIANTS, build
from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.methods import rotta
from memory_reference import (
    TOLERANCE,
    AveragedBN,
    dimmed,
    learned,
    log_softmax,
    moments_of,
    moved,
    set_mode,
    with_layers,
)
from nets import KINDS, make_images, make_net, make_stream, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")


class Memory:
    """Lists of (image, entropy, age) by class."""

    def __init__(self, size, classes, lambda_t=1.0, lambda_u=1.0):
        self.size, self.classes, self.lambdas = size, classes, (lambda_t, lambda_u)
        self.lists = [[] for _ in range(classes)]

    def score(self, entropy, age):
        return self.lambdas[0] / (1 + math.exp(-age / self.size)) + self.lambdas[1] * entropy / math.log(self.classes)

    def add(self, image, label, entropy):
        number = sum(map(len, self.lists))
        if len(self.lists[label]) >= self.size / self.classes:
            rivals = [label]
        elif number < self.size:
            rivals = None
        else:
            most = max(map(len, self.lists))
            rivals = [k for k, items in enumerate(self.lists) if len(items) == most]
        enters = rivals is None
        if not enters:
            score, k, place = max((self.score(i[1], i[2]), k, p) for k in rivals for p, i in enumerate(self.lists[k]))
            enters = score > self.score(entropy, 0)
            if enters:
                self.lists[k].pop(place)
        if enters:
            self.lists[label].append([image, entropy, 0])
        for items in self.lists:
            for item in items:
                item[2] += 1

    def items(self):
        return [item for items in self.lists for item in items]


class PlainRoTTA:
    def __init__(self, net, classes, *, lr, decay, momentum, size, every, **lambdas):
        self.student, self.teacher = (with_layers(net, lambda layer: AveragedBN(layer, momentum)) for _ in range(2))
        self.memory, self.count = Memory(size, classes, **lambdas), 0
        self.decay, self.every = decay, every
        self.adam = torch.optim.Adam(learned(self.student).values(), lr=lr)

    def __call__(self, images, view):
        set_mode(self.teacher, False)
        with torch.no_grad():
            logits = self.teacher(images)
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        for image, row in zip(images, p, strict=True):
            self.memory.add(image, int(row.argmax()), float(-(row * row.log()).sum()))
            self.count += 1
            if self.count % self.every == 0:
                self.update(view)
        return logits

    def update(self, view):
        set_mode(self.teacher, True), set_mode(self.student, True)
        images = torch.stack([item[0] for item in self.memory.items()])
        ages = torch.tensor([item[2] / self.memory.size for item in self.memory.items()], dtype=torch.float64)
        with torch.no_grad():
            target = log_softmax(self.teacher(images)).exp()
        losses = -(target * log_softmax(self.student(view(images)))).sum(1)
        self.loss = (losses * (-ages).exp() / (1 + (-ages).exp())).mean()
        self.adam.zero_grad()
        self.loss.backward()
        self.adam.step()
        with torch.no_grad():
            for slow, fast in zip(learned(self.teacher).values(), learned(self.student).values(), strict=True):
                slow.mul_(self.decay).add_((1 - self.decay) * fast)


@pytest.fixture
def known_view(monkeypatch):
    monkeypatch.setattr(rotta, "jitter", dimmed)


def assert_same_state(method, reference, kind):
    weights = dict(method.model.named_parameters())
    for name, p in learned(reference.student).items():
        assert max_difference(weights[name].detach(), p.detach()) < TOLERANCE
        assert max_difference(method.teacher.weights()[name], learned(reference.teacher)[name].detach()) < TOLERANCE
    if kind in ("bn", "user"):
        for net, plain in (("teacher", reference.teacher), ("student", reference.student)):
            assert max_difference(method.value(f"{net}.statistics.moments"), moments_of(plain)) < TOLERANCE
    items = [(label, *item[1:]) for label, items in enumerate(reference.memory.lists) for item in items]
    names = ("labels", "scores", "ages")
    kept = zip(*(method.value(f"images.{name}").tolist() for name in names), strict=True)
    kept = sorted(item for item in kept if item[0] >= 0)
    assert kept == [(k, pytest.approx(h, abs=TOLERANCE), a) for k, h, a in sorted(items)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("classes", "size", "sizes"),
    [(5, 12, (7, 7, 7, 9)), (3, 4, (1, 1, 2, 14, 1, 5)), (9, 4, (10, 10, 10))],
    ids=["balanced", "small", "more classes than slots"],
)
def test_three_steps_and_more(kind, classes, size, sizes, known_view):
    net = make_net(kind, classes).double()
    settings = {"lambda_t": 1.5, "lambda_u": 0.5} if classes == 3 else {}
    method = adapt(net, "rotta", lr=2e-2, ema_decay=0.6, bn_momentum=0.3, capacity=size, update_every=6, **settings)
    reference = PlainRoTTA(net, classes, lr=2e-2, decay=0.6, momentum=0.3, size=size, every=6, **settings)
    for number, batch in enumerate(sizes):
        images = make_images(batch, seed=number, dtype=torch.float64)
        predicted = method.predict(images)
        logits, expected = method(images), reference(images, dimmed)
        assert max_difference(logits, expected) < TOLERANCE
        assert max_difference(predicted, logits) < TOLERANCE
        assert_same_state(method, reference, kind)
        if method.stats["backwards"]:
            assert method.stats["loss"] == pytest.approx(reference.loss.item(), abs=TOLERANCE)
    assert reference.count // 6 >= 3
    assert moved(reference.student, net) > 1e-4


def test_defaults_are_the_authors(known_view):
    net = make_net("bn").double()
    method = adapt(net, "rotta")
    reference = PlainRoTTA(net, 5, lr=1e-3, decay=0.999, momentum=0.05, size=64, every=64)
    for images in make_stream(3, batch=70, dtype=torch.float64):
        assert max_difference(method(images), reference(images, dimmed)) < TOLERANCE
    assert_same_state(method, reference, "bn")


def test_the_batches_do_not_matter():
    """Between two steps; each step then has the same memory, whatever came together."""
    images, options = make_images(12), {"lr": 1e-2, "capacity": 6, "update_every": 12}
    whole, single = (adapt(make_net("bn"), "rotta", **options) for _ in range(2))
    logits, each = whole(images), torch.cat([single(image[None]) for image in images])
    torch.testing.assert_close(each, logits)
    for name, value in whole.memory.items():
        torch.testing.assert_close(single.memory[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_parts_of_its_steps():
    method = build("rotta", VARIANTS["rotta"][0], "bn")
    parts = parts_that_ask_nothing(method)
    for skips in (True, False):
        method.skips_when_empty = skips
        for images in make_stream(2, batch=6):  # a step is every 4 images
            assert torch.isfinite(in_a_step(method, images)).all()
    once = ["prediction", "take in", "learn", "take in"]
    assert parts == 2 * [*once, "keep", *once, "learn"]


def test_views_come_from_the_seed_and_the_stream():
    runs = []
    for seed in (0, 0, 1):
        method = adapt(make_net("gn"), "rotta", lr=0.1, ema_decay=0.0, update_every=4, capacity=4, seed=seed)
        runs.append([method(images) for images in make_stream(3)])
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_failed_step_leaves_out_what_led_to_it(monkeypatch):
    method = build("rotta", VARIANTS["rotta"][0], "bn")
    method(make_images(4))
    before = copy.deepcopy(method.state_dict())
    monkeypatch.setattr(rotta, "jitter", lambda images, key: images * float("inf"))
    for skips in (True, False):
        method.skips_when_empty = skips
        method(make_images(10, seed=3))
        assert method.stats["skipped_steps"] >= 1
        assert same(method.state_dict(), before)
    monkeypatch.undo()
    method(make_images(3, seed=3))
    assert method.value("images.seen") == 7


def test_export_and_predict_are_the_teacher():
    method = build("rotta", VARIANTS["rotta"][0], "bn")
    for images in make_stream(3):
        method(images)
    images = make_images(4, seed=9)
    torch.testing.assert_close(method.export()(images), method.predict(images))
    assert not torch.allclose(method.export()(images), make_net("bn")(images), atol=1e-2)


def test_images_of_another_size_start_the_memory_anew():
    method = build("rotta", VARIANTS["rotta"][0], "gn")
    method(make_images(6))
    method(make_images(3, size=24))
    assert method.value("images.pixels").shape == (5, 3, 24, 24)
    assert method.value("images.seen") == 9
    assert (method.value("images.labels") >= 0).sum() <= 3
    assert torch.isfinite(method(make_images(6, size=24))).all()


def test_what_does_not_fit_is_refused():
    for options in ({"capacity": 0}, {"update_every": 0}, {"bn_momentum": 1.5}, {"lambda_t": -1}, {"steps": 2}):
        with pytest.raises(ConfigError):
            adapt(make_net("gn"), "rotta", **options)
    with pytest.raises(ConfigError, match="exclude each other"):
        adapt(make_net("bn"), "rotta", statistics="ema")
    untracked = make_net("bn")
    untracked.norm1.running_mean = untracked.norm1.running_var = None
    with pytest.raises(UnsupportedModelError, match="'norm1' keeps no running statistics"):
        adapt(untracked, "rotta")
