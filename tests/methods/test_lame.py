"""LAME against the fixed point and the affinities written out with loops."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_tta import ConfigError, adapt
from lightning_tta.methods.components.refinements import affinity_matrix, refine
from nets import KINDS, make_images, make_net, make_stream, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10  # float64


def plain_affinity(z, kind, k):
    """Sample by sample."""
    z = [row / row.norm() for row in z]
    distance = [[math.dist(a.tolist(), b.tolist()) for b in z] for a in z]
    n = len(z)
    w = torch.zeros(n, n, dtype=torch.float64)
    if kind == "rbf":
        widths = [sorted(row)[min(k, n) - 1] for row in distance]
        sigma = max(sum(widths) / n, 2e-16)
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: distance[i][j])
        for j in range(n):
            if kind == "knn":
                w[i, j] = float(j in others[:k])
            elif kind == "rbf":
                w[i, j] = math.exp(-(distance[i][j] ** 2) / (2 * sigma**2))
            else:
                w[i, j] = float(z[i] @ z[j])
    return w


def plain_lame(net, images, kind, k):
    with torch.no_grad():
        z = net.features(images)
        p = net.head(z).softmax(1)
    w, y, old = plain_affinity(z, kind, k), p, None
    for count in range(1, 101):
        pull = w @ y
        y = p * pull.exp()
        y = y / y.sum(1, keepdim=True)
        energy = float((y * (y / p).log()).sum() - (y * pull).sum())
        if count > 2 and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return y, count, energy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
@pytest.mark.parametrize(("batch", "neighbours"), [(9, 5), (9, 2), (4, 5), (2, 1), (1, 5)])
def test_three_batches(kind, affinity, batch, neighbours):
    net = make_net(kind).double()
    method = adapt(net, "lame", affinity=affinity, neighbours=neighbours)
    for images in make_stream(3, batch=batch, dtype=torch.float64):
        expected, count, energy = plain_lame(net, images, affinity, neighbours)
        logits = method(images)
        assert max_difference(logits.exp(), expected) < TOLERANCE
        assert max_difference(logits, expected.log()) < 1e-8
        assert method.stats["iterations"] == count
        assert abs(method.stats["objective"] - energy) < 1e-8
        assert torch.equal(method.predict(images), logits)
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 0)


def test_defaults():
    method = adapt(make_net("bn"), "lame")
    assert (method.affinity, method.neighbours) == ("knn", 5)
    assert method.adaptable == {}


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
def test_the_objective_falls_with_each_iteration(affinity):
    """L(Y) = sum KL(y || p) - 1/2 sum w <y, y'>; the directed graph of knn has no such guarantee step by step."""
    net = make_net("gn", num_classes=4).double()
    images = make_images(12, dtype=torch.float64)
    with torch.no_grad():
        features = net.features(images)
        log_p = net.head(features).log_softmax(1)
    w = affinity_matrix(features, affinity, 5)

    def objective(log_y):
        y = log_y.exp()
        return float((y * (log_y - log_p)).sum() - 0.5 * (y * (w @ y)).sum())

    values = [objective(log_p), *(objective(refine(log_p, w, count)[0]) for count in range(1, 13))]
    steps = [later - earlier for earlier, later in pairwise(values)]
    assert values[-1] < values[0] - 1e-2
    if affinity != "knn":
        assert torch.linalg.eigvalsh(w).min() > -1e-9
        assert max(steps) < 1e-12
        assert steps[0] < -1e-2
    final, iterations, _ = refine(log_p, w)
    assert iterations < 100  # it converged
    again = torch.log_softmax(log_p + w @ final.exp(), 1)
    assert max_difference(final.exp(), again.exp()) < 1e-3  # and that is a fixed point


def test_a_batch_of_one_is_the_prediction_itself():
    net = make_net("bn")
    image = make_images(1)
    with torch.no_grad():
        expected = net(image).log_softmax(1)
    torch.testing.assert_close(adapt(net, "lame")(image), expected)
    for affinity in ("rbf", "linear"):  # it can only agree with itself
        logits = adapt(net, "lame", affinity=affinity)(image)
        assert torch.isfinite(logits).all()
        assert logits.argmax() == expected.argmax()


def test_equal_images_and_saturated_predictions():
    net = make_net("gn")
    with torch.no_grad():
        net.head.weight.mul_(1e4)  # probabilities of exactly 0 in float32
    images = make_images(1).expand(7, -1, -1, -1)
    for affinity in ("knn", "rbf", "linear"):
        for batch in (images, make_images(7)):
            logits = adapt(net, "lame", affinity=affinity, neighbours=2)(batch)
            assert torch.isfinite(logits).all()
            torch.testing.assert_close(logits.exp().sum(1), torch.ones(7))
    assert torch.equal(affinity_matrix(torch.ones(5, 3), "knn", 4), 1 - torch.eye(5))  # never its own neighbour


def test_an_overflowing_image_does_not_reach_the_others():
    net = make_net("gn")

    class Overflows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = net, net.head

        def forward(self, x):
            z = net.features(x)
            return self.head(torch.where(x.amax((1, 2, 3))[:, None] > 1.5, z * float("nan"), z))

    images = make_images(6)
    clean = adapt(net, "lame", neighbours=2)(images[:5])
    images[5, 0, 0, 0] = 1.75
    logits = adapt(Overflows(), "lame", neighbours=2)(images)
    torch.testing.assert_close(logits[:5], clean)


def test_neighbours_outvote_a_doubtful_sample():
    """Five images of one kind, one of them blurred towards the border: its neighbours decide."""
    net = make_net("gn", num_classes=3).double()
    images = make_images(1, dtype=torch.float64).repeat(5, 1, 1, 1)
    images = images + 1e-3 * make_images(5, seed=3, dtype=torch.float64)
    with torch.no_grad():
        log_p = net(images).log_softmax(1)
    winner = log_p.mean(0).argmax()
    doubtful = log_p.clone()
    doubtful[0] = 0.0
    doubtful[0, (winner + 1) % 3] = 0.5  # another class is ahead by little
    refined, *_ = refine(doubtful.log_softmax(1), affinity_matrix(net.features(images).detach(), "knn", 4))
    assert (refined.argmax(1) == winner).all()


def test_nothing_is_kept():
    method, images = adapt(make_net("bn"), "lame"), make_images(6)
    first = method(images)
    for other in make_stream(3, seed=4):
        method(other)
    assert torch.equal(method(images), first)
    assert same(method.state_dict(), adapt(make_net("bn"), "lame").state_dict())


@pytest.mark.parametrize("options", [{"affinity": "cosine"}, {"neighbours": 0}, {"neighbours": 1.5}], ids=str)
def test_wrong_options(options):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "lame", **options)
