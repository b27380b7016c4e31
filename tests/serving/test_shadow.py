"""Shadow: who answers, what comes out, failures of all kinds, snapshots and a kill."""

import copy
import json
import os
import pickle
import signal
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_prometheus import parse
from torch import nn

import lightning_tta
from lightning_tta import (
    AnswerTimeoutError,
    ClosedError,
    ConfigError,
    DataError,
    InputError,
    NotPreparedError,
    QueueFullError,
    Shadow,
    Watch,
    adapt,
)
from lightning_tta.guard.monitors.base import Monitor
from lightning_tta.methods import Source, Tent
from lightning_tta.serving import snapshots
from lightning_tta.serving.policy import Decision, Policy
from nets import make_images, make_net, same

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"max_wait_ms": 0.0, "log_every": 1}


class Counting(Monitor):
    """Estimates what a script says: an alarm or an estimate for each batch that it has seen."""

    name = "counting"
    wants = frozenset({"source"})

    def __init__(self, estimates=(), alarms=()):
        self.estimates, self.alarms, self.seen, self.forgotten = dict(estimates), dict(alarms), 0, 0

    def see(self, seen):
        assert seen.source is not None
        self.of_source = seen.logits is seen.source
        self.seen += 1

    def alarm(self):
        return self.alarms.get(self.seen, "")

    def estimate(self):
        return 0.5 if self.of_source else self.estimates.get(self.seen, 0.9)

    def values(self):
        return {"counting_seen": float(self.seen)}

    def forget(self):
        self.forgotten += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Switching(Policy):
    """Follows a script: the decision after each micro-batch."""

    def __init__(self, decisions):
        self.decisions, self.seen = decisions, []

    def decide(self, evidence):
        self.seen.append(evidence)
        return self.decisions.get(evidence.batch, Decision(evidence.answering))


METHOD, BACK = Decision("method", reason="test"), Decision("source", "rollback", reason="test")


def made(method="tent", decisions=(), monitors=(), net=None, **options):
    options = {**QUICK, **({"lr": 0.05} if method == "tent" else {}), **options}
    return Shadow(net or make_net("gn"), method, policy=Switching(dict(decisions)), monitors=list(monitors), **options)


def settled(shadow, batches):
    """Wait until both have predicted so many micro-batches."""
    end = time.monotonic() + 60
    while shadow.batches < batches and time.monotonic() < end:
        time.sleep(0.001)
    with shadow._lock:
        assert shadow.batches == batches


def serve(shadow, batches, size=4, first=0):
    """One request after the other, each after the step on the last one; their answers."""
    answers = []
    for number in range(first, first + batches):
        answers.append(shadow.answer(make_images(size, seed=number)))
        settled(shadow, shadow_batches(answers, shadow))
    return answers


def shadow_batches(answers, shadow):
    start = next(e["batch"] for e in shadow.events if e["event"] == "start")
    return start + len(answers)


def test_while_the_source_answers_the_method_adapts_as_it_would_alone():
    net, alone = make_net("gn"), adapt(make_net("gn"), "tent", lr=0.05)
    with made(net=net) as shadow:
        for number, answer in enumerate(serve(shadow, 5)):
            images = make_images(4, seed=number)
            assert torch.allclose(answer.logits, net(images), atol=1e-6)
            assert (answer.by, answer.batch) == ("source", number + 1)
            alone(images)
    assert same(dict(shadow.method.state_dict()), dict(alone.state_dict()))
    assert same(dict(net.state_dict()), dict(make_net("gn").state_dict()))


def test_the_method_answers_and_goes_back():
    alone = adapt(make_net("gn"), "tent", lr=0.05)
    with made(decisions={3: METHOD, 6: BACK}, snapshot_every=2) as shadow:
        answers = serve(shadow, 8)
        expected = [alone(make_images(4, seed=number)) for number in range(6)]
        state = dict(alone.state_dict())
        assert [each.by for each in answers] == ["source"] * 3 + ["method"] * 3 + ["source"] * 2
        for answer, logits in zip(answers[3:6], expected[3:], strict=True):
            assert torch.equal(answer.logits, logits)
        assert not same(dict(shadow.method.state_dict()), state)
    decisions = [event for event in shadow.events if event["event"] == "decision"]
    assert [(e["batch"], e["before"], e["answering"], e["restore"], e["reason"]) for e in decisions] == [
        (3, "source", "method", "", "test"),
        (6, "method", "source", "rollback", "test"),
    ]
    families = parse(shadow.metrics())
    values = {sample: value for _, _, samples in families.values() for sample, value in samples.items()}
    assert values["lightning_tta_images_total", (("by", "method"),)] == 12
    assert values["lightning_tta_images_total", (("by", "source"),)] == 20
    assert values["lightning_tta_switches_total", (("to", "method"),)] == 1
    assert values["lightning_tta_answering", (("by", "source"),)] == 1
    assert values["lightning_tta_latency_seconds_count", ()] == 8
    assert values["lightning_tta_restores_total", (("how", "rollback"),)] == 1


