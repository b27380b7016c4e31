"""ActMAD against its formula with loops over layers and images, in float64; its statistics and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, DataError, InputError, UnsupportedModelError, adapt
from lightning_tta.backbones.norms import norm_layers
from nets import KINDS, TinyNet, make_images, make_net, make_stream, max_difference, norm_weights, same
from plain import TOLERANCE, PlainSGD, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")
BEHIND = ("head.", "decide.")  # what the loss does not depend on


def source(sizes=(8, 5, 11), dtype=torch.float64, size=16):
    return [{"image": make_images(n, seed=50 + n, dtype=dtype, size=size)} for n in sizes]


class PlainActMAD:
    def __init__(self, net, lr, names, params="all", weight_decay=0.0, rectified="auto"):
        self.rectified = rectified
        self.net, self.names, self.weight_decay = copy.deepcopy(net), names, weight_decay
        learned = norm_weights(self.net) if params == "norm" else dict(self.net.named_parameters())
        self.sgd = PlainSGD({n: p for n, p in learned.items() if not n.startswith(BEHIND)}, lr, nesterov=True)

    def activations(self, images):
        outputs = {}
        handles = [
            self.net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
            for name in self.names
        ]
        logits = self.net(images)
        for handle in handles:
            handle.remove()
        for name, output in outputs.items():
            is_batch_norm = isinstance(self.net.get_submodule(name), nn.modules.batchnorm._BatchNorm)
            if is_batch_norm if self.rectified == "auto" else self.rectified:
                outputs[name] = output.clamp(min=0)
        return logits, outputs

    def moments(self, a):
        """Over images, one after another."""
        images = [image.flatten() for image in a]
        mean = sum(images) / len(images)
        return mean, sum((image - mean) ** 2 for image in images) / max(len(images) - 1, 1)

    def prepare(self, images):
        with torch.no_grad():
            self.source = {name: self.moments(a) for name, a in self.activations(images)[1].items()}

    def __call__(self, images):
        logits, outputs = self.activations(images)
        terms = torch.zeros(2, dtype=images.dtype)
        for name, a in outputs.items():
            pairs = zip(self.moments(a), self.source[name], strict=True)
            terms = terms + torch.stack([sum((x - s).abs()) / len(s) for x, s in pairs])
        loss = terms.sum() / 2
        gradients = self.sgd.gradients(loss)
        decay = self.weight_decay
        self.sgd.step([g + decay * t.detach() for g, t in zip(gradients, self.sgd.tensors.values(), strict=True)])
        return logits.detach(), loss.item(), terms.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("params", "rectified"), [("all", "auto"), ("norm", False), ("norm", True)])
def test_three_steps(kind, params, rectified):
    net = make_net(kind).double()
    method = adapt(net, "actmad", lr=0.05, weight_decay=0.01, params=params, rectified=rectified)
    reference = PlainActMAD(net, 0.05, list(norm_layers(net)), params, 0.01, rectified)
    method.prepare(source())
    reference.prepare(torch.cat([batch["image"] for batch in source()]))
    for images in make_stream(3, batch=5, dtype=torch.float64):
        expected, loss, terms = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, abs=TOLERANCE)
        assert method.stats["mean_distance"] == pytest.approx(terms[0].item(), abs=TOLERANCE)
        assert method.stats["variance_distance"] == pytest.approx(terms[1].item(), abs=TOLERANCE)
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 1)
        assert_same_sgd(method, reference.sgd)
    assert reference.sgd.moved() > 1e-5


def test_moments_do_not_depend_on_the_batches():
    one, other = (adapt(make_net("bn").double(), "actmad") for _ in range(2))
    one.prepare(source())
    images = torch.cat([batch["image"] for batch in source()])
    other.prepare([{"image": part} for part in images.flip(0).split([1, 13, 10])])
    buffers = dict(other.named_buffers())
    for name, value in one.named_buffers():
        assert max_difference(value.double(), buffers[name].double()) < 1e-12


def test_the_source_itself_is_the_minimum():
    """The loss of the source images as one batch is 0."""
    method = adapt(make_net("gn").double(), "actmad", lr=0.0)
    method.prepare(source())
    method(torch.cat([batch["image"] for batch in source()]))
    assert method.stats["loss"] < 1e-12
    method(make_images(24, dtype=torch.float64))
    assert method.stats["loss"] > 1e-2


def test_named_layers():
    net = make_net("bn").double()
    method = adapt(net, "actmad", lr=0.05, layers=["conv2"], weight_decay=0.0)
    reference = PlainActMAD(net, 0.05, ["conv2"])
    reference.sgd = PlainSGD(
        {n: p for n, p in reference.net.named_parameters() if n.startswith(("conv", "norm1"))}, 0.05, nesterov=True
    )
    method.prepare(source())
    reference.prepare(torch.cat([batch["image"] for batch in source()]))
    images = make_images(5, dtype=torch.float64)
    expected, loss, _ = reference(images)
    assert max_difference(method(images), expected) < TOLERANCE
    assert method.stats["loss"] == pytest.approx(loss)
    assert_same_sgd(method, reference.sgd)


@pytest.mark.parametrize("rectified", ["auto", False])
def test_what_follows_in_place_is_not_seen(rectified):
    """Nor is it needed: the authors' hook sees what the ReLU writes, which is the positive part."""

    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    net = Net(False)
    twin = Net(True)
    twin.load_state_dict(net.state_dict())
    methods = [adapt(each, "actmad", lr=0.1, rectified=rectified) for each in (net, twin)]
    for method in methods:
        method.prepare(source(dtype=torch.float32))
    for images in make_stream(2):
        assert same(*(method(images) for method in methods))
    assert same(*(dict(method.adaptable) for method in methods))
    held = []
    twin.norm.register_forward_hook(lambda module, inputs, output: held.append(output))
    twin.eval()(make_images(6))
    method = adapt(twin, "actmad")
    method.prepare([{"image": make_images(6)}])
    assert max_difference(method.get_buffer("source_mean_0"), held[0].mean(0)) < 1e-6


