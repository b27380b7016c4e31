"""ZeroSiam against a reference written with plain torch, finite differences, and its identities."""

import math

import pytest
import torch
from torch.func import functional_call

from lightning_tta import adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same
from plain import TOLERANCE, PlainMethod, PlainSGD, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainZeroSiam(PlainMethod):
    """The objective, and an SGD of its own for the predictor h."""

    def __init__(self, net, lr, predictor_lr, alpha=1.0, momentum=0.9):
        super().__init__(net, lr, momentum)
        self.h = torch.eye(net.head.in_features, dtype=torch.float64, requires_grad=True)
        self.alpha, self.predictor_sgd = alpha, PlainSGD({"weight": self.h}, predictor_lr, momentum)

    def branches(self, images):
        z = self.net.features(images)
        weight, bias = self.net.head.weight, self.net.head.bias
        return z @ weight.T + bias, (z @ self.h.T) @ weight.T + bias

    def loss(self, o, t):
        """H(p_o) + alpha (KL(p_t || p_o) + KL(p_o || p_t)), mean over the batch."""
        p_o, p_t = o.softmax(1), t.softmax(1)
        entropy = -(p_o * p_o.log()).sum(1)
        kl_to = (p_t * (p_t.log() - p_o.log())).sum(1)
        kl_ot = (p_o * (p_o.log() - p_t.log())).sum(1)
        return (entropy + self.alpha * (kl_to + kl_ot)).mean()

    def __call__(self, images, lr_factor=1.0):
        u, o = self.branches(images)
        loss = self.loss(o, u.detach())
        *gradients, own = torch.autograd.grad(loss, [*self.weights.values(), self.h])
        self.sgd.step(gradients, lr_factor)
        self.predictor_sgd.step([own], lr_factor)
        return u.detach(), loss.item()


def assert_same_state(method, reference):
    assert {n.removeprefix("model.") for n in method.adaptable} == {*reference.weights, "predictor.weight"}
    assert_same_sgd(method, reference.sgd)
    assert_same_sgd(method, reference.predictor_sgd, "predictor", "predictor.")


def plain(net, **options):
    return adapt(net, "zerosiam", **{"lr": 0.1, "predictor_lr": 0.3, "lr_batch_size": None, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "momentum"), [(1.0, 0.9), (0.4, 0.5), (0.0, 0.9)])
def test_five_steps(kind, alpha, momentum):
    net = make_net(kind).double()
    method = plain(net, alpha=alpha, momentum=momentum)
    reference = PlainZeroSiam(net, 0.1, 0.3, alpha, momentum)
    for images in make_stream(5, batch=6, dtype=torch.float64):
        expected, loss = reference(images)
        assert (
            max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE
        )  # the reference branch, before the step
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        assert_same_state(method, reference)
    assert reference.sgd.moved() > 1e-4
    assert (reference.h - torch.eye(len(reference.h))).norm() > 1e-2


def test_steps_per_batch():
    net = make_net("gn").double()
    method, reference = plain(net, steps=3), PlainZeroSiam(net, 0.1, 0.3)
    for images in make_stream(2, dtype=torch.float64):
        for _ in range(3):
            expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
    assert_same_state(method, reference)


