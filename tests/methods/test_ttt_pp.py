"""TTT++ against plain nets, with its losses written out in loops; its queue, its source moments, and its views."""

import copy
from functools import partial

import pytest
import torch

from lightning_tta import DataError, SourceClassifier, UnsupportedModelError, adapt
from lightning_tta.auxiliary import contrastive
from lightning_tta.auxiliary.base import Trained, note_trained
from lightning_tta.auxiliary.contrastive import Contrastive
from lightning_tta.views.strong import strong_views
from nets import make_images, make_net, make_stream, max_difference, same, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9  # float64
QUEUE, TEMPERATURE = 7, 0.5
SCALES = {"z": 0.3, "q": 0.7}


def view_of(images, number):
    return (images * (0.9 - 0.2 * number)).roll(1 + number, -1)


@pytest.fixture
def known(monkeypatch):
    """Views that a reference can make, too: the second key of a step is one above the first."""
    calls = []

    def view(images, key, **options):
        calls.append(0)
        return view_of(images, (len(calls) - 1) % 2)

    monkeypatch.setattr(contrastive, "strong_views", view)


def with_projector(net):
    projector = Contrastive(net, width=6).double()
    note_trained(net, {"contrastive": Trained({"width": 6}, copy.deepcopy(projector.state_dict()))})
    return net


def source():
    return [{"image": make_images(6, seed=60 + i, dtype=torch.float64)} for i in range(3)]


class PlainTTTpp:
    def __init__(self, net, projector, lr, momentum):
        self.projector = copy.deepcopy(projector)
        images = torch.cat([batch["image"] for batch in source()])
        with torch.no_grad():
            z = net.features(images)
            self.source = {"z": z, "q": self.projector(z)}
        self.net = without_running_statistics(copy.deepcopy(net))
        learned = [p for n, p in self.net.named_parameters() if not n.startswith(("head", "decide"))]
        self.sgd = torch.optim.SGD([p.requires_grad_(True) for p in learned], lr=lr, momentum=momentum)
        self.queue = {"z": [], "q": []}

    def distance(self, name, f):
        rows = torch.stack([*self.queue[name], *f])
        n, s = len(rows), self.source[name]
        c_source, c = (torch.cov(r.T) for r in (s, rows))
        centered = s - s.mean(0)
        fourth = sum((row @ row) ** 2 for row in centered) / len(s)
        c_unit = 2 / n * (fourth - (c_source**2).sum())
        m_unit = 2 / n * sum(c_source[i, i] for i in range(len(c_source)))
        return ((c_source - c) ** 2).sum() / c_unit + 0.5 * ((s.mean(0) - rows.mean(0)) ** 2).sum() / m_unit

    def contrast(self, x):
        vectors = self.projector(self.net.features(torch.cat([view_of(x, 0), view_of(x, 1)])))
        vectors = [v / v.norm() for v in vectors]
        number, total = len(x), 0.0
        for i in range(2 * number):
            others = [(vectors[i] @ vectors[j] / TEMPERATURE).exp() for j in range(2 * number) if j != i]
            same_image = (vectors[i] @ vectors[(i + number) % (2 * number)] / TEMPERATURE).exp()
            total = total - (same_image / sum(others)).log()
        return total / (2 * number)

    def __call__(self, x):
        z = self.net.features(x)
        logits, found = self.net.head(z), {"z": z, "q": self.projector(z)}
        loss = 1.5 * self.contrast(x) + sum(SCALES[n] * self.distance(n, f) for n, f in found.items())
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        for name, f in found.items():
            self.queue[name] = [*self.queue[name], *f.detach()][-QUEUE:]
        return logits.detach(), loss.item()


