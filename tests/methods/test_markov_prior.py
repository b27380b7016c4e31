"""prior='markov' against plain loops in float64, all paths of a short chain, and chains that are simulated."""

import math
from itertools import pairwise, product

import pytest
import torch

from lightning_tta import ConfigError, adapt
from nets import make_images, make_net, make_stream, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-10  # float64


class Shown(torch.nn.Module):
    """Its probabilities are the pixels of the first row."""

    def __init__(self):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))

    def forward(self, x):
        return x[:, 0, 0].log() + self.offset


def shown(p):
    """Images (B, 1, 1, K) of probabilities (B, K)."""
    return p.view(len(p), 1, 1, -1)


def random_p(batch, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, generator=generator, dtype=torch.float64).mul(2).softmax(1)


def normalized(numbers):
    return [number / sum(numbers) for number in numbers]


class Plain:
    """The chain with its whole table of transitions, one number at a time."""

    def __init__(self, classes, *, base="stream", pseudo_counts=50.0, switch=(1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)):
        self.k, self.of_stream, self.c, self.switch = range(classes), base == "stream", pseudo_counts, switch
        self.sums, self.images, self.beliefs = [0.0] * classes, 0, {}
        self.weights = [0.0] * len(switch)

    def __call__(self, rows):
        """Posteriors of a batch of probabilities, a list of lists."""
        self.sums = [total + sum(row[k] for row in rows) for k, total in enumerate(self.sums)]
        self.images += len(rows)
        of_stream = [(total + self.c / len(self.k)) / (self.images + self.c) for total in self.sums]
        pi = of_stream if self.of_stream else [1 / len(self.k)] * len(self.k)
        emissions = [[p / q for p, q in zip(row, pi, strict=True)] for row in rows]
        chains = [self.chain(emissions, pi, number) for number in range(len(self.switch))]
        most = max(self.weights)
        self.weights = [max(weight - most, -10) for weight in self.weights]
        shares = normalized([math.exp(weight) for weight in self.weights])
        return [
            [sum(share * chain[t][k] for share, chain in zip(shares, chains, strict=True)) for k in self.k]
            for t in range(len(rows))
        ]

    def chain(self, emissions, pi, number):
        s = self.switch[number]
        table = [[s * pi[j] + (1 - s) * (i == j) for j in self.k] for i in self.k]
        beliefs = [self.beliefs.get(number, pi)]
        for e in emissions:
            joint = [e[j] * sum(beliefs[-1][i] * table[i][j] for i in self.k) for j in self.k]
            self.weights[number] += math.log(sum(joint))
            beliefs.append(normalized(joint))
        self.beliefs[number] = beliefs[-1]
        behind, posteriors = [1.0] * len(self.k), []
        for e, belief in zip(reversed(emissions), reversed(beliefs[1:]), strict=True):
            posteriors.insert(0, normalized([a * b for a, b in zip(belief, behind, strict=True)]))
            behind = normalized([sum(table[i][j] * e[j] * behind[j] for j in self.k) for i in self.k])
        return posteriors

    def check(self, method):
        """The state of a method."""
        like = {"dtype": torch.float64}
        assert max_difference(method.value("prior.weights"), torch.tensor(self.weights, **like)) < EXACT
        beliefs = [self.beliefs[number] for number in range(len(self.switch))]
        assert max_difference(method.value("prior.beliefs"), torch.tensor(beliefs, **like)) < EXACT
        if self.of_stream:
            pi = [(total + self.c / len(self.k)) / (self.images + self.c) for total in self.sums]
            assert max_difference(method.value("prior.average"), torch.tensor(pi, **like)) < EXACT
            assert int(method.value("prior.images")) == self.images


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": "uniform"},
        {"switch": [0.2, 0.9], "pseudo_counts": 1.5},
        {"switch": [0.05], "base": "uniform"},
    ],
    ids=str,
)
def test_the_chain(options):
    method, plain = adapt(Shown(), "source", prior={"kind": "markov", **options}), Plain(4, **options)
    moved = 0.0
    for number, size in enumerate([4, 1, 9, 1, 1, 6, 40]):
        p = random_p(size, seed=number)
        found, expected = method(shown(p)), torch.tensor(plain(p.tolist()), dtype=torch.float64)
        assert max_difference(found.exp(), expected) < EXACT
        plain.check(method)
        moved = max(moved, float((expected - p).abs().max()))
    assert moved > 0.01


def test_all_paths_of_a_short_chain():
    """The posterior is the sum over all sequences of labels, and over the values of s."""
    switch, p = [0.3, 0.8], random_p(6, 3, seed=5)
    prior = {"kind": "markov", "switch": switch, "base": "uniform"}
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for s, path in product(switch, product(range(3), repeat=6)):
        weight = 1 / 3
        for before, label in pairwise(path):
            weight *= s / 3 + (1 - s) * (before == label)
        for place, label in enumerate(path):
            weight *= float(p[place, label])
        for place, label in enumerate(path):
            expected[place, label] += weight
    found = adapt(Shown(), "source", prior=prior)(shown(p))
    assert max_difference(found.exp(), expected / expected.sum(1, keepdim=True)) < EXACT


@pytest.mark.parametrize("base", ["stream", "uniform"])
def test_a_chain_that_never_stays_gives_the_probabilities_back(base):
    method = adapt(Shown(), "source", prior={"kind": "markov", "base": base, "switch": [1.0]})
    for seed in range(3):
        p = random_p(7, seed=seed)
        assert max_difference(method(shown(p)).exp(), p) < EXACT


SKEWED, UNIFORM = [0.4, 0.3, 0.2, 0.1], [0.25] * 4


