"""NOTE against a plain net with IABN layers, a memory made of a list and torch's Adam; what its memory samples."""

import copy
import math

import pytest
import torch
from torch import nn

from contract import VARIANTS, build
from lightning_tta import DataError, UnsupportedModelError, adapt
from lightning_tta.methods.components.image_memory import ReservoirMemory
from memory_reference import (
    TOLERANCE,
    AveragedBN,
    SlotMemory,
    assert_same_step,
    learned,
    log_softmax,
    moved,
    set_mode,
    with_layers,
)
from nets import KINDS, make_images, make_net, make_stream, max_difference, same

pytestmark = pytest.mark.usefixtures("one_thread")


class IABN(AveragedBN):
    """Soft-shrunk statistics of each image, around the batch's in train mode."""

    def __init__(self, layer, momentum, k):
        super().__init__(layer, momentum, unbiased=True)
        self.k = k

    def forward(self, x):
        view, pixels = (1, -1) + (1,) * (x.ndim - 2), x[0, 0].numel()
        mean, var = self.mean, self.var
        if self.training and x.numel() > x.shape[1]:
            dims = [d for d in range(x.ndim) if d != 1]
            mean, var = x.mean(dims), x.var(dims)
            self.mean = (1 - self.momentum) * self.mean + self.momentum * mean.detach()
            self.var = (1 - self.momentum) * self.var + self.momentum * var.detach()
        mean, var = mean.view(view), var.view(view)
        if pixels > 1:
            dims = list(range(2, x.ndim))
            own_mean, own_var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True)
            shrink = nn.functional.relu
            bound, of_var = self.k * ((var + self.eps) / pixels).sqrt(), self.k * (var + self.eps)
            of_var = of_var * math.sqrt(2 / (pixels - 1))
            mean = mean + shrink(own_mean - mean - bound) - shrink(mean - own_mean - bound)
            var = shrink(var + shrink(own_var - var - of_var) - shrink(var - own_var - of_var))
        return (x - mean) / (var + self.eps).sqrt() * self.weight.view(view) + self.bias.view(view)


class PlainNOTE:
    def __init__(self, net, classes, *, lr, momentum, size, every, k, seed):
        self.net, self.every = with_layers(net, lambda layer: IABN(layer, momentum, k)), every
        self.memory = SlotMemory(size, classes, seed, reservoir=True)
        self.adam = torch.optim.Adam(learned(self.net).values(), lr=lr)

    def __call__(self, images):
        return torch.stack([self.one(image) for image in images])

    def one(self, image):
        set_mode(self.net, False)
        with torch.no_grad():
            (logits,) = self.net(image[None])
        self.memory.add(image, int(logits.argmax()), 0.0)
        if self.memory.seen % self.every == 0:
            set_mode(self.net, True)
            u = self.net(torch.stack([item[0] for item in self.memory.items()]))
            loss = -(log_softmax(u).exp() * log_softmax(u)).sum(1).mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
        return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("classes", "size", "k", "sizes"),
    [(5, 8, 1.0, (7, 7, 7, 9)), (9, 4, 0.0, (1, 1, 2, 14, 1, 5)), (2, 6, 2.0, (20, 10, 10))],
    ids=["balanced", "more classes than slots", "two classes"],
)
def test_three_steps_and_more(kind, classes, size, k, sizes):
    net = make_net(kind, classes).double()
    options = {"lr": 2e-2, "k": k, "seed": 3}
    method = adapt(net, "note", bn_momentum=0.3, capacity=size, update_every=6, **options)
    reference = PlainNOTE(net, classes, momentum=0.3, size=size, every=6, **options)
    for number, batch in enumerate(sizes):
        assert_same_step(method, reference, make_images(batch, seed=number, dtype=torch.float64))
        assert method.value("images.counts").tolist() == reference.memory.counts
    assert min(reference.memory.seen, sum(reference.memory.counts)) // 6 >= 3
    assert moved(reference.net, net) > 1e-4


def test_defaults_are_the_authors():
    net = make_net("bn").double()
    method = adapt(net, "note")
    reference = PlainNOTE(net, 5, lr=1e-4, momentum=0.01, size=64, every=64, k=4.0, seed=0)
    for images in make_stream(3, batch=70, dtype=torch.float64):
        assert max_difference(method(images), reference(images)) < TOLERANCE


def test_of_each_class_the_memory_is_a_uniform_sample():
    """Two classes, one after the other: half of the slots each, and of each the mean age is that of all its images."""
    means = []
    for seed in range(40):
        method = adapt(make_net("gn", 2), "source")
        memory = ReservoirMemory(method, 8, seed)
        logits = torch.tensor([[1.0, 0.0]] * 60 + [[0.0, 1.0]] * 60)
        numbers = torch.arange(120.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        method.sized("images.pixels", torch.zeros(8, 3, 2, 2))
        method.sized("images.counts", torch.zeros(2))
        held = memory.with_images(method, numbers, logits)
        assert held.labels.bincount().tolist() == [4, 4]
        means.append([held.pixels[held.labels == label, 0, 0, 0].mean().item() for label in (0, 1)])
    found = torch.tensor(means).mean(0)
    # of 4 of 60 in a row, 40 times: standard deviation 1.4
    assert abs(found[0] - 29.5) < 5
    assert abs(found[1] - 89.5) < 5


def test_it_warns_of_a_net_that_was_not_trained_with_it(recwarn):
    net = make_net("user")
    images = make_images(64)
    batches = [{"image": images, "label": net(images).argmax(1)}]
    method = adapt(net, "note", k=0.0)
    before = copy.deepcopy(method.state_dict())
    with pytest.warns(UserWarning, match=r"not trained with such layers.*'rotta'"):
        method.prepare(batches)
    assert same(method.state_dict(), before)
    with pytest.raises(DataError, match=r"'image'.*'label'"):
        method.prepare([{"image": images}])
    recwarn.clear()
    adapt(net, "note", k=1e6).prepare(batches)  # plain BatchNorm
    assert not [w for w in recwarn if "trained with" in str(w.message)]


def test_there_is_no_plain_net():
    method = build("note", VARIANTS["note"][0], "bn")
    method(make_images(4))
    with pytest.raises(UnsupportedModelError, match="statistics of each image"):
        method.export()
    method = build("note", VARIANTS["note"][0], "gn")
    for images in make_stream(3):
        method(images)
    torch.testing.assert_close(method.export()(images), method.predict(images))
