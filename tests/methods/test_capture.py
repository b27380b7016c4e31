"""Captured steps give what plain ones give, to the last bit, whatever happens on the stream.

There need be no GPU: tests/replay.py records on a CPU what a CUDA graph would, with the same limits.
"""

import copy
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contract import FIRST, MECHANISMS, SUPPORTED, VARIANTS, build, case_id, spread
from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.guard.watch import Watch
from lightning_tta.methods.base import capture
from lightning_tta.methods.base import recorder as recorders
from lightning_tta.methods.base.execution import Execution
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.tent import Tent
from nets import kind_for, make_images, make_net, make_stream, same
from replay import Tape, use_tape

pytestmark = [
    pytest.mark.usefixtures("one_thread", "tape"),
    pytest.mark.filterwarnings("ignore:.*normalises BatchNorm layers"),
    pytest.mark.filterwarnings("error:A step of"),
]


@pytest.fixture
def tape(monkeypatch):
    """Record on a CPU; the plain path leaves out no pass that a GPU would not."""
    use_tape(monkeypatch)
    with recording():
        yield


def pair(name, options, kind, **more):
    plain, captured = (build(name, options, kind, **more) for _ in range(2))
    plain.execution = Execution(capture=False)
    return plain, captured


def agree(plain, captured, images, context=nullcontext):
    with context():
        expected, logits = plain(images.clone()), captured(images)
    assert same(logits, expected)
    assert captured.stats == pytest.approx(plain.stats, rel=1e-9, abs=1e-12, nan_ok=True)
    assert same(captured.adaptable, plain.adaptable)
    assert same(captured.memory, plain.memory)


def replays(method):
    return "recorded" in method.capture_report().values()


@pytest.mark.parametrize(("name", "options", "kind"), SUPPORTED, ids=[case_id(*case) for case in SUPPORTED])
def test_every_method_on_every_net(name, options, kind):
    plain, captured = pair(name, options, kind)
    for images in make_stream(6):
        agree(plain, captured, images)
    assert replays(captured)


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


HOW = [(torch.float32, autocast, 1), (torch.float32, autocast, 8), (torch.bfloat16, nullcontext, 1)]
HOW += [(torch.bfloat16, nullcontext, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "kind", "dtype", "context", "batch"),
    [
        pytest.param(*case, id=f"{case_id(*case[:3])}-{case[3]}-{case[5]}")
        for case in spread([(*case, *how) for case in FIRST for how in HOW], 2)
    ],
)
def test_precisions_and_sizes(name, options, kind, dtype, context, batch):
    plain, captured = pair(name, options, kind)
    plain.to(dtype), captured.to(dtype)
    for images in make_stream(5, batch=batch):
        agree(plain, captured, images.to(dtype), context)
    assert replays(captured)


ONE_OF_EACH = [(name, VARIANTS.get(name, [{}])[number], kind_for(name, "bn")) for name, number in MECHANISMS.values()]
EACH = pytest.mark.parametrize(("name", "options", "kind"), ONE_OF_EACH, ids=[case[0] for case in ONE_OF_EACH])


@EACH
def test_odd_batches_take_the_plain_path(name, options, kind):
    plain, captured = pair(name, options, kind)
    stream = make_stream(12)
    stream[5][1, 0, 0, 0] = float("nan")
    stream[7] = make_images(3, seed=3)
    stream[8] = stream[8].contiguous(memory_format=torch.channels_last)
    stream[9][:] = float("inf")
    for images in stream:
        agree(plain, captured, images)
    assert replays(captured)


@EACH
def test_reset_state_and_copies(name, options, kind):
    plain, captured = pair(name, options, kind)
    stream = make_stream(8)
    for images in stream[:5]:
        agree(plain, captured, images)
    state = copy.deepcopy(captured.state_dict())
    plain.reset(), captured.reset()
    for images in stream[:3]:
        agree(plain, captured, images)
    plain.load_state_dict(state), captured.load_state_dict(state)
    agree(plain, captured, stream[5])
    twin, fresh = copy.deepcopy(captured), build(name, options, kind)
    assert not replays(twin)
    fresh.load_state_dict(captured.state_dict())
    twin.execution = Execution(capture=False)
    for images in stream[4:]:
        agree(plain, captured, images)
        agree(twin, fresh, images)
    assert replays(captured)
    assert same(twin.adaptable, captured.adaptable)


