"""PSMT against two plain nets, weight by weight; what of it is a plain mean teacher."""

import copy

import pytest
import torch

from lightning_tta import UnsupportedModelError, adapt
from lightning_tta.methods.components import drawing
from nets import KINDS, make_net, make_stream, max_difference, same, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9  # float64
OPTIONS = {"lr": 0.05, "optimizer": "sgd", "ema_decay": 0.8, "fisher_alpha": 40.0, "fisher_decay": 0.6}


def view_of(images):
    return (images * 0.7).roll(2, -1)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(drawing, "jitter", lambda images, key: view_of(images))


class PlainPSMT:
    def __init__(self, net, preserve, augment, alpha=40.0):
        self.student, self.teacher = (without_running_statistics(copy.deepcopy(net)) for _ in range(2))
        for p in self.student.parameters():
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        self.fisher = [torch.zeros_like(p) for p in self.student.parameters()]
        self.before = [p.detach().clone() for p in self.student.parameters()]
        self.preserve, self.augment, self.alpha, self.stayed = preserve, augment, alpha, []

    def __call__(self, x):
        with torch.no_grad():
            target = self.teacher(x)
        t, logits = target.softmax(1), self.student(x)
        passes = [logits, self.student(view_of(x))] if self.augment else [logits]
        loss = 0.0
        for each in passes:
            p = each.softmax(1)
            loss = loss - 0.5 * ((t * p.log()).sum(1) + (p * t.log()).sum(1)).mean() / len(passes)
        weights = list(self.student.parameters())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        self.fisher = [0.6 * f + 0.4 * g**2 for f, g in zip(self.fisher, gradients, strict=True)]
        for f, w, b in zip(self.fisher, weights, self.before, strict=True):
            loss = loss + self.alpha * (f * (w - b) ** 2).sum()
        self.before = [w.detach().clone() for w in weights]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        entries = torch.cat([f.flatten() for f in self.fisher]).sort(descending=True).values
        number = int(self.preserve * (len(entries) - 1))
        with torch.no_grad():
            for f, slow, fast in zip(self.fisher, self.teacher.parameters(), weights, strict=True):
                stays = f > entries[number]  # the largest ones
                slow.copy_(torch.where(stays, slow, 0.8 * slow + 0.2 * fast))
        self.stayed.append(number)
        return logits.detach() + target, loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("preserve", "augment"), [(0.3, True), (0.03, False)])
def test_three_steps(kind, preserve, augment, known):
    net = make_net(kind).double()
    method = adapt(net, "psmt", preserve=preserve, augment=augment, **OPTIONS)
    reference, free = (PlainPSMT(net, preserve, augment, alpha) for alpha in (40.0, 0.0))
    for images in make_stream(3, batch=6, dtype=torch.float64):
        predicted = method.predict(images, statistics="batch")
        logits = method(images)
        expected, loss = reference(images)
        free(images)
        assert max_difference(logits, expected) < TOLERANCE
        assert max_difference(predicted, expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        averages = method.teacher.weights()
        for number, (name, weight) in enumerate(method.model.named_parameters()):
            assert max_difference(weight.detach(), reference.student.get_parameter(name).detach()) < TOLERANCE
            assert max_difference(averages[name], reference.teacher.get_parameter(name).detach()) < TOLERANCE
            assert max_difference(method.value(f"fisher.{name}"), reference.fisher[number]) < TOLERANCE
            assert max_difference(method.value(f"before.{name}"), reference.before[number]) < TOLERANCE
    assert method.stats["pull"] > 0
    assert reference.stayed[0] > 5
    assert max_difference(reference.student.head.weight.detach(), free.student.head.weight.detach()) > 1e-7


def test_without_its_terms_it_is_a_mean_teacher(known):
    net = make_net("gn").double()
    method = adapt(net, "psmt", **{**OPTIONS, "fisher_alpha": 0.0}, preserve=0.0)
    student, slow = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = torch.optim.SGD(student.requires_grad_().parameters(), lr=0.05, momentum=0.9)
    for images in make_stream(3, dtype=torch.float64):
        method(images)
        with torch.no_grad():
            t = slow(images).softmax(1)
        losses = []
        for x in (images, view_of(images)):
            p = student(x).softmax(1)
            losses.append(-((t * p.log()).sum(1) + (p * t.log()).sum(1)).mean() / 2)
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(slow.parameters(), student.parameters(), strict=True):
                a.copy_(0.8 * a + 0.2 * b)
    for ours, theirs in zip(method.teacher.weights().values(), slow.parameters(), strict=True):
        assert max_difference(ours, theirs.detach()) < TOLERANCE


def test_a_step_that_is_not_taken_leaves_all():
    method = adapt(make_net("bn"), "psmt", augment=False, **OPTIONS)
    method(make_stream(1)[0])
    method.skips_when_empty = False
    before = copy.deepcopy(method.rest), copy.deepcopy(method.adaptable)
    method.gradients, gradients = None, method.gradients

    def infinite(losses):
        return gradients(losses * float("inf"))

    method.gradients = infinite
    method(make_stream(2)[1])
    assert method.stats["skipped_steps"] == 1
    rest = {name: value for name, value in method.rest.items() if not name.startswith("stream.")}
    assert same(rest, {name: value for name, value in before[0].items() if not name.startswith("stream.")})
    assert same(method.adaptable, before[1])
    with pytest.raises(UnsupportedModelError, match="'cotta'"):
        method.export()
