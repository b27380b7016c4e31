"""CAFA against its formula with loops over samples and classes, in float64; its statistics, and what it refuses."""

import pytest
import torch

from lightning_tta import ConfigError, DataError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same
from plain import TOLERANCE, PlainMethod, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def source(batches=8, classes=5, dtype=torch.float64):
    """Batches of eight, each class in several."""
    return [
        {"image": make_images(8, seed=50 + n, dtype=dtype), "label": (torch.arange(8) + 3 * n) % classes}
        for n in range(batches)
    ]


class PlainCAFA(PlainMethod):
    def __init__(self, net, lr, shrinkage, covariance):
        super().__init__(net, lr)
        self.source_net, self.shrinkage, self.tied = net, shrinkage, covariance == "tied"

    def shrunk(self, rows):
        s = sum(torch.outer(r, r) for r in rows) / len(rows)
        return (1 - self.shrinkage) * s + self.shrinkage * s.trace() / len(s) * torch.eye(len(s)).double()

    def prepare(self, batches):
        with torch.no_grad():  # at the source, with its running statistics
            rows = [
                (z, int(y))
                for batch in batches
                for z, y in zip(self.source_net.features(batch["image"]), batch["label"], strict=True)
            ]
        members = {c: [z for z, y in rows if y == c] for c in range(5)}
        self.means = {c: sum(m) / len(m) for c, m in members.items() if m}
        apart = {c: [z - self.means[c] for z in m] for c, m in members.items() if m}
        tied = self.shrunk([r for each in apart.values() for r in each])
        self.inverses = {c: torch.linalg.inv(tied if self.tied else self.shrunk(apart[c])) for c in apart}

    def __call__(self, images):
        features = self.net.features(images)
        logits, terms, own = self.net.head(features), [], []
        for z, u in zip(features, logits, strict=True):
            d = {c: (z - m) @ self.inverses[c] @ (z - m) for c, m in self.means.items()}
            y = int(u.argmax())
            if y in d:
                terms.append((d[y] / sum(v for c, v in d.items() if c != y)).log())
                own.append(d[y].item() / len(z))
        loss = sum(terms) / len(terms)
        self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), loss.item(), sum(own) / len(own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("covariance", "shrinkage"), [("tied", 0.1), ("tied", 1.0), ("class", 0.3)])
@pytest.mark.filterwarnings("ignore:.*have no source image")
def test_three_steps(kind, covariance, shrinkage):
    net = make_net(kind).double()
    method = adapt(net, "cafa", lr=0.02, optimizer="sgd", covariance=covariance, shrinkage=shrinkage)
    reference = PlainCAFA(net, 0.02, shrinkage, covariance)
    method.prepare(source()), reference.prepare(source())
    for images in make_stream(3, batch=7, dtype=torch.float64):
        expected, loss, distance = reference(images)
        assert max_difference(method(images), expected) < 1e-9
        assert method.stats["loss"] == pytest.approx(loss, abs=1e-8)
        assert method.stats["distance"] == pytest.approx(distance, rel=1e-8)
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 1)
        if covariance == "tied" and shrinkage == 1:  # the others are conditioned worse
            assert_same_sgd(method, reference.sgd)
        for name, tensor in reference.weights.items():
            assert max_difference(method.adaptable[f"model.{name}"].detach(), tensor.detach()) < 1e-8
    assert reference.sgd.moved() > 1e-5


@pytest.mark.parametrize(("covariance", "shrinkage"), [("tied", 0.1), ("class", 0.3)])
def test_images_of_classes_without_source_images_do_not_count(covariance, shrinkage):
    net = make_net("user").double()
    method = adapt(net, "cafa", lr=0.02, optimizer="sgd", covariance=covariance, shrinkage=shrinkage)
    reference = PlainCAFA(net, 0.02, shrinkage, covariance)
    with pytest.warns(UserWarning, match=r"2 of the net's 5 classes have no source image \(3, 4\)"):
        method.prepare(source(classes=3))
    reference.prepare(source(classes=3))
    predicted = set()
    for images in make_stream(3, batch=8, dtype=torch.float64):
        expected, loss, _ = reference(images)
        predicted |= set(expected.argmax(1).tolist())
        assert max_difference(method(images), expected) < 1e-8
        assert method.stats["loss"] == pytest.approx(loss, abs=1e-7)
    assert predicted & {3, 4}
    assert predicted & {0, 1, 2}


