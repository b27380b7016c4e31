"""EATA and ETA against a reference written with plain torch, sample by sample, and their identities."""

import copy
import math

import pytest
import torch

from lightning_tta import ConfigError, DataError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, norm_weights, same, without_account
from plain import TOLERANCE, PlainMethod, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"lr": 0.05, "entropy_margin": 0.8, "diversity_margin": 0.93}


class PlainEATA(PlainMethod):
    """The objective with loops over samples."""

    def __init__(self, net, lr, entropy_margin, diversity_margin, fisher_alpha=0.0, entropy="softmax"):
        super().__init__(net, lr)
        self.come = entropy == "come"
        self.fisher_alpha, self.entropy_margin, self.diversity_margin = fisher_alpha, entropy_margin, diversity_margin
        self.fisher = {n: torch.zeros_like(w) for n, w in self.sgd.source.items()}
        self.mean_probability = None

    def prepare(self, batches):
        for images in batches:
            logits = self.net(images)
            log_p = logits - logits.exp().sum(1, keepdim=True).log()
            loss = -sum(row[row.argmax()] for row in log_p) / len(images)
            for name, gradient in zip(self.weights, self.sgd.gradients(loss), strict=True):
                self.fisher[name] += gradient**2 / len(batches)

    def __call__(self, images):
        logits = self.net(images)
        bound = self.entropy_margin * math.log(logits.shape[1])
        terms, kept, mask = [], [], []
        for row in logits:
            p = row.exp() / row.exp().sum()
            opinion = p
            if self.come:
                length = (row @ row).sqrt()
                opinion = torch.cat([row / length * length.detach(), row.new_full((1,), math.log(len(row)))]).softmax(0)
            entropy = -(opinion * opinion.log()).sum()
            new = True
            if self.mean_probability is not None:
                m = self.mean_probability
                new = (m @ p / (m @ m).sqrt() / (p @ p).sqrt()).item() < self.diversity_margin
            mask.append(entropy.item() < bound and new)
            if mask[-1]:
                terms.append(math.exp(bound - entropy.item()) * entropy)
                kept.append(p.detach())
        if not terms:
            return logits.detach(), None, mask
        loss = sum(terms) / len(terms)
        for name, weight in self.weights.items():
            loss = loss + self.fisher_alpha * (self.fisher[name] * (weight - self.sgd.source[name]) ** 2).sum()
        self.sgd.step(self.sgd.gradients(loss))
        mean = sum(kept) / len(kept)
        first = self.mean_probability is None
        self.mean_probability = mean if first else 0.9 * self.mean_probability + 0.1 * mean
        return logits.detach(), loss.item(), mask


def assert_same_state(method, reference):
    assert_same_sgd(method, reference.sgd)
    ours = method.memory["mean_probability"]
    assert (ours is None) == (reference.mean_probability is None)
    if ours is not None:
        assert max_difference(ours, reference.mean_probability) < TOLERANCE


def source(batches=3):
    return [make_images(6, seed=70 + i, dtype=torch.float64) for i in range(batches)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fisher_alpha", "entropy"), [(0.0, "softmax"), (1.0, "softmax"), (50.0, "softmax"), (1.0, "come")]
)
def test_five_steps(kind, fisher_alpha, entropy):
    """COME's entropy is in the filter, the weight and the loss; the mean prediction remains one of classes."""
    net = make_net(kind).double()
    options = {**OPTIONS, "fisher_alpha": fisher_alpha, "entropy": entropy}
    method, reference = adapt(net, "eata", **options), PlainEATA(net, **options)
    reference.prepare(source())
    method.prepare([{"image": images} for images in source()])
    masks = []
    for images in make_stream(5, batch=8, dtype=torch.float64):
        expected, loss, mask = reference(images)
        assert (
            max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE
        )  # logits come from before the step
        assert max_difference(method(images), expected) < TOLERANCE
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, float(loss is not None))
        assert method.stats["kept"] == pytest.approx(sum(mask) / 8)
        assert method.stats.get("loss", 0) == pytest.approx(loss or 0, abs=TOLERANCE)
        assert_same_state(method, reference)
        masks += mask
    assert 0 < sum(masks) < len(masks)
    assert reference.sgd.moved() > 1e-4


