"""Methods over pixels and over values: references in float64, invariants, errors."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_tta import ConfigError, NotPreparedError, UnsupportedModelError, adapt, available_methods
from lightning_tta.backbones.values import PixelModel
from lightning_tta.views.jitter import jitter

PIXELS = sorted(name for name, kind in available_methods().items() if "pixels" in kind.tasks)
VALUES = sorted(name for name, kind in available_methods().items() if "regression" in kind.tasks)
OPTIONS = {
    "tent": {"lr": 0.02},
    "come": {"lr": 0.02},
    "eta": {"lr": 0.05, "entropy_margin": 0.95, "diversity_margin": 0.99},
    "zerosiam": {"lr": 0.05, "predictor_lr": 0.05, "lr_batch_size": None},
    "cotta": {"lr": 0.02, "views": 2, "anchor_threshold": 1.0, "ema_decay": 0.7, "restore": 0.1},
    "actmad": {"lr": 3e-3},
}
OPTIONS["eata"] = {**OPTIONS["eta"], "fisher_alpha": 20.0}


class TinySegmenter(nn.Module):
    """Logits (B, 4, H, W) from half the resolution, as torchvision's nets: under the key 'out'."""

    def __init__(self, seed=0, kind="bn"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(6) if kind == "bn" else nn.GroupNorm(2, 6)
            self.head = nn.Conv2d(6, 4, 1)
            self.auxiliary = nn.Conv2d(6, 4, 1)
            if kind == "bn":
                self.norm.running_mean.uniform_(-0.2, 0.2)
                self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, images):
        z = self.norm(self.conv(images)).relu()
        out = F.interpolate(self.head(z), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": out, "aux": self.auxiliary(z)}


class TinyRegression(nn.Module):
    """One value (B,) of an image."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 1)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))[:, 0]


def pictures(number=3, seed=0, dtype=torch.float64):
    return torch.rand(number, 3, 8, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(name, net=None, dtype=torch.float64, task="pixels", **options):
    net = (TinySegmenter() if net is None else net).to(dtype)
    method = adapt(net, name, task=task, **{**OPTIONS.get(name, {}), **options})
    if method.needs_source:
        method.prepare([{"image": pictures(16, seed=9, dtype=dtype)}])
    return method


@pytest.mark.parametrize("name", ["tent", "zerosiam"])
def test_three_steps_over_pixels_equal_a_reference(name):
    net = TinySegmenter().double().eval()
    method = build(name, net, optimizer="sgd", momentum=0.9)
    gamma, beta = net.norm.weight.detach().clone(), net.norm.bias.detach().clone()
    h = torch.eye(6, dtype=torch.float64)
    learned = [gamma, beta, *([h] if name == "zerosiam" else [])]
    velocity = [torch.zeros_like(t) for t in learned]
    for step in range(3):
        images = pictures(seed=step)
        for tensor in learned:
            tensor.requires_grad_()
        a = F.conv2d(images, net.conv.weight, net.conv.bias, 2, 1)
        mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
        normed = (a - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        z = (normed * gamma[:, None, None] + beta[:, None, None]).relu()
        w, b = net.head.weight[:, :, 0, 0], net.head.bias

        def upsampled(features, w=w, b=b):
            small = torch.einsum("bdhw,kd->bkhw", features, w) + b[:, None, None]
            return F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)

        u, o = upsampled(z), upsampled(torch.einsum("bdhw,ed->behw", z, h))
        p, t = o.softmax(1), u.detach().softmax(1)
        loss = -(p * p.log()).sum(1).mean()
        if name == "zerosiam":
            loss = loss + ((t * (t / p).log()).sum(1) + (p * (p / t).log()).sum(1)).mean()
        gradients = torch.autograd.grad(loss, learned)
        for tensor in learned:
            tensor.requires_grad_(False)
        logits = method(images)
        torch.testing.assert_close(logits, u.detach(), rtol=0, atol=1e-10)
        assert method.stats["loss"] == pytest.approx(loss.item(), abs=1e-10)
        rates = [OPTIONS[name]["lr"]] * 2 + [0.05]
        for tensor, v, g, rate in zip(learned, velocity, gradients, rates, strict=False):
            v.mul_(0.9).add_(g)
            tensor.sub_(rate * v)
    for now, reference in zip(method.learned, learned, strict=True):
        torch.testing.assert_close(now.detach(), reference, rtol=0, atol=1e-10)


def logits_by_hand(net, images, gamma, beta):
    """Logits (B, K, H, W) with the statistics of the batch."""
    a = F.conv2d(images, net.conv.weight, net.conv.bias, 2, 1)
    normed = (a - a.mean((0, 2, 3), keepdim=True)) / (a.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    z = (normed * gamma[:, None, None] + beta[:, None, None]).relu()
    small = torch.einsum("bdhw,kd->bkhw", z, net.head.weight[:, :, 0, 0]) + net.head.bias[:, None, None]
    return F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)


def test_eata_over_pixels_equals_a_reference_with_its_penalty():
    """Pixel by pixel: filters, weights, the mean prediction, and F from two source batches of different size."""
    net = TinySegmenter().double().eval()
    options = {"lr": 0.05, "entropy_margin": 0.97, "diversity_margin": 0.98, "fisher_alpha": 3e3, "momentum": 0.0}
    method = adapt(net, "eata", task="pixels", **options)
    source = [pictures(3, seed=20), pictures(5, seed=21)]
    with pytest.raises(NotPreparedError, match="must see source data"):
        method(pictures())
    method.prepare([{"image": images, "target": torch.zeros(len(images), 8, 12)} for images in source])
    learned = [net.norm.weight.detach().clone(), net.norm.bias.detach().clone()]
    start, fisher = [t.clone() for t in learned], [0.0, 0.0]
    for images in source:
        tensors = [t.clone().requires_grad_() for t in learned]
        log_p = logits_by_hand(net, images, *tensors).log_softmax(1)
        surprise = -log_p.gather(1, log_p.argmax(1, keepdim=True)).mean()
        fisher = [f + g**2 / 2 for f, g in zip(fisher, torch.autograd.grad(surprise, tensors), strict=True)]
    for number, expected in enumerate(fisher):
        torch.testing.assert_close(method.get_buffer(f"fisher_{number}"), expected, rtol=1e-9, atol=0)
    average, bound, shares, penalties = None, 0.97 * math.log(4), [], []
    for step in range(4):
        images = pictures(seed=step)
        for tensor in learned:
            tensor.requires_grad_()
        logits = logits_by_hand(net, images, *learned)
        terms, kept = [], []
        for row in logits.movedim(1, -1).reshape(-1, 4):
            p = row.softmax(0)
            entropy, frozen = -(p * p.log()).sum(), p.detach()
            new = average is None or float(average @ frozen / average.norm() / frozen.norm()) < 0.98
            if entropy.item() < bound and new:
                terms.append(math.exp(bound - entropy.item()) * entropy)
                kept.append(frozen)
        penalty = 3e3 * sum((f * (t - s) ** 2).sum() for f, t, s in zip(fisher, learned, start, strict=True))
        loss = sum(terms) / len(terms) + penalty
        gradients = torch.autograd.grad(loss, learned)
        torch.testing.assert_close(method(images), logits.detach(), rtol=0, atol=1e-10)
        assert method.stats["loss"] == pytest.approx(loss.item(), abs=1e-10)
        assert method.stats["kept"] == pytest.approx(len(kept) / (3 * 8 * 12))
        for tensor, gradient in zip(learned, gradients, strict=True):
            tensor.requires_grad_(False)
            tensor.sub_(0.05 * gradient)
        mean = sum(kept) / len(kept)
        average = mean if average is None else 0.9 * average + 0.1 * mean
        shares.append(len(kept) / (3 * 8 * 12))
        penalties.append(penalty.item())
    for now, reference in zip(method.learned, learned, strict=True):
        torch.testing.assert_close(now.detach(), reference, rtol=0, atol=1e-10)
    assert 0 < min(shares) < 1
    assert penalties[-1] > 1e-4  # it was felt


def test_neo_takes_the_mean_over_all_positions_out():
    net = TinySegmenter().double().eval()
    method, seen = build("neo", net, center="raw"), []
    for seed in range(3):
        images = pictures(seed=seed)
        with torch.no_grad():
            z = net.norm(net.conv(images)).relu()
            seen.append(z.movedim(1, -1).reshape(-1, 6))
            center = torch.cat(seen).mean(0)
            small = net.head(z - center[:, None, None])
            expected = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(method(images), expected, rtol=0, atol=1e-10)
        with torch.no_grad():  # and so does the plain net, by its bias
            torch.testing.assert_close(method.export()(images)["out"], expected, rtol=0, atol=1e-10)


def test_neo_over_pixels_moves_towards_the_source_unless_it_is_told_otherwise():
    """By c - mu, both over all positions: the source's own images stay what they are; by the raw form they do not."""
    net = TinySegmenter().double().eval()
    method, source = adapt(net, "neo", task="pixels"), [pictures(3, seed=20), pictures(5, seed=21)]
    with pytest.raises(NotPreparedError, match="must see source data"):
        method(pictures())
    method.prepare([{"image": images} for images in source])

    @torch.no_grad()
    def features(images):
        return net.norm(net.conv(images)).relu()

    def rows(several):
        return torch.cat([features(images).movedim(1, -1).reshape(-1, 6) for images in several])

    mu = rows(source).mean(0)
    torch.testing.assert_close(method.source_mean[0], mu, rtol=0, atol=1e-12)
    raw = build("neo", net, center="raw")
    for images in source:
        last, moved = method(images), raw(images)
    with torch.no_grad():
        torch.testing.assert_close(last, net(source[1])["out"], rtol=0, atol=1e-10)
        assert (moved - net(source[1])["out"]).abs().max() > 0.01
    method.reset()
    stream = [0.5 * pictures(seed=seed) + 0.4 for seed in range(3)]
    for number, images in enumerate(stream):
        shift = rows(stream[: number + 1]).mean(0) - mu
        with torch.no_grad():
            small = net.head(features(images) - shift[:, None, None])
            expected = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(method(images), expected, rtol=0, atol=1e-10)
    assert shift.abs().max() > 0.01


def test_the_raw_form_over_pixels_is_not_judged_by_how_even_its_predictions_are():
    net = TinySegmenter()
    with torch.no_grad():  # the mean logits are 0; without the mean feature they are the bias
        mean = net.eval().norm(net.conv(pictures(8, dtype=torch.float32))).relu().mean((0, 2, 3))
        net.head.weight *= 8
        net.head.bias.copy_(-(net.head.weight[:, :, 0, 0] @ mean))
    method = adapt(net, "neo", task="pixels", center="raw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):  # 24 positions an image
            method(pictures(2, seed=seed, dtype=torch.float32))
    assert method.stats["spread"] < -0.02  # an image classifier would be warned of


def test_the_teacher_averages_views_whose_pixels_stay_in_place():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 3:6, 9:12] = 1.0
    for number in range(8):
        view = jitter(image, torch.tensor([0, number]), geometry=False, noise=False, blur=False)
        assert bool((view[..., 3:6, 9:12] > view[..., :3, :9].max()).all())
    moved = [jitter(image, torch.tensor([0, number]), noise=False, blur=False) for number in range(8)]
    assert any(float(view[0, 0, 4, 10]) < 0.5 * float(view.max()) for view in moved)
    method, images = build("cotta", dtype=torch.float32), pictures(dtype=torch.float32)
    first = method(images)
    assert method.stats["forwards"] > 3  # the views
    assert first.shape == (3, 4, 8, 12)
    assert not torch.equal(first, method(images))


@pytest.mark.parametrize("name", PIXELS)
def test_reset_and_state_over_pixels_are_exact(name):
    method = build(name, dtype=torch.float32)
    stream = [pictures(seed=seed, dtype=torch.float32) for seed in range(4)]
    before = copy.deepcopy(method.state_dict())
    first = [method(images) for images in stream[:2]]
    assert first[0].shape == (3, 4, 8, 12)
    middle = copy.deepcopy(method.state_dict())
    rest = [method(images) for images in stream[2:]]
    resumed = build(name, dtype=torch.float32)
    resumed.load_state_dict(middle)
    assert all(torch.equal(resumed(images), logits) for images, logits in zip(stream[2:], rest, strict=True))
    if name not in ("source", "norm"):
        fresh = build(name, dtype=torch.float32)
        assert not torch.equal(fresh(stream[2]), rest[0])
    method.reset()
    after = method.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], torch.Tensor))
    assert all(torch.equal(method(images), logits) for images, logits in zip(stream[:2], first, strict=True))


