"""AdaContrast against two plain nets, its vote and its bank as lists of images; its views against torchvision's."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2 import functional as F

from lightning_tta import adapt
from lightning_tta.methods import adacontrast
from lightning_tta.views import strong
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9  # float64
DECAY, SIZE, NEIGHBOURS, TEMPERATURE = 0.8, 10, 3, 0.3
OPTIONS = {"lr": 0.05, "ema_decay": DECAY, "queue_size": SIZE, "neighbours": NEIGHBOURS, "temperature": TEMPERATURE}


def unit(x):
    return x / (x**2).sum(-1, keepdim=True).sqrt()


def views(images):
    return images.flip(-1), (images * 0.7).roll(2, -1), (images * 0.8 + 0.1).roll(1, -2)


@pytest.fixture
def known(monkeypatch):
    """The weak view, and the strong ones of student (the even counter) and teacher."""
    monkeypatch.setattr(adacontrast, "flip_some", lambda images, key: views(images)[0])
    monkeypatch.setattr(adacontrast, "strong_views", lambda images, key: views(images)[2 - self_number(key)])


def self_number(key):
    return int((key[1] % 1_000_003).item() == 2)


class PlainAdaContrast:
    """One image after another; the bank is a list of (feature, key, probabilities, label)."""

    def __init__(self, net, warmup, weights=(1.0, 1.0, 1.0)):
        self.student, self.teacher = (without_running_statistics(copy.deepcopy(net)) for _ in range(2))
        for p in self.student.parameters():
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        self.bank, self.seen, self.warmup, self.weights, self.changed = [], 0, warmup, weights, 0

    def vote(self, feature, own):
        if self.seen < self.warmup or not self.bank:
            return own
        nearest = sorted(self.bank, key=lambda entry: -(unit(feature) @ unit(entry[0])).item())[:NEIGHBOURS]
        return sum(entry[2] for entry in nearest).argmax().item()

    def __call__(self, x):
        weak, query, key = views(x)
        with torch.no_grad():
            features = self.student.features(weak)
            own = self.student.head(features).argmax(1).tolist()
            labels = [self.vote(z, k) for z, k in zip(features, own, strict=True)]
            self.changed = sum(a != b for a, b in zip(own, labels, strict=True)) / len(x)
            keys, slow = unit(self.teacher.features(key)), self.teacher.features(weak)
            probabilities = self.teacher.head(slow).softmax(1)
        z = self.student.features(query)
        logits = self.student.head(z)
        contrast = 0.0
        for number, label in enumerate(labels):
            q = unit(z[number])
            positive = (q @ keys[number] / TEMPERATURE).exp()
            others = sum((q @ entry[1] / TEMPERATURE).exp() for entry in self.bank if entry[3] != label)
            contrast = contrast - (positive / (positive + others)).log() / len(x)
        mean = logits.softmax(1).mean(0)
        diversity = (mean * (mean + 1e-8).log()).sum()
        losses = cross_entropy(logits, torch.tensor(labels)), contrast, diversity
        loss = sum(weight * each for weight, each in zip(self.weights, losses, strict=True))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.bank = [*self.bank, *zip(slow, keys, probabilities, labels, strict=True)][-SIZE:]
        self.seen += len(x)
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                a.copy_(DECAY * a + (1 - DECAY) * b)
            return self.student(x), loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"warmup": 5}, {"warmup": 0, "weights": (0.5, 2.0, 0.3)}], ids=str)
def test_five_steps(kind, options, known):
    net = make_net(kind).double()
    weights = options.get("weights", (1.0, 1.0, 1.0))
    named = dict(zip(("class_weight", "contrast_weight", "diversity_weight"), weights, strict=True))
    method = adapt(net, "adacontrast", warmup=options["warmup"], **named, **OPTIONS)
    reference, changed = PlainAdaContrast(net, options["warmup"], weights), []
    for images in make_stream(5, batch=4, dtype=torch.float64):
        logits = method(images)
        expected, loss = reference(images)
        assert max_difference(logits, expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        assert method.stats["changed"] == pytest.approx(reference.changed)
        changed.append(reference.changed)
        for name, weight in method.model.named_parameters():
            assert max_difference(weight.detach(), reference.student.get_parameter(name).detach()) < TOLERANCE
            slow = reference.teacher.get_parameter(name).detach()
            assert max_difference(method.teacher.weights()[name], slow) < TOLERANCE
    order = [place % SIZE for place in range(20 - SIZE, 20)]  # the last 10 images, from the oldest
    for number, name in enumerate(("features", "keys", "probabilities", "labels")):
        held = torch.stack([torch.as_tensor(entry[number]) for entry in reference.bank])
        held = unit(held) if name == "features" else held
        assert max_difference(method.value(f"bank.{name}")[order], held) < TOLERANCE
    assert changed[0] == 0
    assert kind == "gn" or max(changed) > 0
    assert method.value("images_seen") == 20


def test_a_batch_larger_than_the_bank_and_one_image(known):
    method = adapt(make_net("gn").double(), "adacontrast", warmup=0, **OPTIONS)
    reference = PlainAdaContrast(make_net("gn").double(), 0)
    for size in (13, 1, 2):
        images = make_images(size, seed=size, dtype=torch.float64)
        assert max_difference(method(images), reference(images)[0]) < TOLERANCE
    places = [place % SIZE for place in range(6, 16)]
    assert method.value("bank.labels")[places].tolist() == [entry[3] for entry in reference.bank]


def test_what_is_exported_is_the_student():
    method = adapt(make_net("bn"), "adacontrast", **OPTIONS)
    for images in make_stream(2):
        method(images)
    images = make_images(5)
    with torch.no_grad():
        assert max_difference(method.export()(images), method.predict(images)) < 1e-5


def test_a_batch_that_is_not_finite_stays_out_of_the_bank():
    method = adapt(make_net("gn"), "adacontrast", warmup=0, **OPTIONS)
    method(make_images(4))
    before = copy.deepcopy(method.rest), copy.deepcopy(method.adaptable)
    teach = method.teach_features
    method.teach_features = lambda *args, **options: tuple(t * float("nan") for t in teach(*args, **options))
    method(make_images(4, seed=1))
    assert method.stats["skipped_steps"] == 1
    assert same(method.rest, before[0])
    assert same(method.adaptable, before[1])


# Views ---------------------------------------------------------------------------------------------------------------


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "numbers"),
    [
        (strong._turned, F.adjust_hue, values(-0.1, 0.02, 0.07)),
        (lambda x, f: strong._mixed(x, strong._grey(x), f), F.adjust_saturation, values(0.6, 1.0, 1.4)),
        (
            lambda x, f: strong._mixed(x, strong._grey(x).mean((1, 2, 3), keepdim=True), f),
            F.adjust_contrast,
            values(0.6, 1.1, 1.4),
        ),
        (strong._blurred, lambda x, s: F.gaussian_blur(x, [13, 13], [s]), values(0.1, 1.0, 2.0)),
    ],
    ids=["hue", "saturation", "contrast", "blur"],
)
def test_parts_of_a_view_are_torchvisions(ours, theirs, numbers):
    images = make_images(3, dtype=torch.float64)
    expected = torch.stack([theirs(x, float(number)) for x, number in zip(images, numbers.flatten(), strict=True)])
    assert max_difference(ours(images, numbers), expected) < 2e-4  # their weights of grey have four digits


def test_views_have_draws_of_their_own():
    images = make_images(1).expand(400, -1, -1, -1)
    made = strong.strong_views(images, torch.tensor([0, 5]))
    assert made.shape == images.shape
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, strong.strong_views(images, torch.tensor([0, 5])))
    assert not torch.equal(made, strong.strong_views(images, torch.tensor([0, 6])))
    assert len({tuple(view.flatten()[:40].tolist()) for view in made}) > 350
    grey = (made[:, 0] - made[:, 1]).abs().amax((1, 2)) < 1e-6
    assert 0.12 < grey.float().mean() < 0.28
    flipped = strong.flip_some(images, torch.tensor([0, 5]))
    share = (flipped != images).flatten(1).any(1).float().mean()
    assert 0.4 < share < 0.6
    assert torch.equal(flipped[(flipped != images).flatten(1).any(1)][0], images[0].flip(-1))
    for odd in (make_images(2)[:, :1], make_images(2)[:, :, :2, :1], make_images(2).bfloat16()):
        view = strong.strong_views(odd, torch.tensor([0, 5]))
        assert (view.shape, view.dtype) == (odd.shape, odd.dtype)