def test_both_filters_decide():
    net = make_net("gn").double()
    counts = []
    for entropy_margin, diversity_margin in ((0.8, 0.93), (0.8, None), (1.5, 0.93), (1.5, None)):
        method = adapt(net, "eta", lr=0.05, entropy_margin=entropy_margin, diversity_margin=diversity_margin)
        counts.append(0)
        for images in make_stream(4, batch=8, dtype=torch.float64):
            method(images)
            counts[-1] += round(8 * method.stats["kept"])
    both, certain, diverse, neither = counts
    assert both < certain < neither == 32
    assert both < diverse < neither


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_of_the_source(kind):
    net = make_net(kind).double()
    method, reference = adapt(net, "eata", **OPTIONS), PlainEATA(net, **OPTIONS)
    reference.prepare(source())
    batches = [{"image": images} for images in source()]
    method.prepare(batches)
    fisher = [method.get_buffer(f"fisher_{i}") for i in range(len(reference.fisher))]
    for ours, expected in zip(fisher, reference.fisher.values(), strict=True):
        assert max_difference(ours, expected) < TOLERANCE
    assert max(value.max() for value in fisher) > 1e-3
    method(make_images(8, dtype=torch.float64))
    learned = [t.detach().clone() for t in method.adaptable.values()]
    assert not same(learned, [w.detach() for w in reference.weights.values()])
    before = [value.clone() for value in fisher]
    method.prepare(batches)  # in the middle of a stream: still the source's, and what was learned stays
    assert same(fisher, before)
    assert same([t.detach() for t in method.adaptable.values()], learned)


def test_fisher_takes_every_finite_image_and_depends_on_the_batches():
    net = make_net("gn").double()
    batches = source()
    bad = batches[0].clone()
    bad[0] = float("nan")
    methods = [adapt(net, "eata", **OPTIONS) for _ in range(3)]
    for method, shown in zip(
        methods, ((bad, batches[1]), (bad[1:], batches[1]), (torch.cat((bad[1:], batches[1])),)), strict=True
    ):
        method.prepare({"image": images} for images in shown)
    fisher = [dict(method.named_buffers()) for method in methods]
    assert same(fisher[0], fisher[1])
    assert not same(fisher[0], fisher[2])


def test_preparation_without_images_is_refused():
    method = adapt(make_net("gn"), "eata")
    for batches in ([], [{"image": torch.full((2, 3, 16, 16), float("nan"))}]):
        with pytest.raises(DataError, match="no image"):
            method.prepare(batches)
        assert not method.prepared


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([make_images(2)], "got Tensor"),
        ([(make_images(2), torch.zeros(2))], "got tuple"),
        ([{"images": make_images(2)}], "got keys \\['images'\\]"),
        ({"image": make_images(2)}, "must be several.*got dict"),
        ([{"image": make_images(2)[:, :1]}], "channels"),
    ],
    ids=["tensors", "pairs", "another key", "one batch", "grey"],
)
def test_preparation_with_something_else_is_refused(batches, words):
    method = adapt(make_net("gn"), "eata")
    with pytest.raises((DataError, ConfigError), match=words):
        method.prepare(batches)
    assert not method.prepared


def test_preparation_of_a_net_of_two_precisions():
    net = make_net("bn").bfloat16()
    net.norm1.float(), net.norm2.float()
    method = adapt(net, "eata", **OPTIONS)
    method.prepare([{"image": make_images(6)}])
    assert torch.isfinite(method(make_images(6))).all()


def test_the_state_of_eta_does_not_make_eata_prepared():
    method = adapt(make_net("gn"), "eata", **OPTIONS)
    with pytest.raises(ConfigError, match="of method 'eta', and this is 'eata'"):
        method.load_state_dict(adapt(make_net("gn"), "eta", **OPTIONS).state_dict(), strict=False)
    assert not method.prepared