def test_learning_rates_follow_the_batch_size():
    net = make_net("gn").double()
    method, reference = plain(net, lr_batch_size=64), PlainZeroSiam(net, 0.1, 0.3)
    for size in (16, 64, 1):
        images = make_images(size, seed=size, dtype=torch.float64)
        reference(images, lr_factor=size / 64)
        method(images)
        assert_same_state(method, reference)
    default = adapt(net, "zerosiam", lr=0.1, predictor_lr=0.3)
    default(make_images(16, seed=16, dtype=torch.float64))
    assert default.optimizers["model"].param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    assert default.optimizers["predictor"].param_groups[0]["lr"] == pytest.approx(0.3 / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind):
    net = make_net(kind).double()
    method = plain(net, momentum=0.0, lr=1.0, predictor_lr=1.0)
    images, previous = make_images(6, dtype=torch.float64), make_images(6, seed=1, dtype=torch.float64)
    method(previous)  # away from h = I, where the alignment term has no gradient
    reference = PlainZeroSiam(net, 1.0, 1.0)
    reference(previous)
    weights = {name: w.detach().clone() for name, w in reference.weights.items()}
    h = reference.h.detach().clone()
    with torch.no_grad():
        target = reference.branches(images)[0]

    def loss(shift, scale):
        with torch.no_grad():
            moved = {name: w + scale * shift[name] for name, w in weights.items()}
            u = functional_call(reference.net, moved, (images,))
            for name, w in reference.weights.items():
                w.copy_(moved[name])
            reference.h.copy_(h + scale * shift["h"])
            again, o = reference.branches(images)
            assert torch.allclose(again, u)
            return reference.loss(o, target).item()

    before = {name: t.detach().clone() for name, t in method.adaptable.items()}
    method(images)
    gradient = {name.removeprefix("model."): before[name] - t.detach() for name, t in method.adaptable.items()}
    gradient["h"] = gradient.pop("predictor.weight")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        shift = {n: torch.randn(g.shape, generator=generator, dtype=torch.float64) for n, g in gradient.items()}
        numeric = (loss(shift, 1e-5) - loss(shift, -1e-5)) / 2e-5
        analytic = sum((gradient[n] * shift[n]).sum().item() for n in shift)
        assert abs(analytic) > 1e-3
        assert numeric == pytest.approx(analytic, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_is_tents(kind):
    net, images = make_net(kind).double(), make_images(6, dtype=torch.float64)
    method, tent = plain(net), adapt(net, "tent", lr=0.1, optimizer="sgd")
    assert torch.equal(method(images), tent(images))
    for name, tensor in tent.adaptable.items():
        assert max_difference(tensor.detach(), method.adaptable[name].detach()) < 1e-12
    second = make_images(6, seed=1, dtype=torch.float64)
    method(second)
    tent(second)
    assert any(max_difference(t.detach(), method.adaptable[n].detach()) > 1e-5 for n, t in tent.adaptable.items())


@pytest.mark.parametrize("kind", KINDS)
def test_identity_predictor_is_tent(kind):
    net = make_net(kind).double()
    method, tent = plain(net, predictor="identity"), adapt(net, "tent", lr=0.1, optimizer="sgd")
    for images in make_stream(5, dtype=torch.float64):
        assert max_difference(method(images), tent(images)) < TOLERANCE
        assert method.stats["predictor_distance"] == 0
    assert method.adaptable.keys() == tent.adaptable.keys()
    for name, tensor in tent.adaptable.items():
        assert max_difference(tensor.detach(), method.adaptable[name].detach()) < TOLERANCE


def test_loss_as_cross_entropy_plus_divergence():
    net = make_net("gn").double()
    method = plain(net)
    for images in make_stream(3, dtype=torch.float64):
        with torch.no_grad():
            z = method.model.features(images)
            t, o = method.model.head(z), method.model.head(z @ method.predictor.weight.T)
        log_t, log_o = t.log_softmax(1), o.log_softmax(1)
        cross_entropy = -(log_o.exp() * log_t).sum(1).mean()
        divergence = torch.nn.functional.kl_div(log_o, log_t, log_target=True, reduction="batchmean")
        method(images)
        assert method.stats["loss"] == pytest.approx((cross_entropy + divergence).item(), abs=1e-12)
        assert method.stats["loss"] == pytest.approx(method.stats["online_entropy"] + method.stats["alignment"])
    assert method.stats["alignment"] > 1e-6


def test_random_predictor_is_fixed_seeded_and_orthogonal():
    net = make_net("gn")
    method = plain(net, predictor="random", predictor_seed=3)
    h = method.predictor.weight.detach().clone()
    torch.testing.assert_close(h @ h.T, torch.eye(12), atol=1e-5, rtol=0)
    assert (h - torch.eye(12)).norm() > 1
    norms = [t.detach().clone() for t in method.adaptable.values()]
    for images in make_stream(3):
        method(images)
    assert torch.equal(method.predictor.weight, h)
    assert "predictor.weight" not in method.adaptable
    assert not any(torch.equal(a, b) for a, b in zip(norms, method.adaptable.values(), strict=True))
    torch.manual_seed(99)
    assert torch.equal(plain(net, predictor="random", predictor_seed=3).predictor.weight, h)
    assert not torch.equal(plain(net, predictor="random", predictor_seed=4).predictor.weight, h)


def test_reset_restores_norms_predictor_and_both_momenta():
    method = plain(make_net("gn"))
    start = {name: t.detach().clone() for name, t in method.adaptable.items()}
    stream = make_stream(3)
    first = [method(images) for images in stream]
    assert all(not torch.equal(t, start[name]) for name, t in method.adaptable.items())
    momenta = [moment for o in method.optimizers.values() for s in o.state.values() for moment in s.values()]
    assert len(momenta) == 5
    assert all(momentum.any() for momentum in momenta)
    method.reset()
    assert same(dict(method.adaptable), start)
    assert torch.equal(method.predictor.weight, torch.eye(12))
    assert not any(momentum.any() for momentum in momenta)
    assert same([method(images) for images in stream], first)


def test_stats_against_hand_computation():
    method = plain(make_net("gn").double())
    method(make_images(6, seed=1, dtype=torch.float64))
    logits = method(make_images(6, dtype=torch.float64))
    rows = logits.tolist()
    norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
    classes = [row.index(max(row)) for row in rows]
    centre = [sum(column) / 6 for column in zip(*rows, strict=True)]
    h = method.predictor.weight.tolist()
    distance = math.sqrt(sum((v - (i == j)) ** 2 for i, row in enumerate(h) for j, v in enumerate(row)))
    assert method.stats["logit_norm"] == pytest.approx(sum(norms) / 6, abs=1e-10)
    assert method.stats["largest_class_share"] == max(map(classes.count, classes)) / 6
    assert method.stats["centre_dominance"] == pytest.approx(math.hypot(*centre) / (sum(norms) / 6), abs=1e-10)
    assert method.stats["predictor_distance"] == pytest.approx(distance, abs=1e-10)
    assert distance > 1e-3


class FilteredZeroSiam(PlainZeroSiam):
    """The objective with a divergence of Jensen and Shannon, over the samples that EATA's filters keep."""

    margin, diversity, average = 0.97, 0.995, None

    def __call__(self, images, lr_factor=1.0):
        u, o = self.branches(images)
        p_o, p_t = o.softmax(1), u.detach().softmax(1)
        middle = (p_o + p_t) / 2
        entropies = -(p_o * p_o.log()).sum(1)
        js = ((p_o * (p_o / middle).log()).sum(1) + (p_t * (p_t / middle).log()).sum(1)) / 2
        kept = entropies < self.margin * math.log(o.shape[1])
        if self.average is not None:
            kept &= torch.cosine_similarity(self.average[None], p_t, dim=1) < self.diversity
        self.kept = kept
        if kept.any():
            loss = (entropies + self.alpha * js)[kept].mean()
            *gradients, own = torch.autograd.grad(loss, [*self.weights.values(), self.h])
            self.sgd.step(gradients, lr_factor)
            self.predictor_sgd.step([own], lr_factor)
            new = p_t[kept].mean(0)
            self.average = new if self.average is None else 0.9 * self.average + 0.1 * new
        return u.detach()


def test_on_top_of_eatas_filters_with_another_divergence():
    reference = FilteredZeroSiam(make_net("gn").double(), 0.1, 0.3)
    options = {"divergence": "js", "entropy_margin": 0.97, "diversity_margin": 0.995}
    method, shares = plain(make_net("gn").double(), **options), []
    for images in make_stream(6, batch=6, dtype=torch.float64):
        logits = reference(images)
        assert max_difference(method(images), logits) < TOLERANCE
        shares.append(float(reference.kept.double().mean()))
        assert method.stats["kept"] == pytest.approx(shares[-1])
    assert 0 < sum(shares) < 6  # the filters leave some out
    assert_same_state(method, reference)


def test_deyos_filter_leaves_out_what_needs_no_shape():
    """An image of one color is the same with its patches shuffled: PLPD 0."""
    images = make_images(6, dtype=torch.float64)
    images[:3] = images[:3, :, :1, :1]
    method = plain(make_net("gn").double(), plpd_threshold=1e-9)
    before = method.state_dict()["predictor.weight"].clone()
    method(images[:3])
    assert torch.equal(method.state_dict()["predictor.weight"], before)
    assert method.stats["kept"] == 0
    method(images)
    assert 0 < method.stats["kept"] <= 0.5
    assert method.stats["forwards"] == 2
