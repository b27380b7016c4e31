"""What a method of gradients is given: parameters by selector, features at any depth, one masked descent."""

import copy
import re

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.backbones.norms import weighted_batch_statistics
from lightning_tta.backbones.split import execution_order, features_at
from lightning_tta.methods.base import GradientMethod
from nets import KINDS, make_images, make_net, make_stream, max_difference, norm_weights, same
from plain import TOLERANCE, PlainSGD

pytestmark = pytest.mark.usefixtures("one_thread")


class Squares(GradientMethod):
    """Minimises the mean square of the logits of the samples that weigh something."""

    uses_batch_statistics = True

    def __init__(self, model, what="norm", weights=None, **options):
        super().__init__(model, **options)
        self.weights = weights
        self.learn(self.select(what))

    def step(self, x):
        logits = self.logits(x)
        self.taken = self.descend(logits.square().sum(-1), self.weights, extra=0.5 * logits.mean())
        return logits


@pytest.mark.parametrize("kind", ["gn", "ln"])
@pytest.mark.parametrize("what", ["norm", "all", r"(norm1|head)\..*"])
def test_weighted_descent_by_hand(kind, what):
    net, weights = make_net(kind).double(), torch.tensor([0.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    method = Squares(copy.deepcopy(net), what, weights, lr=0.01, optimizer="sgd")
    names = [n for n, _ in net.named_parameters() if what == "all" or re.fullmatch(what, n)]
    names = list(norm_weights(net)) if what == "norm" else names
    assert set(method.adaptable) == {f"model.{name}" for name in names}
    sgd = PlainSGD({name: net.get_parameter(name) for name in names}, 0.01)
    for images in make_stream(4, dtype=torch.float64):
        logits = net(images)
        loss = (2 * logits[1].square().sum() + 0.5 * logits[2].square().sum()) / 2.5 + 0.5 * logits.mean()
        assert max_difference(method(images), logits.detach()) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss.item(), abs=TOLERANCE)
        sgd.step(sgd.gradients(loss))
        for name in names:
            assert max_difference(method.adaptable[f"model.{name}"].detach(), sgd.tensors[name].detach()) < TOLERANCE


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("reason", ["no sample counts", "the loss is not finite"])
def test_no_step(optimizer, reason, skips):
    method = Squares(make_net("gn"), optimizer=optimizer, weight_decay=0.1)
    method.skips_when_empty = skips
    method(make_images(4))
    before = copy.deepcopy(method.state_dict())
    method.weights = torch.full((4,), 0.0 if reason == "no sample counts" else float("inf"))
    method(make_images(4, seed=1))
    assert not method.taken
    assert same(method.state_dict(), before)
    assert method.stats["skipped_steps"] == (reason != "no sample counts")
    assert method.stats["backwards"] == (reason != "no sample counts" or not skips)
    method.weights = None
    method(make_images(4, seed=2))
    assert method.taken
    assert not same(method.state_dict(), before)


def test_nesterovs_momentum_is_torchs():
    """Also in the first step, and with weight decay."""
    net = make_net("gn").double()
    method = Squares(copy.deepcopy(net), "all", lr=0.01, optimizer="nesterov", weight_decay=0.1)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=0.1, nesterov=True)
    for images in make_stream(3, dtype=torch.float64):
        method(images)
        logits = net(images)
        optimizer.zero_grad()
        (logits.square().sum(-1).mean() + 0.5 * logits.mean()).backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert max_difference(method.adaptable[f"model.{name}"].detach(), parameter.detach()) < TOLERANCE
    with pytest.raises(ConfigError, match=r"momentum must be a number in \(0, "):
        Squares(net, "all", optimizer="nesterov", momentum=0.0)


def test_moments_of_channels_last_gradients_are_right():
    """Fused kernels walk through memory: a gradient in another layout than its weight must be brought into it."""
    net = make_net("bn")
    methods = [Squares(copy.deepcopy(net), "all", lr=0.01, optimizer="adam") for _ in range(2)]
    for images in make_stream(3):
        plain = methods[0](images)
        torch.testing.assert_close(
            methods[1](images.to(memory_format=torch.channels_last)), plain, rtol=1e-3, atol=1e-4
        )
    for name, tensor in methods[0].adaptable.items():
        torch.testing.assert_close(methods[1].adaptable[name], tensor, rtol=1e-3, atol=1e-4)


