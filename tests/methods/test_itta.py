"""ITTA against its stages written out; MixStyle, the learned measure, and what training teaches it."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, silu

from lightning_tta import DataError, SourceClassifier, UnsupportedModelError, adapt
from lightning_tta.auxiliary import consistency
from lightning_tta.auxiliary.base import Trained, note_trained
from lightning_tta.auxiliary.consistency import Consistency, mix_styles
from nets import make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainSGD

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = torch.tensor([3, 7])


def trained(net, depth=3):
    """A net that says it was trained with f: random scales and shifts, and six styles of the source."""
    made = Consistency(net, depth=depth, styles=6).double()
    generator = torch.Generator().manual_seed(1)
    state = made.state_dict()
    for name, value in state.items():
        if name != "seen":
            value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.2)
    state["seen"].fill_(6)
    note_trained(net, {"consistency": Trained({"depth": depth, "styles": 6}, copy.deepcopy(state))})
    return net


@pytest.fixture
def known(monkeypatch):
    """A mixing that a reference can make: half of the style of the next image, or of the stored one."""

    def mix(x, key, others=None):
        mean, deviation = x.mean((2, 3), keepdim=True).detach(), x.std((2, 3), keepdim=True).detach()
        if others is None:
            others = mean.roll(1, 0), deviation.roll(1, 0)
        other_mean, other_deviation = (value.view_as(mean) for value in others)
        return (x - mean) / deviation * (deviation + other_deviation) / 2 + (mean + other_mean) / 2

    monkeypatch.setattr(consistency, "mix_styles", mix)


class PlainITTA:
    """Four stages: conv1, norm1, conv2, norm2; the style changes after the first or the second."""

    def __init__(self, net, measure, lr, momentum):
        self.net, self.f = copy.deepcopy(net), [*zip(measure.scales, measure.shifts, strict=True)]
        widths = (8, 8, 12, 12)
        tensors = {f"scales.{k}": torch.ones(w, dtype=torch.float64, requires_grad=True) for k, w in enumerate(widths)}
        tensors |= {
            f"shifts.{k}": torch.zeros(w, dtype=torch.float64, requires_grad=True) for k, w in enumerate(widths)
        }
        self.sgd, self.tensors, self.lr = PlainSGD(tensors, lr, momentum), tensors, lr

    def features(self, x, where=None):
        for k, layer in enumerate((self.net.conv1, self.net.norm1, self.net.conv2, self.net.norm2)):
            x = layer(x)
            if k == where:
                x = consistency.mix_styles(x, KEY)
            x = self.tensors[f"scales.{k}"].view(1, -1, 1, 1) * x + self.tensors[f"shifts.{k}"].view(1, -1, 1, 1)
            x = silu(x) if k in (1, 3) else x
        return x.mean((2, 3))

    def __call__(self, images, where):
        d = self.features(images, where) - self.features(images)
        for number, (scale, shift) in enumerate(self.f):
            d = (d if number == 0 else d.clamp_min(0)) * scale.detach() + shift.detach()
        loss = (d**2).mean()
        self.sgd.step(self.sgd.gradients(loss))
        return self.net.head(self.features(images)).detach(), loss.item()


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_four_steps(kind, known):
    net = trained(make_net(kind).double())
    method = adapt(net, "itta", lr=0.5, optimizer="sgd", momentum=0.5)
    assert not method.needs_source
    reference, places = PlainITTA(net, method.auxiliary, 0.5, 0.5), []
    for images in make_stream(4, batch=6, dtype=torch.float64):
        found = method.auxiliary.mixing(method.draw_key(), False)
        double = torch.cat([images, images])
        places.append(next(k for k in (0, 1) if not torch.equal(found(k, double), double)))
        expected, loss = reference(images, places[-1])
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        for name, tensor in reference.tensors.items():
            assert max_difference(method.adaptable[name].detach(), tensor.detach()) < TOLERANCE
        assert max_difference(method.predict(images), expected) < TOLERANCE
    assert {*places} == {0, 1}
    assert reference.sgd.moved() > 1e-7
    assert all(torch.equal(p, net.state_dict()[name]) for name, p in method.model.state_dict().items())


def test_one_image_is_mixed_with_the_source():
    method = adapt(trained(make_net("gn").double()), "itta", lr=0.5, optimizer="sgd")
    before = copy.deepcopy(method.adaptable)
    method(make_images(1, dtype=torch.float64))
    assert any(not torch.equal(value, before[name]) for name, value in method.adaptable.items())
    assert method.stats["loss"] > 0


def test_styles_are_mixed():
    x = make_images(500, dtype=torch.float64) * torch.rand(500, 3, 1, 1, dtype=torch.float64)
    mean, deviation = x.mean((2, 3)), (x.var((2, 3)) + 1e-6).sqrt()
    mixed = mix_styles(x, KEY)
    means, deviations = mixed.mean((2, 3)), mixed.std((2, 3))
    other = torch.full((500, 3), 4.0, dtype=torch.float64), torch.full((500, 3), 2.0, dtype=torch.float64)
    given = mix_styles(x, KEY, other)
    shares = (4 - given.mean((2, 3))) / (4 - mean)  # of the image's own style
    assert (shares.amax(1) - shares.amin(1)).max() < 1e-9  # one for all channels
    expected = x.std((2, 3)) / deviation * (shares * deviation + (1 - shares) * 2)
    assert max_difference(given.std((2, 3)), expected) < 1e-9
    share = shares[:, 0]
    assert -1e-9 < share.min() < share.max() < 1 + 1e-9
    assert abs(share.mean() - 0.5) < 0.08
    assert abs(share.var() - 1 / (4 * 1.2)) < 0.03  # of Beta(0.1, 0.1)
    assert means.amin() >= mean.amin() - 1e-9  # within what the batch has
    assert (means.amax(0) <= mean.amax(0) + 1e-9).all()
    assert deviations.isfinite().all()
    tokens = mix_styles(x.flatten(2).transpose(1, 2), KEY)
    assert max_difference(tokens.transpose(1, 2).reshape(x.shape), mixed) < TOLERANCE


def test_f_learns_from_the_alignment_alone_and_the_net_from_the_rest(known):
    net = make_net("gn").double().requires_grad_(True)
    measure = Consistency(net, depth=2, align=0.3).double()
    with torch.no_grad():
        measure.scales.mul_(torch.rand(2, 12, dtype=torch.float64) + 0.5)
    images, labels = make_images(6, dtype=torch.float64), torch.arange(6) % 5
    where = next(k for k in (0, 1) if k == int(consistency.random_integers(KEY, 1)[0] >> 16 & 1))
    loss = measure.loss(net, images, labels, KEY)
    parameters = [*measure.parameters()]
    weight = net.conv1.weight
    ours = torch.autograd.grad(loss, [*parameters, weight])

    plain = PlainITTA(net, measure, 1.0, 0.0)
    for p in plain.net.parameters():
        p.requires_grad_(True)
    z, other = plain.features(images), plain.features(images, where)

    def f(d, scales, shifts):
        return (((d * scales[0] + shifts[0]).clamp_min(0) * scales[1] + shifts[1]) ** 2).mean()

    scales, shifts = (p.detach() for p in (measure.scales, measure.shifts))
    term = cross_entropy(plain.net.head(other), labels) + f(other - z, scales, shifts)
    leaves = [t.detach().requires_grad_(True) for t in (z, other)]
    main = sum(cross_entropy(plain.net.head(leaf), labels) for leaf in leaves)
    pull = torch.cat(torch.autograd.grad(main, leaves)).flatten()
    push = torch.autograd.grad(f(leaves[1] - leaves[0], measure.scales, measure.shifts), leaves, create_graph=True)
    push = torch.cat(push).flatten()
    aligned = 0.3 * (1 - push @ pull / (push.norm() * pull.norm()))
    expected = [*torch.autograd.grad(aligned, parameters), *torch.autograd.grad(term, [plain.net.conv1.weight])]
    assert abs(loss.item() - (term + aligned).item()) < TOLERANCE
    for one, two in zip(ours, expected, strict=True):
        assert one.abs().max() > 1e-8
        assert max_difference(one, two) < TOLERANCE
    assert measure.seen == 6
    mean = net.conv1(images).mean((2, 3))
    assert max_difference(measure.styles_0[:6, 0], mean.detach()) < TOLERANCE


@pytest.mark.parametrize("styles", [4, 20])
def test_the_styles_of_the_last_images_are_kept(styles):
    """Those of the first batches are of a net that has learned nothing yet."""
    net = make_net("gn").double().requires_grad_(True)
    measure = Consistency(net, styles=styles).double()
    seen = []
    for images in make_stream(4, batch=6, dtype=torch.float64):
        seen.insert(0, net.conv1(images).mean((2, 3)).detach())
        measure.loss(net, images, torch.arange(6) % 5, KEY)
        with torch.no_grad():
            net.conv1.weight.mul_(1.5)
    assert measure.seen == styles
    assert max_difference(measure.styles_0[:, 0], torch.cat(seen)[:styles]) < TOLERANCE


def test_prepare_and_refusals():
    method = adapt(make_net("gn"), "itta", head_from="prepare", head_lr=0.01)
    with pytest.raises(DataError, match="label"):
        method.prepare([{"image": make_images(4)}])
    before = copy.deepcopy(method.auxiliary.state_dict())
    method.prepare([{"image": make_images(8), "label": torch.arange(8) % 5}])
    assert not torch.equal(method.auxiliary.scales, before["scales"])
    assert method.auxiliary.seen == 64  # ten passes over eight images
    with pytest.raises(UnsupportedModelError, match=r"--model\.auxiliary consistency"):
        adapt(make_net("gn"), "itta", head_from="trained")
    SourceClassifier("cifar/resnet20", 5, auxiliary=["consistency", {"kind": "rotation"}])
