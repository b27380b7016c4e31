"""SHOT against its formula with loops over samples and classes, in float64; its labels, and what it leaves alone."""

import copy

import pytest
import torch

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_running_statistics
from plain import TOLERANCE, PlainSGD, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def clustered(features, p):
    """Labels by two rounds of centroids, the first weighted by the predictions."""
    f = [torch.cat([z, z.new_ones(1)]) for z in features]
    f = [z / z.norm() for z in f]
    labels = [int(row.argmax()) for row in p]
    for soft in (True, False):
        centroids = {}
        for k in set(labels):
            weights = [float(row[k]) if soft else float(y == k) for row, y in zip(p, labels, strict=True)]
            centroids[k] = sum(w * z for w, z in zip(weights, f, strict=True)) / sum(weights)
        labels = [max(centroids, key=lambda k: cosine(z, centroids[k])) for z in f]
    return labels


class PlainSHOT:
    def __init__(self, net, lr, label_weight=0.3, diversity_weight=1.0, labels="centroid", threshold=0.9):
        self.net = without_running_statistics(copy.deepcopy(net))
        head = {id(p) for p in self.net.head.parameters()}
        self.sgd = PlainSGD({n: p for n, p in self.net.named_parameters() if id(p) not in head}, lr)
        self.label_weight, self.diversity_weight = label_weight, diversity_weight
        self.labels, self.threshold = labels, threshold

    def __call__(self, images):
        features = self.net.features(images)
        logits = self.net.head(features)
        p = torch.stack([row.exp() / row.exp().sum() for row in logits])
        loss = sum(-(row * row.log()).sum() for row in p) / len(p)
        mean = sum(p) / len(p)
        loss = loss + self.diversity_weight * (mean * mean.log()).sum()
        guesses = [int(row.argmax()) for row in p]
        if self.labels == "centroid":
            labels, kept = clustered(features.detach(), p.detach()), range(len(p))
        else:
            labels, kept = guesses, [i for i, row in enumerate(p) if row.max() > self.threshold]
        self.changed, self.kept = sum(a != b for a, b in zip(labels, guesses, strict=True)), len(kept)
        if kept:
            loss = loss + self.label_weight * sum(-p[i, labels[i]].log() for i in kept) / len(kept)
        self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"label_weight": 2.0, "diversity_weight": 0.0},
        {"labels": "confident", "threshold": 0.6, "label_weight": 1.0},
        {"labels": "confident", "threshold": 1.0},
    ],
    ids=str,
)
def test_four_steps(kind, more):
    net = make_net(kind, seed=2).double()  # which predicts several classes
    method, reference = adapt(net, "shot", lr=0.02, **more), PlainSHOT(net, 0.02, **more)
    changed = kept = 0
    for images in make_stream(4, batch=12, seed=2, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert method.stats["relabelled"] == pytest.approx(reference.changed / 12)
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 1)
        assert_same_sgd(method, reference.sgd)
        changed, kept = changed + reference.changed, kept + reference.kept
    if "labels" not in more:
        assert changed > 0  # clusters and arg-max differ
    elif more["threshold"] < 1:
        assert 0 < kept < 48
    assert same(net.head.state_dict(), {k: v for k, v in method.model.head.state_dict().items()})


def test_each_confident_class_alone():
    """One image: its cluster is itself, and the two entropies are one."""
    method = adapt(make_net("gn"), "shot", label_weight=0.0)
    before = copy.deepcopy(method.state_dict())
    method(make_images(1))
    assert method.stats["relabelled"] == 0
    assert method.stats["loss"] == pytest.approx(0, abs=1e-6)
    for name, tensor in before.items():
        if isinstance(tensor, torch.Tensor):
            assert max_difference(method.state_dict()[name], tensor) < 1e-6


def test_a_classifier_alone_is_refused():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.head(x.mean((2, 3)))

    with pytest.raises(UnsupportedModelError, match=r"last linear layer 'head'.*'t3a'"):
        adapt(Linear(), "shot")


@pytest.mark.parametrize(
    "wrong", [{"label_weight": -1}, {"diversity_weight": -0.1}, {"labels": "hard"}, {"threshold": 1.1}], ids=str
)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "shot", **wrong)
