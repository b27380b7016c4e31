"""The methods of one image and its views on a device: what they ask the host, and how much goes through one pass."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tta import ConfigError, adapt
from lightning_tta.methods.base import task
from lightning_tta.methods.components import episodes, image_episodes, room
from lightning_tta.views.augmix import ViewPlan
from nets import KINDS, make_images, make_net, max_difference, same

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = [
    ("memo", {"optimizer": "adamw"}),
    ("memo", {"optimizer": "adamw", "steps": 2, "bn_prior": 16, "loss_classes": [0, 2], "predict_classes": [1, 2]}),
    ("memo", {"optimizer": "adamw", "params": "norm", "together": True}),
    ("memo", {"optimizer": "adamw", "params": "norm", "together": True, "steps": 2, "bn_prior": 16, "kl_weight": 0.5}),
    ("zero", {"predict_classes": [1, 2]}),
    ("view_averaging", {"bn_prior": 16}),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]


@pytest.fixture
def on_a_device(monkeypatch):
    """What a net without values, and torch's fake devices, cannot do."""
    monkeypatch.setattr(task, "_check_numbers", lambda model: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # fake memory cannot be pinned
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, tensors, **_: [torch.zeros_like(t) for t in tensors])
    monkeypatch.setattr(room, "free_bytes", lambda device: None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_step_asks_the_device_for_the_seeds_alone(name, options, kind, on_a_device, monkeypatch):
    """Tensors without values: whatever mixes devices, or reads a value, raises."""
    plans, asked = {n: ViewPlan(4, "augmix_crop", (16, 16), range(n)) for n in (1, 3)}, []
    for module in (episodes, image_episodes):
        monkeypatch.setattr(module, "make_views", lambda images, views, augment, seeds: plans[len(images)](images))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            net = make_net(kind)
        method = adapt(net, name, in_place=True, views=4, **options)
        method.room.fitting = lambda *_: 16
        method.seeds = lambda images: asked.append(len(images)) or [0] * len(images)
        with method.hold(), torch.enable_grad(), method.running():
            method._batch_size = 3
            logits = method.step(torch.empty(3, 3, 16, 16, device="cuda"))
    assert (logits.shape, logits.device.type) == ((3, 5), "cuda")
    assert asked == [3]


def test_seeds_are_hashes_in_whole_numbers():
    """Written out in Python's whole numbers, which no device rounds."""
    images = make_images(2, size=5)
    method = adapt(make_net("bn"), "memo", seed=3)
    bits = images.numpy().view("int32").reshape(2, -1).tolist()
    for row, seed in zip(bits, method.seeds(images), strict=True):
        total = sum(value * (2 * place + 1) * 0x9E3779B1 for place, value in enumerate(row)) % 2**64
        assert seed == (total ^ (3 * 0x85EBCA6B)) & (2**62 - 1)


class Passes(TorchDispatchMode):
    """The sizes of the batches that convolutions see."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::convolution":
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_bytes_that_a_pass_keeps():
    """Of a net whose activations are known; parameters and buffers do not count, nor what is kept twice."""
    net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 30), nn.ReLU()).double()
    kept = [room.kept_bytes(net, torch.zeros(n, 10, dtype=torch.float64), net) for n in (1, 2, 7)]
    assert kept == [n * (10 + 20 + 30) * 8 for n in (1, 2, 7)]  # input, tanh (of both layers around it), relu


@pytest.mark.parametrize("autocast", [False, True])
def test_the_number_that_fits(autocast):
    net = nn.Sequential(nn.Linear(10, 20), nn.Tanh()).double()
    measure, x = room.Room(), torch.zeros(3, 10, dtype=torch.float64)
    each = (10 + 20) * 8 + room.MAKING * 4 * 10
    for fits, expected in ((0.9, 1), (1.1, 1), (7.9, 4), (8.1, 8), (1000, 512)):
        measure = room.Room()
        measure.free = lambda device, fits=fits: int(fits * each / room.MARGIN)
        assert measure.fitting(net, x, net, "net") == expected
        measure.free = lambda device: 10**12  # what is free later changes nothing: equal batches are split equally
        with torch.no_grad():
            assert measure.fitting(net, x[:1], net, "net") == expected
    with torch.inference_mode():
        assert measure.fitting(net, torch.zeros(3, 10, dtype=torch.float64), net, "another kind") > 10**6
    assert room.Room().fitting(net, torch.zeros(1, 3, 224, 224), net, "net") == 128  # a CPU is not asked


SPLIT = [
    ("memo", {"params": "all"}),
    ("memo", {"params": "all", "bn_prior": 16, "optimizer": "adam"}),
    ("memo", {"params": "norm", "together": True}),
    ("memo", {"params": "norm", "together": True, "bn_prior": 16}),
    ("zero", {}),
    ("view_averaging", {}),
    ("view_averaging", {"bn_prior": 16}),
]


@pytest.mark.parametrize("kind", ["bn", "gn", "user"])
@pytest.mark.parametrize(("name", "options"), SPLIT)
@pytest.mark.parametrize("fits", [1, 3, 8, 17, 10**4])
def test_memory_changes_no_number(name, options, kind, fits):
    """Whatever is free, results are those of a pass over all; views whose statistics are common stay together."""
    net, images = make_net(kind).double(), make_images(5, dtype=torch.float64)
    method, whole = (adapt(net, name, views=6, augment="crop_flip", **options) for _ in range(2))
    common = options.get("bn_prior") is not None and kind != "gn"
    method.room.free = lambda device: 1
    method.room.fitting = lambda *_: fits
    method(images)
    with Passes() as passes:
        logits = method(images)
    assert max_difference(logits, whole(images)) < 1e-9
    assert max_difference(method.predict(images), whole.predict(images)) < 1e-9
    together = name != "memo" or options["params"] == "norm"
    expected = max(1, fits // 6) * 6 if fits >= 6 else 6 if common else fits
    assert max(passes.sizes) == min(expected, 30 if together else 6)


def test_a_measured_bound_is_kept():
    """From bytes to passes: the real count of what a pass keeps, with as much memory as three images need."""
    net, images = make_net("gn"), make_images(8)
    method = adapt(net, "memo", views=6, params="norm", together=True, augment="crop_flip")
    each = [room.kept_bytes(method.pass_of_rows, images[:1].expand(n, -1, -1, -1), method.model) for n in (1, 2)]
    method.room.free = lambda device: int(19 * (each[1] - each[0] + room.MAKING * 4 * 3 * 16 * 16) / room.MARGIN)
    expected = adapt(net, "memo", views=6, params="norm", together=True, augment="crop_flip")(images)
    with Passes() as passes:
        assert max_difference(method(images), expected) < 1e-5
    assert max(passes.sizes) == 12  # 16 samples fit, rounded to a power of two: two images of six views
    assert copy.deepcopy(method).room is not method.room


# Steps that are not finite ------------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Its logits are infinite for images with a bright spot, in one of the steps."""

    def __init__(self, net, at, steps):
        super().__init__()
        self.net, self.at, self.steps, self.passes = net, at, steps, 0

    def forward(self, x):
        logits = self.net(x)
        if not torch.is_grad_enabled():
            return logits
        self.passes += 1
        bright = (x.amax((1, 2, 3)) > 1.05)[:, None] & ((self.passes - 1) % self.steps == self.at)
        return torch.where(bright, torch.inf, logits)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("options", [{"params": "all"}, {"params": "norm"}, {"params": "norm", "together": True}])
def test_an_image_whose_step_is_not_finite_is_predicted_as_the_source(options, at, skips):
    net, images = make_net("gn").double(), make_images(4, dtype=torch.float64)
    options = {"views": 5, "augment": "none", "steps": 2, "optimizer": "adam", "lr": 0.05, **options}
    expected = adapt(net, "memo", **options)(images)
    images[3, 0, 3, 3] = 1.1  # the last one: after a step that is left out, passes would be miscounted
    with torch.no_grad():
        expected[3] = net(images)[3]
    method = adapt(Fragile(net, at, 2), "memo", **options)
    method.skips_when_empty = skips
    before = copy.deepcopy(method.state_dict())
    for _ in range(2):
        method.model.passes = 0
        assert max_difference(method(images), expected) < 1e-9
        assert method.stats["skipped_steps"] == 1
        assert same(method.state_dict(), before)
    assert not same(expected[1], net(images)[1].detach())


def test_stale_moments_do_not_learn_from_a_step_that_is_not_finite():
    net, images = make_net("gn").double(), make_images(3, dtype=torch.float64)
    options = {"views": 5, "augment": "none", "steps": 2, "optimizer": "adam", "optimizer_state": "stale", "lr": 0.05}
    bright = images.clone()
    bright[1, 0, 3, 3] = 1.1
    method, other = (adapt(n, "memo", **options) for n in (Fragile(net, 1, 2), net))
    method.skips_when_empty = False
    found = method(bright)[2]
    other(images[:1])
    once = adapt(net, "memo", **{**options, "steps": 1})
    once.load_state_dict({**other.state_dict()})
    once(bright[1:2])  # the first of its steps was finite
    other.load_state_dict(once.state_dict())
    assert max_difference(found, other(images[2:])[0]) < 1e-9


def test_classes_that_the_net_does_not_have():
    for options in ({"predict_classes": [1, 5]}, {"loss_classes": [0, 5]}):
        with pytest.raises(ConfigError, match="class 5, but the net has 5"):
            adapt(make_net("gn"), "memo", views=2, **options)(make_images(1))


def test_class_positions_move_with_the_method():
    method = adapt(make_net("gn"), "memo", views=2, loss_classes=[0, 2], predict_classes=[1])
    assert {name for name, _ in method.named_buffers()} >= {"seen", "predictable"}
    assert not {"seen", "predictable"} & method.state_dict().keys()
    assert method.half().seen.dtype == torch.int64


class Detached(nn.Module):
    """A norm layer that runs, and that no gradient reaches."""

    def __init__(self, net):
        super().__init__()
        self.net, self.extra = net, nn.BatchNorm2d(3).eval()

    def forward(self, x):
        return self.net(x + self.extra(x).detach())


@pytest.mark.filterwarnings("ignore:No gradient reaches 2 of")
def test_weight_decay_leaves_alone_what_does_not_learn():
    net, images = Detached(make_net("gn")).double(), make_images(3, dtype=torch.float64)
    options = {"views": 4, "params": "norm", "lr": 0.1, "weight_decay": 0.5, "augment": "crop_flip"}
    apart, together = (adapt(net, "memo", together=flag, **options)(images) for flag in (False, True))
    assert max_difference(together, apart) < 1e-9