def test_rollback_goes_to_the_last_healthy_state_and_once_more_to_the_source():
    """Candidates are taken after batches 2, 4, 6; at 7 that of 4 has proven itself for two batches."""
    alone = adapt(make_net("gn"), "tent", lr=0.05)
    with made(decisions={7: BACK, 8: BACK}, snapshot_every=2) as shadow:
        serve(shadow, 7)
        for number in range(4):
            alone(make_images(4, seed=number))
        assert same(dict(shadow.method.adaptable), dict(alone.adaptable))
        shadow.predict(make_images(4, seed=7))
        settled(shadow, 8)
        alone.reset()
        assert same(dict(shadow.method.adaptable), dict(alone.adaptable))


def test_default_policy_by_estimates_and_alarms():
    monitor = Counting(alarms={9: "one_class"})
    with Shadow(
        make_net("gn"), "tent", policy={"patience": 3, "min_images": 1}, monitors=[monitor], max_wait_ms=0
    ) as shadow:
        answers = serve(shadow, 11)
    assert [each.by for each in answers] == ["source"] * 3 + ["method"] * 6 + ["source"] * 2
    assert monitor.forgotten == 1
    assert [e["reason"] for e in shadow.events if e["event"] == "alarm"] == ["one_class"]
    reasons = [e["reason"] for e in shadow.events if e["event"] == "decision"]
    assert reasons == [
        "counting: estimated accuracy 0.900 of the method, 0.500 of the source",
        "alarm one_class",
    ]
    assert 'estimated_accuracy{of="method",monitor="counting"} 0.9' in shadow.metrics()
    assert 'monitor{value="counting_seen"} 11' in shadow.metrics()


def test_late_labels_move_the_default_policy():
    """Labels that the method predicts and the source does not: nine of them are enough, without any estimate."""

    class Opposite(Source):
        synchronized = False

        def step(self, x):
            return -super().step(x)

    net = make_net("gn")
    policy = {"patience": 3, "min_images": 1}
    with Shadow(net, Opposite(make_net("gn")), policy=policy, monitors=[], max_wait_ms=0) as shadow:
        answers = serve(shadow, 4)
        ids = [id for answer in answers for id in answer.ids]
        assert len(set(ids)) == 16
        worst = torch.cat([answer.logits for answer in answers]).argmin(1)
        assert shadow.tell([*ids[:9], "unknown"], [*worst[:9].tolist(), 0]) == 9
        assert shadow.predict(make_images(4)).shape == (4, 5)
        settled(shadow, 5)
        assert shadow.answering == "method"
        assert shadow.tell(ids[9:], answers_of(net, range(4))[9:]) == 7
        assert torch.allclose(shadow.predict(make_images(4)), -net(make_images(4)), atol=1e-6)
    assert 'labelled_accuracy{of="method"} 0.5625' in shadow.metrics()


def answers_of(net, seeds):
    return torch.cat([net(make_images(4, seed=seed)) for seed in seeds]).argmax(1)


def test_monitors_get_late_labels_too():
    class Told(Counting):
        def tell(self, index, labels):
            self.told = [*getattr(self, "told", []), *zip(index, labels, strict=True)]

    with made(monitors=[Told()]) as shadow:
        answers = serve(shadow, 2)
        shadow.tell(answers[0].ids, torch.arange(4))
        shadow.predict(make_images(4))
    expected = list(zip(answers[0].ids, range(4), strict=True))
    assert shadow.monitors[0].told == shadow._twins[0].told == expected


class Named(Counting):
    """Knows which answers it has seen; the labels of others are none to it, as to the monitor ``labels``."""

    def __init__(self):
        super().__init__()
        self.names, self.told, self.unknown = [], [], []

    def see(self, seen):
        super().see(seen)
        self.names += seen.index

    def tell(self, index, labels):
        for name, label in zip(index, labels, strict=True):
            (self.told if name in self.names else self.unknown).append((name, label))