@pytest.mark.parametrize("kind", ["bn", "gn", "ln"])
def test_four_steps(kind, known):
    """The queue is not full at first, and drops its oldest later."""
    net = with_projector(make_net(kind).double())
    scales = {"feature_scale": SCALES["z"], "projection_scale": SCALES["q"]}
    method = adapt(net, "ttt_pp", lr=1e-6, momentum=0.5, contrast_weight=1.5, queue=QUEUE, **scales)
    method.prepare(iter(source()))
    reference = PlainTTTpp(net, method.auxiliary.projector, 1e-6, 0.5)
    for number, x in enumerate(make_stream(4, batch=3, dtype=torch.float64)):
        expected, loss = reference(x)
        assert max_difference(method(x), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE * max(1, loss)
        assert method.value("queued") == min(QUEUE, 3 * (number + 1))
    for name, p in reference.net.named_parameters():
        ours = method.model.get_parameter(name).detach()
        assert max_difference(ours, p.detach()) < TOLERANCE
        if not name.startswith("head"):
            assert max_difference(ours, net.get_parameter(name).detach()) > 1e-12


def test_source_features_are_at_no_distance():
    """Two samples of the source have distance 1 (and half of one) on average, whatever their size."""
    torch.manual_seed(0)
    net = with_projector(make_net("gn").double())
    method = adapt(net, "ttt_pp", queue=0)
    method.prepare([{"image": make_images(400, seed=1, dtype=torch.float64)}])
    with torch.no_grad():
        features = net.features(make_images(4000, seed=2, dtype=torch.float64))
        for size in (8, 32):
            distances = [method._distance("features", f) for f in features.split(size)]
            assert 0.4 < torch.stack(distances).mean() < 1.2  # of a sample to the source itself: half of (1 + 1 / 2)


def test_alone_without_a_queue_nothing_is_broken():
    method = adapt(with_projector(make_net("gn").double()), "ttt_pp", queue=0)
    method.prepare(source())
    method(make_images(1, dtype=torch.float64))
    assert method.stats["skipped_steps"] == 0
    assert method.stats["contrast"] == 0
    assert method.stats["alignment"] > 0


def test_what_it_refuses():
    with pytest.raises(UnsupportedModelError, match=r"--model\.auxiliary contrastive"):
        adapt(make_net("gn"), "ttt_pp", head_from="trained")
    method = adapt(with_projector(make_net("gn").double()), "ttt_pp")
    with pytest.raises(DataError, match="found 1"):
        method.prepare([{"image": make_images(1, dtype=torch.float64)}])
    assert not method.prepared


def test_the_training_draws_views_together():
    model = SourceClassifier("cifar/resnet20", 5, auxiliary={"kind": "contrastive", "width": 8})
    images, key = make_images(6, size=32), torch.tensor([1, 2])
    auxiliary = model.auxiliary["contrastive"]
    loss = auxiliary.loss(model.backbone, images, torch.zeros(6), key)
    assert loss > 0
    gradients = torch.autograd.grad(loss, list(auxiliary.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)


def test_views():
    simclr_view = partial(strong_views, crop=True, hue=False, blur=False)
    images, key = make_images(64), torch.tensor([5, 9])
    views = simclr_view(images, key)
    assert views.shape == images.shape
    assert 0 <= views.min() <= views.max() <= 1
    assert same(views, simclr_view(images, key))
    assert not torch.equal(views, simclr_view(images, key + 1))
    gray = (views.amax(1) - views.amin(1)).flatten(1).amax(1) < 1e-6
    assert 2 < gray.sum() < 28  # a fifth of 64
    flat = torch.full((200, 3, 8, 8), 0.5)  # crops and contrast change nothing here
    levels = simclr_view(flat, key).flatten(1)
    assert (levels.amax(1) - levels.amin(1)).max() < 1e-5
    assert 0.29 < levels.min() < 0.34
    assert 0.66 < levels.max() < 0.71
    assert 15 < ((levels[:, 0] - 0.5).abs() < 1e-6).sum() < 70  # a fifth of 200 keep theirs
    ramp = torch.linspace(0, 1, 32).expand(200, 2, 32, 32)  # two channels: no colours
    slopes = (lambda v: v[:, 0, 16, 20] - v[:, 0, 16, 11])(simclr_view(ramp, key))
    assert 60 < (slopes < 0).sum() < 140  # flipped
    assert (simclr_view(ramp, key, flip=False)[:, 0, 16, 20] >= simclr_view(ramp, key, flip=False)[:, 0, 16, 11]).all()
