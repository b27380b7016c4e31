"""T3A against lists of supports, class by class; the bank's size, its memory and what it keeps."""

import copy

import pytest
import torch

from lightning_tta import ConfigError, adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference, same
from plain import assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-10  # float64


def modest_net(kind, num_classes=5):
    """A net whose classifier rows are not more confident than every image, so that they can be dropped."""
    net = make_net(kind, num_classes).double()
    with torch.no_grad():
        net.head.weight.mul_(0.1)
    return net


def plain_entropy(u):
    p = (u - u.max()).exp() / (u - u.max()).exp().sum()
    return -sum(float(q) * float(q.log()) for q in p if q > 0)


class PlainT3A:
    """A list of (entropy, age, direction) for each class, sorted and cut at every batch."""

    def __init__(self, net, filter_k):
        self.net, self.filter_k, self.age = net, filter_k, 0
        weight, bias = net.head.weight.detach(), net.head.bias.detach()
        self.bank = [[] for _ in weight]
        for k, row in enumerate(weight):
            self.add(k, plain_entropy(weight @ row + bias), row)

    def add(self, k, h, z):
        self.age += 1
        self.bank[k].append((h, self.age, z / z.norm()))

    def scores(self, z):
        sums = [torch.stack([direction for *_, direction in entries]).sum(0) for entries in self.bank]
        return torch.stack([z @ (c / c.norm()) for c in sums], 1)

    def __call__(self, images):
        with torch.no_grad():
            features = self.net.features(images)
            for z in features:
                u = self.net.head.weight @ z + self.net.head.bias
                self.add(int(u.argmax()), plain_entropy(u), z)
            self.bank = [sorted(entries, key=lambda entry: entry[:2])[: self.filter_k] for entries in self.bank]
            return self.scores(features)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filter_k", [1, 2, 3, 50, None])