def test_labels_of_answers_that_monitors_have_still_to_look_at_wait_for_that():
    """Both were answered, and their labels came, before the method adapts on the first."""
    with made(monitors=[Named()], max_lag=4, when_behind="wait", max_batch=1) as shadow:
        with shadow._lock:  # until both are there
            first, second = (shadow.submit(make_images(1, seed=number)) for number in range(2))
            second.add_done_callback(lambda done: shadow.tell([*done.result().ids, *first.result().ids], [1, 0]))
        settled(shadow, 2)
    for monitor in (shadow.monitors[0], shadow._twins[0]):
        assert monitor.told == [(*first.result().ids, 0), (*second.result().ids, 1)]
        assert monitor.unknown == []


def test_labels_that_come_last_reach_monitors_before_the_last_snapshot(tmp_path):
    with made(monitors=[Named()], directory=tmp_path) as shadow:
        (answer,) = serve(shadow, 1)
        shadow.tell(answer.ids, [0, 1, 2, 3])
    assert shadow.monitors[0].told == list(zip(answer.ids, range(4), strict=True))


@pytest.mark.parametrize("answering", ["source", "method"])
def test_every_request_of_many_threads_gets_its_own_answer(answering):
    """Requests of one to three images from 16 threads; the method is the source again, so that answers are known."""
    net, images = make_net("gn"), make_images(200)
    cuts = [slice(start, start + 1 + start % 3) for start in range(0, 196, 4)]
    decisions = {1: METHOD} if answering == "method" else {}
    with made(Source(make_net("gn")), decisions, net=net, max_batch=8, max_wait_ms=2, snapshot_every=5) as shadow:
        shadow.predict(images[:1])
        settled(shadow, 1)
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda cut: shadow.answer(images[cut]), cuts))
    for cut, answer in zip(cuts, answers, strict=True):
        assert torch.allclose(answer.logits, net(images[cut]), atol=1e-5)
        assert answer.by == answering
        assert len(answer.ids) == len(answer.logits)
    ids = [id for answer in answers for id in answer.ids]
    assert len(set(ids)) == len(ids)
    assert max(answer.batch for answer in answers) < len(cuts)  # some were gathered


def test_one_image_and_what_the_caller_does_to_tensors():
    net, images = make_net("gn"), make_images(2)
    expected = net(images)
    with made(net=net) as shadow:
        mine = images[0].clone()
        logits = shadow.predict(mine)
        mine.fill_(0)
        assert torch.allclose(logits, expected[:1], atol=1e-6)
        logits.fill_(7)
        settled(shadow, 1)
    alone = adapt(net, "tent", lr=0.05)
    alone(images[:1])
    assert same(dict(shadow.method.adaptable), dict(alone.adaptable))


def test_a_bad_request_fails_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    nan = make_images(2)
    nan[1, 0, 0, 0] = float("nan")
    with made(Source(nn.Sequential(nn.Flatten(), nn.Linear(768, 5))), net=net, max_wait_ms=20) as shadow:
        good = [shadow.submit(make_images(1, seed=n)) for n in range(3)]
        wrong_size = shadow.submit(make_images(1, size=8))
        with pytest.raises(InputError, match="image 1 of the request are not finite"):
            shadow.submit(nan)
        with pytest.raises(InputError, match=r"must be in \[0, 1\]"):
            shadow.predict(255 * make_images(1))
        with pytest.raises(InputError, match="Not a batch"):
            shadow.predict(torch.zeros(4, 4))
        with pytest.raises(InputError, match="max_batch=32"):
            shadow.predict(make_images(33))
        for number, future in enumerate(good):
            assert torch.allclose(future.result(10).logits, net(make_images(1, seed=number)), atol=1e-6)
        with pytest.raises(InputError, match="cannot take"):
            wrong_size.result(10)
        assert shadow.predict(make_images(1)).shape == (1, 5)
        assert shadow.answering == "source"
    assert 'requests_total{result="invalid"} 5' in shadow.metrics()
    assert 'requests_total{result="answered"} 4' in shadow.metrics()


class Touchy(nn.Module):
    """A net that refuses one image for what is in it."""

    def __init__(self):
        super().__init__()
        self.net = make_net("gn")

    def forward(self, x):
        if bool((x[:, 0, 0, 0] == 1).any()):
            raise ArithmeticError("a one in the corner")
        return self.net(x)


