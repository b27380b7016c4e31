"""Watch: each signal, each action and the snapshots, on a scripted method."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, Watch, adapt
from lightning_tta.methods import Source, TTAMethod
from lightning_tta.methods.base.state import put_back, size, take
from nets import make_images, make_net, make_stream, same

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]
K = 4
watched = partial(Watch, gather=1)  # each batch is looked at, however few images it has
IMAGES = torch.full((8, 3, 16, 16), 0.5)


class Scripted(TTAMethod):
    """Returns the logits of a script; ``weight`` counts the batches it has adapted on."""

    def __init__(self, script):
        super().__init__(nn.Linear(1, K))
        self.script = script
        self.register_buffer("weight", torch.zeros(()))
        self.state("weight", self.weight)
        self.state("last", torch.zeros(()))

    def step(self, images):
        step = int(self.weight)
        self.weight.add_(1)
        self.write("last", torch.tensor(step))
        return self.script(step)

    def infer(self, images):
        return spread(1.0)[: len(images)]


def spread(scale):
    """Eight images, two of each class, confidence and norm by ``scale``."""
    return scale * torch.eye(K).repeat(2, 1)


def one_class(scale):
    return scale * torch.eye(K)[:1].repeat(8, 1)


def after(count, healthy, sick):
    return lambda step: sick() if step >= count else healthy()


def feed(script, batches, **settings):
    watch = watched(Scripted(script), **{"window": 4, "history": 16, "compare": "history", **settings})
    outputs = [watch(IMAGES) for _ in range(batches)]
    return watch, outputs


@pytest.mark.parametrize(
    ("sick", "reason"),
    [
        (lambda: one_class(4.0), "one_class"),
        (lambda: spread(12.0), "logit_norm"),
        (lambda: spread(2.9) + 5.0 * torch.eye(K)[:1], "one_class"),
        (lambda: torch.full((8, K), float("nan")), "non_finite"),
        (lambda: spread(float("inf")).nan_to_num(0.0, float("inf")), "non_finite"),
    ],
)
def test_signals(sick, reason):
    watch, _ = feed(after(20, lambda: spread(2.0), sick), 30, action="warn", norm_ratio=4.0)
    assert watch.events[0]["reason"] == reason
    assert 20 <= watch.events[0]["batch"] < 24
    assert watch.events[0]["action"] == "warn"
    values, reference = watch.events[0]["values"], watch.events[0]["reference"]
    if reason != "non_finite":
        assert reference["largest_class_share"] == pytest.approx(0.25)
        assert reference["logit_norm"] == pytest.approx(2.0)
        assert values["logit_norm"] > 2.0
    healthy, _ = feed(lambda step: spread(2.0), 30, action="warn")
    assert healthy.events == []


def test_no_entropy():
    def two_classes():
        return 10.0 * torch.eye(K)[[0, 0, 0, 1, 1, 1, 2, 3]]  # shares of 0.375 after 0.25: no ``one_class``

    watch, _ = feed(after(20, lambda: spread(3.0), two_classes), 30, action="warn", norm_ratio=10.0)
    assert watch.events[0]["reason"] == "no_entropy"
    sure, _ = feed(lambda step: spread(10.0), 30, action="warn", norm_ratio=10.0)  # a net that always was so sure
    assert sure.events == []


def test_an_easier_domain_is_no_collapse():
    """Sure of all classes alike: what a confident net makes of clean images after noisy ones."""
    easier = after(20, lambda: spread(3.0), lambda: spread(10.0))
    assert feed(easier, 40, action="warn", norm_ratio=10.0)[0].events == []
    sorted_before = after(20, lambda: one_class(3.0), lambda: one_class(10.0))  # one class all along: cannot be told
    assert feed(sorted_before, 40, action="warn", norm_ratio=10.0)[0].events[0]["reason"] == "no_entropy"


def test_a_stream_that_becomes_sorted_is_no_collapse():
    sorted_stream = after(20, lambda: spread(3.0), lambda: one_class(3.0))
    assert feed(sorted_stream, 40, action="warn")[0].events == []  # as unsure as before


def test_left_out_images_and_a_poisoned_parameter():
    def some(step):
        logits = spread(2.0)
        logits[::2] = 0
        return logits

    assert feed(some, 30, action="warn")[0].events == []
    assert feed(lambda step: torch.zeros(8, K), 30, action="warn")[0].events == []
    watch = watched(Scripted(lambda step: spread(2.0)), "rollback", window=4)
    watch(IMAGES)

    def poison(step):
        watch.method.weight.fill_(float("nan"))
        return spread(2.0)

    watch.method.script = poison
    watch(IMAGES)
    assert watch.events[0]["reason"] == "non_finite"
    assert watch.method.weight == 0


def test_rollback_goes_to_a_snapshot_that_proved_healthy():
    watch, outputs = feed(after(20, lambda: spread(2.0), lambda: one_class(9.0)), 23, snapshot_every=4)
    (event,) = watch.events
    assert event["batch"] in (21, 22)
    back_to = int(watch.method.weight) - (22 - event["batch"])
    assert 12 <= back_to <= event["batch"] - 3  # taken before, and followed by a whole window without alarm
    assert torch.equal(outputs[event["batch"]], spread(1.0))  # predicted again
    assert torch.equal(outputs[event["batch"] - 1], one_class(9.0))
    assert not watch.stopped


def test_reset_and_stop():
    sick = after(20, lambda: spread(2.0), lambda: one_class(9.0))
    watch, _ = feed(sick, 23, action="reset")
    assert len(watch.events) == 1
    assert int(watch.method.weight) == 22 - watch.events[0]["batch"]
    watch, outputs = feed(sick, 30, action="stop", snapshot_every=4)
    assert watch.stopped
    assert len(watch.events) == 1
    assert 12 <= int(watch.method.weight) <= 18
    assert all(torch.equal(logits, spread(1.0)) for logits in outputs[watch.events[0]["batch"] :])


def test_repeated_alarms_stop_at_the_source():
    def nan(step):
        return torch.full((8, K), float("nan"))

    watch, outputs = feed(nan, 10, retries=3)
    assert [event["action"] for event in watch.events] == ["rollback", "rollback", "reset and stop"]
    assert [event["batch"] for event in watch.events] == [0, 1, 2]
    assert watch.stopped
    assert watch.method.weight == 0
    assert all(torch.isfinite(logits).all() for logits in outputs)
    assert len(feed(nan, 10, retries=None)[0].events) == 10
    assert not feed(nan, 10, action="warn")[0].stopped


def test_a_reset_of_the_stream_begins_anew():
    watch, _ = feed(lambda step: spread(2.0), 10)
    watch.reset()
    assert watch.method.weight == 0
    watch.method.script = lambda step: torch.full((8, K), float("nan"))
    watch(IMAGES)
    assert len(watch.events) == 1
    assert watch.method.weight == 0  # not back to a snapshot from before the reset


SETTINGS = [
    ("tent", {"lr": 1e-2}),
    ("eata", {"lr": 0.1, "fisher_alpha": 0.0, "entropy_margin": None, "diversity_margin": None}),
    ("sar", {"lr": 1e-2, "entropy_margin": 0.95, "reset_threshold": None}),
    ("zerosiam", {"lr": 0.5, "predictor_lr": 0.5}),
    ("t3a", {"filter_k": None}),
    ("cotta", {"lr": 1e-2, "views": 2, "restore": 0.2, "ema_decay": 0.7}),
]


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_a_snapshot_brings_back_everything(name, options):
    method, stream = adapt(make_net("bn"), name, **options), make_stream(6)
    for images in stream[:3]:
        method(images)
    moment, state = take(method), copy.deepcopy(method.state_dict())
    expected = [method(images) for images in stream[3:]]
    assert not same(method.state_dict(), state)
    for _ in range(2):  # the snapshot is not used up
        put_back(method, moment)
        assert same(method.state_dict(), state)
        assert all(torch.equal(method(x), y) for x, y in zip(stream[3:], expected, strict=True))


def test_a_snapshot_holds_no_more_than_the_method_changes():
    net = make_net("bn")
    norm = sum(p.numel() for n, p in net.named_parameters() if "norm" in n)
    method = adapt(net, "tent", optimizer="sgd")
    account = 4 * norm + 8  # a mean and a variance beside each weight and bias, and the number of images
    assert size(take(method)) == 8 * norm + account  # with its momentum
    method(make_images(4))
    assert size(take(method)) == 8 * norm + account
    assert sum(Watch(adapt(net, "source")).sizes().values()) == 0


def test_watching_changes_nothing():
    for settings in ({"compare": "history"}, {"probation": 0}, {"action": "warn"}):
        plain, watch = adapt(make_net("bn"), "tent"), watched(adapt(make_net("bn"), "tent"), **settings)
        assert all(torch.equal(plain(x), watch(x)) for x in make_stream(12))
        assert same(plain.state_dict(), watch.method.state_dict())


def test_on_probation_the_source_predicts():
    plain, source = adapt(make_net("gn"), "tent", lr=1e-3), adapt(make_net("gn"), "source")
    watch = watched(adapt(make_net("gn"), "tent", lr=1e-3), window=3)
    for number, images in enumerate(make_stream(10)):
        adapted, logits = plain(images), watch(images)
        assert torch.equal(logits, source(images) if number < 6 else adapted)
        assert same(plain.state_dict(), watch.method.state_dict())
    assert watch.events == []
    assert watch.report()["on_probation"] == 6


def test_probation_begins_anew_and_doubles_with_each_alarm():
    def script(step):  # the source's classes, twice as sure; one class at 5, and at 9 once more
        return one_class(2.0) if step in alarms else spread(2.0)

    alarms: list[int] = []
    watch = watched(Scripted(script), "reset", window=2, history=100, retries=None, share_excess=0.2)
    shown = []
    for batch in range(30):
        if batch in (5, 20):
            alarms[:] = [int(watch.method.weight)]
        shown.append(float(watch(IMAGES).norm(dim=1).mean()))
        alarms.clear()
    assert [event["batch"] for event in watch.events] == [5, 20]
    own = [batch for batch, norm in enumerate(shown) if norm == 2.0]
    assert own == [4, *range(5 + 1 + 8, 20)]  # 4 batches at first, 8 after an alarm, 16 after two: not within 30


@pytest.mark.parametrize(("moved", "alarm"), [(0, False), (2, False), (4, True)])
def test_a_class_that_the_source_does_not_predict(moved, alarm):
    """Eight images, ``moved`` of them from classes 1, 2 and 3 to class 0."""
    classes = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    classes[1 : 1 + moved] = 0
    watch, _ = feed(lambda step: torch.eye(K)[classes], 8, compare="source", action="warn")
    assert bool(watch.events) == alarm
    assert all(event["reason"] == "one_class" for event in watch.events)


def test_state_goes_on():
    def made():
        return watched(adapt(make_net("gn"), "tent", lr=0.3), "rollback", window=2, snapshot_every=2, share_excess=0.05)

    stream = make_stream(24)
    whole = made()
    expected = [whole(images) for images in stream]
    first, second = made(), made()
    for images in stream[:11]:
        first(images)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert all(torch.equal(second(x), y) for x, y in zip(stream[11:], expected[11:], strict=True))
    assert second.events == whole.events
    assert len(whole.events) > 0


def test_a_watch_has_the_interface_of_its_method():
    plain, watch = adapt(make_net("bn"), "tent"), watched(adapt(make_net("bn"), "tent"), compare="history")
    for name in ("name", "options", "returns", "no_plain_net", "prepared", "needs_source"):
        assert getattr(watch, name) == getattr(plain, name)
    images = make_images(4)
    assert torch.equal(watch.forward(images), plain.forward(images))
    assert torch.equal(watch.predict(images), plain.predict(images))
    assert watch.stats == {**plain.stats, "guard_alarms": 0.0}
    state = watch.state_dict()
    assert same({name: value for name, value in state.items() if name != "watch"}, plain.state_dict())
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = watch.no_such_name
    with pytest.raises(ConfigError, match="got a Linear"):
        Watch(nn.Linear(1, 2))
    with pytest.raises(ConfigError, match="got a Watch"):
        Watch(watch)


def test_predict_shows_the_source_on_probation_only():
    source, images = adapt(make_net("gn"), "source"), make_images(4)
    for settings in ({"window": 2}, {"window": 2, "action": "warn"}, {"window": 2, "probation": 0}):
        watch = watched(adapt(make_net("gn"), "tent", lr=1e-2), **settings)
        watch(images)
        assert torch.equal(watch.predict(images), source.predict(images)) == (settings == {"window": 2})
        for batch in make_stream(6):
            watch(batch)
        assert torch.equal(watch.predict(images), watch.method.predict(images))


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "panic"},
        {"compare": "labels"},
        {"window": 1},
        {"history": 0},
        {"share_excess": 0.0},
        {"entropy_floor": 1.5},
        {"norm_ratio": 1.0},
        {"snapshot_every": 0},
        {"retries": 0},
        {"probation": -1},
        {"probation": 4, "compare": "history"},
        {"windows": 4},
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Watch(Source(make_net("bn")), **wrong)


def test_a_net_is_no_method():
    with pytest.raises(ConfigError, match=r"Watch\(lightning_tta.adapt\(model, 'tent'\)\), not a net; got a ConvNet"):
        Watch(make_net("bn"))


def test_a_second_watch_and_a_call_without_the_watch():
    method = adapt(make_net("bn"), "tent")
    watch = watched(method)
    with pytest.warns(UserWarning, match="has a watch already"):
        second = watched(method)
    stream = make_stream(6)
    watch(stream[0])
    for change, *of in ((method, stream[1]), (method.reset,), (second, stream[2])):
        change(*of)
        with pytest.warns(UserWarning, match="without its watch"):
            watch(stream[3])
        assert len(watch.monitors["collapse"].state_dict()["_recent"]) == 1  # a new beginning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.predict(stream[4])
        method.state_dict()
        with watch.hold():
            watch(stream[4])
            watch.reset()
        watch(stream[5])
        watch.load_state_dict(watch.state_dict())
        watch(stream[5])
        del second, watch, change
        watched(method)


def test_states_that_are_not_this_watchs():
    watch = watched(adapt(make_net("bn"), "tent"), window=4)
    watch(make_images(4))
    before = copy.deepcopy(watch.state_dict())
    others = {
        "no state of a watch": watch.method.state_dict(),
        "window=8, here 4": watched(adapt(make_net("bn"), "tent"), window=8).state_dict(),
        "method 'come'": watched(adapt(make_net("bn"), "come"), window=4).state_dict(),
        "does not fit": watched(adapt(make_net("bn", num_classes=7), "tent"), window=4).state_dict(),
    }
    for match, state in others.items():
        with pytest.raises(ConfigError, match=match):
            watch.load_state_dict(state)
        assert same(watch.state_dict(), before)
    with pytest.raises(ConfigError, match="watch"):
        watch.method.load_state_dict(before, strict=False)
    older = {**before, "watch": {k: v for k, v in before["watch"].items() if k not in ("settings", "dropped_events")}}
    watch.load_state_dict(older)
    assert same(watch.state_dict(), before)


@pytest.mark.parametrize("name", ["settings", "method", "action", "window", "steps", "acton"])
def test_attributes_that_cannot_be_set(name):
    watch = watched(adapt(make_net("bn"), "tent"))
    with pytest.raises(ConfigError, match=f"'{name}' cannot be set"):
        setattr(watch, name, "stop")
    watch.on_event = print
    watch.next_batch = 3


def test_events_are_bounded():
    watch, _ = feed(lambda step: torch.full((8, K), float("nan")), 300, action="warn")
    assert len(watch.events) == 256
    assert watch.dropped_events == 300 - 256
    assert watch.events[-1]["batch"] == 299
    assert watch.stats["guard_alarms"] == 300
    assert watch.report()["dropped_events"] == 44
    again = watched(Scripted(None), "warn", window=4, history=16, compare="history")
    again.load_state_dict(watch.state_dict())
    assert again.dropped_events == 44
    assert len(feed(lambda step: torch.full((8, K), float("nan")), 300, action="warn", history=280)[0].events) == 280