def test_a_recording_knows_its_settings():
    plain, captured = pair("tent", {"lr": 0.1, "optimizer": "sgd"}, "gn")
    stream = make_stream(24)
    for images in stream[:5]:
        agree(plain, captured, images)
    for method in (plain, captured):
        method.optimizers["model"].param_groups[0]["initial_lr"] = 0.01
    for images in stream[5:10]:
        agree(plain, captured, images)
    for method in (plain, captured):
        method.steps = 2
    for images in stream[10:15]:
        agree(plain, captured, images)
    for method in (plain, captured):
        method.entropy = lambda logits: logits.logsumexp(1)
    for images in stream[15:20]:
        agree(plain, captured, images)
    assert captured.capture_report()["step 4x3x16x16"] == "recorded"
    plain.double(), captured.double()
    for images in stream[20:]:
        agree(plain, captured, images.double())
    assert replays(captured)


def test_the_step_that_is_accounted_for_has_a_recording_of_its_own():
    plain, captured = pair("cotta", {**VARIANTS["cotta"][0], "steps": 2}, "bn")
    for images in make_stream(6):
        agree(plain, captured, images)
    assert captured.memory["stream.images"] == 24


def test_autocast_around_some_calls():
    plain, captured = pair("tent", {"lr": 0.1}, "bn")
    for number, images in enumerate(make_stream(12)):
        agree(plain, captured, images, autocast if number % 2 else nullcontext)
    assert list(captured.capture_report().values()).count("recorded") == 1  # by part and shape
    assert len(captured._capture.recordings) == 2


def test_a_converted_net_is_recorded_anew():
    plain, captured = pair("tent", {"lr": 0.1}, "bn")
    stream = make_stream(10)
    for images in stream[:5]:
        agree(plain, captured, images)
    plain.double(), captured.double()
    for images in stream[5:]:  # of the same dtype as before
        agree(plain, captured, images)


def test_other_tensors_of_state_are_recorded_anew():
    method = build("eta", VARIANTS["eta"][0], "gn")
    for images in make_stream(4):
        method(images)
    assert replays(method)
    method.sized("mean_probability", torch.zeros(7))
    method.sized("mean_probability", torch.zeros(5))
    method(make_stream(1)[0])
    assert not replays(method)


def test_unread_stats_stay_those_of_their_batch():
    plain, captured = pair("tent", {"lr": 0.1}, "bn")
    expected, unread = [], []
    for images in make_stream(8):
        plain(images), captured(images)
        expected.append(plain.stats)
        unread.append(captured.unread_stats())
    for stats, scalars in zip(expected, unread, strict=True):
        assert {name: float(value) for name, value in scalars.items()} == pytest.approx(stats, rel=1e-9)


@pytest.mark.parametrize("name", ["tent", "memo"])
def test_other_frozen_weights_reach_a_recording(name):
    """Under bf16 the net's frozen weights are kept as copies, which a recorded pass reads."""
    options = {"precision": "bf16", **VARIANTS[name][1 if name == "memo" else 0]}
    plain, captured = pair(name, options, "bn")
    plain.execution, captured.execution = (Execution(precision="bf16", capture=c) for c in (False, "auto"))
    stream = make_stream(8)
    for images in stream[:5]:
        agree(plain, captured, images)
    assert replays(captured)
    state = build(name, options, "bn", seed=1).state_dict()
    plain.load_state_dict(state), captured.load_state_dict(state)
    for images in stream[5:]:
        agree(plain, captured, images)
    assert replays(captured)