def test_a_request_that_the_net_fails_on_does_not_take_others_with_it():
    poison = make_images(1)
    poison[0, 0, 0, 0] = 1
    with made("source", net=Touchy(), max_wait_ms=50, max_batch=4) as shadow:
        futures = [shadow.submit(images) for images in (make_images(1), poison, make_images(2, seed=1))]
        with pytest.raises(InputError, match="a one in the corner"):
            futures[1].result(10)
        assert torch.allclose(futures[2].result(10).logits, make_net("gn")(make_images(2, seed=1)), atol=1e-6)
        assert futures[0].result(10).logits.shape == (1, 5)


class Gate(nn.Module):
    """A net that waits until it is let on: no test looks at a clock."""

    def __init__(self):
        super().__init__()
        self.net = make_net("gn")
        self.opened = [threading.Event()]

    def __deepcopy__(self, memo):  # the copy has the same event
        other = type(self)()
        other.opened = self.opened
        return other

    def forward(self, x):
        self.opened[0].wait(60)
        return self.net(x)

    def open(self):
        self.opened[0].set()


def test_full_late_closed():
    gate = Gate()
    with made("source", net=gate, max_queue=3, max_batch=2) as shadow:
        waiting = [shadow.submit(make_images(1))]
        while shadow._requests:
            time.sleep(0.001)
        waiting += [shadow.submit(make_images(1)) for _ in range(2)]
        with pytest.raises(AnswerTimeoutError, match=r"No answer within 0\.01 s; 3 images wait"):
            shadow.predict(make_images(1), timeout=0.01)
        with pytest.raises(QueueFullError, match="3 images wait"):
            shadow.predict(make_images(1))
        gate.open()
    expected = make_net("gn")(make_images(1))
    assert all(torch.allclose(each.result(0).logits, expected, atol=1e-6) for each in waiting)  # answered at the end
    with pytest.raises(ClosedError):
        shadow.predict(make_images(1))
    shadow.close()  # twice is no error
    assert shadow.closed
    assert shadow._metrics.value("requests_total", result="answered") == 3


def test_an_answer_does_not_wait_for_its_step():
    gate = Gate()
    with made(Source(gate)) as shadow:
        assert shadow.answer(make_images(1), timeout=30).by == "source"
        assert shadow.batches == 0
        gate.open()
    assert shadow.batches == 1


@pytest.mark.parametrize(("when_behind", "skipped"), [("skip", 6), ("wait", 0)])
def test_steps_where_many_wait(when_behind, skipped):
    """With two behind, one is left out and one is done; or both are done."""
    with made("source", max_lag=2, when_behind=when_behind, max_batch=1) as shadow:
        with shadow._lock:  # until all are there
            futures = [shadow.submit(make_images(1)) for _ in range(12)]
        assert all(future.result(30).by == "source" for future in futures)
    assert int(shadow._metrics.value("skipped_images_total")) == skipped
    assert shadow.batches == 12 - skipped


class Sick(Tent):
    """Writes NaN into its parameters, or raises, at its third batch."""

    how = "nan"
    synchronized = False

    def step(self, images):
        logits = super().step(images)
        self.count_of = getattr(self, "count_of", 0) + 1
        if self.count_of < 3:
            return logits
        if self.how == "raise":
            raise RuntimeError("out of order")
        with torch.no_grad():
            self.learned[0].fill_(float("nan"))
        return logits * float("nan")


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_what_a_sick_method_says_never_goes_out(how):
    net, method = make_net("gn"), Sick(make_net("gn"), lr=0.01)
    method.how = how
    source = {name: value.clone() for name, value in method.adaptable.items()}
    policy = {"patience": 1, "min_images": 1}
    with warnings.catch_warnings(), Shadow(net, method, policy=policy, monitors=[Counting()], **QUICK) as shadow:
        warnings.simplefilter("ignore")
        first = serve(shadow, 2)
        assert [each.by for each in first] == ["source", "method"]
        answer = shadow.answer(make_images(4))
        assert (answer.by, torch.allclose(answer.logits, net(make_images(4)), atol=1e-6)) == ("source", True)
        shadow.predict(make_images(4))
        with shadow._lock:
            assert shadow.answering == "source"
            assert same(dict(shadow.method.adaptable), source)
        for _ in range(3):
            shadow.predict(make_images(4))
    assert shadow.stopped == (how == "raise")
    kinds = [event["event"] for event in shadow.events]
    assert ("failure" in kinds, "alarm" in kinds) == (how == "raise", how == "nan")
    assert kinds.count("stopped") == (how == "raise")