def test_no_preparation_without_penalty():
    assert adapt(make_net("gn"), "eata").needs_source
    for method in (adapt(make_net("gn"), "eata", fisher_alpha=0.0), adapt(make_net("gn"), "eta")):
        assert not method.needs_source
        assert method.prepared
        assert not any(name.startswith("fisher") for name, _ in method.named_buffers())


def test_eta_is_eata_without_penalty():
    net = make_net("bn")
    methods = [adapt(net, "eta", **OPTIONS), adapt(net, "eata", fisher_alpha=0.0, **OPTIONS)]
    results = [[method(images) for images in make_stream(3, batch=8)] for method in methods]
    assert same(*results)
    states = [method.state_dict() for method in methods]
    assert [state["_extra_state"].pop("method") for state in states] == ["eta", "eata"]
    assert same(*states)


@pytest.mark.parametrize("kind", KINDS)
def test_without_thresholds_it_is_tent(kind):
    net = make_net(kind).double()
    options = {"lr": 0.1, "optimizer": "sgd"}
    method = adapt(net, "eata", fisher_alpha=0.0, entropy_margin=None, diversity_margin=None, **options)
    tent = adapt(net, "tent", **options)
    for images in make_stream(3, dtype=torch.float64):
        assert torch.equal(method(images), tent(images))
        assert method.stats["kept"] == 1
    for name, tensor in tent.adaptable.items():
        assert torch.equal(tensor, method.adaptable[name])


def test_the_penalty_holds_the_net_near_the_source():
    net, distances = make_net("gn").double(), []
    for fisher_alpha in (0.0, 1.0, 10.0):
        method = adapt(net, "eata", fisher_alpha=fisher_alpha, lr=0.02, entropy_margin=0.8, diversity_margin=None)
        method.prepare([{"image": images} for images in source()])
        for images in make_stream(6, batch=8, dtype=torch.float64):
            method(images)
        start = norm_weights(net)
        moved = [(t - start[n.removeprefix("model.")]).square().sum() for n, t in method.adaptable.items()]
        distances.append(sum(moved).item())
    assert distances[0] > distances[1] > distances[2] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 1000])
@pytest.mark.parametrize("batch", [1, 4])
def test_nothing_kept(kind, num_classes, batch):
    net = make_net(kind, num_classes)
    method = adapt(net, "eta", entropy_margin=1e-9)
    before = copy.deepcopy(method.state_dict())
    images = make_images(batch)
    expected = method.predict(images, statistics="batch")
    assert torch.equal(method(images), expected)
    assert method.stats["kept"] == method.stats["backwards"] == method.stats["skipped_steps"] == 0
    assert "loss" not in method.stats
    assert same(without_account(method.state_dict()), without_account(before))


def test_nothing_new_leaves_momentum_and_mean_alone():
    method = adapt(make_net("gn"), "eta", lr=0.05, entropy_margin=1.5, diversity_margin=1e-9)
    images = make_images(4)
    method(images)
    assert method.stats["kept"] == 1  # nothing has been seen yet
    before = copy.deepcopy(method.state_dict())
    method(make_images(4, seed=1))
    assert method.stats["kept"] == method.stats["backwards"] == 0
    assert same(without_account(method.state_dict()), without_account(before))


def test_mean_prediction_is_saved_and_forgotten_by_reset():
    method, other = (adapt(make_net("gn", seed=seed), "eta", **OPTIONS) for seed in (0, 5))
    saved = assert_goes_on_after_loading(method, other, make_stream(4, batch=8))
    assert saved["_extra_state"]["memory"]["mean_probability"] is not None
    method.reset()
    assert method.memory["mean_probability"] is None


def test_state_without_the_mean_prediction_is_refused():
    net = make_net("gn")
    method, tent = adapt(net, "eta"), adapt(net, "tent")
    for a, b in ((method, tent), (tent, method)):
        with pytest.raises(ConfigError, match="of method"):
            a.load_state_dict(b.state_dict())
