"""EcoTTA against its parts written out; where parts stand, how they start, and what the warm-up trains."""

import copy
import math
import warnings

import pytest
import torch
from torch.nn.functional import conv2d, silu

from lightning_tta import DataError, UnsupportedModelError, adapt, create_backbone
from lightning_tta.auxiliary.meta_parts import MetaParts
from nets import make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainSGD

pytestmark = pytest.mark.usefixtures("one_thread")
MARGIN, PENALTY = 0.8, 0.7


def source(batches=2):
    return [{"image": make_images(8, seed=60 + i, dtype=torch.float64), "label": torch.arange(8) % 5} for i in range(2)]


def normalize(x, weight, bias, statistics=None):
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if statistics is None else statistics
    shape = (1, -1, 1, 1)
    return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


class PlainEcoTTA:
    """Two parts: conv1 and norm1, conv2 and norm2, whose convolutions halve the map."""

    def __init__(self, net, parts, lr, momentum):
        self.net = copy.deepcopy(net)
        tensors = {n: p.detach().clone().requires_grad_(True) for n, p in parts.named_parameters()}
        self.running = {n: b.clone() for n, b in parts.named_buffers() if "running" in n}
        self.sgd, self.tensors = PlainSGD(tensors, lr, momentum), tensors

    def norm(self, k, name, x, learns, notes=True):
        affine = [self.tensors[f"parts.{k}.{name}.{leaf}"] for leaf in ("weight", "bias")]
        where = f"parts.{k}.{name}.running_"
        if not learns:
            return normalize(x, *affine, (self.running[f"{where}mean"], self.running[f"{where}var"]))
        if notes:
            self.noted[f"{where}mean"], self.noted[f"{where}var"] = x.mean((0, 2, 3)), x.var((0, 2, 3))
        return normalize(x, *affine)

    def added(self, k, x, learns, notes=True):
        y = conv2d(x, self.tensors[f"parts.{k}.conv.weight"], stride=2, padding=1)
        return self.norm(k, "added_norm", y, learns, notes).clamp_min(0)

    def forward(self, x, learns):
        self.noted, penalties = {}, []
        for k, (conv, norm) in enumerate([(self.net.conv1, self.net.norm1), (self.net.conv2, self.net.norm2)]):
            y = norm(conv(x))
            fixed, given = y.detach(), x.detach()
            alone = self.norm(k, "norm", fixed, learns, False) + self.added(k, given, learns, False)
            penalties.append((alone - fixed).abs().mean())
            x = silu(self.norm(k, "norm", y, learns) + self.added(k, x, learns))
        return self.net.head(x.mean((2, 3))), sum(penalties)

    def __call__(self, images):
        logits, penalty = self.forward(images, True)
        p = logits.softmax(1)
        entropies = -(p * p.log()).sum(1)
        kept = entropies < MARGIN * math.log(5)
        loss = (entropies * kept).mean() + PENALTY * penalty
        self.sgd.step(self.sgd.gradients(loss))
        for name, value in self.noted.items():
            self.running[name] = 0.9 * self.running[name] + 0.1 * value.detach()
        return logits.detach(), loss.item(), kept.double().mean().item()


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_three_steps(kind):
    net = make_net(kind).double()
    options = {"parts": 2, "entropy_margin": MARGIN, "penalty": PENALTY, "warmup_epochs": 0}
    method = adapt(net, "eco_tta", lr=0.1, momentum=0.5, **options)
    assert method.auxiliary.names == [("conv1", "norm1"), ("conv2", "norm2")]
    method.prepare(source())
    with torch.no_grad():
        for part in method.auxiliary.parts:
            part.added_norm.weight.fill_(0.5)  # so that the convolutions count
    method.load_state_dict(method.state_dict())
    reference = PlainEcoTTA(net, method.auxiliary, 0.1, 0.5)
    kept = []
    for images in make_stream(3, batch=6, dtype=torch.float64):
        expected, loss, share = reference(images)
        kept.append(share)
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        assert abs(method.stats["kept"] - share) < TOLERANCE
        for name, tensor in {**reference.tensors, **reference.running}.items():
            assert max_difference(method.adaptable[f"auxiliary.{name}"].detach(), tensor.detach()) < TOLERANCE, name
        assert max_difference(method.predict(images), reference.forward(images, False)[0].detach()) < TOLERANCE
    assert reference.sgd.moved() > 1e-6
    assert 0 < sum(kept) / 3 < 1
    assert all(torch.equal(p, net.state_dict()[name]) for name, p in method.model.state_dict().items())


def test_the_start_is_the_net_but_for_a_hundredth():
    net, images = make_net("gn").double(), torch.cat([batch["image"] for batch in source()])
    method = adapt(net, "eco_tta", parts=2, warmup_epochs=0)
    method.prepare({"image": batch["image"]} for batch in source())  # no labels needed
    plain = net(images)
    near = (method.predict(images) - plain).norm() / plain.norm()
    assert 0 < near < 0.05
    with torch.no_grad():
        for part in method.auxiliary.parts:
            part.added_norm.weight.zero_()
    with method.auxiliary.running(method.model):
        assert max_difference(method.model(images), plain) < TOLERANCE  # exactly the net


def test_the_warm_up_trains_the_meta_parts_alone():
    net = make_net("gn").double()
    method = adapt(net, "eco_tta", parts=2, warmup_epochs=15, warmup_lr=0.02)
    images, labels = (torch.cat([batch[key] for batch in source()]) for key in ("image", "label"))

    def loss():
        return torch.nn.functional.cross_entropy(method.predict(images), labels).item()

    method.prepare(iter(source()))
    started = adapt(net, "eco_tta", parts=2, warmup_epochs=0)
    started.prepare(source())
    before = torch.nn.functional.cross_entropy(started.predict(images), labels).item()
    assert loss() < before - 0.1
    assert all(torch.equal(p, net.state_dict()[name]) for name, p in method.model.state_dict().items())
    start = copy.deepcopy(method.adaptable)
    method(images)
    method.reset()  # to the end of the warm-up
    assert all(torch.equal(value, start[name]) for name, value in method.adaptable.items())


def test_where_parts_stand():
    net = create_backbone("cifar/resnet20", 5)
    assert MetaParts(net, parts=3).names == [(f"net.layer{k}.0", f"net.layer{k}.2") for k in (1, 2, 3)]
    assert len(MetaParts(net, parts=100).names) == 9
    strides = [part.conv.stride[0] for part in MetaParts(net, parts=3).parts]
    assert strides == [1, 2, 2]


def test_what_it_refuses():
    with pytest.raises(UnsupportedModelError, match="select='lora'"):
        adapt(make_net("ln"), "eco_tta")
    with pytest.raises(DataError, match="label"):
        adapt(make_net("gn"), "eco_tta", parts=2).prepare([{"image": make_images(4)}])
    with pytest.raises(DataError, match="no image"):
        adapt(make_net("gn"), "eco_tta", parts=2, warmup_epochs=0).prepare([])


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_few_images_are_warned_of_on_any_net(kind):
    """The BatchNorm is that of the meta parts."""
    for images, more, told in ((1, {}, True), (7, {}, True), (8, {}, False), (1, {"window": 8}, False)):
        method = adapt(make_net(kind), "eco_tta", parts=2, warmup_epochs=0, **more)
        method.prepare(source())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method(make_images(images))
        assert [f"batches of {images} image" in str(text.message) for text in caught] == [True] * told