def test_no_image_of_a_known_class_leaves_all_as_it_was():
    net = make_net("gn")
    method = adapt(net, "cafa", lr=0.1)
    images = make_images(4)
    with torch.no_grad():
        labels = set(net(images).argmax(1).tolist())
    known = [c for c in range(5) if c not in labels][:2]
    batches = [{**batch, "label": torch.tensor(known)[torch.arange(8) % 2]} for batch in source(dtype=torch.float32)]
    with pytest.warns(UserWarning, match="3 of the net's 5 classes"):
        method.prepare(batches)
    before = {name: tensor.clone() for name, tensor in method.adaptable.items()}
    assert method(images).isfinite().all()
    assert method.stats["backwards"] == 0
    assert "distance" not in method.stats
    assert same(before, dict(method.adaptable))


def test_the_distance_on_the_source_is_about_one():
    method = adapt(make_net("gn").double(), "cafa", lr=0.0, shrinkage=0.0)
    method.prepare(source(40))
    features = torch.cat([method.features(batch["image"])[0] for batch in source(40)]).detach()
    labels = torch.cat([batch["label"] for batch in source(40)])
    own = method.distances(features).gather(1, labels[:, None])
    assert own.mean().item() / 12 == pytest.approx(1, abs=1e-9)


def test_features_far_from_zero_keep_their_distances():
    method = adapt(make_net("gn"), "cafa")
    method.prepare(source(dtype=torch.float32))
    features = method.features(make_images(6))[0].detach()
    expected = method.distances(features)
    method.source_means += 256
    torch.testing.assert_close(method.distances(features + 256), expected, rtol=1e-2, atol=1e-2)


def test_the_order_and_size_of_source_batches_do_not_matter():
    net = make_net("bn").double()
    methods = [adapt(net, "cafa") for _ in range(2)]
    joined = {key: torch.cat([batch[key] for batch in source()]) for key in ("image", "label")}
    order = joined["label"].argsort(stable=True)  # sorted by class: nobody's statistics but the source's
    methods[0].prepare(source())
    methods[1].prepare(
        [{key: value[order][part] for key, value in joined.items()} for part in torch.arange(64).chunk(5)]
    )
    for name in ("source_means", "source_roots"):
        assert max_difference(*(getattr(method, name) for method in methods)) < TOLERANCE


def test_save_and_reset_in_mid_stream():
    options = {"lr": 0.02, "optimizer": "sgd"}
    method, other = (adapt(make_net("bn", seed=seed), "cafa", **options) for seed in (0, 5))
    method.prepare(source(dtype=torch.float32)), other.prepare(source(3, dtype=torch.float32))
    assert_goes_on_after_loading(method, other, make_stream(4, batch=7), same_options=False)


@pytest.mark.parametrize(
    ("options", "batches", "message"),
    [
        ({}, lambda: [{"image": make_images(4)}], r"needs labelled source images"),
        ({}, lambda: [{"image": make_images(4), "label": torch.zeros(4).long()}], r"found source images of 1\."),
        (
            {"shrinkage": 0.0},
            lambda: source(1, dtype=torch.float32),
            r"singular with shrinkage=0.0, from 8 images .*shrinkage\.$",
        ),
        ({"covariance": "class"}, lambda: source(1, dtype=torch.float32), "covariance of class 3 .*covariance='tied'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*have no source image")
def test_source_data_without_use_is_refused(options, batches, message):
    method = adapt(make_net("gn"), "cafa", **options)
    with pytest.raises(DataError, match=message):
        method.prepare(batches())
    assert not method.prepared


@pytest.mark.parametrize("wrong", [{"shrinkage": 1.1}, {"shrinkage": -0.1}, {"covariance": "full"}], ids=str)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "cafa", **wrong)


def test_covariances_that_are_too_large_are_refused():
    net = make_net("gn", 1000)
    net.head = torch.nn.Linear(1000, 1000)
    with pytest.raises(ConfigError, match=r"1000 classes of 1000 features.*covariance='tied'"):
        adapt(net, "cafa", covariance="class")