def test_the_first_run_of_a_layer_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.norm(1 + self.norm(self.conv(x)).relu()).mean((2, 3)))

    net, images = Twice().eval(), make_images(6)
    expected = net.norm(net.conv(images)).relu().mean(0).detach()
    method = adapt(net, "actmad", lr=0.0)
    method.prepare([{"image": images}])
    assert max_difference(method.get_buffer("source_mean_0"), expected) < 1e-6
    method(images)
    assert method.stats["loss"] < 1e-6


def test_one_image_moves_by_its_mean():
    method = adapt(make_net("bn").double(), "actmad", lr=0.05)
    method.prepare(source())
    before = {name: tensor.clone() for name, tensor in method.adaptable.items()}
    assert method(make_images(1, dtype=torch.float64)).isfinite().all()
    assert method.stats["skipped_steps"] == 0
    assert max(max_difference(before[n].detach(), t.detach()) for n, t in method.adaptable.items()) > 1e-4


def test_a_head_of_regression():
    """The loss does not depend on the outputs, of which it takes any number from two on."""
    nets = [make_net("gn", outputs).double() for outputs in (2, 7)]
    nets[1].load_state_dict(
        {**nets[1].state_dict(), **{k: v for k, v in nets[0].state_dict().items() if "head" not in k}}
    )
    methods = [adapt(net, "actmad", lr=0.05) for net in nets]
    for method in methods:
        method.prepare(source())
        method(make_images(5, dtype=torch.float64))
    assert same(*(dict(method.adaptable) for method in methods))


def test_other_sizes_are_refused():
    method = adapt(make_net("bn"), "actmad")
    with pytest.raises(DataError, match="source images must have one size"):
        method.prepare([*source((4,), torch.float32), *source((4,), torch.float32, size=20)])
    method.prepare(source((4,), torch.float32))
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(InputError, match=r"'norm1' gave \(8, 8, 8\).*gives \(8, 10, 10\) for images \(3, 20, 20\)"):
        method(make_images(4, size=20))
    assert same(method.state_dict(), before)
    assert method.predict(make_images(4, size=20)).isfinite().all()
    method.prepare(source((4,), torch.float32, size=20))  # again, with others
    assert method(make_images(4, size=20)).isfinite().all()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "found 0 images"),
        (source((1,)), "found 1 images"),
        ([{"image": torch.full((2, 3, 16, 16), torch.nan)}], "0"),
    ],
)
def test_too_few_source_images(batches, message):
    method = adapt(make_net("gn").double(), "actmad")
    with pytest.raises(DataError, match=message):
        method.prepare(batches)
    assert not method.prepared


def test_nets_without_such_layers():
    with pytest.raises(UnsupportedModelError, match=r"has no normalisation layer.*use a method.*'neo'"):
        adapt(TinyNet("none", 5), "actmad")
    with pytest.raises(UnsupportedModelError, match="has no module 'norm9'"):
        adapt(make_net("bn"), "actmad", layers=["norm1", "norm9"])


def test_layers_that_do_not_have_the_images_first():
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(48, 6), nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.norm(self.embed(x.reshape(len(x), -1, 48).transpose(0, 1))).mean(0))

    method = adapt(TokensFirst(), "actmad")
    with pytest.raises(UnsupportedModelError, match=r"'norm' returns \(16, 4, 6\) for 4 images.*layers="):
        method.prepare(source((4,), torch.float32))


def test_save_and_reset_in_mid_stream():
    """A method that was not prepared takes the moments of the one that was."""
    method, other = (adapt(make_net("bn", seed=seed), "actmad", lr=0.05) for seed in (0, 5))
    method.prepare(source(dtype=torch.float32))
    assert_goes_on_after_loading(method, other, make_stream(4, batch=5), same_options=False)


def test_wrong_options():
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "actmad", params="head")