@pytest.mark.parametrize("name", PIXELS)
def test_the_exported_segmenter_predicts_alike(name):
    method, images = build(name), pictures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method(images)
        method(pictures(seed=1))
        net = method.export()
    assert type(net) is TinySegmenter
    torch.testing.assert_close(net(images)["out"], method.predict(images), rtol=0, atol=1e-10)


def test_one_image_is_a_batch_of_many_positions():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("tent")(pictures(1))


def test_nets_of_group_norm_and_plain_tensors():
    class Plain(TinySegmenter):
        def forward(self, images):
            return super().forward(images)["out"]

    dictionary, plain = build("zerosiam", TinySegmenter(kind="gn")), build("zerosiam", Plain(kind="gn"))
    for seed in range(2):
        assert torch.equal(dictionary(pictures(seed=seed)), plain(pictures(seed=seed)))


def test_the_head_is_that_whose_output_the_net_returns():
    method = build("zerosiam")
    assert method.split.name == "net.head"  # and not the auxiliary one, which comes later

    class Changed(TinySegmenter):
        def forward(self, images):
            return super().forward(images)["out"].softmax(1)

    with pytest.raises(UnsupportedModelError, match="does not end in such a convolution"):
        build("zerosiam", Changed())
    with pytest.raises(UnsupportedModelError, match=r"head='conv' is no convolution over single pixels"):
        build("zerosiam", head="conv")


