"""POEM against a reference written with plain torch, sample by sample; and that it does no harm without a shift."""

import copy
import math

import pytest
import torch

from lightning_tta import ConfigError, DataError, NotPreparedError, adapt
from nets import make_images, make_net, make_stream, max_difference, norm_weights
from plain import TOLERANCE, PlainSGD, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"lr": 0.5, "entropy_margin": 1.1, "diversity_margin": 0.98, "watched": 10}


def entropy_of(row):
    p = row.exp() / row.exp().sum()
    return -(p * p.log()).sum()


class PlainPOEM:
    """The docstring's equations, sample by sample, with source statistics."""

    def __init__(self, net, source, lr, entropy_margin, diversity_margin, watched):
        self.net = copy.deepcopy(net)
        self.sgd = PlainSGD(norm_weights(self.net), lr)
        self.entropy_margin, self.diversity_margin, self.watched = entropy_margin, diversity_margin, watched
        values = sorted(entropy_of(row).item() for row in self.net(source))
        self.knots = [0.0, *values, values[-1]]
        sizes = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
        self.bets = {bet: 0.1 / 12 for size in sizes for bet in (size, -size)} | {0.0: 0.9}
        self.start, self.samples, self.mean_probability = dict(self.bets), 0, None

    def rank(self, value):
        for place in range(len(self.knots) - 1):
            low, high = self.knots[place : place + 2]
            if low <= value <= high:
                return (place + (value - low) / (high - low) if high > low else place) / (len(self.knots) - 1)
        return 1.0

    def quantile(self, rank):
        place = rank * (len(self.knots) - 1)
        low = min(int(place), len(self.knots) - 2)
        return self.knots[low] + (place - low) * (self.knots[low + 1] - self.knots[low])

    def __call__(self, images):
        logits, terms, kept, bets = self.net(images), [], [], []
        bound, margin = self.entropy_margin * math.log(logits.shape[1]), 1.96 / math.sqrt(12 * (len(self.knots) - 2))
        for row in logits:
            h = entropy_of(row)
            u = self.rank(h.item())
            total = sum(self.bets.values())
            bets.append(sum(bet * wealth for bet, wealth in self.bets.items()) / total)
            protected = 0.5 * bets[-1] * u * u + (1 - 0.5 * bets[-1]) * u
            target = h.item() + self.quantile(protected) - self.quantile(u)
            self.bets = {bet: wealth * (1 + bet * (u - 0.5) - margin * abs(bet)) for bet, wealth in self.bets.items()}
            self.samples += 1
            p, m = row.exp() / row.exp().sum(), self.mean_probability
            new = m is None or self.diversity_margin is None
            new = new or (m @ p / (m @ m).sqrt() / (p @ p).sqrt()).item() < self.diversity_margin
            if h.item() < bound and new and self.samples > self.watched:
                terms.append(math.exp(bound - h.item()) * (h - target) ** 2 / 2)
                kept.append(p.detach())
        wealth, rate = sum(self.bets.values()), len(images) / (self.samples + 50)
        self.bets = {bet: (1 - rate) * each + rate * wealth * self.start[bet] for bet, each in self.bets.items()}
        loss = sum(terms) / len(terms) if terms else None
        if terms:
            self.sgd.step(self.sgd.gradients(loss))
            mean, before = sum(kept) / len(kept), self.mean_probability
            self.mean_probability = mean if before is None else 0.9 * before + 0.1 * mean
        return logits.detach(), loss, sum(bets) / len(bets), math.log(wealth)


def source(number=6, dtype=torch.float64):
    return [{"image": make_images(20, seed=70 + i, dtype=dtype)} for i in range(number)]


def reddened(images):
    return images * torch.tensor([1, 0.1, 0.1], dtype=images.dtype)[:, None, None]


