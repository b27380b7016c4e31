"""DeYO against a reference written with plain torch, sample by sample; the shuffles."""

import copy
import math

import pytest
import torch

from lightning_tta import ConfigError, adapt
from lightning_tta.views.augmix import permute_patches
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_account
from plain import FROZEN, TOLERANCE, PlainMethod, assert_goes_on_after_loading, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")
MARGIN = {"bn": 0.8, "gn": 0.8, "ln": 0.65, "user": 0.82}


def plain_shuffle(image, patches, order):
    """One image (C, H, W), patch by patch, row by row: the new i-th patch is the old ``order[i]``-th."""
    side = image.shape[-1] // patches
    result = torch.empty_like(image)
    for new, old in enumerate(order):
        (y, x), (v, u) = divmod(new, patches), divmod(old, patches)
        result[:, y * side : (y + 1) * side, x * side : (x + 1) * side] = image[
            :, v * side : (v + 1) * side, u * side : (u + 1) * side
        ]
    return result


def plain_orders(seed, count, samples, patches):
    """SplitMix64 of the seed, then of the count, then of the position, in Python's whole numbers; sorted as signed."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    orders = []
    for sample in range(samples):
        values = [mix(mix(mix(seed) + count) + sample * patches + i) for i in range(patches)]
        orders.append(sorted(range(patches), key=lambda i: (values[i] + 2**63) % 2**64))
    return orders


class PlainDeYO(PlainMethod):
    """Loops over samples."""

    def __init__(self, net, kind, lr, entropy_margin, plpd_threshold, patches=4, seed=0, weight_margin=0.4):
        super().__init__(net, lr, frozen=FROZEN[kind])
        self.entropy_margin, self.plpd_threshold, self.patches = entropy_margin, plpd_threshold, patches
        self.seed, self.shuffles, self.weight_margin = seed, 0, weight_margin

    def __call__(self, images):
        logits = self.net(images)
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        entropies = -(p * p.log()).sum(1)
        log_k = math.log(logits.shape[1])
        sure = [i for i in range(len(images)) if entropies[i].item() < self.entropy_margin * log_k]
        report = {"sure": len(sure), "kept": 0, "loss": None, "passes": (1 + bool(sure), 0)}
        if not sure:
            return logits.detach(), report
        orders = plain_orders(self.seed, self.shuffles, len(images), self.patches**2)
        self.shuffles += 1
        with torch.no_grad():
            shuffled = torch.stack([plain_shuffle(images[i], self.patches, orders[i]) for i in sure])
            q = self.net(shuffled).softmax(1)
        terms = []
        for row, i in enumerate(sure):
            label = p[i].argmax().item()
            plpd = (p[i, label] - q[row, label]).item()
            if plpd > self.plpd_threshold:
                weight = math.exp(self.weight_margin * log_k - entropies[i].item()) + math.exp(plpd)
                terms.append(weight * entropies[i])
        if terms:
            loss = sum(terms) / len(terms)
            report |= {"kept": len(terms), "loss": loss.item(), "passes": (2, 1)}
            self.sgd.step(self.sgd.gradients(loss))
        return logits.detach(), report


def assert_same_state(method, reference):
    assert {n.removeprefix("model.") for n in method.adaptable} == set(reference.weights)
    assert_same_sgd(method, reference.sgd)
    assert method.memory["shuffles"].tolist() == [reference.seed, reference.shuffles]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches", "seed", "weight"), [(4, 0, {}), (8, 7, {"weight_margin": 0.7})])
def test_five_steps(kind, patches, seed, weight):
    net = make_net(kind).double()
    options = {"lr": 0.05, "entropy_margin": MARGIN[kind], "plpd_threshold": 0.02, "patches": patches, "seed": seed}
    options |= weight
    method, reference = adapt(net, "deyo", optimizer="sgd", **options), PlainDeYO(net, kind, **options)
    reports = []
    for images in make_stream(5, batch=8, dtype=torch.float64):
        expected, report = reference(images)
        assert (
            max_difference(method.predict(images, statistics="batch"), expected) < TOLERANCE
        )  # logits come from before the step
        assert max_difference(method(images), expected) < TOLERANCE
        stats = method.stats
        assert (stats["forwards"], stats["backwards"]) == report["passes"]
        assert stats["kept_by_entropy"] == pytest.approx(report["sure"] / 8)
        assert stats["kept"] == pytest.approx(report["kept"] / 8)
        assert stats.get("loss", 0) == pytest.approx(report["loss"] or 0, abs=TOLERANCE)
        assert_same_state(method, reference)
        reports.append(report)
    assert 0 < sum(r["kept"] for r in reports) < sum(r["sure"] for r in reports) < 40
    assert reference.sgd.moved() > 1e-4


def shuffle_patches(images, patches, generator):
    return permute_patches(images, patches, torch.rand(len(images), patches**2, generator=generator).argsort(1))


@pytest.mark.parametrize(("patches", "size"), [(1, 16), (2, 16), (4, 16), (4, 32)])
def test_shuffle_against_a_loop(patches, size):
    images = make_images(5, size=size)
    shuffled = shuffle_patches(images, patches, torch.Generator().manual_seed(3))
    orders = torch.rand(5, patches**2, generator=torch.Generator().manual_seed(3)).argsort(1).tolist()
    for image, result, order in zip(images, shuffled, orders, strict=True):
        assert torch.equal(result, plain_shuffle(image, patches, order))
    assert torch.equal(shuffled.flatten(2).sort().values, images.flatten(2).sort().values)
    if patches == 4:
        assert len(set(map(tuple, orders))) == 5  # each image its own
        assert all(not torch.equal(a, b) for a, b in zip(images, shuffled, strict=True))


def test_shuffle_of_other_sizes():
    images = make_images(3)[:, :, :14, :15].contiguous(memory_format=torch.channels_last)
    shuffled = shuffle_patches(images, 4, torch.Generator().manual_seed(0))
    assert shuffled.shape == images.shape
    assert shuffled.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= shuffled.min() <= shuffled.max() <= 1
    torch.testing.assert_close(shuffled.mean((2, 3)), images.mean((2, 3)), atol=0.05, rtol=0)
    with pytest.raises(ConfigError, match="patches=17 does not fit images of 16 x 16"):
        shuffle_patches(make_images(1), 17, torch.Generator())


def test_shuffles_depend_on_the_seed_and_go_on():
    images = make_images(8, dtype=torch.float64)
    options = {"entropy_margin": None, "plpd_threshold": 1.0, "patches": 2}  # never a step
    values = []
    for seed in (0, 0, 1):
        method = adapt(make_net("gn").double(), "deyo", seed=seed, **options)
        values.append([])
        for _ in range(3):
            method(images)
            assert method.stats["kept"] == method.stats["backwards"] == 0
            values[-1].append(method.stats["plpd"])
    assert values[0] == values[1]
    assert values[0] != values[2]
    assert len(set(values[0])) == 3
    method.reset()
    method(images)
    assert method.stats["plpd"] == values[2][0]


def test_number_of_shuffles_is_saved():
    options = {"lr": 0.1, "optimizer": "sgd", "entropy_margin": 0.95, "plpd_threshold": -0.1, "patches": 2}
    method = adapt(make_net("gn"), "deyo", **options)
    other = adapt(make_net("gn", seed=5), "deyo", seed=9, **options)
    assert_goes_on_after_loading(method, other, make_stream(4, batch=8), same_options=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 1000])
@pytest.mark.parametrize("batch", [1, 4])
def test_nothing_sure(kind, num_classes, batch):
    method = adapt(make_net(kind, num_classes), "deyo", entropy_margin=1e-9)
    before = copy.deepcopy(method.state_dict())
    images = make_images(batch)
    expected = method.predict(images, statistics="batch")
    assert torch.equal(method(images), expected)
    assert method.stats["kept"] == method.stats["kept_by_entropy"] == method.stats["backwards"] == 0
    assert method.stats["forwards"] == 1
    assert same(without_account(method.state_dict()), without_account(before))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_kept(kind):
    method = adapt(make_net(kind), "deyo", entropy_margin=None, plpd_threshold=1.0)
    before = {name: tensor.detach().clone() for name, tensor in method.adaptable.items()}
    images = make_images(4)
    expected = method.predict(images, statistics="batch")
    assert torch.equal(method(images), expected)
    assert (method.stats["kept_by_entropy"], method.stats["kept"]) == (1, 0)
    assert (method.stats["forwards"], method.stats["backwards"]) == (2, 0)
    assert same(dict(method.adaptable), before)


def test_the_second_pass_has_no_gradient_and_a_fixed_size():
    """All images go through it, so that its shape does not depend on the data; unsure ones weigh nothing."""
    net = make_net("gn").double()
    method = adapt(net, "deyo", entropy_margin=0.8, plpd_threshold=-1.0)
    passes = []
    method.model.register_forward_hook(lambda module, args, output: passes.append((len(output), output.requires_grad)))
    method(make_images(8, dtype=torch.float64))
    assert passes == [(8, True), (8, False)]
    assert 0 < method.stats["kept_by_entropy"] < 1
