"""How a method computes: precision, determinism, what the process is set to meanwhile and afterwards."""

import os
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from contract import build, every_mechanism, every_setting, run
from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.backbones.casts import FrozenCasts
from lightning_tta.methods.base.execution import Execution
from nets import make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BACKENDS = torch.backends


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def settings():
    """All that may change, under torch's newer names and, where it allows to ask, its older ones."""

    def older(ask):
        try:
            return ask()
        except RuntimeError:
            return "unclear"

    kinds = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
    kinds += (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn)
    return {
        "kinds": [kind.fp32_precision for kind in kinds],
        "matmul": older(torch.get_float32_matmul_precision),
        "convolutions": older(lambda: BACKENDS.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (BACKENDS.cudnn.deterministic, BACKENDS.cudnn.benchmark),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    }


# Settings of the process


STARTS = {
    "torch's own": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32 in cuDNN": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "the newer name": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "benchmark": lambda: setattr(BACKENDS.cudnn, "benchmark", True),
    "warnings": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
}


@pytest.fixture
def start(request):
    before = settings()
    BACKENDS.cudnn.allow_tf32 = True
    STARTS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision(before["matmul"])
    BACKENDS.cudnn.allow_tf32 = before["convolutions"]
    kinds = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
    kinds += (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn)
    for kind, value in zip(kinds, before["kinds"], strict=True):
        kind.fp32_precision = value
    BACKENDS.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)
    assert settings() == before


@pytest.mark.parametrize("start", STARTS, indirect=True)
def test_settings_of_the_process_while_active_and_afterwards(start):
    before = settings()
    with Execution(precision="exact").active(CUDA):
        now = settings()
        assert now["kinds"] == ["ieee"] * 6
        assert (now["matmul"], now["convolutions"]) == ("highest", False)
    assert settings() == before
    with Execution(precision="tf32").active(CUDA):
        now = settings()
        assert now["kinds"] == ["tf32"] * 3 + before["kinds"][3:]
        assert now["convolutions"] is True
    assert settings() == before
    with Execution(precision="tf32").active(CPU), Execution().active(CUDA):
        assert settings() == before
    with Execution(deterministic=True, precision="bf16").active(CPU):
        now = settings()
        assert now["deterministic"]
        assert (now["warn"], now["cudnn"], now["fill"]) == (False, (True, False), False)
        assert now["kinds"] == before["kinds"]
        assert now["autocast"] == (True, False)
    assert settings() == before


def test_nothing_to_set_costs_nothing():
    assert isinstance(Execution().active(CUDA), nullcontext)


def test_nested_and_after_an_error():
    before = settings()
    exact, tf32 = Execution(precision="exact", deterministic=True), Execution(precision="tf32")
    with exact.active(CUDA):
        with tf32.active(CUDA):
            with exact.active(CUDA):
                assert settings()["kinds"][:3] == ["ieee"] * 3
            assert settings()["kinds"][:3] == ["tf32"] * 3
            assert settings()["deterministic"]  # another method's wish for less takes nothing away
        assert settings()["kinds"][:3] == ["ieee"] * 3
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact.active(CUDA):
        raise ZeroDivisionError
    assert settings() == before


def test_threads_share_the_same_settings_and_wait_for_others():
    before, entered, leave, order = settings(), threading.Event(), threading.Event(), []

    def hold(execution, name, wait):
        with execution.active(CUDA):
            order.append((name, *settings()["kinds"][:1]))
            entered.set()
            if wait:
                leave.wait(10)

    exact, tf32 = Execution(precision="exact"), Execution(precision="tf32")
    first = threading.Thread(target=hold, args=(exact, "first", True))
    first.start()
    assert entered.wait(10)
    same_as_first, other = (threading.Thread(target=hold, args=(e, e.precision, False)) for e in (exact, tf32))
    same_as_first.start()
    same_as_first.join(10)
    other.start()
    other.join(0.2)
    assert order == [("first", "ieee"), ("exact", "ieee")]
    leave.set()
    first.join(10)
    other.join(10)
    assert order[-1] == ("tf32", "tf32")
    assert settings() == before


