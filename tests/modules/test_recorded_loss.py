"""Recorded training steps: what a replay gives, when it is used, and when it is not.

A CPU has no CUDA graph. Its place is taken by a tape, which repeats the same operations on the same addresses. So a
step that asks the host, or bakes in what changes, is found out here too.
"""

import copy
import warnings

import pytest
import torch
from test_meta_ttt import assert_same_weights, batches, fit, module
from torch import nn

import replay
from lightning_tta import ConfigError, UnsupportedModelError
from lightning_tta.methods.base import recorder
from lightning_tta.modules.recorded_loss import RecordedLoss
from nets import max_difference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Tape(replay.Tape):
    """One that counts."""

    replays = 0

    def record(self, run, device):
        result, again = super().record(run, device)

        def counted():
            Tape.replays += 1
            again()

        return result, counted


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    monkeypatch.setattr(recorder, "make_recorder", Tape)
    monkeypatch.setattr(Tape, "replays", 0)


# In training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({"synthesis_probability": 0.5, "pseudo_domains": 2}, {}),
        ({"schedule": "chained", "learn_inner_lr": True, "source_weight_lr": 0.1}, {}),
        ({"schedule": "chained", "second_order": False}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ({"meta": False}, {}),
    ],
    ids=["alternating", "learned rates", "accumulated", "without meta"],
)
def test_a_training_by_replays_is_the_plain_one(options, trainer):
    nets = []
    for capture in (False, True):
        torch.manual_seed(0)
        model = module(capture=capture, **options).double()
        fit(model, batches(12), precision="64-true", **trainer)
        nets.append(model)
        assert not model.recorded.recordings  # given back
    assert Tape.replays >= 2 * (12 - 1 - 2 * 3) // 2
    assert_same_weights(nets[1], nets[0], 1e-12)


def test_autocast():
    nets = []
    for capture in (False, "auto"):
        torch.manual_seed(0)
        model = module(capture=capture, schedule="chained")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*cannot be recorded")
            fit(model, batches(8), precision="bf16-mixed")
        nets.append(model.backbone)
    assert Tape.replays
    assert_same_weights(nets[1], nets[0], 2e-2)


def test_where_nothing_can_be_recorded(monkeypatch):
    monkeypatch.setattr(recorder, "make_recorder", recorder.CudaGraphs)
    with pytest.raises(ConfigError, match=r"capture=True is not possible: CUDA graphs need a CUDA device.*'cpu'"):
        fit(module(capture=True), batches(1))
    with pytest.raises(ConfigError, match="capture must be True, False or 'auto'; got 'yes'"):
        module(capture="yes")
    with pytest.raises(ConfigError, match="several processes"):
        RecordedLoss(True).check(torch.device("cuda"), 2)
    RecordedLoss().check(torch.device("cuda"), 2)
    fit(module(), batches(6))


# On its own ----------------------------------------------------------------------------------------------------------


def make(capture="auto"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return net, RecordedLoss(capture)


def squares(net):
    def function(x):
        loss = net(x).square().mean()
        return loss, 2 * loss.detach()

    return function


def values(net, recorded, function, x, **options):
    loss, *scalars = recorded(net, function, [x], **options)
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [loss.detach(), *scalars, *torch.autograd.grad(3 * loss, parameters, allow_unused=True)]


def assert_right(net, recorded, x, **options):
    found, expected = (values(net, r, squares(net), x, **options) for r in (recorded, RecordedLoss(False)))
    assert max(max_difference(a, b) for a, b in zip(found, expected, strict=True)) < 1e-14


def inputs(number, count=5):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def test_follows_inputs_and_weights():
    net, recorded = make()
    for number in range(8):
        assert_right(net, recorded, inputs(number))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1)
    assert Tape.replays == 8 - 3  # two to warm up, one to record; the fourth takes both ways


def test_what_changes_gets_a_recording_of_its_own():
    net, recorded = make()
    changes = [
        lambda: None,
        lambda: net[0].requires_grad_(False),
        lambda: setattr(net[2], "weight", nn.Parameter(net[2].weight.detach() * 2)),
    ]
    for number, change in enumerate(changes, 1):
        change()
        for seed in range(6):
            assert_right(net, recorded, inputs(seed))
        assert len(recorded.recordings) == number
    for _ in range(6):
        assert_right(net, recorded, inputs(0, count=7))
        assert_right(net, recorded, inputs(0, count=7), settings="another")
    assert len(recorded.recordings) == 5
    assert not copy.deepcopy(recorded).recordings


def test_parameters_without_a_gradient_have_none():
    net, recorded = make()
    net.append(nn.Linear(2, 2))
    for number in range(6):
        found = values(net, recorded, lambda x: (net[:3](x).square().mean(),), inputs(number))
        assert found[-2:] == [None, None]
    assert Tape.replays


@pytest.mark.parametrize("capture", ["auto", True])
def test_a_recording_that_differs_is_not_used(capture):
    net, recorded = make(capture)
    steps = iter(range(100))

    def drifts(x):  # what it needs is not the same in every call
        factor = 1 + next(steps)
        return (net(x).square().mean() * factor,)

    for _ in range(3):
        values(net, recorded, drifts, inputs(0))
    if capture is True:
        with pytest.raises(UnsupportedModelError, match=r"cannot be recorded.*differ from those"):
            values(net, recorded, drifts, inputs(0))
        return
    with pytest.warns(UserWarning, match=r"cannot be recorded.*differ from those"):
        values(net, recorded, drifts, inputs(0))
    loss, *_ = values(net, recorded, drifts, inputs(0))
    assert loss == pytest.approx(net(inputs(0)).square().mean().item() * next(steps), rel=1e-12)
    assert Tape.replays == 1


def test_a_step_that_asks_the_host_is_not_recorded():
    net, recorded = make()

    def asks(x):
        loss = net(x).square().mean()
        return (loss * 2 if loss > 0 else loss,)

    for _ in range(2):
        values(net, recorded, asks, inputs(0))
    with pytest.warns(UserWarning, match=r"cannot be recorded.*_local_scalar_dense"):
        values(net, recorded, asks, inputs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values(net, recorded, asks, inputs(0))
    assert not Tape.replays


def test_who_looks_inside_sees_every_pass():
    net, recorded = make()
    for number in range(6):
        assert_right(net, recorded, inputs(number))
    before, seen = Tape.replays, []
    handle = net[1].register_forward_hook(lambda *_: seen.append(1))
    values(net, recorded, squares(net), inputs(0))
    handle.remove()
    assert (seen, Tape.replays) == ([1], before)
    assert_right(net, recorded, inputs(0))
    assert Tape.replays == before + 1


def test_several_processes_and_float16_take_the_plain_way():
    net, recorded = make()
    for number in range(6):
        values(net, recorded, squares(net), inputs(number), processes=2)
        with torch.autocast("cpu", torch.float16):
            values(net, recorded, squares(net), inputs(number))
    assert not recorded.recordings


def test_a_late_backward_is_refused():
    net, recorded = make()
    for number in range(5):
        values(net, recorded, squares(net), inputs(number))
    first, second = (recorded(net, squares(net), [inputs(number)])[0] for number in (0, 1))
    second.backward()
    with pytest.raises(RuntimeError, match="overwritten its gradients"):
        first.backward()
