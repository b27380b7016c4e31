"""CoTTA against three plain nets and an Adam written out; passes and restored weights."""

import copy
import math

import pytest
import torch

from lightning_tta import adapt
from nets import KINDS, make_net, make_stream, max_difference, same, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-8  # float64; Adam turns gradients of rounding noise (a bias before BatchNorm) into up to 1e-9


class PlainCoTTA:
    """Student, teacher and anchor as three nets in training-mode BatchNorm; views and masks are given."""

    def __init__(self, net, lr=1e-3, decay=0.999, threshold=0.92, symmetric=False, optimizer="adam"):
        self.student, self.teacher, self.anchor = (without_running_statistics(copy.deepcopy(net)) for _ in range(3))
        for p in self.student.parameters():
            p.requires_grad_(True)
        self.lr, self.decay, self.threshold, self.symmetric, self.optimizer = lr, decay, threshold, symmetric, optimizer
        self.moments = {n: [torch.zeros_like(p)] * 2 for n, p in self.student.named_parameters()}
        self.count = 0

    def __call__(self, images, views=None, masks=None):
        with torch.no_grad():
            confidence = self.anchor(images).softmax(1).amax(1).mean().item()
            unsure = confidence < self.threshold
            target = sum(self.teacher(v) for v in views) / len(views) if unsure else self.teacher(images)
        logits = self.student(images)
        t, p = target.exp() / target.exp().sum(1, keepdim=True), logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = -(t * p.log()).sum(1).mean()
        if self.symmetric:
            loss = 0.5 * loss - 0.5 * (p * t.log()).sum(1).mean()
        names, parameters = zip(*self.student.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        self.count += 1
        with torch.no_grad():
            for name, weight, g in zip(names, parameters, gradients, strict=True):
                self.update(name, weight, g)
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.copy_(self.decay * slow + (1 - self.decay) * fast)
            for name, weight in zip(names, parameters, strict=True):
                if masks is not None:
                    weight[masks[name]] = self.anchor.get_parameter(name)[masks[name]]
        return target, loss.item(), confidence

    def update(self, name, weight, g):
        m, v = self.moments[name]
        if self.optimizer == "sgd":
            self.moments[name] = [0.9 * m + g, v]
            weight -= self.lr * self.moments[name][0]
            return
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        self.moments[name] = [m, v]
        weight -= self.lr * (m / (1 - 0.9**self.count)) / ((v / (1 - 0.999**self.count)).sqrt() + 1e-8)


def assert_same_state(method, reference):
    teacher = method.teacher.weights()
    for name, weight in method.model.named_parameters():
        assert max_difference(weight.detach(), reference.student.get_parameter(name).detach()) < TOLERANCE
        assert max_difference(teacher[name], reference.teacher.get_parameter(name).detach()) < TOLERANCE
        state = method.optimizers["model"].state[weight]
        keys = ("momentum_buffer",) if reference.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
        for key, moment in zip(keys, reference.moments[name], strict=False):
            assert max_difference(state[key], moment) < TOLERANCE


def unsure_first(net, batches, batch=6):
    """Batches of which the first and every other are below the returned threshold, the others above."""
    plain = without_running_statistics(copy.deepcopy(net))

    def confidence(images):
        return plain(images).softmax(1).amax(1).mean().item()

    batches_by_confidence = sorted(make_stream(2 * batches, batch, dtype=torch.float64), key=confidence)
    low, high = batches_by_confidence[:batches], batches_by_confidence[batches:]
    threshold = (confidence(low[-1]) + confidence(high[0])) / 2
    return [images for pair in zip(low, high, strict=True) for images in pair], threshold


NO_GRADIENT = ("qkv.bias", "stem.2.bias", "hidden.0.bias")  # of attention's keys; before BatchNorm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["always", "every other"])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "symmetric": True}], ids=str)
def test_six_steps(kind, which, options, views):
    net = make_net(kind).double()
    stream, threshold = unsure_first(net, 3)
    options = {"lr": 2e-2, **options}
    threshold = 1.0 if which == "always" else threshold
    method = adapt(
        net, "cotta", ema_decay=0.8, anchor_threshold=threshold, views=3, chunk_views=12, restore=0.0, **options
    )
    reference = PlainCoTTA(net, decay=0.8, threshold=threshold, **options)
    asked = []
    for images in stream:
        views.clear()
        predicted = method.predict(images, statistics="batch")
        given = list(views)
        views.clear()
        logits = method(images)
        assert len(views) == len(given)
        assert all(torch.equal(a, b) for a, b in zip(views, given, strict=True))
        asked.append(len(views))
        expected, loss, confidence = reference(images, views)
        assert max_difference(logits, expected) < TOLERANCE
        assert max_difference(predicted, expected) < TOLERANCE  # the target, before the step
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        assert abs(method.stats["anchor_confidence"] - confidence) < TOLERANCE
        assert_same_state(method, reference)
    assert asked == ([3] * 6 if which == "always" else [3, 0] * 3)
    source = dict(net.named_parameters())
    moved = {n: (w - source[n]).abs().max() for n, w in reference.student.named_parameters() if n not in NO_GRADIENT}
    assert min(moved.values()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_sure_anchor_there_is_nothing_to_learn_at_first(kind):
    net = make_net(kind).double()
    method, plain = adapt(net, "cotta", optimizer="sgd", lr=0.1, anchor_threshold=0.0, restore=0.0), copy.deepcopy(net)
    plain = without_running_statistics(plain)
    for images in make_stream(3, dtype=torch.float64):
        with torch.no_grad():
            assert max_difference(method(images), plain(images)) < TOLERANCE
        assert "anchor_confidence" not in method.stats
    for weight, start in zip(method.model.parameters(), net.parameters(), strict=True):
        assert max_difference(weight.detach(), start.detach()) < TOLERANCE


def test_with_a_sure_anchor_the_symmetric_loss_teaches():
    """Half of its gradient is then that of the entropy."""
    net = make_net("gn").double()
    options = {"optimizer": "sgd", "momentum": 0.0, "anchor_threshold": 0.0, "restore": 0.0, "symmetric": True}
    method, tent = adapt(net, "cotta", lr=0.1, **options), adapt(net, "tent", lr=0.05, optimizer="sgd", momentum=0.0)
    (images,) = make_stream(1, dtype=torch.float64)
    method(images), tent(images)
    for name, weight in tent.adaptable.items():
        assert max_difference(weight.detach(), method.adaptable[name].detach()) < TOLERANCE


def test_defaults_are_the_authors(views):
    net = make_net("bn").double()
    method, reference = adapt(net, "cotta", restore=0.0), PlainCoTTA(net)
    for images in make_stream(3, batch=6, dtype=torch.float64):
        views.clear()
        logits = method(images)
        assert len(views) == 32
        assert max_difference(logits, reference(images, views)[0]) < TOLERANCE
    assert_same_state(method, reference)
    assert adapt(net, "cotta").restore == 0.01


@pytest.mark.parametrize("kind", ["bn", "ln"])
def test_restored_weights_go_on_from_the_source(kind, views):
    """The masks are read off the student; all that follows from them must be the reference's."""
    net = make_net(kind).double()
    method = adapt(net, "cotta", lr=2e-2, ema_decay=0.8, views=2, restore=0.3)
    reference = PlainCoTTA(net, lr=2e-2, decay=0.8)
    source, seen = dict(net.named_parameters()), []
    for images in make_stream(4, batch=6, dtype=torch.float64):
        views.clear()
        logits = method(images)
        masks = {n: w.detach() == source[n] for n, w in method.model.named_parameters()}
        seen.append(torch.cat([m.flatten() for n, m in masks.items() if n != "qkv.bias"]))  # half of it has no gradient
        expected, *_ = reference(images, views, masks)
        assert max_difference(logits, expected) < TOLERANCE
        assert_same_state(method, reference)
    share = torch.stack(seen).double()
    deviation = math.sqrt(0.3 * 0.7 / share.shape[1])
    assert all(abs(s - 0.3) < 5 * deviation for s in share.mean(1).tolist())
    assert abs((share[0] * share[1]).mean().item() - 0.09) < 5 * deviation  # drawn anew in each step
    assert not torch.equal(seen[0][:50], seen[0][50:100])


@pytest.mark.parametrize("name", ["cotta", "vida"])
def test_restore_always_and_never(name, views):
    net, stream = make_net("gn"), make_stream(3)
    options = {"lr": 1e-2, "symmetric": True, "views": 2}
    always = adapt(net, name, restore=1.0, ema_decay=0.5, **options)
    for images in stream:
        always(images)
        assert same(always.student(), always.source())
    moved = [not torch.equal(slow, always.source()[n]) for n, slow in always.teacher.weights().items()]
    assert sum(moved) > len(moved) / 2  # it met the student before
    never = adapt(net, name, restore=0.0, **options)
    for images in stream:
        never(images)
    kept = {n: (w == never.source()[n]).double().mean().item() for n, w in never.student().items()}
    assert max(kept[name] for name, _ in net.named_parameters() if name in kept) == 0