def simulated(switch, images=6000, *, pi=SKEWED, noise=1.0, seed=0):
    """Labels of a chain, and the true probabilities (M, K) of each image on its own."""
    generator = torch.Generator().manual_seed(seed)
    pi = torch.tensor(pi, dtype=torch.float64)
    drawn = torch.multinomial(pi, images, replacement=True, generator=generator)
    is_drawn = torch.rand(images, generator=generator) < switch
    is_drawn[0] = True
    labels = drawn[torch.where(is_drawn, torch.arange(images), 0).cummax(0).values]
    seen = torch.eye(4, dtype=torch.float64)[labels]
    seen += noise * torch.randn(images, 4, generator=generator, dtype=torch.float64)
    return labels, (seen / noise**2 + pi.log()).softmax(1)


def predicted(p, batch, **options):
    method = adapt(Shown(), "source", prior={"kind": "markov", **options})
    return method, torch.cat([method(shown(part)) for part in p.split(batch)])


def shares(method):
    """Of the values of s."""
    return dict(zip(SWITCH, method.value("prior.weights").softmax(0).tolist(), strict=True))


SWITCH = [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]


@pytest.mark.parametrize("batch", [100, 1])
def test_a_simulated_chain(batch):
    """It finds how often the label is drawn, and predicts better than each image on its own, and is calibrated."""
    labels, p = simulated(0.125, images=6000 if batch > 1 else 600)
    method, found = predicted(p, batch)
    alone, right = p.argmax(1) == labels, found.argmax(1) == labels
    assert shares(method)[0.125] > 0.5
    assert sum(s * share for s, share in shares(method).items()) == pytest.approx(0.125, abs=0.06)
    assert right.double().mean() > alone.double().mean() + (0.1 if batch == 1 else 0.2)
    assert float(found.exp().max(1).values.mean()) == pytest.approx(float(right.double().mean()), abs=0.03)
    likelihoods = [x[torch.arange(len(p)), labels].mean() for x in (p.log(), found)]
    assert likelihoods[1] > likelihoods[0] + 0.2


@pytest.mark.parametrize(("base", "pi"), [("stream", SKEWED), ("stream", UNIFORM), ("uniform", UNIFORM)], ids=str)
def test_a_shuffled_stream(base, pi):
    labels, p = simulated(1.0, pi=pi)
    method, found = predicted(p, 100, base=base)
    alone, right = ((x.argmax(1) == labels).double().mean() for x in (p, found))
    assert shares(method)[1.0] > 0.99
    assert right > alone - 0.003


def test_a_stream_that_changes_is_followed():
    parts = [simulated(switch, images=1000, seed=seed)[1] for seed, switch in enumerate([0.125, 1.0, 0.125])]
    method, most = adapt(Shown(), "source", prior="markov"), []
    for part in parts:
        for p in part.split(50):
            method(shown(p))
            most.append(max(shares(method), key=shares(method).get))
    assert set(most[10:20] + most[50:60]) <= {0.25, 0.125, 0.0625}
    assert set(most[30:40]) == {1.0}


def test_predict_and_export_are_without_it():
    """An image at an unknown place of the chain has its own probabilities."""
    for kind in ("gn", "bn"):
        method, plain = (
            adapt(make_net(kind), "norm" if kind == "bn" else "source", **o) for o in ({"prior": "markov"}, {})
        )
        for images in make_stream(2):
            method(images), plain(images)
        images = make_images(5, seed=9)
        assert torch.equal(method.predict(images), plain.predict(images))
        assert same(method.export().state_dict(), plain.export().state_dict())
    net = make_net("gn")
    net.head = torch.nn.Linear(12, 5, bias=False)  # nothing is to be written there
    method = adapt(net, "source", prior="markov")
    torch.testing.assert_close(method.export()(images), net(images))


def test_a_window_takes_images_as_they_come():
    net = make_net("bn").double()
    method, bare, plain = adapt(net, "norm", window=6, prior="markov"), adapt(net, "norm", window=6), Plain(5)
    for number, size in enumerate([3, 1, 9, 1]):
        images = make_images(size, seed=number, dtype=torch.float64)
        posteriors = plain(bare(images).softmax(1).tolist())
        assert max_difference(method(images).exp(), torch.tensor(posteriors, dtype=torch.float64)) < EXACT


def test_logits_that_are_very_sure():
    """Classes of probability 0 keep finite logits."""
    logits = torch.full((6, 4), -1e4)
    logits[torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 3])] = 0.0

    class Sure(torch.nn.Module):
        def forward(self, x):
            return logits[: len(x)] + 3

    method = adapt(Sure(), "source", prior="markov")
    for _ in range(30):
        found = method(torch.zeros(6, 1, 1, 1))
        assert torch.isfinite(found).all()
        assert torch.equal(found.argmax(1), logits.argmax(1))
    assert all(torch.isfinite(value).all() for value in method.memory.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "source"}, "base must be"),
        ({"pseudo_counts": 0}, "pseudo_counts must be"),
        ({"switch": 0.5}, "switch must be a list"),
        ({"switch": []}, "switch must be a list"),
        ({"switch": "0.5"}, "switch must be a list"),
        ({"switch": [0.5, 0]}, "each number of switch must be"),
        ({"switch": [1.5]}, "each number of switch must be"),
        ({"switch": [0.5, math.nan]}, "each number of switch must be"),
        ({"window": 3}, "has no option 'window'"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(make_net("gn"), "source", prior={"kind": "markov", **options})


def test_processes_are_replicas():
    assert adapt(make_net("gn"), "source", prior="markov").parallel == {"replicas"}