def test_frozen_layers_stay_frozen_unless_asked_for():
    net = make_net("gn")
    net.norm1.requires_grad_(False)
    assert set(adapt(net, "tent").adaptable) == {"model.norm2.weight", "model.norm2.bias"}
    again = adapt(net, "tent", in_place=True)
    assert set(adapt(net, "tent", in_place=True).adaptable) == set(again.adaptable)  # of the user's flags, not ours
    assert set(again.select("norm", include_frozen=True)) == set(norm_weights(net))
    assert not any(name.startswith("model.norm1") for name in adapt(net, "cotta").adaptable)
    assert "model.conv1.weight" in adapt(net, "cotta").adaptable  # frozen by tent, not by the user
    net.norm1.requires_grad_()
    assert "model.norm1.weight" in adapt(net, "tent").adaptable  # the user thought again
    net = make_net("gn")
    net.norm1.requires_grad_(False)
    assert not any(name.startswith("model.norm1") for name in adapt(net, "cotta").adaptable)
    whole = make_net("gn").requires_grad_(False)  # for inference: says nothing of any layer
    assert set(adapt(whole, "tent").adaptable) == {f"model.{name}" for name in norm_weights(whole)}
    net.norm2.requires_grad_(False)
    net = copy.deepcopy(net)
    net.head.requires_grad_(True)
    for layer in (net.norm1, net.norm2):
        layer.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"all 4 parameters .* are frozen.*requires_grad_\(\)"):
        adapt(net, "tent")
    with pytest.raises(UnsupportedModelError, match=r"no parameter whose name matches 'stem\.\*'"):
        Squares(make_net("gn"), "stem.*")


def test_a_loss_that_does_not_depend_on_what_learns_is_refused():
    class Elsewhere(Squares):
        def step(self, x):
            self.descend(torch.ones(len(x), requires_grad=True))
            return self.logits(x)

    with pytest.raises(UnsupportedModelError, match="does not depend on what is to learn"):
        Elsewhere(make_net("gn"))(make_images(2))


class TwoTowers(nn.Module):
    """Text tower registered first, which never runs; of the vision tower the last block is registered first."""

    def __init__(self):
        super().__init__()
        self.text = nn.Sequential(*[nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(4)])
        blocks = {n: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)) for n in "dcba"}
        self.vision = nn.ModuleDict(blocks)
        self.stem, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.stem(x)
        for name in "abcd":
            x = self.vision[name](x)
        return self.head(x.mean((2, 3)))


def test_depth_is_the_order_of_execution():
    net = TwoTowers()
    order = execution_order(net)
    assert [name for name in order if re.fullmatch(r"vision\.\w", name)] == [f"vision.{n}" for n in "abcd"]
    assert not any(name.startswith("text") for name in order)
    method = adapt(net, "sar", entropy_margin=None, in_place=True)
    assert {name.split(".")[2] for name in method.adaptable} == set("abc")  # the last of what runs is frozen
    assert net.calls == 0  # nobody ran the user's net
    assert execution_order(nn.Sequential(nn.Conv3d(2, 1, 1))) is None


def test_features_at_any_depth():
    net, images = TwoTowers(), make_images(3)
    method = adapt(net, "tent", in_place=True)
    expected, x = {}, net.stem(images)
    for name in "abcd":
        x = expected[name] = net.vision[name](x)
    for at, name in ((0.25, "a"), (0.5, "b"), (0.75, "c"), (1.0, "d")):
        features, logits = method.features(images, at=at)
        assert torch.equal(features, expected[name])
        assert torch.equal(logits, net(images))
        assert features.requires_grad
    both, _ = method.features(images, at=["vision.c", "vision.a"])
    assert list(both) == ["vision.a", "vision.c"]
    assert torch.equal(both["vision.c"], expected["c"])
    z, logits = method.features(images)
    assert torch.equal(net.head(z), logits)
    with pytest.raises(UnsupportedModelError, match=r"'text\.0' of TwoTowers does not run"):
        features_at(net, images, ["text.0"])
    with pytest.raises(UnsupportedModelError, match="no module 'layer9'"):
        features_at(net, images, ["layer9"])
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_statistics_are_those_of_the_samples_that_count(kind):
    net, images = make_net(kind).double(), make_images(8, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    method = adapt(net, "tent", in_place=True)
    with torch.no_grad(), method.running():
        expected = method.logits(images[mask])
        with weighted_batch_statistics(net, mask):
            found = method.logits(images)[mask]
        assert max_difference(found, expected) < TOLERANCE
        assert torch.equal(method.logits(images[mask]), expected)  # the outer rule is back
    if kind == "bn":
        assert net.norm1.running_mean is not None


def test_groups_keep_batches_apart():
    net, stream = make_net("bn").double(), make_stream(3, dtype=torch.float64)
    method = adapt(net, "tent", in_place=True)
    with torch.no_grad(), method.running():
        expected = [method.logits(images) for images in stream]
        found = method.logits(torch.cat(stream), groups=3).chunk(3)
    for one, other in zip(found, expected, strict=True):
        assert max_difference(one, other) < TOLERANCE
