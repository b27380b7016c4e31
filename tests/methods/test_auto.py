"""Auto: follows a change of what is best, falls back, and is one method with all that is inside it."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.evidence.contest import Contest
from lightning_tta.guard.watch import Watch
from lightning_tta.methods import auto
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import put_back, take
from nets import make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")
TENT, SIAM = {"method": "tent", "lr": 0.1, "optimizer": "sgd"}, {"method": "zerosiam", "lr": 0.5}
EAGER = {"recent": 4, "margin": -1.0, "hysteresis": 0.0, "fall": 2.0}


class Codes(nn.Module):
    """Reads label (of 5) and domain (of 3) from two pixels; sure of the label in domain 0, unsure elsewhere."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.good = 0

    def forward(self, x):
        label, domain = (5 * x[:, 0, 0, 0]).round().long(), (5 * x[:, 0, 0, 1]).round()
        strength = torch.where(domain == self.good, 6.0, 1.0)[:, None]
        noise = 3 * x[:, 1].flatten(1)[:, :5]
        return self.scale * strength * nn.functional.one_hot(label, 5) + noise


class Expert(TTAMethod):
    """Good in one domain."""

    def __init__(self, model, good):
        super().__init__(model)
        model.good = good

    def step(self, x):
        return self.logits(x)


def coded(domain, number, batch=16):
    images = make_images(batch, seed=number)
    images[:, 0, 0, 0] = torch.arange(batch) % 5 / 5
    images[:, 0, 0, 1] = domain / 5
    return images


@pytest.fixture
def experts(monkeypatch):
    """An auto whose candidates are good in domain 1 and in domain 2; the source in domain 0."""
    made = lambda net, *_: [(f"expert {n}", Expert(copy.deepcopy(net), n)) for n in (1, 2)]  # noqa: E731
    monkeypatch.setattr(auto, "make_candidates", made)
    return lambda **options: adapt(Codes(), "auto", fall=2.0, **options)


@pytest.mark.parametrize("every", [1, 3])
def test_it_follows_what_is_best(experts, every):
    method, length = experts(every=every, recent=64), 10 * every
    domains = [domain for domain in (0, 1, 2, 0) for _ in range(length)]
    answers = []
    for number, domain in enumerate(domains):
        logits = method(coded(domain, number))
        answers.append(int(method.stats["answers"]))
        assert method.answering == ["source", "expert 1", "expert 2"][answers[-1]]
        assert torch.equal(logits, method.predict(coded(domain, number)))  # experts do not learn: this is who answered
        assert method.stats["forwards"] == (3 if number % every == 0 else 1)
    for part in range(4):
        settled = answers[part * length + (0 if part == 0 else 6 * every) : (part + 1) * length]
        assert set(settled) == {domains[part * length]}