def test_values_are_aligned_without_classes():
    """ActMAD brings the statistics, and so the values, of shifted images back towards those of the source."""
    net, images = TinyRegression(), pictures(16, seed=9, dtype=torch.float32)  # those that prepare() sees
    with torch.no_grad():
        net.norm.train()
        for _ in range(60):
            net(images)
    net.eval()
    shifted = (0.3 * images + 0.5).clamp(0, 1)
    truth = net(images).detach()
    before = (net(shifted).detach() - truth).abs().mean()
    for name in VALUES:
        method = build(name, net, torch.float32, "regression")
        values = [method(shifted) for _ in range(40)][-1]
        assert values.shape == (16, 1)
        assert method.stats["mean_value"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert "entropy" not in method.stats
        after = (method.predict(shifted)[:, 0] - truth).abs().mean()
        assert (after == before) if name == "source" else (after < 0.7 * before), name


class Returns(nn.Module):
    """A segmenter whose output a function has changed."""

    def __init__(self, change):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.change = change

    def forward(self, images):
        return self.change(self.head(self.norm(self.conv(images)).relu()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda z: {"seg": z, "aux": z}, r"a dict with keys 'seg', 'aux' for images \(3, 3, 8, 12\)"),
        (lambda z: {"out": None}, "a NoneType as 'out'"),
        (lambda z: {"out": z.argmax(1)}, r"a tensor of shape \(3, 8, 12\) as 'out'"),
        (lambda z: (z, z), r"a tuple of a tensor of shape \(3, 4, 8, 12\), a tensor"),
        (lambda z: z[:, :1], r"\(3, 1, 8, 12\) for images .* return two logits"),
        (lambda z: z[:2], r"\(2, 4, 8, 12\) for images \(3, 3"),
        (lambda z: z.movedim(1, -1), r"are the classes last\? .*logits.movedim\(-1, 1\)"),
        (lambda z: {"out": z.movedim(1, -1)}, r"as 'out' for images .*: are the classes last"),
    ],
)
def test_what_is_no_logits_of_pixels_is_described(change, says):
    with pytest.raises(UnsupportedModelError, match=says):
        adapt(Returns(change), "tent", task="pixels")(pictures(dtype=torch.float32))