def test_cublas_is_told_when_the_method_is_made(monkeypatch):
    adapt(make_net("bn"), "tent")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    adapt(make_net("bn"), "tent", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    adapt(make_net("bn"), "tent", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Puts(nn.Module):
    """A net with an operation that torch has no deterministic kernel for, on a CPU either."""

    def __init__(self):
        super().__init__()
        self.net = make_net("bn")

    def forward(self, x):
        place = torch.zeros(1, dtype=torch.long)
        return self.net(x) + torch.zeros(5).put(place, torch.ones(1), accumulate=False)


class Late(nn.Module):
    """What torch says of a matrix product on CUDA if its environment variable came too late."""

    def __init__(self):
        super().__init__()
        self.net = make_net("bn")

    def forward(self, x):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
                "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it "
                "uses CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set "
                "an environment variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8"
            )
        return self.net(x)


def test_what_is_not_deterministic_is_refused():
    before = settings()
    for net, error, words in (
        (Puts(), UnsupportedModelError, "put.*Leave deterministic out"),
        (Late(), ConfigError, "came too late.*CUBLAS_WORKSPACE_CONFIG=:4096:8"),
    ):
        method = adapt(net, "tent", deterministic=True)
        for call in (method, method.predict):
            with pytest.raises(error, match=f"(?s){words}"):
                call(make_images(4))
        assert settings() == before
        adapt(net, "tent")(make_images(4))


# What methods compute


@pytest.mark.slow
@every_setting
def test_exact_and_deterministic_change_nothing_on_a_cpu(case):
    plain = build(*case)
    other = build(*case, precision="exact", deterministic=True)
    for images in make_stream(2):
        assert torch.equal(plain(images), other(images))
        assert torch.equal(plain.predict(images), other.predict(images))
    assert same(plain.state_dict(), other.state_dict())


@every_mechanism
def test_bf16_is_autocast(case):
    """The same bits as autocast around the call, without a cache of it and without copies of frozen weights."""
    method, plain = build(*case, precision="bf16"), build(*case, precision="bf16")  # source data are seen so, too
    plain.execution = Execution()
    plain._casts.active = lambda device: nullcontext()
    for images in make_stream(3):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected, predicted = plain(images), plain.predict(images)
        assert torch.equal(method(images), expected)
        assert torch.equal(method.predict(images), predicted)
    assert same(plain.state_dict(), method.state_dict())


@pytest.mark.slow
@every_setting
def test_copies_of_frozen_weights_change_no_bit_under_float16_autocast(case):
    methods = [build(*case), build(*case)]
    methods[1]._casts.active = lambda device: nullcontext()
    outputs = []
    for method in methods:
        with torch.autocast("cpu", torch.float16):
            outputs.append(run(method, make_stream(3)))
    assert same(*outputs)
    assert same(*[method.state_dict() for method in methods])


def test_weights_that_were_loaded_or_moved_are_used():
    stream, other = make_stream(2), adapt(make_net("bn", seed=1), "tent")
    method = adapt(make_net("bn"), "tent", precision="bf16")
    run(method, stream)
    method.load_state_dict(other.state_dict())
    fresh = adapt(make_net("bn", seed=1), "tent", precision="bf16")
    assert same(run(method, stream), run(fresh, stream))
    source = FrozenCasts(method.model)
    assert isinstance(method._casts, FrozenCasts)
    assert method._casts.nbytes > source.nbytes == 0
    method.double().float()  # no rounding: the same values at other addresses
    assert method._casts.nbytes == 0
    method.reset()
    fresh.reset()
    assert same(run(method, stream), run(fresh, stream))


def test_an_interrupt_leaves_no_copies_in_use():
    method = adapt(make_net("bn"), "tent", precision="bf16")
    method(make_images(4))

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = method.model.head.register_forward_pre_hook(interrupt)
    before = settings()
    with pytest.raises(KeyboardInterrupt):
        method(make_images(4))
    assert settings() == before
    assert all("forward" not in vars(module) for module in method.model.modules())
    handle.remove()
    assert method(make_images(4)).isfinite().all()


# What contradicts itself


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16", torch.float64),
        ("bf16", torch.bfloat16),
        ("tf32", torch.float64),
        ("tf32", torch.bfloat16),
        ("exact", torch.bfloat16),
        ("exact", torch.float16),
    ],
)
def test_precision_of_a_net_of_another_type_is_refused(precision, dtype):
    method = adapt(make_net("bn").to(dtype), "norm", precision=precision)
    with pytest.raises(ConfigError, match=rf"precision='{precision}'.*{dtype}.*net\.float\(\)"):
        method(make_images(4))


@pytest.mark.parametrize(
    ("precision", "around"), [("exact", torch.bfloat16), ("tf32", torch.float16), ("bf16", torch.float16)]
)
def test_a_contradictory_autocast_is_refused(precision, around):
    method = adapt(make_net("bn"), "tent", precision=precision)
    with torch.autocast("cpu", around), pytest.raises(ConfigError, match=f"'{precision}' contradicts.*{around}"):
        method(make_images(4))
    assert method(make_images(4)).isfinite().all()


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"deterministic": "yes"}, {"precision": True}])
def test_wrong_words(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        adapt(make_net("bn"), "tent", **options)


# 16-bit nets


def moved(method, stream):
    """How far each learned value is from the source after the stream."""
    source = [p.detach().double().clone() for p in method.learned]
    run(method, stream)
    return torch.cat([(p.detach().double() - s).flatten() for p, s in zip(method.learned, source, strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_learning_of_16_bit_weights_is_warned_of_with_reason(dtype):
    """At small rates most steps are rounded away; a float32 net that computes in 16 bits takes them all."""
    options = {"lr": 2.5e-4, "optimizer": "sgd"}
    stream = make_stream(6, batch=16)
    with pytest.warns(UserWarning, match=r"learn \w*16 weights.*rounded away.*precision='bf16'"):
        narrow = adapt(make_net("bn").to(dtype), "tent", **options)
    with pytest.warns(UserWarning, match="rounded away"):
        adapt(make_net("bn"), "tent", **options).to(dtype)
    exact = moved(adapt(make_net("bn"), "tent", **options), stream)
    stuck = (moved(narrow, stream) == 0) & (exact != 0)
    assert stuck.double().mean() > 0.5
    cast = moved(adapt(make_net("bn"), "tent", precision="bf16", **options), stream)
    assert (cast == 0).double().mean() < 0.05
    assert torch.cosine_similarity(cast, exact, dim=0) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_nothing_is_said_where_nothing_learns(dtype, recwarn):
    adapt(make_net("bn").to(dtype), "norm")(make_images(8))
    adapt(make_net("bn"), "tent", precision="bf16")(make_images(8))
    assert not [w for w in recwarn if "rounded away" in str(w.message)]