def test_decisions_are_those_of_the_contest(experts):
    """Probes, with all rivals in them, are the evidence, and nothing else; a probe is answered by its own."""
    method, contest, answering = experts(every=2), Contest(fall=2.0), 0
    evidence, rivals = torch.zeros(3, 13), [Codes() for _ in range(3)]
    for good, net in enumerate(rivals):
        net.good = good
    for number in range(24):
        images = coded(number // 8, number)
        if number % 2 == 0:
            logits = torch.stack([net(images).detach() for net in rivals])
            evidence = contest.take_in(evidence, logits, [0, 1, 2])
            answering, fallen = contest.decide(contest.standings(evidence), answering)
            assert not fallen
        assert torch.equal(method(images), rivals[answering](images))
    torch.testing.assert_close(method.value("evidence"), evidence)


class Prototypes(nn.Module):
    """LayerNorm over pixels, and a head with a prototype for each class."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 5)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data = 0.3 * nn.functional.layer_norm(self.prototypes(), [48]) / 48**0.5

    @staticmethod
    def prototypes():
        return torch.rand(5, 48, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


def of_prototypes(number, batch=16):
    generator = torch.Generator().manual_seed(number)
    images = Prototypes.prototypes()[torch.arange(batch) % 5] / 2 + 0.25
    images = images + 0.2 * torch.randn(batch, 48, generator=generator)
    return images.clamp(0, 1).view(batch, 3, 4, 4)


def test_a_forced_collapse_falls_back_to_the_source():
    """Tent at an absurd rate, which is made to answer: it falls, is reset, rests, and gets another chance."""
    net = Prototypes()
    tent = {"method": "tent", "lr": 0.2}
    method = adapt(net, "auto", candidates=[tent], every=1, recent=16, margin=-1, rest=3)
    alone, labels = adapt(net, **tent), torch.arange(16) % 5
    answers, right, wrong = [], [], []
    for number in range(24):
        logits = method(of_prototypes(number))
        answers.append(int(method.stats["answers"]))
        right.append((logits.argmax(1) == labels).float().mean())
        wrong.append((alone(of_prototypes(number)).argmax(1) == labels).float().mean())
        if method.stats["fallen"]:
            source = adapt(net, **tent)
            assert answers[-1] == 0
            assert same(method.candidate(1).adaptable, source.adaptable)
            assert same(method.candidate(1).rest, source.rest)
    text = "".join(map(str, answers))
    assert "1000" in text
    assert "0001" in text  # it comes back
    assert sum(wrong[-10:]) / 10 < 0.5
    assert min(r for r, a in zip(right, answers, strict=True) if a == 0) > 0.9
    assert sum(right) / len(right) > sum(wrong) / len(wrong) + 0.2


def test_what_is_not_finite_is_not_answered():
    """Weights that have become infinite in a candidate: the source answers the batch itself."""
    method = adapt(make_net("gn"), "auto", candidates=[TENT], **EAGER)
    for images in make_stream(2):
        method(images)
    assert method.answering == "tent (lr 0.1, optimizer sgd)"
    with method.candidate(1).hold():
        method.candidate(1).adaptable["model.norm1.weight"].data.fill_(float("inf"))
    for images in make_stream(2):
        logits = method(images)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, make_net("gn")(images).detach())
    assert method.answering == "source"
    assert all(torch.isfinite(tensor).all() for tensor in method.adaptable.values())


@pytest.mark.parametrize("kind", ["bn", "gn", "ln", "user"])
def test_the_default_candidates_run_on_any_net(kind):
    method = adapt(make_net(kind), "auto", every=1)
    assert len(method.names) == 4
    for images in make_stream(2):
        assert torch.isfinite(method(images)).all()
    assert method.stats["forwards"] >= 4
    assert method.stats["backwards"] == 2


def test_a_net_without_norm_layers_has_other_candidates():
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    method = adapt(net, "auto", every=1)
    assert [name.split()[0] for name in method.names] == ["source", "t3a", "lame", "source"]
    assert torch.isfinite(method(make_images(4))).all()
    with pytest.raises(UnsupportedModelError):
        adapt(nn.Sequential(nn.Flatten(), nn.Softmax(1)), "auto")


def test_one_image_at_a_time_waits_for_enough_of_them():
    method = adapt(make_net("gn"), "auto", candidates=[TENT], every=1, margin=-1, fall=2.0, recent=32)
    answers = []
    for number in range(12):
        method(make_images(1, seed=number))
        answers.append(method.stats["answers"])
    assert answers == [0] * 7 + [1] * 5  # a quarter of 32 images


def test_source_data_goes_to_those_that_need_it():
    candidates = [{"method": "eata", "entropy_margin": 0.9}, "neo", {"method": "neo", "center": "source"}]
    method = adapt(make_net("gn"), "auto", candidates=candidates)
    assert method.needs_source
    method.prepare(iter([{"image": make_images(8), "label": torch.arange(8) % 5}]))
    assert all(method.candidate(number).prepared for number in (1, 2, 3))
    assert torch.isfinite(method(make_images(4))).all()


def test_export_is_that_of_who_answers():
    method = adapt(make_net("gn"), "auto", candidates=[TENT, "lame"], **EAGER)
    plain = method.export()
    assert torch.equal(plain(make_images(4)), make_net("gn")(make_images(4)))
    for images in make_stream(3):
        method(images)
    images = make_images(4, seed=9)
    if method.answering == "lame":
        with pytest.raises(UnsupportedModelError, match="'lame'"):
            method.export()
    else:
        torch.testing.assert_close(method.export()(images), method.predict(images))
    assert torch.equal(method.predict(images), method.candidate(int(method.stats["answers"])).predict(images))


def test_a_watch_takes_it_back_whole():
    """Snapshots of the guard hold the states inside, too; the source that it compares with is the source."""
    method = adapt(make_net("gn"), "auto", candidates=[TENT, SIAM], **EAGER)
    stream = make_stream(6)
    method(stream[0])
    moment, state = take(method), copy.deepcopy(method.state_dict())
    expected = [method(images) for images in stream[1:]]
    put_back(method, moment)
    assert same(method.state_dict(), state)
    assert same([method(images) for images in stream[1:]], expected)
    with method.at_source():
        torch.testing.assert_close(method.predict(stream[0]), make_net("gn")(stream[0]).detach())
    watch = Watch(method, "warn", window=2, norm_ratio=100.0)
    assert torch.isfinite(watch(stream[0])).all()


def test_a_state_with_another_candidate_is_refused_before_anything_is_written():
    method = adapt(make_net("gn"), "auto", candidates=[TENT, SIAM], **EAGER)
    other = adapt(make_net("gn", seed=1), "auto", candidates=[TENT, "t3a"], **EAGER)
    for images in make_stream(2):
        method(images)
        other(images)
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ConfigError, match=r"'t3a'.*'zerosiam'"):
        method.load_state_dict(other.state_dict())
    assert same(method.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": []}, "at least one"),
        ({"candidates": [3]}, "names of methods"),
        ({"candidates": {"kind": "tent"}}, "names of methods"),
        ({"candidates": ["tentt"]}, r"tentt.*tent"),
        ({"candidates": [{"method": "tent", "rate": 1}]}, r"candidate 'tent'.*'rate'"),
        ({"candidates": ["auto"]}, "no candidate of itself"),
        ({"every": 0}, "every must be"),
        ({"rest": -1}, "rest must be"),
        ({"fall": 0}, "fall must be"),
        ({"prior": "markov"}, "candidates"),
        ({"refine": "lame"}, "candidates"),
        ({"statistics": "ema"}, "candidates"),
        ({"reservoir": {}}, "candidates"),
        ({"select": "norm"}, "learns no parameters"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ConfigError, match=words):
        adapt(make_net("bn"), "auto", **options)