def test_filters_count_as_settings():
    options = {"lr": 0.1, "entropy_margin": 0.9, "diversity_margin": None}
    plain, captured = pair("eta", options, "gn")
    stream = make_stream(10)
    for images in stream[:5]:
        agree(plain, captured, images)
    for method in (plain, captured):
        method.filters[0].margin = 0.2
    for images in stream[5:]:
        agree(plain, captured, images)


def test_who_looks_inside_sees_every_pass():
    method = build("tent", {"lr": 0.01}, "gn")
    stream = make_stream(6)
    for images in stream[:4]:
        method(images)
    seen = []
    layer = next(m for m in method.model.modules() if isinstance(m, torch.nn.GroupNorm))
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    method(stream[4])
    assert len(seen) == 1
    assert "hooks" in method.capture_report()["last batch"]
    handle.remove()

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += func.name().startswith("aten::convolution")
            return func(*args, **(kwargs or {}))

    with Count():
        method(stream[5])
    assert Count.calls > 0
    assert "mode" in method.capture_report()["last batch"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_every_mode(mode):
    plain, captured = pair("tent", {"lr": 0.1}, "bn")
    for images in make_stream(6):
        agree(plain, captured, images, mode)
    assert replays(captured)


def test_results_belong_to_the_caller():
    plain, captured = pair("tent", {"lr": 0.1}, "bn")
    stream = make_stream(8)
    for images in stream:
        expected, given = plain(images), images.clone()
        logits = captured(given)
        given.zero_(), logits.add_(1e6)
        assert same(logits - 1e6, expected + 1e6 - 1e6)
        assert captured.stats == pytest.approx(plain.stats, rel=1e-9)


class _Asking(Tent):
    """A method whose step asks the host."""

    synchronized = False

    def step(self, x):
        logits = super().step(x)
        return logits * 2 if bool(logits.sum() > 0) else logits


def _asking():
    return [_Asking(make_net("gn"), lr=0.1) for _ in range(2)]


def test_a_step_that_asks_the_host_runs_as_it_is():
    plain, captured = _asking()
    plain.execution = Execution(capture=False)
    stream = make_stream(6)
    for images in stream[:2]:
        agree(plain, captured, images)
    with pytest.warns(UserWarning, match=r"cannot be captured, and runs as it is: .*capture=False"):
        agree(plain, captured, stream[2])
    for images in stream[3:]:  # without another word
        agree(plain, captured, images)
    assert "not permitted" in captured.capture_report()["step 4x3x16x16"]


class _Draws(Tent):
    """A method that draws on the host."""

    synchronized = False

    def step(self, x):
        return super().step(x) * (1 + 1e-6 * self.draw())


@pytest.mark.parametrize(
    "draw", [random.random, lambda: float(torch.rand(())), np.random.rand], ids=["python", "torch", "numpy"]
)
def test_draws_on_the_host_are_not_recorded(draw):
    captured = _Draws(make_net("gn"), lr=0.1)
    captured.draw = draw
    stream = make_stream(4)
    for images in stream[:2]:
        captured(images)
    with pytest.warns(UserWarning, match="draws random numbers on the host"):
        captured(stream[2])
    captured(stream[3])
    assert not replays(captured)


def test_capture_true_refuses_what_cannot_be_captured(monkeypatch):
    method = _asking()[0]
    method.execution = Execution(capture=True)
    stream = make_stream(4)
    for images in stream[:2]:
        method(images)
    with pytest.raises(UnsupportedModelError, match=r"cannot be captured.*capture='auto'"):
        method(stream[2])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"capture=True is not possible: CUDA graphs need.*'cpu'.*capture=False"):
        adapt(make_net("gn"), "tent", capture=True)(stream[3])


class _Stale(Tape):
    """A recorder whose replays write nothing: what a graph would be that lost its addresses."""

    def record(self, run, device):
        result, _ = super().record(run, device)
        return result, lambda: None


class _Off(Tape):
    """One whose replays give other results."""

    def record(self, run, device):
        result, replay = super().record(run, device)

        def wrong():
            replay()
            result[0][0].add_(0.1)

        return result, wrong


