"""RMT against two plain nets, its losses written out with loops; prototypes, replay, warm-up and what it refuses."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lightning_tta import DataError, UnsupportedModelError, adapt
from lightning_tta.methods.components import drawing, replay
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_running_statistics

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*have no source image:UserWarning"),
]
TOLERANCE = 1e-9  # float64
DECAY, TEMPERATURE = 0.8, 0.2


def source(batches=2):
    """Pixels as image files have them, so that 8 bits lose nothing; class 4 has no image."""
    images = [(make_images(8, seed=70 + i, dtype=torch.float64) * 255).round() / 255 for i in range(batches)]
    return [{"image": each, "label": torch.arange(8) % 4} for each in images]


def view_of(images):
    return (images * 0.7).roll(2, -1)


@pytest.fixture
def known(monkeypatch):
    """Draws that a reference can make: the view, and the order of the source images, which is shifted by one a time."""
    monkeypatch.setattr(drawing, "jitter", lambda images, key: view_of(images))
    calls = []

    def order(key, number, length):
        calls.append(0)
        return torch.arange(length).roll(len(calls))[None]

    monkeypatch.setattr(replay, "random_orders", order)


class PlainRMT:
    """Student and teacher as nets in training-mode BatchNorm."""

    def __init__(self, net, batches, projector, lr, source_free=False, weights=(1.0, 1.0, 1.0)):
        self.student, self.teacher = (without_running_statistics(copy.deepcopy(net)) for _ in range(2))
        self.projector = copy.deepcopy(projector)
        parameters = [*self.student.parameters(), *self.projector.parameters()]
        for p in parameters:
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        self.weights, self.source_free, self.calls = weights, source_free, 0
        if not source_free:
            self.images, self.labels = (torch.cat([b[key] for b in batches]) for key in ("image", "label"))
            with torch.no_grad():
                features = torch.cat([self.student.features(b["image"]) for b in batches])
                means = [features[self.labels == k].mean(0) for k in range(4)]
                self.prototypes = torch.stack(means)

    def contrast(self, prototypes, z, z_view):
        nearest = [
            max(range(len(prototypes)), key=lambda k: cosine_similarity(prototypes[k], one, dim=0).item()) for one in z
        ]
        vectors = torch.cat([prototypes[nearest], z, z_view])
        vectors = self.projector(vectors)
        vectors = vectors / (vectors**2).sum(1, keepdim=True).sqrt()
        number, total = len(z), 0.0
        for i in range(3 * number):
            scores = [(vectors[i] @ vectors[j] / TEMPERATURE).exp() for j in range(3 * number) if j != i]
            for j in range(3 * number):
                if j != i and j % number == i % number:
                    positive = (vectors[i] @ vectors[j] / TEMPERATURE).exp()
                    total = total - (positive / sum(scores)).log() / 2
        return total / (3 * number)

    def __call__(self, x):
        z, z_view = self.student.features(x), self.student.features(view_of(x))
        u, u_view = self.student.head(z), self.student.head(z_view)
        with torch.no_grad():
            target = self.teacher(x)
        t = target.softmax(1)
        loss = 0.0
        for logits in (u, u_view):
            p = logits.softmax(1)
            loss = loss - 0.25 * ((t * p.log()).sum(1) + (p * t.log()).sum(1)).mean()
        loss = self.weights[0] * loss
        if self.source_free:
            rows = self.student.head.weight.detach()
            prototypes = rows / rows.norm(dim=1, keepdim=True) * z.detach().norm(dim=1).mean()
        else:
            prototypes = self.prototypes
        loss = loss + self.weights[1] * self.contrast(prototypes, z, z_view)
        if not self.source_free and self.weights[2]:
            self.calls += 1
            chosen = torch.arange(len(self.labels)).roll(self.calls)[: len(x)]
            loss = loss + self.weights[2] * cross_entropy(self.student(self.images[chosen]), self.labels[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.copy_(DECAY * slow + (1 - DECAY) * fast)
        return u.detach() + target, loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"source_free": True}, {"weights": (0.5, 2.0, 0.0)}, {"weights": (1.0, 0.3, 4.0)}], ids=str
)
def test_three_steps(kind, options, known):
    net = make_net(kind).double()
    weights = options.get("weights", (1.0, 1.0, 1.0))
    named = dict(zip(("target_weight", "contrast_weight", "replay_weight"), weights, strict=True))
    more = {"lr": 0.05, "optimizer": "sgd", "ema_decay": DECAY, "temperature": TEMPERATURE, "projector": 7}
    source_free = options.get("source_free", False)
    method = adapt(net, "rmt", source_free=source_free, **named, **more)
    assert method.needs_source != source_free
    if not source_free:
        method.prepare(source())
    reference = PlainRMT(net, source(), method.projector, 0.05, source_free, weights)
    for images in make_stream(3, batch=5, dtype=torch.float64):
        predicted = method.predict(images, statistics="batch")
        logits = method(images)
        expected, loss = reference(images)
        assert max_difference(logits, expected) < TOLERANCE
        assert max_difference(predicted, expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        for name, weight in method.model.named_parameters():
            assert max_difference(weight.detach(), reference.student.get_parameter(name).detach()) < TOLERANCE
            slow = reference.teacher.get_parameter(name).detach()
            assert max_difference(method.teacher.weights()[name], slow) < TOLERANCE
        for ours, theirs in zip(method.projector.parameters(), reference.projector.parameters(), strict=True):
            assert max_difference(ours.detach(), theirs.detach()) < TOLERANCE
    moved = zip(reference.student.head.parameters(), net.head.parameters(), strict=True)
    assert min((a - b).abs().max().item() for a, b in moved) > 1e-4


def test_without_projector_the_features_are_compared(known):
    net = make_net("gn").double()
    options = {"lr": 0.05, "optimizer": "sgd", "ema_decay": DECAY, "temperature": TEMPERATURE, "projector": None}
    method = adapt(net, "rmt", **options)
    method.prepare(source())
    reference = PlainRMT(net, source(), nn.Identity(), 0.05)
    for images in make_stream(2, batch=3, dtype=torch.float64):
        assert max_difference(method(images), reference(images)[0]) < TOLERANCE
    assert not any(name.startswith("projector") for name in method.adaptable)


def test_without_contrast_there_is_no_projector_to_learn():
    method = adapt(make_net("gn"), "rmt", contrast_weight=0.0, source_free=True)
    assert method(make_images(8)).isfinite().all()
    assert set(method.optimizers) == {"model"}


def test_the_warm_up_is_where_a_reset_goes_back_to(known):
    net = make_net("bn").double()
    options = {"optimizer": "sgd", "lr": 0.3, "ema_decay": DECAY, "warmup": 128, "projector": 7}
    method = adapt(net, "rmt", **options)
    method.prepare(source())
    student, slow = (without_running_statistics(copy.deepcopy(net)) for _ in range(2))
    for p in student.parameters():
        p.requires_grad_(True)
    optimizer, images = torch.optim.SGD(student.parameters(), lr=0.0, momentum=0.9), source()
    images = torch.cat([b["image"] for b in images])
    for step in (1, 2):
        chosen = images.roll(step, 0)
        with torch.no_grad():
            t = slow(chosen).softmax(1)
        p = student(chosen).softmax(1)
        loss = -0.5 * ((t * p.log()).sum(1) + (p * t.log()).sum(1)).mean()
        optimizer.param_groups[0]["lr"] = 0.3 * step / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(slow.parameters(), student.parameters(), strict=True):
                a.copy_(DECAY * a + (1 - DECAY) * b)
    warm = copy.deepcopy(method.state_dict())
    for name, weight in student.named_parameters():
        assert max_difference(method.model.get_parameter(name).detach(), weight.detach()) < 1e-7  # pixels in float32
        assert max_difference(method.teacher.weights()[name], slow.get_parameter(name).detach()) < 1e-7
    assert (student.head.weight - net.head.weight).abs().max() > 1e-4
    stream = make_stream(4, dtype=torch.float64)
    first = [method(x) for x in stream[:2]]
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = adapt(make_net("bn", seed=3).double(), "rmt", **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other.state_dict(), method.state_dict())
    for each in (method, other):
        each.reset()
        assert same(each.state_dict(), warm)
    assert not same(first, [net(x) for x in stream[:2]])


def test_images_kept_are_the_first_and_come_back_with_the_state():
    method = adapt(make_net("gn"), "rmt", replay_images=11)
    method.prepare(source())
    kept = torch.cat([b["image"] for b in source()])[:11]
    assert torch.equal(method.replayed_images.double() / 255, kept)
    assert method.replayed_labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    method.prepare(source())  # again: not twice
    assert len(method.replayed_images) == 11
    other = adapt(make_net("gn", seed=4), "rmt", replay_images=11)
    other.load_state_dict(method.state_dict())
    assert other.prepared
    stream = make_stream(2)
    assert same([other(x) for x in stream], [method(x) for x in stream])
    few, many = (adapt(make_net("gn"), "rmt", replay_weight=weight) for weight in (0.0, 1.0))
    few.prepare(source()), many.prepare(source())
    assert (len(few.replayed_images), len(many.replayed_images)) == (0, 16)
    many(make_images(40))  # more than are kept


def test_source_images_that_are_not_finite_are_left_out_with_their_labels():
    one, other = (adapt(make_net("gn"), "rmt", replay_images=11) for _ in range(2))
    first, second = source()
    bad = {key: torch.cat([first[key][:3], first[key][:1], first[key][3:]]) for key in ("image", "label")}
    bad["image"][3] = torch.nan
    one.prepare([bad, second]), other.prepare([first, second])
    for name in ("source_prototypes", "replayed_images", "replayed_labels"):
        assert torch.equal(one.get_buffer(name), other.get_buffer(name)), name


def test_each_draw_is_its_own_and_repeats():
    net = make_net("gn")
    one, other, third = (adapt(net, "rmt", lr=1e-2, seed=seed) for seed in (0, 0, 1))
    for method in (one, other, third):
        method.prepare(source())
    drawn = [one.replayed_batch(torch.tensor([0, step]), 4, torch.float32)[0] for step in range(3)]
    assert not same(drawn[0], drawn[1])
    stream = make_stream(2)
    expected = [one(x) for x in stream]
    assert same([other(x) for x in stream], expected)
    assert not same([third(x) for x in stream], expected)


def test_what_it_refuses():
    method = adapt(make_net("gn"), "rmt")
    with pytest.raises(DataError, match="labelled"):
        method.prepare([{"image": make_images(4)}])
    with pytest.raises(DataError, match=r"found no image.*training set"):
        method.prepare([])
    with pytest.raises(DataError, match="from 0 to 5"):
        method.prepare([{"image": make_images(6), "label": torch.arange(6)}])
    with pytest.raises(DataError, match="one size"):
        method.prepare([*source(), {"image": make_images(4, size=24), "label": torch.arange(4)}])
    with pytest.raises(UnsupportedModelError, match="linear"):
        adapt(nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()), "rmt")
    method.prepare(source())
    with pytest.raises(UnsupportedModelError, match="'cotta'"):
        method.export()