@pytest.mark.parametrize("num_classes", [2, 5, 40])
def test_five_batches(kind, filter_k, num_classes):
    net = modest_net(kind, num_classes)
    method, reference = adapt(net, "t3a", filter_k=filter_k), PlainT3A(net, filter_k)
    for number, size in enumerate((6, 1, 9, 4, 12)):
        images = make_images(size, seed=number, dtype=torch.float64)
        assert max_difference(method(images), reference(images)) < TOLERANCE
        assert (method.stats["forwards"], method.stats["backwards"]) == (1, 0)
        if filter_k is not None:
            assert method.stats["supports"] == sum(map(len, reference.bank))
            for k, entries in enumerate(reference.bank):
                kept = method.entropies[k][: len(entries)]
                expected = torch.tensor([h for h, *_ in entries], dtype=torch.float64)
                assert max_difference(kept, expected) < TOLERANCE
                assert max_difference(method.supports[k][: len(entries)], torch.stack([z for *_, z in entries])) < 1e-12
    assert {len(entries) for entries in reference.bank} != {1} or filter_k == 1
    ages = [age for entries in reference.bank for _, age, _ in entries]
    if (filter_k, num_classes) != (1, 2):  # there, no image is more confident than the rows
        assert max(ages) > num_classes  # some images came in
    if filter_k == 1:
        assert min(ages) <= num_classes  # and some rows stayed
    probe = make_images(3, seed=77, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.scores(net.features(probe))
    assert max_difference(method.predict(probe), expected) < TOLERANCE  # adds nothing
    assert max_difference(method.predict(probe), expected) < TOLERANCE


def test_all_is_all():
    net, stream = make_net("gn").double(), make_stream(4, dtype=torch.float64)
    runs = {k: [adapt(net, "t3a", filter_k=k), []] for k in (None, -1, 100, 2)}
    for method, logits in runs.values():
        logits.extend(method(images) for images in stream)
    assert same(runs[None][1], runs[-1][1])
    for a, b in zip(runs[None][1], runs[100][1], strict=True):  # 21 supports a class at most: nothing is dropped
        assert max_difference(a, b) < TOLERANCE
    assert max_difference(runs[None][1][-1], runs[2][1][-1]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filter_k", [2, 20, None])
def test_without_images_it_is_the_normalised_classifier(kind, filter_k):
    net, images = make_net(kind).double(), make_images(6, dtype=torch.float64)
    weight = net.head.weight.detach()
    with torch.no_grad():
        expected = net.features(images) @ (weight / weight.norm(dim=1, keepdim=True)).T
    method = adapt(net, "t3a", filter_k=filter_k)
    assert max_difference(method.predict(images), expected) < 1e-12
    assert max_difference(method(images), expected) > 1e-3
    method.reset()
    assert max_difference(method.predict(images), expected) < 1e-12


def test_a_confident_row_gives_way_to_a_more_confident_image():
    net, images = modest_net("gn"), make_images(30, dtype=torch.float64)
    method = adapt(net, "t3a", filter_k=1)
    rows = method.sums.clone()
    with torch.no_grad():
        start, p = method.entropies[:, 0].clone(), net(images).softmax(1)
    method(images)
    own = [-(p * p.log()).sum(1)[p.argmax(1) == k] for k in range(5)]
    best = torch.stack([min([start[k], *own[k]]) for k in range(5)])
    assert max_difference(method.entropies[:, 0], best) < TOLERANCE
    moved = (method.sums - rows).abs().amax(1) > 1e-6
    assert torch.equal(moved, best < start - 1e-12)
    assert moved.any()
    assert not moved.all()


@pytest.mark.parametrize("filter_k", [1, 3, None])
def test_save_and_reset_in_mid_stream(filter_k):
    method, other = (adapt(make_net("bn", seed=seed), "t3a", filter_k=filter_k) for seed in (0, 5))
    assert_goes_on_after_loading(method, other, make_stream(5, batch=7))


def test_memory_is_bounded_and_known_from_the_start():
    for filter_k, floats in ((None, 5 * 12), (8, 5 * 12 + 5 * 8 * 13)):
        method = adapt(make_net("gn"), "t3a", filter_k=filter_k)
        for images in (None, *make_stream(4, batch=16)):
            if images is not None:
                method(images)
            assert sum(t.numel() for t in method.adaptable.values()) == floats
        extra = method.get_extra_state()["source"]
        assert sum(t.numel() for t in extra.values()) <= 2 * 5 * 12 + 5 * 8  # not a second bank


def test_a_bank_of_another_size_is_refused():
    for own, other in ((None, 4), (8, 4), (4, 1)):
        method, given = adapt(make_net("gn"), "t3a", filter_k=own), adapt(make_net("gn", seed=1), "t3a", filter_k=other)
        given(make_images(8))
        before = copy.deepcopy(method.state_dict())
        with pytest.raises(ConfigError, match="does not fit"):
            method.load_state_dict(given.state_dict(), strict=False)
        assert same(method.state_dict(), before)


def test_head_without_bias_and_thousand_classes():
    net = make_net("gn", 1000)
    net.head.bias = None
    method = adapt(net, "t3a", filter_k=20)
    for images in make_stream(3, batch=16):
        logits = method(images)
        assert logits.shape == (16, 1000)
        assert torch.isfinite(logits).all()
    assert 1000 < method.stats["supports"] <= 1048


def test_equal_images_keep_the_oldest():
    net = make_net("gn").double()
    image = make_images(1, dtype=torch.float64)
    method, reference = adapt(net, "t3a", filter_k=2), PlainT3A(net, 2)
    for images in (image, image.repeat(5, 1, 1, 1), image):
        assert max_difference(method(images), reference(images)) < TOLERANCE


def test_autocast_does_not_round_the_bank():
    """The features may be rounded; what is made of them is that of float32."""
    net, images = make_net("gn"), make_images(64)
    method, seen = adapt(net, "t3a", filter_k=None), []
    method.split.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = method(images)
        classes = net.head(seen[-1]).argmax(1)
    features = seen[-1]
    sums = torch.nn.functional.normalize(net.head.weight.detach())
    sums = sums.index_add(0, classes, torch.nn.functional.normalize(features))
    assert method.sums.dtype == scores.dtype == torch.float32
    assert max_difference(method.sums, sums) < 1e-5
    assert max_difference(scores, features @ torch.nn.functional.normalize(sums).T) < 1e-5


@pytest.mark.parametrize("filter_k", [0, -2, 1.5, "all", True])
def test_wrong_options(filter_k):
    with pytest.raises(ConfigError, match=r"filter_k must be .*; got"):
        adapt(make_net("bn"), "t3a", filter_k=filter_k)