@pytest.mark.parametrize(("recorder", "reason"), [(_Stale, "the state '.*' differs"), (_Off, "its results differ")])
def test_a_recording_that_does_not_agree_is_not_used(monkeypatch, recorder, reason):
    monkeypatch.setattr(recorders, "make_recorder", recorder)
    plain, captured = pair("tent", {"lr": 0.1}, "bn")
    stream = make_stream(5)
    for images in stream[:2]:
        agree(plain, captured, images)
    with pytest.warns(UserWarning, match=reason):
        agree(plain, captured, stream[2])
    for images in stream[3:]:
        agree(plain, captured, images)


def test_a_watch_rolls_back_what_is_captured():
    plain, captured = (adapt(make_net("bn"), "tent", lr=5.0, optimizer="sgd") for _ in range(2))
    plain.execution = Execution(capture=False)
    settings = {"compare": "history", "window": 2, "history": 2, "snapshot_every": 2, "share_excess": 0.01}
    watches = [Watch(method, action="rollback", **settings) for method in (plain, captured)]
    for images in make_stream(30):
        expected, logits = (watch(images) for watch in watches)
        assert same(logits, expected)
    assert watches[0].events
    assert len(watches[1].events) == len(watches[0].events)
    assert same(captured.adaptable, plain.adaptable)
    assert replays(captured)


def test_the_number_of_recordings_is_bounded(monkeypatch):
    monkeypatch.setattr(capture.Capture, "LIMIT", 2)
    plain, captured = pair("tent", {"lr": 0.1}, "gn")
    for batch in (2, 3, 4):
        for images in make_stream(4, batch=batch):
            agree(plain, captured, images)
    assert list(captured.capture_report().values()).count("recorded") == 2


def test_cuda_graphs_share_a_pool_and_leave_other_threads_alone(monkeypatch):
    entered = []

    @contextmanager
    def graph(made, **settings):
        entered.append((made, settings))
        yield

    class Graph:
        def replay(self):
            entered.append("replay")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    recorder = recorders.CudaGraphs()
    for _ in range(2):
        result, replay = recorder.record(lambda: 7, torch.device("cuda:1"))
        assert result == 7
        replay()
    assert [settings for _, settings in entered[::2]] == 2 * [
        {"pool": "pool", "stream": "stream of cuda:1", "capture_error_mode": "thread_local"}
    ]
    assert entered[1::2] == ["replay", "replay"]


class _Again:
    """A recorder that runs the step itself again: a tape would not see what is compiled."""

    method = None

    def reason_against(self, device):
        return ""

    def record(self, run, device):
        outputs, packed, noted = run()

        def replay():
            with torch.enable_grad(), self.method.running(), self.method.passes(), self.method.compiled():
                again, scalars, _ = run()
            packed.copy_(scalars)
            for old, new in zip(outputs, again, strict=True):
                old.copy_(new)

        return (outputs, packed, noted), replay


def test_compiled_steps(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **options: compile(*a, **options, backend="aot_eager"))
    monkeypatch.setattr(recorders, "make_recorder", _Again)
    plain, captured = pair("zerosiam", VARIANTS["zerosiam"][0], "bn")
    captured.execution = Execution(compile=True)
    monkeypatch.setattr(_Again, "method", captured)
    passes = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for images in make_stream(4):
        torch.testing.assert_close(captured(images), plain(images), rtol=1e-5, atol=1e-5)
    assert replays(captured)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > passes
    for one, other in zip(captured.adaptable.values(), plain.adaptable.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compile_without_capture_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"compile=True compiles captured steps"):
        adapt(make_net("gn"), "tent", compile=True, capture=False)
    with pytest.raises(ConfigError, match=r"lean=True and compile=True exclude each other.*Leave one"):
        adapt(make_net("gn"), "tent", compile=True, lean=True)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"compile=True is not possible: CUDA graphs need"):
        adapt(make_net("gn"), "tent", compile=True)(make_images(4))
