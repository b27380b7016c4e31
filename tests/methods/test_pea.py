"""PEA against loops over blocks, groups and vectors in plain torch and float64; what it keeps, and what it survives."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_tta import ConfigError, DataError, UnsupportedModelError, adapt
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.components.roots import inverse_root, iterated, root
from nets import make_images, make_net, make_stream, max_difference, same
from plain import assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, dim=-1))
        return x + self.mlp(x)


class ViT(nn.Module):
    """Four patches and a class token; ``pool``: the head reads the mean of all tokens."""

    def __init__(self, width=12, depth=3, pool=False):
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, width, 8, stride=8), nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head, self.pool = nn.LayerNorm(width), nn.Linear(width, 5), pool

    def embed(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)

    def classify(self, x):
        return self.head(self.norm(x).mean(1) if self.pool else self.norm(x)[:, 0])

    def forward(self, x):
        return self.classify(self.blocks(self.embed(x)))


def make_vit(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = ViT(**options).double().eval()
    with torch.no_grad():
        net.head.weight.mul_(4)
        for parameter in net.blocks.parameters():
            parameter.mul_(1.5)
    return net


def parts_of(net):
    """The net as functions: one up to the output of each block, and one from the last one to the logits."""
    if isinstance(net, ViT):
        first, *rest = net.blocks
        return [lambda x: first(net.embed(x)), *rest, net.classify]
    second = [net.conv2, net.norm2]
    return [
        lambda x: net.norm1(net.conv1(x)),
        lambda x: second[1](second[0](F.silu(x))),
        lambda x: net.head(F.silu(x).mean((2, 3))),
    ]


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


class PlainPEA:
    def __init__(self, net, source, *, views, cls, size, momentum, drift_threshold, entropy_threshold):
        self.net, self.views, self.cls, self.size, self.momentum = net, views, cls, size, momentum
        self.drift_threshold, self.entropy_threshold = drift_threshold, entropy_threshold
        self.replaced = self.forgotten = 0
        *self.blocks, self.tail = parts_of(net)
        self.source = []
        x = source
        for block in self.blocks:
            x = block(x)
            self.source.append(self.moments(self.rows(x)))
        self.forget()

    def forget(self):
        self.target, self.drift, self.entropy = [None] * len(self.blocks), [None] * len(self.blocks), None

    def rows(self, x):
        """A list of vectors."""
        if x.ndim == 3:
            return [row for image in x for row in (image[:1] if self.cls else image)]
        return [image[:, i, j] for image in x for i in range(x.shape[2]) for j in range(x.shape[3])]

    def put(self, x, rows):
        x, rows = x.clone(), iter(rows)
        for image in x:
            if x.ndim == 3:
                for token in image[:1] if self.cls else image:
                    token[:] = next(rows)
            else:
                for i in range(x.shape[2]):
                    for j in range(x.shape[3]):
                        image[:, i, j] = next(rows)
        return x

    def moments(self, rows):
        mean = sum(rows) / len(rows)
        covariance = sum(torch.outer(row - mean, row - mean) for row in rows) / len(rows)
        places = torch.arange(len(mean)) // self.size
        return mean, covariance * (places[:, None] == places) + 1e-5 * torch.eye(len(mean)).double()

    def views_of(self, images):
        size = images.shape[-1]
        inner = round(0.9 * size)
        start = (size - inner) // 2
        middle = images[:, :, start : start + inner, start : start + inner]
        middle = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=False)
        return [images, middle, torch.flip(images, [3])][: self.views]

    @torch.no_grad()
    def __call__(self, images):
        x = torch.cat(self.views_of(images))
        distances, y = [], x
        for block, (mean, covariance) in zip(self.blocks, self.source, strict=True):
            y = block(y)
            m, c = self.moments(self.rows(y))
            distances.append(float((mean - m).norm() + (covariance.diag() - c.diag()).norm()))
        low, high = min(distances), max(distances)
        self.weights = [(d - low) / (high - low) for d in distances]
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.weights[number] > 1e-3:
                x = self.put(x, self.aligned(number, self.rows(x)))
        logits = sum(self.tail(x).chunk(self.views)) / self.views
        p = logits.softmax(1)
        entropy = float(-(p * p.log()).sum(1).mean())
        if self.entropy is not None and entropy > self.entropy + self.entropy_threshold:
            self.forgotten += 1
            self.forget()
        else:
            self.entropy = entropy if self.entropy is None else 0.8 * self.entropy + 0.2 * entropy
        return logits

    def aligned(self, number, rows):
        mean, covariance = self.moments(rows)
        if self.target[number] is None:
            self.target[number] = mean, covariance
        else:
            old_mean, old_covariance = self.target[number]
            drift, average = float((mean - old_mean).abs().mean()), self.drift[number]
            if average is not None and drift > self.drift_threshold * average:
                self.replaced += 1
                self.target[number] = mean, covariance
            else:
                m = self.momentum
                self.target[number] = (1 - m) * old_mean + m * mean, (1 - m) * old_covariance + m * covariance
            self.drift[number] = drift if average is None else 0.8 * average + 0.2 * drift
        (mean, covariance), (source_mean, source_covariance) = self.target[number], self.source[number]
        change = power(covariance, -0.5) @ power(source_covariance, 0.5)
        w = self.weights[number]
        return [row + w * ((row - mean) @ change + source_mean - row) for row in rows]


NETS = {
    "class token": (lambda: make_vit(), {}, True),
    "all tokens": (lambda: make_vit(pool=True), {}, False),
    "all tokens by option": (lambda: make_vit(), {"tokens": "all"}, False),
    "feature maps": (lambda: make_net("bn").double(), {}, False),
}
SIZES = (5, 4, 6, 1, 4, 3)


@pytest.mark.parametrize("decomposes", [True, False], ids=["decomposition", "iteration"])
@pytest.mark.parametrize(
    ("views", "size", "momentum", "drift_threshold", "entropy_threshold"),
    [(1, 12, 0.3, 4.0, 1.0), (3, 12, 0.02, 1.1, 9.0), (2, 4, 0.5, 9.0, 0.0)],
    ids=["plain", "drift", "entropy"],
)
@pytest.mark.parametrize("kind", NETS)
def test_six_batches(kind, views, size, momentum, drift_threshold, entropy_threshold, decomposes):
    make, more, cls = NETS[kind]
    options = {"drift_threshold": drift_threshold, "entropy_threshold": entropy_threshold}
    net, source = make(), make_images(16, seed=90, dtype=torch.float64)
    plain = PlainPEA(net, source, views=views, cls=cls, size=size, momentum=momentum, **options)
    method = adapt(net, "pea", views=views, group_size=size, momentum=momentum, **options, **more)
    method.prepare([{"image": batch} for batch in source.split(7)])
    replaced = forgotten = 0
    for number, batch in enumerate(SIZES):
        images = make_images(batch, seed=number, dtype=torch.float64) * (0.3 if number > 3 else 1)
        expected = plain(images)
        if decomposes:
            logits = method(images)
        else:
            with recording():
                logits = method(images)
        assert max_difference(logits, expected) < 1e-7
        assert method.stats["forwards"] == 2
        assert method.stats["backwards"] == 0
        replaced, forgotten = replaced + method.stats["drift_resets"], forgotten + method.stats["entropy_reset"]
        assert (replaced, forgotten) == (plain.replaced, plain.forgotten)
        assert method.value("weights").tolist() == pytest.approx(plain.weights, abs=1e-9)
        assert method.value("started").tolist() == [target is not None for target in plain.target]
        numbers = [-1.0 if value is None else value for value in (*plain.drift, plain.entropy)]
        mine = [*method.value("drift").tolist(), float(method.value("entropy"))]
        assert mine == pytest.approx(numbers, abs=1e-8)
        for place, target in enumerate(plain.target):
            if target is not None:
                assert max_difference(method.value(f"mean.{place}"), target[0]) < 1e-8
                whole = torch.block_diag(*method.value(f"covariance.{place}"))
                assert max_difference(whole, target[1]) < 1e-8
    if size == 4:
        assert plain.forgotten > 0
    elif views == 3:
        assert plain.replaced > 0
    else:
        assert (plain.replaced, plain.forgotten) == (0, 0)


@pytest.mark.parametrize("kind", NETS)
def test_what_the_source_had(kind):
    make, more, cls = NETS[kind]
    net, source = make(), make_images(30, seed=90, dtype=torch.float64)
    plain = PlainPEA(net, source[:20], views=1, cls=cls, size=99, momentum=1, drift_threshold=0, entropy_threshold=0)
    for size in (20, 7, 3):
        method = adapt(net, "pea", source_images=20, **more)
        method.prepare([{"image": batch} for batch in source.split(size)])
        for number, (mean, covariance) in enumerate(plain.source):
            assert max_difference(method.get_buffer(f"source_mean_{number}"), mean) < 1e-12
            r = method.get_buffer(f"source_root_{number}")[0]
            assert max_difference(r @ r, covariance) < 1e-12
            assert max_difference(r, r.T) < 1e-12


def test_aligned_vectors_have_the_moments_of_the_source():
    """Of the block that differs most, whose weight is 1, in the batch that its statistics are of."""
    method = adapt(make_vit(pool=True), "pea", views=1)
    method.prepare([{"image": make_images(40, seed=90, dtype=torch.float64)}])
    seen, align = {}, method.align

    def watched(number, vectors):
        seen[number] = align(number, vectors)
        return seen[number]

    method.align = watched
    method(0.5 * make_images(20, dtype=torch.float64))
    number = int(method.value("weights").argmax())
    assert method.value("weights")[number] == 1
    x = seen[number]
    r = method.get_buffer(f"source_root_{number}")[0]
    assert max_difference(x.mean(0), method.get_buffer(f"source_mean_{number}")) < 1e-10
    assert max_difference((x - x.mean(0)).T @ (x - x.mean(0)) / len(x), r @ r) < 1e-4  # up to 1e-5 on the diagonal


@pytest.mark.parametrize("views", [1, 3])
def test_predictions_keep_images_apart(views):
    method = adapt(make_vit(), "pea", views=views)
    method.prepare([{"image": make_images(40, seed=90, dtype=torch.float64)}])
    images = make_images(4, seed=50, dtype=torch.float64)
    plain = PlainPEA(
        method.model, images, views=views, cls=True, size=99, momentum=1, drift_threshold=0, entropy_threshold=0
    )
    with torch.no_grad():
        source = sum(method.model(view) for view in plain.views_of(images)) / views
    assert max_difference(method.predict(images), source) < 1e-12  # nothing was seen yet
    for batch in make_stream(3, batch=8, dtype=torch.float64):
        method(0.6 * batch)
    together = method.predict(images)
    for number in range(4):
        assert max_difference(method.predict(images[number : number + 1])[0], together[number]) < 1e-12
    assert max_difference(together, source) > 1e-2


def test_a_batch_that_overflows_changes_nothing_and_its_other_images_are_predicted():
    method = adapt(make_vit(), "pea", views=1)
    method.prepare([{"image": make_images(40, seed=90, dtype=torch.float64)}])
    images = make_images(6, dtype=torch.float64)

    def overflow(module, inputs, output):
        return torch.cat([output[:1] * torch.inf, output[1:]])

    for number in range(2):  # nothing was seen before, or something
        before, expected = copy.deepcopy(method.state_dict()), method.predict(images)
        hook = method.model.patches.register_forward_hook(overflow)
        logits = method(images)
        hook.remove()
        assert method.stats["skipped_steps"] == 1
        assert same(method.state_dict(), before)
        assert max_difference(logits[1:], expected[1:]) < 1e-9
        method(0.6 * make_images(8, seed=number, dtype=torch.float64))


def test_one_image_and_one_class_at_a_time():
    """Statistics stay finite, and so do predictions."""
    method = adapt(make_net("ln"), "pea")
    method.prepare([{"image": make_images(40, seed=90)}])
    for number in range(30):
        images = make_images(1, seed=number % 3).expand(1 + number % 2, -1, -1, -1)
        assert method(images).isfinite().all()
    assert all(value.isfinite().all() for value in method.rest.values() if value.ndim == 3)
    assert method.value("started").any()


@pytest.mark.parametrize("views", [1, 3])
def test_save_and_reset_in_mid_stream(views):
    method, other = (adapt(make_net("ln", seed=seed), "pea", views=views, momentum=0.3) for seed in (0, 5))
    for each in (method, other):
        each.prepare([{"image": make_images(20, seed=90)}])
    assert_goes_on_after_loading(method, other, make_stream(5, batch=7))


def test_memory_is_what_the_docstring_says():
    for size, floats in ((768, 12 * 12), (6, 12 * 6), (5, 12 * 4), (1, 12)):
        method = adapt(make_vit(), "pea", group_size=size)
        kept = [*method.rest.values(), *(b for name, b in method.named_buffers() if name.startswith("source_"))]
        assert sum(tensor.numel() for tensor in kept if tensor.ndim == 3) == 3 * 3 * floats


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-7)])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_roots_with_and_without_decomposition(condition, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 10, 10, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), 10, dtype=torch.float64) * torch.tensor([[1e-4], [1], [1e3]])
    matrices = (basis * values[:, None]) @ basis.mT
    expected = (basis * values[:, None] ** -0.5) @ basis.mT
    for function in (inverse_root, iterated):
        difference = (function(matrices.to(dtype)).double() - expected).flatten(1).norm(dim=1)
        assert (difference < tolerance * expected.flatten(1).norm(dim=1)).all()
    assert max_difference(root(matrices) @ root(matrices), matrices) < 1e-10


@pytest.mark.parametrize("function", [inverse_root, iterated])
def test_directions_without_variance_are_not_blown_up(function):
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-12]))
    result = function(matrix)
    assert result[1, 1] == pytest.approx(10**1.5, rel=1e-3)
    assert 0 < result[2, 2] < 2e4  # 1e6 is that of the matrix


def test_source_data_that_is_none():
    method = adapt(make_vit(), "pea")
    with pytest.raises(DataError, match="two source images or more"):
        method.prepare([])
    with pytest.raises(DataError, match="two source images or more"):
        method.prepare([{"image": make_images(1, dtype=torch.float64)}])
    with pytest.raises(DataError, match="Source batches must be dicts"):
        method.prepare([make_images(2, dtype=torch.float64)])
    assert not method.prepared


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("views", value) for value in (0, 4, 1.5)),
        *(("momentum", value) for value in (0.0, 1.1)),
        ("tokens", "first"),
        ("group_size", 0),
        ("drift_threshold", -1.0),
        ("entropy_threshold", -1.0),
        ("source_images", 1),
    ],
)
def test_wrong_options(name, value):
    with pytest.raises(ConfigError, match=name):
        adapt(make_vit(), "pea", **{name: value})


def test_there_is_no_plain_net():
    with pytest.raises(UnsupportedModelError, match="what the blocks return"):
        adapt(make_vit(), "pea").export()


class Program(nn.Module):
    """What a method predicts, as a module to export."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x):
        return self.method.infer(x)


