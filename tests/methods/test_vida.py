"""ViDA against plain nets in float64 whose weights are written out from the formula."""

import copy

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, adapt
from lightning_tta.methods.components import adapters
from nets import TokenViT, make_images, make_net, make_stream, max_difference, without_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"optimizer": "sgd", "momentum": 0.0, "symmetric": True, "restore": 0.0, "ranks": [1, 3], "views": 3}
MARK = ".parametrizations.weight."


class PlainViDA:
    """Student and teacher are dicts of tensors; a pass writes ``W + s1 B1 A1 + s2 B2 A2`` into a plain net."""

    def __init__(self, net, adapted, threshold, scaled="both"):
        self.net, self.threshold, self.scaled = without_running_statistics(copy.deepcopy(net)), threshold, scaled
        self.student = {name: p.detach().clone().requires_grad_() for name, p in adapted.named_parameters()}
        self.teacher = {name: p.detach().clone() for name, p in self.student.items()}
        self.low = self.high = 1.0

    def run(self, tensors, x):
        weights = {}
        for name, tensor in tensors.items():
            layer, mark, leaf = name.partition(MARK)
            if not mark:
                weights[name] = tensor
            elif leaf == "original":
                first, second = (tensors[f"{layer}{MARK}0.up{n}"] @ tensors[f"{layer}{MARK}0.down{n}"] for n in (0, 1))
                weights[f"{layer}.weight"] = tensor + (self.low * first + self.high * second).view_as(tensor)
        return torch.func.functional_call(self.net, weights, (x,))

    def __call__(self, images, views, lr, pair_lr, decay, pair_decay):
        with torch.no_grad():
            logits = torch.stack([self.run(self.teacher, view) for view in views])
            center = logits.mean(0)
            uncertainty = 0.1 * (((logits - center) ** 2).sum(0) / (len(views) - 1)).mean().item()
            unsure = uncertainty >= self.threshold
            self.low = 1 - uncertainty if unsure else 1 + uncertainty
            self.high = (2 - self.low) if self.scaled == "both" else 1.0
            target = self.run(self.teacher, images)
        t, logits = target.softmax(1), self.run(self.student, images)
        p = logits.softmax(1)
        loss = (-0.5 * (t * p.log()).sum(1) - 0.5 * (p * t.log()).sum(1)).mean()
        gradients = torch.autograd.grad(loss, list(self.student.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(self.student.items(), gradients, strict=True):
                is_pair = f"{MARK}0" in name
                weight -= (pair_lr if is_pair else lr) * gradient
                rate = pair_decay if is_pair else decay
                self.teacher[name].copy_(rate * self.teacher[name] + (1 - rate) * weight)
        return target, loss.item(), uncertainty


@pytest.mark.parametrize("scaled", ["both", "low"])
@pytest.mark.parametrize("kind", ["bn", "ln"])
def test_four_steps(kind, scaled, views):
    net = make_net(kind).double()
    trial = adapt(net, "vida", **OPTIONS, lr=0.2, pair_lr=0.5, ema_decay=0.6, pair_decay=0.3)
    stream, sizes = make_stream(4, batch=6, dtype=torch.float64), []
    for images in stream:
        trial(images)
        sizes.append(trial.stats["uncertainty"])
    threshold = sorted(sizes)[1] + 1e-6  # some batches are below it, some above
    views.clear()
    rates = {"lr": 0.2, "pair_lr": 0.5}
    method = adapt(net, "vida", **OPTIONS, **rates, ema_decay=0.6, pair_decay=0.3, threshold=threshold, scaled=scaled)
    reference = PlainViDA(net, method.model, threshold, scaled)
    sides = set()
    for images in stream:
        before = method.predict(images, statistics="batch")
        logits = method(images)
        target, loss, uncertainty = reference(images, views[-3:], **rates, decay=0.6, pair_decay=0.3)
        sides.add(uncertainty >= threshold)
        assert max_difference(logits, target) < 1e-9
        assert abs(method.stats["loss"] - loss) < 1e-9
        assert abs(method.stats["uncertainty"] - uncertainty) < 1e-9
        assert before.shape == logits.shape
        for name, p in method.model.named_parameters():
            assert max_difference(p.detach(), reference.student[name].detach()) < 1e-9, name
            assert max_difference(method.teacher.weights()[name], reference.teacher[name]) < 1e-9, name
        for name, module in adapters.adapters_of(method.model):
            assert (
                max_difference(module.scales, torch.tensor([reference.low, reference.high], dtype=torch.float64)) < 1e-9
            ), name
    assert sides == {False, True}
    assert any(reference.student[n].abs().max() > 1e-3 for n in reference.student if ".up1" in n)


def test_where_the_pairs_go():
    attention = adapt(TokenViT(5).eval(), "vida", **OPTIONS)
    assert {name for name, _ in adapters.adapters_of(attention.model)} == {
        f"blocks.{number}.qkv{MARK}0" for number in range(3)
    }
    everywhere = adapt(make_net("bn"), "vida", **OPTIONS)
    assert {name for name, _ in adapters.adapters_of(everywhere.model)} == {f"conv{n}{MARK}0" for n in (1, 2)}
    module = next(module for _, module in adapters.adapters_of(adapt(make_net("bn"), "vida").model))
    assert [tuple(p.shape) for p in module.parameters()] == [(1, 27), (8, 1), (8, 27), (8, 8)]  # no rank above a side
    assert abs(module.down1.std().item() * 128**2 - 1) < 0.2
    assert abs(module.down0.std().item() - 1) < 0.4
    assert set(attention.optimizers) == {"model", "pairs"}


def test_pairs_of_the_source_are_kept():
    net = make_net("gn")
    adapters.KINDS["vida"](net, ranks=[1, 2], targets=None)
    nn.init.normal_(net.conv1.parametrizations.weight[0].up0, std=0.3)
    method = adapt(net, "vida", **OPTIONS)
    assert torch.equal(method.model.conv1.parametrizations.weight[0].up0, net.conv1.parametrizations.weight[0].up0)
    with torch.no_grad():
        assert max_difference(method.predict(make_images(4)), net(make_images(4))) < 1e-6
    with pytest.raises(ConfigError, match="select: 'vida'"):
        adapt(make_net("gn"), "vida", select="lora")


def test_export_has_the_scales_as_they_are():
    net = make_net("gn")
    method = adapt(net, "vida", **{**OPTIONS, "lr": 0.1, "pair_lr": 0.5, "ema_decay": 0.5, "pair_decay": 0.2})
    for images in make_stream(3):
        method(images)
    plain = method.export()
    assert plain.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        assert max_difference(plain(images), method.predict(images)) < 1e-5
        assert max_difference(plain(images), net(images)) > 1e-3


def test_a_step_that_is_not_taken_leaves_the_scales():
    method = adapt(make_net("gn"), "vida", **OPTIONS)
    method(make_images(4))
    before = {name: value.clone() for name, value in method.adaptable.items()}
    with method.hold(changed=True), torch.no_grad():
        weight = method.model.head.weight
        kept = weight.clone()
        weight.fill_(float("inf"))
    method(make_images(4, seed=3))
    with method.hold(changed=True), torch.no_grad():
        weight.copy_(kept)
    assert all(torch.equal(value, before[name]) for name, value in method.adaptable.items())
