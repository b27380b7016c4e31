"""Calls from many threads are those of one thread in some order; and calls that break off leave nothing behind."""

import contextlib
import copy
import io
import pickle
import signal
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from torch import nn

from contract import FIRST, MECHANISMS, SUPPORTED, VARIANTS, build, case_id, state_of, tensors_of
from lightning_tta import Watch, adapt
from lightning_tta.methods import TTAMethod
from lightning_tta.methods.components import filters
from nets import make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")
# Every method once on a BatchNorm net, and every mechanism on a GroupNorm net.
ONCE = [case for case in FIRST if case[1] == VARIANTS.get(case[0], [{}])[0]]
GROUP_NORM = [c for name, n in MECHANISMS.values() for c in SUPPORTED if c == (name, VARIANTS.get(name, [{}])[n], "gn")]
each = pytest.mark.parametrize("case", [*ONCE, *GROUP_NORM], ids=lambda case: case_id(*case))


@pytest.fixture(autouse=True)
def _often_switched():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(*calls):
    """Run the functions at the same time; an error of one is raised here."""
    errors, start = [], threading.Barrier(len(calls))

    def work(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def hooks_of(net):
    return [hook for m in net.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@each
def test_threads_equal_one_after_the_other(case):
    """With the order in which the calls came, noted under the method's own lock, one thread repeats all of it."""
    method, order = build(*case), []

    def client(number):
        for k in range(2):
            images = make_images(1 + (number + k) % 3, seed=10 * number + k)
            with method.hold():
                logits, stats = method(images), dict(method.stats)
                order.append((images, logits, stats))
            method.predict(images)
            assert method.stats["forwards"] >= 1
            copied = copy.deepcopy(method.state_dict())
            assert all(t.isfinite().all() for t in tensors_of(copied).values() if t.is_floating_point())

    in_threads(*(lambda number=number: client(number) for number in range(8)))
    assert len(order) == 16
    alone = build(*case)
    for images, logits, stats in order:
        assert torch.equal(alone(images), logits)
        assert alone.stats == stats
    assert same(alone.state_dict(), method.state_dict())
    assert not hooks_of(method.model)
    method.reset()
    assert same(method.state_dict(), build(*case).state_dict())


class Counting(TTAMethod):
    """Counts its calls in a way that loses some where two run at once."""

    def __init__(self, model):
        super().__init__(model)
        self.state("calls", torch.zeros(()))

    def step(self, x):
        before = float(self.value("calls"))
        time.sleep(0)
        self.write("calls", torch.tensor(before + 1))
        return self.infer(x)

    def reset(self):
        calls = float(self.value("calls"))
        time.sleep(0)
        super().reset()
        self.last = calls


@pytest.mark.parametrize("watched", [False, True])
def test_no_call_is_lost(watched):
    method = Counting(make_net("bn"))
    outer = Watch(method, "warn", compare="history") if watched else method
    images = make_images(2)
    in_threads(*[lambda: [outer(images) for _ in range(10)]] * 8)
    assert method.value("calls") == 80
    assert outer.revision == 80
    if watched:
        assert outer.next_batch == 80


def test_reset_save_and_load_between_calls():
    method = build("tent", {"lr": 1e-2}, "bn")
    saved = method.state_dict()
    states = []
    stream = make_stream(6)

    def save():
        for _ in range(6):
            file = io.BytesIO()
            torch.save(method.state_dict(), file)
            states.append(file)

    in_threads(
        lambda: [method(images) for images in stream],
        lambda: [method(images) for images in stream],
        lambda: [method.reset() for _ in range(6)],
        lambda: [method.load_state_dict(saved) for _ in range(6)],
        lambda: [copy.deepcopy(method)(stream[0]) for _ in range(3)],
        save,
    )
    other = build("tent", {"lr": 1e-2}, "bn")
    for file in states:
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        steps = {float(t) for name, t in other.memory.items() if t is not None and name.endswith("step")}
        assert len(steps) <= 1  # not torn: every parameter has taken as many
    method.reset()
    assert same(method.state_dict(), saved)


def test_a_saved_state_does_not_move():
    method = build("cotta", VARIANTS["cotta"][1], "bn")
    stream = make_stream(3)
    method(stream[0])
    state = method.state_dict()
    before = copy.deepcopy(state)
    method(stream[1])
    assert same(state, before)
    assert method.state_dict(keep_vars=True)["model.conv1.weight"] is method.model.conv1.weight


def test_two_nets_do_not_wait_for_each_other():
    first, second = (build("source", {}, "gn") for _ in range(2))
    with first.hold():
        in_threads(lambda: second(make_images(2)))


def test_the_switch_of_attention_is_one_for_all_threads(monkeypatch):
    """It is off while any thread needs it off, and afterwards as it was."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    inside, leave = threading.Event(), threading.Event()

    def long():
        with filters._usual_attention():
            inside.set()
            assert leave.wait(10)
            assert not torch.backends.mha.get_fastpath_enabled()

    def short():
        assert inside.wait(10)
        with filters._usual_attention():
            pass
        leave.set()

    in_threads(long, short)
    assert torch.backends.mha.get_fastpath_enabled() == enabled


class Breaking(nn.Module):
    """The identity, that raises an error forwards or backwards when told to."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.when = inner, None

    def forward(self, x):
        y = self.inner(x)
        if self.when == "forward":
            raise KeyboardInterrupt
        if self.when == "backward" and y.requires_grad:
            y.register_hook(self._raise)
        return y

    def _raise(self, gradient):
        raise KeyboardInterrupt


@each
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_interrupt_leaves_nothing(case, when):
    net = make_net(case[2])
    layer = "patches" if case[2] == "vit" else "conv2"
    setattr(net, layer, Breaking(getattr(net, layer)))
    method = build(*case, net=net)
    start, (first, second) = state_of(method), make_stream(2)
    getattr(net, layer).when = when
    with contextlib.suppress(KeyboardInterrupt):
        method(first)
    getattr(net, layer).when = None
    assert not hooks_of(net)
    assert not any("forward" in vars(module) for module in net.modules())
    assert torch.is_grad_enabled()
    assert state_of(method).keys() == start.keys()
    method.reset()
    assert same(method.state_dict(), start)
    fresh = copy.deepcopy(method)
    assert same(method(second), fresh(second))


@pytest.mark.parametrize("name", ["tent", "sar", "cotta", "meta_ttt", "ostta"])
def test_interrupts_at_any_moment(name):
    """A signal may come between any two lines, also where things are put back."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    method, images = build(name, VARIANTS[name][-1], "bn"), make_images(4)
    start = state_of(method)
    seconds = min(_timed(method, images) for _ in range(3))
    method.reset()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    outcomes = Counter()
    try:
        for number in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, seconds * (number + 0.5) / 40))
                method(images)
                signal.setitimer(signal.ITIMER_REAL, 0)
                outcomes["finished"] += 1
            except KeyboardInterrupt:
                outcomes["interrupted"] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not hooks_of(method.model)
            method.reset()
            assert same(method.state_dict(), start)
            assert torch.is_grad_enabled()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)  # the other tests need it
    assert outcomes["interrupted"] > 5


def _timed(method, images):
    start = time.perf_counter()
    method(images)
    return time.perf_counter() - start


@pytest.mark.parametrize("case", ONCE, ids=lambda case: case_id(*case))
def test_pickled_and_saved_whole(case):
    if case[0] == "vida":
        with pytest.raises(RuntimeError, match="state_dict"):  # torch's, of a net with parametrized weights
            pickle.dumps(build(*case))
        return
    method, stream = build(*case), make_stream(3)
    method(stream[0])
    file = io.BytesIO()
    torch.save(method, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(method)), torch.load(file, weights_only=False)]
    logits = [method(images) for images in stream[1:]]
    for twin in copies:
        assert same([twin(images) for images in stream[1:]], logits)
        assert same(twin.state_dict(), method.state_dict())
        twin.reset()
        assert same(twin.state_dict(), build(*case).state_dict())


def test_a_hold_is_given_back_after_an_error():
    method = adapt(make_net("gn"), "tent")
    with contextlib.suppress(ValueError), method.hold():
        raise ValueError
    in_threads(lambda: method(make_images(2)))