def test_logits_of_pixels_in_a_dict_and_of_less_than_the_images_resolution():
    images = pictures(dtype=torch.float32)
    plain = adapt(Returns(lambda z: z), "tent", task="pixels")(images)
    assert torch.equal(adapt(Returns(lambda z: {"logits": z}), "tent", task="pixels")(images), plain)
    assert adapt(Returns(lambda z: z[..., ::4, ::4]), "tent", task="pixels")(images).shape == (3, 4, 2, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [(lambda z: z.softmax(1), "probabilities already"), (lambda z: z.log_softmax(1), "log-probabilities"),
     (lambda z: (9 * z).sigmoid(), "lie in [0, 1]"), (lambda z: z, None)],
)  # fmt: skip
def test_pixels_of_a_net_with_a_softmax_at_its_end_are_warned_of(change, says):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapt(Returns(change), "tent", task="pixels")(pictures(dtype=torch.float32))
    texts = [str(each.message) for each in caught]
    assert [says in text for text in texts] == [True] * (says is not None)


def test_a_segmenter_without_a_task_is_told_of_it():
    for name in ("zerosiam", "neo", "tent"):
        with pytest.raises(UnsupportedModelError, match="task='pixels'"):
            adapt(TinySegmenter(), name)(pictures(dtype=torch.float32))


def test_what_has_no_classes_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match=r"no classes, of which it could take entropies.*'actmad'"):
        build("tent", TinyRegression(), task="regression")
    with pytest.raises(UnsupportedModelError, match="task='regression'"):
        adapt(TinyRegression(), "source")(pictures(dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match="task='pixels'"):
        adapt(TinySegmenter(), "source")(pictures(dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"logits \(B, K, H, W\) of K >= 2"):
        PixelModel(nn.Conv2d(3, 1, 1))(pictures(dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"values \(B, D\) or \(B,\)"):
        build("source", nn.Conv2d(3, 1, 1), torch.float32, "regression")(pictures(dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match="'memo' adapts on images, and the task of TinySegmenter is pixels"):
        build("memo")
    with pytest.raises(ConfigError, match="window= is for images with one class each"):
        build("tent", window=4)
