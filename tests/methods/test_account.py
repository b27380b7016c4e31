"""The account of the stream's BatchNorm statistics: the law of total variance, whatever the batches."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, adapt
from lightning_tta.backbones.norms import MomentsRecord, batch_statistics, fixed_statistics
from lightning_tta.methods.base.account import IMAGES, MOMENTS, StreamAccount
from nets import make_images, make_net, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")
MIXES = {"one by one": [1] * 12, "odd": [5, 1, 4, 2], "all": [12]}


def stream(sizes, **options):
    return torch.split(make_images(sum(sizes), **options), sizes)


def first_layer_inputs(net, images):
    """What the first BatchNorm layer of the small nets sees, which no earlier one normalises."""
    with torch.no_grad():
        return net.conv1(images) if hasattr(net, "conv1") else images


@pytest.mark.parametrize("sizes", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("kind", ["bn", "user"])
def test_total_variance(kind, sizes):
    net = make_net(kind).double()
    method = adapt(net, "norm")
    for images in stream(sizes, dtype=torch.float64):
        method(images)
    x = first_layer_inputs(net, torch.cat(stream(sizes, dtype=torch.float64)))
    mean, var = next(iter(method.stream_statistics().values()))
    assert max_difference(mean, x.mean((0, 2, 3))) < 1e-12
    assert max_difference(var, x.var((0, 2, 3), correction=0)) < 1e-12
    assert method.value(IMAGES) == sum(sizes)


def test_classes_in_order():
    """Batches of one brightness each: the stream varies more than any of them."""
    net = make_net("bn").double()
    method = adapt(net, "norm")
    batches = [make_images(4, seed=n, dtype=torch.float64) / 2 + n / 8 for n in range(4)]
    for images in batches:
        method(images)
    _, var = next(iter(method.stream_statistics().values()))
    x = first_layer_inputs(net, torch.cat(batches))
    assert max_difference(var, x.var((0, 2, 3), correction=0)) < 1e-12
    assert all((var > 1.5 * first_layer_inputs(net, images).var((0, 2, 3))).any() for images in batches)


def test_the_horizon(monkeypatch):
    monkeypatch.setattr(StreamAccount, "HORIZON", 8)
    method = adapt(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), "norm")
    mean = var = torch.zeros(3)
    seen = 0
    for number in range(6):
        x = make_images(4, seed=number)
        method(x)
        weight = 4 / (min(seen, 8) + 4)
        new, between = x.mean((0, 2, 3)), x.mean((0, 2, 3)) - mean
        var = (1 - weight) * var + weight * x.var((0, 2, 3), correction=0) + weight * (1 - weight) * between**2
        mean, seen = mean + weight * between, seen + 4
        assert max_difference(method.stream_statistics()["0"][0], mean) < 1e-6
        assert max_difference(method.stream_statistics()["0"][1], var) < 1e-6
    assert max_difference(mean, new) > 1e-3


@pytest.mark.parametrize("name", ["tent", "sar", "cotta", "zerosiam", "deyo", "ostta"])
def test_only_the_plain_pass_counts(name):
    """No perturbed, shuffled or augmented images, no other weights: the first layer has seen the batch as it came."""
    options = {"cotta": {"anchor_threshold": 1.0, "views": 3}, "ostta": {}}.get(name, {"source_filter": True})
    net = make_net("user")
    method, images = adapt(net, name, in_place=True, lr=0.1, **options), make_images(6)
    method(images)
    mean, var = method.stream_statistics()["stem.0"]
    assert max_difference(mean, images.mean((0, 2, 3))) < 1e-6
    assert max_difference(var, images.var((0, 2, 3), correction=0)) < 1e-6
    assert method.value(IMAGES) == 6


def test_the_teacher_counts():
    """CoTTA predicts with its teacher, so that the account is that of the teacher's pass."""
    method = adapt(make_net("bn"), "cotta", lr=0.1, ema_decay=0.5, anchor_threshold=0.0, restore=0.0)
    batches = [make_images(4, seed=number) for number in range(2)]
    method(batches[0])
    teacher = copy.deepcopy(make_net("bn"))
    teacher.load_state_dict({name: value.clone() for name, value in method.teacher.weights().items()}, strict=False)
    before = method.value(MOMENTS).clone()
    method(batches[1])
    place = slice(0, 8)
    x = first_layer_inputs(teacher, batches[1])
    expected = (before[0, place] + x.mean((0, 2, 3))) / 2
    assert max_difference(method.value(MOMENTS)[0, place], expected) < 1e-6
    assert max_difference(before[0, place], expected) > 1e-3


def test_what_does_not_count():
    method, images = adapt(make_net("bn"), "tent", lr=1e-2), make_images(4)
    bad = images.clone()
    bad[1, 0, 0, 0] = torch.nan
    method(bad)
    assert method.value(IMAGES) == 3  # as if it were not in the batch
    before = copy.deepcopy(method.state_dict())
    method(torch.full_like(images, torch.nan))
    method.predict(images)
    method.predict(images, statistics="batch")
    assert same(method.state_dict(), before)
    method.entropy = lambda logits: logits.sum(1) * torch.inf  # a step that is skipped
    method(images)
    assert same(method.state_dict(), before)


def test_one_value_a_channel():
    """A batch of one through a layer of vectors has no variance; the stream has."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()
    method = adapt(net, "norm")
    first, *rest = torch.split(make_images(5), 1)
    method(first)
    assert same([*method.stream_statistics()["2"]], [net[2].running_mean, net[2].running_var])
    for image in rest:
        method(image)
    mean, var = method.stream_statistics()["2"]
    x = torch.cat([torch.zeros(1, 6), net[1](torch.cat(rest).flatten(1)).detach()])  # the source in place of the first
    assert max_difference(mean, x.mean(0)) < 1e-6
    assert max_difference(var, x.var(0, correction=0) + 1 / 5) < 1e-6


def test_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(2 * x + 1)

    net, x = Twice().eval(), make_images(5)
    forward = {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x)}
    for layer in (nn.BatchNorm2d, type("Own", (nn.BatchNorm2d,), forward)):
        net.norm = layer(3).eval()
        record = MomentsRecord(net)
        record.begin()
        with batch_statistics(net, record=record):
            net(x)
        record.end()
        mean, var = record.result(torch.zeros(2, 3), torch.tensor(0))
        both = torch.cat([x, 2 * x + 1])
        assert max_difference(mean, both.mean((0, 2, 3)).detach()) < 1e-6
        assert max_difference(var, both.var((0, 2, 3), correction=0)) < 1e-6


def test_fixed_statistics_are_put_back():
    net, x = make_net("bn"), make_images(3)
    before = net(x)
    with fixed_statistics(net, {"norm1": (torch.zeros(8), torch.ones(8))}):
        assert max_difference(net(x), before) > 1e-3
    assert torch.equal(net(x), before)


def test_statistics_are_chosen_by_name():
    method, images = adapt(make_net("bn"), "tent", lr=1e-2), make_images(4)
    assert torch.equal(method.predict(images), method.predict(images, statistics="batch"))  # nothing was seen
    method(images)
    method(make_images(4, seed=1))
    assert max_difference(method.predict(images), method.predict(images, statistics="batch")) > 1e-2
    with pytest.raises(ConfigError, match="statistics"):
        method.predict(images, statistics="source")