def test_a_monitor_or_policy_that_fails_harms_no_answer():
    class Broken(Counting):
        def see(self, seen):
            raise ZeroDivisionError("in a monitor")

    caught = pytest.warns(UserWarning, match="failed 3 times in a row, the last time with ZeroDivisionError")
    with caught, made(monitors=[Broken()], max_lag=1) as shadow:
        answers = [shadow.answer(make_images(2, seed=number)) for number in range(5)]
    assert {answer.by for answer in answers} == {"source"}
    assert shadow.stopped
    assert shadow._metrics.value("failures_total") == 3


@pytest.mark.parametrize("where", ["monitor", "policy"])
def test_a_state_that_cannot_be_had_harms_no_answer(where, tmp_path):
    def broken(self):
        raise ZeroDivisionError("no state")

    kind = {"monitor": Counting, "policy": Switching}[where]
    shadow = made(monitors=[Counting()], directory=tmp_path, snapshot_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "state_dict", broken)
        assert [each.by for each in serve(shadow, 3)] == ["source"] * 3
        with pytest.warns(UserWarning, match=r"last snapshot could not be written .*no state"):
            shadow.close()
    assert shadow._metrics.value("failures_total") == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_snapshot_that_cannot_be_written_is_tried_again(error, tmp_path, monkeypatch):
    """Whatever kind of error it is, as torch has kinds of its own for a full disk."""

    def full(path, write):
        raise error

    with made(directory=tmp_path, snapshot_every=1) as shadow:
        with monkeypatch.context() as patch:
            patch.setattr(snapshots, "write_whole", full)
            serve(shadow, 1)
            shadow._snapshots.close()  # its thread has tried
            assert shadow._metrics.value("failures_total") == 1
            assert str(error) in shadow.events[-1]["error"]
        shadow._snapshots = snapshots.Snapshots(tmp_path, 3, shadow._note_written, shadow._note_failure)
    assert (tmp_path / "snapshot-000000001.pt").exists()
    monkeypatch.setattr(snapshots, "write_whole", full)
    with pytest.warns(UserWarning, match="last snapshot could not be written"):
        made(directory=tmp_path).close()


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_errors_harm_no_answer():
    class Broken(Counting):
        def see(self, seen):
            raise ZeroDivisionError("in a monitor")

    with made(monitors=[Broken()], max_lag=1) as shadow:
        for number in range(6):
            assert shadow.answer(make_images(2, seed=number), timeout=10).by == "source"
    assert shadow.stopped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("who", ["net", "method"])
def test_nobody_waits_for_a_thread_that_has_ended(who):
    """SystemExit of a net or a method is no failure that one goes on from."""

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.ends = make_net("gn"), False

        def forward(self, x):
            if self.ends:
                raise SystemExit
            return self.net(x)

    with made(Source(Ends()) if who == "method" else "source", net=Ends()) as shadow:
        shadow.predict(make_images(1))
        settled(shadow, 1)
        (shadow._source if who == "net" else shadow.method).model.ends = True
        with pytest.raises(ClosedError, match="has ended" if who == "net" else "closed|has ended"):
            [shadow.predict(make_images(1), timeout=10) for _ in range(1 if who == "net" else 100)]
        shadow._worker.join(10)
        assert shadow.closed
    assert any("SystemExit" in event.get("error", "") for event in shadow.events)


