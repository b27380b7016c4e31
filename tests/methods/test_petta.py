"""PeTTA against three plain nets, RoTTA's memory made of lists, source statistics written out and torch's Adam."""

import copy

import pytest
import torch
from test_rotta import Memory

from contract import VARIANTS, build
from lightning_tta import ConfigError, DataError, adapt
from lightning_tta.methods import rotta
from memory_reference import TOLERANCE, AveragedBN, dimmed, learned, log_softmax, moments_of, set_mode, with_layers
from nets import KINDS, make_images, make_net, make_stream, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")


def crossed(p, q):
    return -(log_softmax(p).exp() * log_softmax(q)).sum(1)


class PlainPeTTA:
    def __init__(self, net, classes, source, *, lr=1e-3, decay=0.999, momentum=0.05, size=64, **settings):
        self.student, self.teacher, self.anchor = (
            with_layers(net, lambda layer: AveragedBN(layer, momentum)) for _ in range(3)
        )
        self.start = {name: p.detach().clone() for name, p in learned(self.student).items()}
        self.memory, self.decay = Memory(size, classes), decay
        self.settings = {"pull_weight": 10.0, "anchor_weight": 1.0, "loss": "both", "regularizer": "cosine", **settings}
        self.adam = torch.optim.Adam(learned(self.student).values(), lr=lr)
        with torch.no_grad():
            z, labels = net.features(source), net(source).argmax(1)
        groups = [z[labels == k] for k in range(classes)]
        self.means, self.vars = (
            [f(g) if len(g) > 1 else None for g in groups] for f in (lambda g: g.mean(0), lambda g: g.var(0))
        )
        self.prototypes = list(self.means)

    def __call__(self, images, view):
        set_mode(self.teacher, False)
        with torch.no_grad():
            logits, z = self.teacher(images), self.teacher.features(images)
        p = log_softmax(logits).exp()
        for image, row in zip(images, p, strict=True):
            self.memory.add(image, int(row.argmax()), float(-(row * row.log()).sum()))
        labels = logits.argmax(1)
        present = [k for k in sorted(set(labels.tolist())) if self.means[k] is not None]
        far = [(self.prototypes[k] - self.means[k]) ** 2 / (self.vars[k] + 1e-6) for k in present]
        self.gamma = float(1 - (-torch.stack(far).mean()).exp()) if far else 0.0
        for k in present:
            self.prototypes[k] = 0.95 * self.prototypes[k] + 0.05 * z[labels == k].mean(0)
        self.update(view)
        return logits

    def update(self, view):
        for net in (self.student, self.teacher, self.anchor):
            set_mode(net, True)
        images = torch.stack([item[0] for item in self.memory.items()])
        with torch.no_grad():
            t, a = self.teacher(images), self.anchor(images)
        s, v = self.student(images), self.student(view(images))
        losses = crossed(t, v)
        if self.settings["loss"] == "both":
            losses = (crossed(t, s) + crossed(s, t) + losses + crossed(v, t)) / 4
        distances = []
        for name, p in learned(self.student).items():
            cosine = (p * self.start[name]).sum() / (p.norm() * self.start[name].norm())
            distances.append(
                -cosine if self.settings["regularizer"] == "cosine" else ((p - self.start[name]) ** 2).sum()
            )
        drawn = self.gamma * self.settings["pull_weight"] * sum(distances) / len(distances)
        self.loss = losses.mean() + self.settings["anchor_weight"] * crossed(a, v).mean() + drawn
        self.adam.zero_grad()
        self.loss.backward()
        self.adam.step()
        alpha = (1 - self.gamma) * (1 - self.decay)
        with torch.no_grad():
            for slow, fast in zip(learned(self.teacher).values(), learned(self.student).values(), strict=True):
                slow.mul_(1 - alpha).add_(alpha * fast)


@pytest.fixture
def known_view(monkeypatch):
    monkeypatch.setattr(rotta, "jitter", dimmed)


def source_images(number=40):
    return make_images(number, seed=77, dtype=torch.float64)