@pytest.mark.parametrize("kind", ["bn", "gn", "vit"])
def test_three_steps_and_more(kind):
    net = make_net(kind).double()
    options = {**OPTIONS, "diversity_margin": None} if kind != "gn" else OPTIONS  # they predict one class alone
    method = adapt(net, "poem", **options)
    method.prepare(source())
    reference = PlainPOEM(net, torch.cat([batch["image"] for batch in source()]), **options)
    losses = []
    for number, images in enumerate(make_stream(5, batch=8, dtype=torch.float64)):
        images = images if number == 3 else reddened(images)
        expected, loss, epsilon, wealth = reference(images)
        assert max_difference(method.predict(images), expected) < TOLERANCE
        assert max_difference(method(images), expected) < TOLERANCE
        stats = method.stats
        assert stats["epsilon"] == pytest.approx(epsilon, abs=1e-9)
        assert stats["log_wealth"] == pytest.approx(wealth, abs=1e-9)
        assert stats.get("loss", 0) == pytest.approx(0 if loss is None else loss.item(), abs=1e-9)
        assert (stats["forwards"], stats["backwards"]) == (1, float(loss is not None))
        assert_same_sgd(method, reference.sgd)
        losses.append(loss)
    assert losses[0] is None  # only watched
    assert sum(loss is not None for loss in losses) >= 3
    assert reference.sgd.moved() > 1e-7


def test_a_bet_of_zero_changes_nothing_to_the_last_bit():
    """Adam makes whole steps of gradients that are rounding errors, so they must be none."""
    net = make_net("gn")
    method = adapt(net, "poem", optimizer="adam", lr=0.1, watched=0, entropy_margin=None, diversity_margin=None)
    method.prepare(source(dtype=torch.float32))
    method.value("wagers").zero_()
    before = {name: tensor.clone() for name, tensor in method.adaptable.items()}
    for images in make_stream(3, batch=8):
        method(reddened(images))
        assert method.stats["backwards"] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in method.adaptable.items())


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_it_does_no_harm_without_a_shift_and_acts_with_one(kind):
    """Of 40 batches like the source at most one prediction in a hundred changes; the net goes far with a shift."""
    net = make_net(kind)
    changes, moves = [], []
    for change in (lambda images: images, reddened):
        method = adapt(net, "poem", lr=0.02, entropy_margin=None, diversity_margin=None)
        method.prepare(source(50, torch.float32))
        before = {name: tensor.clone() for name, tensor in method.adaptable.items()}
        differ, batches = 0, make_stream(40, batch=20, seed=3)
        for images in batches:
            images = change(images)
            with torch.no_grad():
                differ += int((method(images).argmax(1) != net(images).argmax(1)).sum())
        changes.append(differ / (20 * len(batches)))
        moves.append(max((before[name] - tensor).abs().max().item() for name, tensor in method.adaptable.items()))
    assert changes[0] <= 0.01
    assert moves[0] < 0.2 * moves[1]


def test_statistics_of_the_batch_are_in_f_too():
    net, batches = make_net("bn"), source(dtype=torch.float32)
    entropies = []
    for statistics in (None, "batch"):
        method = adapt(net, "poem", watched=0, **({} if statistics is None else {"statistics": statistics}))
        method.prepare(batches)
        entropies.append(method.get_buffer("source_entropies").view(torch.float64).clone())
        for batch in batches:
            method(batch["image"])
        assert abs(method.stats["log_wealth"]) < 2  # its own images are no shift
    assert not torch.allclose(*entropies)


def test_values_that_are_not_finite_are_not_bet_on():
    net = make_net("gn")
    method = adapt(net, "poem", watched=0)
    method.prepare(source(dtype=torch.float32))
    target, _, bets = method.protect(torch.tensor([0.5, math.nan, 0.7, math.inf]))
    assert bets.isfinite().all()
    twin = adapt(net, "poem", watched=0)
    twin.prepare(source(dtype=torch.float32))
    assert torch.equal(target[[0, 2]], twin.protect(torch.tensor([0.5, 0.7]))[0])


def test_it_goes_on_after_loading():
    net = make_net("gn")
    method, other = (adapt(each, "poem", **{**OPTIONS, "lr": 0.05}) for each in (net, make_net("gn", seed=1)))
    method.prepare(source(dtype=torch.float32))
    assert_goes_on_after_loading(method, other, [reddened(images) for images in make_stream(6, batch=8)], False)
    assert method.bfloat16().get_buffer("source_entropies").dtype == torch.int64


def test_what_does_not_go_is_refused():
    net = make_net("gn")
    with pytest.raises(ConfigError, match="no option 'steps'"):
        adapt(net, "poem", steps=2)
    with pytest.raises(ConfigError, match="watched must be"):
        adapt(net, "poem", watched=-1)
    method = adapt(net, "poem")
    with pytest.raises(NotPreparedError):
        method(make_images(8))
    with pytest.raises(DataError, match="at least 10 held-out source images"):
        method.prepare([{"image": make_images(9)}])