@pytest.mark.parametrize("views", [1, 3])
def test_predictions_become_a_program_for_any_batch(views):
    method = adapt(make_vit(), "pea", views=views)
    method.prepare([{"image": make_images(40, seed=90, dtype=torch.float64)}])
    for batch in make_stream(3, batch=8, dtype=torch.float64):
        method(0.6 * batch)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Program(method), (make_images(2, dtype=torch.float64),), dynamic_shapes=shapes)
    for number in (1, 5):
        images = make_images(number, seed=number, dtype=torch.float64)
        assert max_difference(program.module()(images), method.predict(images)) < 1e-12


@pytest.mark.filterwarnings("ignore")  # of torch, that this kind of quantisation moves to another package
def test_quantised_net():
    """Linear layers of int8, without parameters; what PEA does to the blocks is as it is on the float net."""
    from torch.ao.quantization import quantize_dynamic

    net = make_vit().float()
    logits = {}
    for kind, each in (("float", net), ("int8", quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8))):
        method = adapt(each, "pea", views=1)
        assert [block.first_only for block in method.blocks] == [True] * 3
        method.prepare([{"image": make_images(40, seed=90)}])
        for batch in make_stream(3, batch=16):
            logits[kind] = method(0.6 * batch)
        state = copy.deepcopy(method.state_dict())
        expected = method(make_images(4))
        method.load_state_dict(state)
        assert same(method(make_images(4)), expected)
    with torch.no_grad():
        plain = net(0.6 * make_stream(3, batch=16)[2])
    error = (logits["int8"] - logits["float"]).norm()
    assert 0 < error < 0.3 * (logits["float"] - plain).norm()