def prepared(net, **options):
    method = adapt(net, "petta", **options)
    method.prepare([{"image": images} for images in source_images().split(16)])
    return method


def assert_same_state(method, reference, kind):
    for name, p in learned(reference.student).items():
        assert max_difference(method.model.get_parameter(name).detach(), p.detach()) < TOLERANCE
        assert max_difference(method.teacher.weights()[name], learned(reference.teacher)[name].detach()) < TOLERANCE
    if kind in ("bn", "user"):
        for net in ("teacher", "student", "anchor"):
            assert (
                max_difference(method.value(f"{net}.statistics.moments"), moments_of(getattr(reference, net)))
                < TOLERANCE
            )
    for k, prototype in enumerate(reference.prototypes):
        expected = torch.zeros_like(method.value("prototypes")[k]) if prototype is None else prototype
        assert max_difference(method.value("prototypes")[k], expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("classes", "settings"),
    [(5, {}), (3, {"loss": "view", "regularizer": "l2", "pull_weight": 3.0, "anchor_weight": 0.5})],
    ids=["cifar", "other"],
)
def test_four_steps(kind, classes, settings, known_view):
    net = make_net(kind, classes).double()
    method = prepared(net, lr=2e-2, ema_decay=0.6, bn_momentum=0.3, capacity=8, **settings)
    options = {"lr": 2e-2, "decay": 0.6, "momentum": 0.3, "size": 8, **settings}
    reference, drifts = PlainPeTTA(net, classes, source_images(), **options), []
    for number, batch in enumerate((6, 9, 3, 7)):
        images = make_images(batch, seed=number, dtype=torch.float64)
        predicted = method.predict(images)
        logits, expected = method(images), reference(images, dimmed)
        assert max_difference(logits, expected) < TOLERANCE
        assert max_difference(predicted, logits) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(reference.loss.item(), abs=TOLERANCE)
        assert method.stats["drift"] == pytest.approx(reference.gamma, abs=TOLERANCE)
        assert_same_state(method, reference, kind)
        drifts.append(reference.gamma)
    assert drifts[0] == 0 < drifts[-1] < 1


def test_defaults_are_the_authors(known_view):
    net = make_net("bn").double()
    method, reference = prepared(net), PlainPeTTA(net, 5, source_images())
    for images in make_stream(3, batch=12, dtype=torch.float64):
        assert max_difference(method(images), reference(images, dimmed)) < TOLERANCE
    assert_same_state(method, reference, "bn")


def test_the_farther_the_slower():
    """With prototypes at the other end, the teacher stays where it is."""
    method = build("petta", {"lr": 0.1, "ema_decay": 0.0}, "gn")
    method.value("prototypes").add_(1e3)
    method(make_images(6))
    assert method.stats["drift"] == 1.0
    for name, weight in method.teacher.weights().items():
        assert torch.equal(weight, method.source_value(f"model.{name}"))
    method.reset()
    method(make_images(6))
    assert method.stats["drift"] == 0.0
    for name, weight in method.teacher.weights().items():
        assert max_difference(weight, method.model.get_parameter(name).detach()) < 1e-6


def test_what_was_prepared_is_saved_with_the_state():
    method = build("petta", VARIANTS["petta"][0], "bn")
    method(make_images(4))
    state = copy.deepcopy(method.state_dict())
    other = build("petta", VARIANTS["petta"][0], "bn", seed=5, prepare=False)
    other.load_state_dict(state)
    assert same(other(make_images(4, seed=3)), method(make_images(4, seed=3)))


def test_what_does_not_fit_is_refused():
    method = adapt(make_net("bn"), "petta")
    with pytest.raises(DataError, match="at least two of a class"):
        method.prepare([{"image": make_images(1)}])
    for options in ({"pull_weight": -1}, {"loss": "ce"}, {"regularizer": "none"}, {"update_every": 3}):
        with pytest.raises(ConfigError):
            adapt(make_net("bn"), "petta", **options)