@pytest.mark.filterwarnings("ignore:The net's outputs are not all finite")
def test_logits_of_the_source_that_are_not_finite_are_no_answer():
    class Sick(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net("gn")

        def forward(self, x):
            return self.net(x) * torch.where((x == 1).flatten(1).all(1), float("nan"), 1.0)[:, None]

    with made("source", net=Sick(), max_wait_ms=50, max_batch=2) as shadow:
        white, other = shadow.submit(torch.ones(1, 3, 16, 16)), shadow.submit(make_images(1))
        with pytest.raises(InputError, match="not finite"):
            white.result(10)
        assert torch.allclose(other.result(10).logits, make_net("gn")(make_images(1)), atol=1e-6)


def test_an_answer_that_comes_at_the_last_moment_counts():
    class Late(Future):
        def result(self, timeout=None):
            if timeout is None:
                return super().result()
            self.set_result("the answer")
            raise TimeoutError

    with made() as shadow:
        shadow.submit = lambda images: Late()
        assert shadow.answer(make_images(1)) == "the answer"


def test_the_thread_that_answers_does_not_wait_for_itself():
    caught, gate = [], Gate()

    def call(shadow):
        for action in (shadow.close, lambda: shadow.predict(make_images(1))):
            try:
                action()
            except ConfigError as error:
                caught.append(str(error))

    with made(net=gate) as shadow:
        shadow.submit(make_images(1)).add_done_callback(lambda future: call(shadow))
        gate.open()
    assert len(caught) == 2
    assert all("wait for it" in words for words in caught)


@pytest.mark.parametrize("answering", ["source", "method"])
def test_images_that_the_method_alone_refuses_leave_it_as_it_is(answering):
    """A request of another size, that comes to a method with a window, costs nothing of what it has learned."""
    with made(window=4, decisions={1: Decision(answering, reason="test")}) as shadow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        serve(shadow, 3)
        with shadow._lock:
            before = {name: tensor.clone() for name, tensor in shadow.method.adaptable.items()}
        for _ in range(4):
            odd = shadow.answer(torch.rand(2, 3, 20, 20))
            assert odd.by == "source"
        answer = shadow.answer(make_images(4, seed=3))
        settled(shadow, 4)
        assert answer.by == answering
        assert not shadow.stopped
        assert "lightning_tta_skipped_images_total 8" in shadow.metrics().splitlines()
        assert "lightning_tta_failures_total 0" in shadow.metrics().splitlines()
        alone = adapt(make_net("gn"), "tent", lr=0.05, window=4)
        for number in range(4):
            if number == 3:
                assert all(torch.equal(before[name], tensor) for name, tensor in alone.adaptable.items())
            alone(make_images(4, seed=number))
        assert all(torch.equal(shadow.method.adaptable[n], tensor) for n, tensor in alone.adaptable.items())


def test_images_that_the_method_refuses_make_no_further_snapshot(tmp_path, monkeypatch):
    with made(window=4, directory=tmp_path, snapshot_every=3) as shadow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = []
        monkeypatch.setattr(shadow._snapshots, "write", lambda number, state: written.append(number))
        serve(shadow, 3)
        for _ in range(2):
            shadow.predict(torch.rand(2, 3, 20, 20))
        shadow.predict(make_images(4, seed=3))
    assert written == [3, 4]  # the latter as it is closed


def test_metrics_after_a_restart_have_the_number_of_before(tmp_path):
    with made(directory=tmp_path) as shadow:
        serve(shadow, 2)
    with made(directory=tmp_path) as shadow:
        assert "lightning_tta_micro_batches 2" in shadow.metrics().splitlines()


@pytest.mark.parametrize("timeout", [-1, "soon"])
def test_a_timeout_that_is_none(timeout):
    with made() as shadow, pytest.raises(ConfigError, match="timeout must be"):
        shadow.predict(torch.rand(1, 3, 16, 16), timeout=timeout)


@pytest.mark.parametrize("batches", [None, 3])
def test_source_images_that_are_none(batches):
    with made(monitors=["doc"]) as shadow, pytest.raises(DataError, match="Source batches must be several"):
        shadow.prepare(batches)


@pytest.mark.parametrize(
    ("decide", "words"),
    [
        (lambda: None, "must return a Decision; Says returned a NoneType"),
        (lambda: "method", "must return a Decision; Says returned a str"),
        (lambda: Decision("nobody"), "answering must be one of 'source', 'method'; got 'nobody'"),
        (lambda: Decision("source", "forget"), "restore must be one of"),
    ],
)
def test_a_policy_that_decides_nothing_harms_no_answer(decide, words):
    class Says(Policy):
        def decide(self, evidence):
            return decide()

    with Shadow(make_net("gn"), "tent", policy=Says(), monitors=[], **QUICK) as shadow:
        serve(shadow, 1)
        shadow.close()
        assert words in next(event["error"] for event in shadow.events if event["event"] == "failure")
        assert shadow.answering == "source"


def test_labels_that_are_none():
    with made() as shadow:
        (answer,) = serve(shadow, 1)
        for labels in ([-1, 0, 0, 0], [0, 0, 0, 5], [0.0] * 4, [True] * 4, torch.tensor(1), [0] * 3, [[0]] * 4):
            with pytest.raises(InputError, match="from 0 to 4"):
                shadow.tell(answer.ids, labels)
        with pytest.raises(InputError, match="list of ids"):
            shadow.tell("abcd", [0, 0, 0, 0])
        assert shadow.tell(answer.ids[:2], np.array([0, 4])) == 2
        assert shadow.tell(answer.ids[2:], [np.int64(1), np.int8(2)]) == 2
    assert shadow._labels.counts.labels == 4


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_no_copies(way):
    with made() as shadow, pytest.raises(TypeError, match="Shadow cannot be copied or pickled"):
        way(shadow)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_fork(tmp_path):
    """Its child has no thread that answers: an error at once. Nothing of the parent's is closed."""
    with made(directory=tmp_path) as shadow:
        child = os.fork()
        if child == 0:
            wrong = 1
            try:
                for action in (lambda: shadow.predict(make_images(1)), lambda: shadow.tell(["a"], [0])):
                    with pytest.raises(ClosedError, match="is a fork"):
                        action()
                assert shadow.closed
                shadow.close()
                wrong = 0
            finally:
                os._exit(wrong)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not shadow.closed
        serve(shadow, 1)
        with pytest.raises(ConfigError, match="in use by another shadow"):
            made(directory=tmp_path)


def test_reset_and_rollback_by_hand():
    with made(decisions={2: METHOD}) as shadow:
        serve(shadow, 3)
        assert shadow.answering == "method"
        shadow.reset()
        assert shadow.answering == "source"
        assert same(dict(shadow.method.adaptable), dict(adapt(make_net("gn"), "tent").adaptable))


# Snapshots


def test_goes_on_from_the_last_snapshot(tmp_path):
    """Twelve micro-batches in two parts are those of one."""
    decisions, monitor = {5: METHOD}, Counting()
    with made(decisions=decisions, monitors=[monitor]) as whole:
        expected = serve(whole, 12)
    with made(decisions=decisions, monitors=[Counting()], directory=tmp_path) as first:
        answers = serve(first, 7)
    again = Counting()
    with made(decisions=decisions, monitors=[again], directory=tmp_path) as second:
        assert (second.batches, second.answering) == (7, "method")
        assert second.tell(answers[0].ids, torch.zeros(4, dtype=torch.long)) == 4
        more = serve(second, 5, first=7)
    for answer, other in zip([*answers, *more], expected, strict=True):
        assert torch.equal(answer.logits, other.logits)
        assert answer.by == other.by
    assert same(dict(second.method.state_dict()), dict(whole.method.state_dict()))
    assert again.seen == monitor.seen == 12
    assert len({id for answer in [*answers, *more] for id in answer.ids}) == 48
    starts = [json.loads(line) for line in (tmp_path / "shadow.jsonl").read_text().splitlines()]
    assert [line["resumed"] for line in starts if line["event"] == "start"] == [False, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_in_the_middle(tmp_path):
    """SIGKILL after nine micro-batches, with a snapshot of the eighth: the rest is as if there had been no kill."""
    child = os.fork()
    if child == 0:
        try:
            shadow = made(decisions={3: METHOD}, directory=tmp_path, snapshot_every=4)
            serve(shadow, 9)
            while not (tmp_path / "snapshot-000000008.pt").exists():
                time.sleep(0.001)
            (tmp_path / ".snapshot-000000012.pt.1.tmp").write_bytes(b"half")
            with (tmp_path / "shadow.jsonl").open("a") as file:
                file.write('{"time": 1, "ev')
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with made(decisions={3: METHOD}) as whole:
        serve(whole, 12)
    with made(directory=tmp_path, snapshot_every=4) as shadow:
        assert (shadow.batches, shadow.answering) == (8, "method")
        serve(shadow, 4, first=8)
    assert same(dict(shadow.method.state_dict()), dict(whole.method.state_dict()))
    assert not list(tmp_path.glob(".*.tmp"))
    lines = [json.loads(line) for line in (tmp_path / "shadow.jsonl").read_text().splitlines()]  # the cut one is gone
    assert lines[-1]["event"] != "ev"
    numbers = {int(path.stem.partition("-")[2]) for path in tmp_path.glob("snapshot-*.pt")}
    assert {8, 12} <= numbers <= {4, 8, 12}  # one that waits to be written gives way to the next


def test_a_damaged_snapshot(tmp_path):
    for first in (0, 3):
        with made(directory=tmp_path) as shadow:
            serve(shadow, 3, first=first)
    newest, oldest = tmp_path / "snapshot-000000006.pt", tmp_path / "snapshot-000000003.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"snapshot-000000006\.pt .* snapshot-000000003\.pt, the one before"):
        shadow = made(directory=tmp_path)
    with shadow:
        assert shadow.batches == 3
        assert not newest.exists()
    oldest.write_bytes(oldest.read_bytes()[:100])
    with pytest.raises(DataError, match=r"All snapshots in .* snapshot-000000003\.pt"):
        made(directory=tmp_path)
    oldest.unlink()
    made(directory=tmp_path).close()  # the lock was let go


def test_whose_directory(tmp_path):
    with made(directory=tmp_path) as shadow:
        serve(shadow, 1)
        with pytest.raises(ConfigError, match="in use by another shadow"):
            made(directory=tmp_path)
    with pytest.raises(ConfigError, match="of another method: tent; here it is eata"):
        made("eata", directory=tmp_path)
    with pytest.raises(ConfigError, match="of another net"):
        made(net=make_net("gn", seed=1), directory=tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        made(directory=tmp_path, optimizer="sgd")
    made(directory=tmp_path, lr=0.5).close()


@pytest.mark.parametrize("place", ["file", "file/below", "log"])
def test_a_directory_that_cannot_be_used(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "log" / "shadow.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot be used: .*Give a directory"):
        made(directory=tmp_path / place)


def test_snapshots_are_small(tmp_path):
    """Of the net they hold what the method may change, not the rest."""
    net = nn.Sequential(make_net("gn", num_classes=16), nn.Linear(16, 1024), nn.Linear(1024, 4))
    with made(net=net, directory=tmp_path) as shadow:
        serve(shadow, 1)
    assert (tmp_path / "snapshot-000000001.pt").stat().st_size < 60_000
    with made(net=net, directory=tmp_path) as again:
        assert same(dict(again.method.state_dict()), dict(shadow.method.state_dict()))


def test_source_images_first(tmp_path):
    class Hungry(Counting):
        needs_source = True

        def prepare(self, batches):
            self.prepared = sum(len(seen.logits) for seen in batches)

    source = [{"image": make_images(8), "label": torch.arange(8) % 5}]
    with made("eata", monitors=[Hungry()], directory=tmp_path) as shadow:
        with pytest.raises(NotPreparedError, match="'eata', 'counting' must see source images"):
            shadow.predict(make_images(1))
        shadow.prepare(source)
        assert shadow.monitors[0].prepared == 8
        serve(shadow, 1)
    with made("eata", monitors=[Hungry()], directory=tmp_path) as again:
        assert again.predict(make_images(1)).shape == (1, 5)


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_wait_ms": -1}, "max_wait_ms"),
        ({"max_queue": 3, "max_batch": 4}, "max_queue"),
        ({"max_wait_ms": "5"}, "max_wait_ms"),
        ({"keep_snapshots": 0}, "keep_snapshots"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"max_lag": 0}, "max_lag"),
        ({"timeout": 0}, "timeout"),
        ({"when_behind": "stop"}, "when_behind"),
        ({"monitors": ["none"]}, "Unknown monitors 'none'"),
        ({"monitors": [Counting(), Counting()]}, "same name"),
        ({"monitors": None}, r"monitors=\[\]"),
        ({"monitors": 3}, "got 3"),
        ({"directory": 3}, "directory must be a path"),
        ({"directory": b"runs"}, "directory must be a path"),
        ({"monitors": ["aetta"], "policy": {"estimates": ["aeta"]}}, "estimates must be one of 'aetta'; got 'aeta'"),
        ({"monitors": ["collapse"], "policy": {"estimates": ["collapse"]}}, "estimates must be one of"),
        ({"policy": {"ignore": "shift"}}, "ignore must be a list"),
        ({"policy": {"patence": 3}}, r"Did you mean patience\?"),
        ({"policy": "patience"}, "policy must be a Policy"),
        ({"method": "tnet"}, r"mean tent\?"),
        ({"method": 3}, "method must be the name of a method"),
        ({"method": lambda net: Watch(adapt(net, "tent"))}, "needs no Watch"),
        ({"method": lambda net: adapt(net, "tent"), "lr": 0.1}, "options go with the name"),
        ({"method": lambda net: adapt(net, "tent", in_place=True)}, "nothing is left of the source"),
    ],
)
def test_wrong_options(options, words):
    net = make_net("gn")
    method = options.get("method", "tent")
    options = {**options, "method": method(net) if callable(method) else method}
    with pytest.raises(ConfigError, match=words):
        Shadow(net, **{"monitors": [], **options})


def test_it_is_public_and_no_thread_stays():
    assert lightning_tta.Shadow is Shadow
    made().close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lightning_tta") and t.is_alive()]
