"""PETAL against three plain nets, a posterior fitted by torch's SGD, and a sort in the place of the selection."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_tta import DataError, UnsupportedModelError, WeightsError, adapt
from lightning_tta.methods.components.fisher import quantile_bound
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-9  # float64
RESTORE, DECAY, PRIOR = 0.3, 0.8, 1e-6
FIT = {"swag_epochs": 4, "swag_lr": 0.02}
OPTIONS = {"lr": 0.05, "optimizer": "sgd", "ema_decay": DECAY, "anchor_threshold": 1.0, "views": 2, "restore": RESTORE}


def source():
    return [
        {"image": make_images(8, seed=70 + i, dtype=torch.float64), "label": torch.arange(8) * (i + 1) % 5}
        for i in range(2)
    ]


def fitted(net):
    """Mean and variance of the weights after epochs 2, 3, ... of SGD on the net in eval mode."""
    net, snapshots = copy.deepcopy(net), []
    optimizer = torch.optim.SGD(net.requires_grad_().parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for epoch in range(4):
        for batch in source():
            optimizer.zero_grad()
            cross_entropy(net(batch["image"]), batch["label"]).backward()
            optimizer.step()
        if epoch:
            snapshots.append([p.detach().clone() for p in net.parameters()])
    stacked = [torch.stack(each) for each in zip(*snapshots, strict=True)]
    return [each.mean(0) for each in stacked], [(each**2).mean(0) - each.mean(0) ** 2 for each in stacked]


class PlainPETAL:
    def __init__(self, net, means, variances, start="mean", symmetric=False):
        net = copy.deepcopy(net)
        if start == "mean":
            with torch.no_grad():
                for parameter, mean in zip(net.parameters(), means, strict=True):
                    parameter.copy_(mean)
        self.student, self.teacher, self.anchor = (without_running_statistics(copy.deepcopy(net)) for _ in range(3))
        for p in self.student.parameters():
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        self.means, self.variances, self.symmetric = means, variances, symmetric
        self.restored = []

    def __call__(self, images, views):
        with torch.no_grad():
            target = sum(self.teacher(v) for v in views) / len(views)
        t, p = target.softmax(1), self.student(images).softmax(1)
        loss = -(t * p.log()).sum(1).mean()
        if self.symmetric:
            loss = loss / 2 - (p * t.log()).sum(1).mean() / 2
        for weight, mean, variance in zip(self.student.parameters(), self.means, self.variances, strict=True):
            loss = loss + PRIOR / 2 * ((weight - mean) ** 2 / (variance + 1e-6)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        squares = [p.grad**2 for p in self.student.parameters()]
        entries = torch.cat([s.flatten() for s in squares]).sort().values
        place = RESTORE * (len(entries) - 1)
        low, high = entries[int(place)], entries[int(place) + 1]
        threshold = low + (high - low) * (place - int(place))
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.copy_(DECAY * slow + (1 - DECAY) * fast)
            for weight, start, square in zip(self.student.parameters(), self.anchor.parameters(), squares, strict=True):
                weight[square < threshold] = start[square < threshold]
        self.restored.append(sum((s < threshold).sum().item() for s in squares) / len(entries))
        return target, loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"start": "source", "symmetric": True}], ids=str)
def test_three_steps(kind, options, views):
    net = make_net(kind).double()
    method = adapt(net, "petal", prior_weight=PRIOR, **FIT, **OPTIONS, **options)
    method.prepare(source())
    means, variances = fitted(net)
    for number, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        assert max_difference(method.get_buffer(f"mean_{number}"), mean) < TOLERANCE
        assert max_difference(method.get_buffer(f"variance_{number}"), variance) < TOLERANCE
    reference = PlainPETAL(net, means, variances, **options)
    reference_without = PlainPETAL(net, means, [v + 1e9 for v in variances], **options)
    for images in make_stream(3, batch=6, dtype=torch.float64):
        views.clear()
        logits = method(images)
        expected, loss = reference(images, views)
        reference_without(images, views)
        assert len(views) == 2
        assert max_difference(logits, expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        teacher = method.teacher.weights()
        for name, weight in method.model.named_parameters():
            assert max_difference(weight.detach(), reference.student.get_parameter(name).detach()) < TOLERANCE
            assert max_difference(teacher[name], reference.teacher.get_parameter(name).detach()) < TOLERANCE
    assert all(abs(share - RESTORE) < 0.01 for share in reference.restored)
    free = reference_without.student.state_dict()
    moved = [(w - free[name]).abs().max().item() for name, w in reference.student.named_parameters()]
    assert max(moved) > 1e-5  # what the prior does


def test_a_reset_goes_back_to_the_mean():
    net = make_net("gn")
    method = adapt(net, "petal", **FIT, **OPTIONS)
    method.prepare(source())
    start = copy.deepcopy(method.state_dict())
    assert all(
        torch.equal(w, t) for w, t in zip(method.student().values(), method.teacher.weights().values(), strict=True)
    )
    assert all(torch.equal(w, method.get_buffer(f"mean_{n}")) for n, w in enumerate(method.student().values()))
    assert not same(dict(method.model.named_parameters()), dict(net.named_parameters()))
    for images in make_stream(2):
        method(images)
    method.reset()
    assert same(method.state_dict(), start)


def test_a_posterior_from_a_file(tmp_path):
    net, file = make_net("bn"), tmp_path / "posterior.pt"
    method = adapt(net, "petal", **FIT, **OPTIONS)
    method.prepare(source())
    method.save_posterior(file)
    other = adapt(net, "petal", posterior=str(file), **OPTIONS)
    assert not other.needs_source
    stream = make_stream(2)
    assert same([other(x) for x in stream], [method(x) for x in stream])
    other.reset(), method.reset()
    assert same(list(other.student().values()), list(method.student().values()))
    with pytest.raises(WeightsError, match=r"is no posterior.*save_posterior"):
        adapt(make_net("gn", num_classes=3), "petal", posterior=str(file))
    torch.save(net.state_dict(), file)
    with pytest.raises(WeightsError, match=r"mean.*missing"):
        adapt(net, "petal", posterior=str(file))


def test_random_restore_is_cottas():
    net, stream = make_net("gn"), make_stream(3)
    method = adapt(net, "petal", restore_by="random", start="source", prior_weight=0.0, **FIT, **OPTIONS)
    method.prepare(source())
    other = adapt(net, "cotta", **OPTIONS)
    assert same([method(x) for x in stream], [other(x) for x in stream])
    assert same(method.student(), other.student())


@pytest.mark.parametrize("share", [0.0, 0.03, 0.25, 0.5, 1.0])
def test_the_bound_of_a_quantile(share):
    values = [torch.rand(3, 7, generator=torch.Generator().manual_seed(0)), torch.rand(80)]
    entries = torch.cat([v.flatten() for v in values])
    bound, quantile = quantile_bound(values, share), entries.quantile(share)
    assert torch.equal(entries < bound, entries < quantile)
    assert torch.equal(entries > bound, entries > torch.maximum(bound, quantile))
    assert quantile_bound([torch.zeros(5)], share) == 0


def test_what_it_refuses():
    method = adapt(make_net("gn"), "petal")
    with pytest.raises(DataError, match=r"5 times.*list"):
        method.prepare(iter(source()))
    with pytest.raises(DataError, match="labelled"):
        method.prepare([{"image": make_images(4)}])
    with pytest.raises(DataError, match=r"found no image.*'cotta'"):
        method.prepare([])
    with pytest.raises(DataError, match="not finite"):
        adapt(make_net("gn"), "petal", swag_lr=1e30).prepare(source())
    with pytest.raises(UnsupportedModelError, match="linear"):
        adapt(nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()), "petal")
