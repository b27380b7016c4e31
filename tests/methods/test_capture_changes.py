"""What is changed after a step was recorded reaches the next one; what a recording cannot hold is not recorded."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from contract import VARIANTS, build
from lightning_tta import UnsupportedModelError, adapt
from lightning_tta.methods.base.execution import Execution
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.components.filters import Diverse, LowLoss
from lightning_tta.methods.tent import Tent
from nets import make_net, make_stream, same
from replay import use_tape

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*normalises BatchNorm layers")]


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    use_tape(monkeypatch)
    with recording():
        yield


def agree(plain, captured, stream):
    for images in stream:
        assert same(plain(images.clone()), captured(images))
        assert same(captured.adaptable, plain.adaptable)


def is_recorded(method):
    return "recorded" in method.capture_report().values()


class _Sharp:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, logits):
        return (self.factor * logits).logsumexp(1)


class _SharpModule(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return (self.factor * logits).logsumexp(1)


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.factor = make_net("gn"), 1.0

    def forward(self, x):
        return self.factor * self.net(x)


def _patch(method):
    own = method.model.head.forward
    method.model.head.forward = lambda x: 2 * own(x)


SGD = {"lr": 0.1, "optimizer": "sgd"}
ETA = {"lr": 0.1, "entropy_margin": 0.9, "diversity_margin": 0.9}
ZERO = VARIANTS["zerosiam"][0]
CHANGES = {
    "a frozen dataclass": (
        ("meta_ttt", {"threshold": 0.4}, "bn"),
        lambda m: setattr(m, "settings", dataclasses.replace(m.settings, max_lr=5.0)),
    ),
    "an object": (("tent", SGD, "gn"), lambda m: setattr(m, "entropy", _Sharp(3.0))),
    "a module": (("tent", SGD, "gn"), lambda m: setattr(m, "entropy", _SharpModule(3.0))),
    "another filter": (("eta", ETA, "gn"), lambda m: setattr(m, "filters", [Diverse(0.9), LowLoss(0.9)])),
    "an object beside the filters": (("eta", ETA, "gn"), lambda m: setattr(m, "reliable", LowLoss(0.1))),
    "a hook on a gradient": (("tent", SGD, "gn"), lambda m: m.model.norm1.weight.register_hook(lambda g: 0 * g)),
    "a hook on a part": (("zerosiam", ZERO, "gn"), lambda m: m.predictor.register_forward_hook(lambda a, b, o: 2 * o)),
    "a forward": (("tent", SGD, "gn"), _patch),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_reach_the_next_step(what):
    case, change = CHANGES[what]
    plain, captured = build(*case), build(*case)
    plain.execution = Execution(capture=False)
    stream = make_stream(10)
    agree(plain, captured, stream[:5])
    assert is_recorded(captured)
    change(plain), change(captured)
    agree(plain, captured, stream[5:])


@pytest.mark.parametrize("make", [_Sharp, _SharpModule])
def test_values_of_an_objective_count(make):
    plain, captured = (build("tent", SGD, "gn") for _ in range(2))
    plain.execution = Execution(capture=False)
    plain.entropy, captured.entropy = make(1.0), make(1.0)
    stream = make_stream(10)
    agree(plain, captured, stream[:5])
    plain.entropy.factor = captured.entropy.factor = 3.0
    agree(plain, captured, stream[5:])


def test_an_attribute_of_the_net_counts():
    plain, captured = (adapt(_Scaled(), "tent", lr=0.1) for _ in range(2))
    plain.execution = Execution(capture=False)
    stream = make_stream(10)
    agree(plain, captured, stream[:5])
    assert is_recorded(captured)
    plain.model.factor = captured.model.factor = 3.0
    agree(plain, captured, stream[5:])
    assert is_recorded(captured)


def test_another_storage_is_recorded_anew():
    plain, captured = (build("tent", SGD, "gn") for _ in range(2))
    plain.execution = Execution(capture=False)
    stream = make_stream(10)
    agree(plain, captured, stream[:5])
    for method in (plain, captured):
        with method.hold(changed=True):
            method.model.norm1.weight.data = torch.full((8,), 2.0)
    captured(stream[5]), plain(stream[5])
    assert not is_recorded(captured)
    agree(plain, captured, stream[6:])


def test_what_is_frozen_later_is_refused():
    method = build("tent", SGD, "gn")
    stream = make_stream(6)
    for images in stream[:5]:
        method(images)
    method.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="frozen after"):
        method(stream[5])


def test_copies_in_two_precisions_keep_their_addresses():
    plain, captured = (build("tent", {"lr": 0.01}, "bn") for _ in range(2))
    plain.execution = Execution(capture=False)
    stream = make_stream(10)
    with torch.autocast("cpu", torch.bfloat16):
        agree(plain, captured, stream[:5])
    assert is_recorded(captured)
    for method in (plain, captured):
        with torch.autocast("cpu", torch.float16):
            method.predict(stream[0])
        with method.hold(changed=True), torch.no_grad():
            method.model.conv1.weight.mul_(-1.5)
    with torch.autocast("cpu", torch.bfloat16):
        agree(plain, captured, stream[5:])


class _Undeclared(Tent):
    synchronized = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.average, self._calls = torch.zeros(5), 0


class _Average(_Undeclared):
    def step(self, x):
        logits = super().step(x)
        self.average = 0.999 * self.average + 0.001 * logits.mean(0)
        return logits + self.average


class _Counter(_Undeclared):
    def step(self, x):
        self._calls += 1
        return super().step(x) * (1 + 1e-5 * self._calls)


@pytest.mark.parametrize(("kind", "name"), [(_Average, "average"), (_Counter, "_calls")])
def test_state_that_is_not_declared_is_not_recorded(kind, name):
    plain, captured = (kind(make_net("gn"), lr=0.1) for _ in range(2))
    plain.execution = Execution(capture=False)
    stream = make_stream(8)
    agree(plain, captured, stream[:2])
    with pytest.warns(UserWarning, match=f"changes '{name}', which is no declared state"):
        agree(plain, captured, stream[2:3])
    agree(plain, captured, stream[3:])


def test_capture_true_refuses_each_time_and_takes_the_step_back():
    method = _Counter(make_net("gn"), lr=0.1)
    method.execution = Execution(capture=True)
    stream = make_stream(4)
    method(stream[0]), method(stream[1])
    before = copy.deepcopy(method.adaptable)
    for images in stream[2:]:
        with pytest.raises(UnsupportedModelError, match=r"cannot be captured.*capture='auto'"):
            method(images)
        assert same(before, method.adaptable)


def test_recordings_of_old_settings_make_room():
    plain, captured = (build("tent", SGD, "gn") for _ in range(2))
    plain.execution = Execution(capture=False)
    for number, images in enumerate(make_stream(100, batch=2)):
        for method in (plain, captured):
            method.optimizers["model"].param_groups[0]["initial_lr"] = 0.1 / (1 + number // 5)
        agree(plain, captured, [images])
    assert is_recorded(captured)
    assert len(captured._capture.recordings) <= captured._capture.LIMIT
