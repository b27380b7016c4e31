"""Images one at a time: what monitors see, with which statistics, and what an alarm undoes."""

import copy

import pytest
import torch

from lightning_tta import ConfigError, Shadow, Watch, adapt
from lightning_tta.guard.monitors import kinds
from lightning_tta.guard.monitors.base import Monitor
from nets import make_images, make_net, same, without_running_statistics

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]
TENT = {"lr": 0.05, "window": 8}


class Looks(Monitor):
    """Remembers all that it sees; alarms at given looks."""

    name = "looks"

    def __init__(self, wants=(), gathers=True, alarms=()):
        self.wants, self.gathers, self.alarms, self.seen = frozenset(wants), gathers, alarms, []

    def see(self, seen):
        self.seen.append(seen)

    def alarm(self):
        return "one_class" if len(self.seen) in self.alarms else ""

    def state_dict(self):
        return {"seen": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [None] * state["seen"]


@pytest.fixture
def looks(monkeypatch):
    """``looks(**options)`` watches a method with one."""
    monkeypatch.setitem(kinds.MONITORS, "looks", Looks)

    def make(method, gather=4, **options):
        options = {"kind": "looks", **options}
        return Watch(method, monitors=[options], gather=gather, window=2, snapshot_every=3)

    return make


def singles(number, first=0):
    return [make_images(1, seed=n) for n in range(first, first + number)]


def among(net, images):
    """Logits of a net whose BatchNorm takes the statistics of these images, in plain PyTorch."""
    with torch.no_grad():
        return without_running_statistics(copy.deepcopy(net))(torch.cat(images))


@pytest.mark.parametrize("kind", ["bn", "user", "gn"])
def test_gathered_images_and_the_source_among_those_of_the_window(kind, looks):
    """The source has the statistics of the method's last eight images, not of one, nor of four."""
    net, images = make_net(kind), singles(18)
    watch = looks(adapt(net, "tent", **TENT), wants=("source", "same_source"))
    answers = [watch(image) for image in images]
    seen = watch.monitors["looks"].seen
    assert [len(each.logits) for each in seen] == [4] * 4  # two images wait
    assert [name for each in seen for name in each.index] == list(range(16))
    assert torch.equal(torch.cat([each.logits for each in seen]), torch.cat(answers[:16]))
    for number, each in enumerate(seen, 1):
        window = images[max(0, 4 * number - 8) : 4 * number]
        expected = among(net, window)[-4:] if kind != "gn" else net(torch.cat(window))[-4:]
        assert torch.allclose(each.same_source, expected, atol=1e-5)
        assert torch.allclose(each.source, net(torch.cat(window))[-4:], atol=1e-5)


@pytest.mark.parametrize("kind", ["bn", "user"])
def test_features_and_other_passes_are_among_the_window_too(kind, looks):
    """What AETTA and view_agreement go by: at once, and gathered."""
    for gathers in (False, True):
        watch = looks(adapt(make_net(kind), "tent", **TENT), wants=("features", "predict"), gathers=gathers)
        images = singles(12)
        answers = torch.cat([watch(image) for image in images])
        seen = watch.monitors["looks"].seen
        assert len(seen) == (3 if gathers else 12)
        features = torch.cat([each.features for each in seen])
        assert torch.allclose(make_net(kind).head(features), answers, atol=1e-5)
        mirrored = seen[-1].images.flip(-1)
        expected = among(watch.model, [*images[4 + len(mirrored) :], mirrored])[-len(mirrored) :]
        assert torch.allclose(seen[-1].predict(mirrored), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_predict_with_the_statistics_that_the_method_uses(size):
    """Images that have come, and others, in windows that are full and not."""
    method = adapt(make_net("bn"), "tent", lr=0.0, window=8)
    last = []
    for number in range(7):
        images, other = make_images(size, seed=number), make_images(size, seed=100 + number)
        answer, last = method(images), [*last, images]
        stream = torch.cat(last)
        if size in (1, 8) or (size == 3 and number < 2):  # else it was cut in two by the end of a window
            assert torch.allclose(method.predict(images, statistics="batch"), answer, atol=1e-5)
        before = method.state_dict()
        window = torch.cat([stream, other])[-max(8, size) :]
        expected = among(make_net("bn"), [window if size < 8 else other])[-size:]
        assert torch.allclose(method.predict(other, statistics="batch"), expected, atol=1e-5)
        assert same(dict(before), dict(method.state_dict()))


def test_the_source_answers_with_the_window_too(looks):
    """On probation, and after a stop: two looks long."""
    net, images = make_net("bn"), singles(20)
    watch = Watch(adapt(net, "tent", **TENT), "stop", gather=4, window=2, probation=2)
    for number, image in enumerate(images):
        expected = among(net, images[max(0, number - 7) : number + 1])[-1:]
        assert torch.allclose(watch(image), expected, atol=1e-5) == (number < 8)
    assert (watch.on_probation, watch.events) == (8, [])


def test_a_batch_that_is_enough_is_shown_as_it_comes(looks):
    watch = looks(adapt(make_net("bn"), "tent"), wants=("same_source",))
    for size in (4, 6, 1, 2, 5, 4):
        watch(make_images(size))
    assert [len(seen.logits) for seen in watch.monitors["looks"].seen] == [4, 6, 8, 4]
    with pytest.raises(ConfigError, match="gather"):
        Watch(adapt(make_net("bn"), "tent"), gather=0)


def test_without_a_window_the_source_has_the_statistics_of_each_batch(looks):
    net = make_net("bn")
    watch = looks(adapt(net, "tent"), wants=("same_source",))
    batches = [make_images(2, seed=n) for n in range(2)]
    for images in batches:
        watch(images)
    expected = torch.cat([among(net, [images]) for images in batches])
    assert torch.allclose(watch.monitors["looks"].seen[0].same_source, expected, atol=1e-5)


@pytest.mark.parametrize("looked", [3, 6, 7])
def test_a_watch_goes_back_to_before_the_first_gathered_image(looked, looks):
    """States are taken after looks alone: after 0, 3, 6 of them; healthy two looks later."""
    alone = adapt(make_net("gn"), "tent", lr=0.05)
    watch = looks(adapt(make_net("gn"), "tent", lr=0.05), alarms=[looked])
    images = singles(4 * looked)
    for image in images:
        watch(image)
    assert [event["batch"] for event in watch.events] == [4 * looked - 1]
    for image in images[: 12 * ((looked - 3) // 3)]:
        alone(image)
    assert same(dict(watch.method.adaptable), dict(alone.adaptable))


@pytest.mark.parametrize(("alarm", "healthy"), [(2, 0), (3, 4), (5, 12)])
def test_a_shadow_goes_back_to_before_the_first_gathered_image(alarm, healthy):
    """A candidate is due after each third image, and is taken where none waits: after 4, 8, 12, 16."""
    alone, monitor = adapt(make_net("gn"), "tent", lr=0.05), Looks(alarms=[alarm])
    images = singles(4 * alarm)
    with Shadow(
        make_net("gn"), "tent", lr=0.05, monitors=[monitor], gather=4, snapshot_every=3, max_wait_ms=0, max_lag=1,
        when_behind="wait",
    ) as shadow:  # fmt: skip
        for image in images:
            shadow.predict(image)
    assert len(monitor.seen) == alarm
    for image in images[:healthy]:
        alone(image)
    assert same(dict(shadow.method.adaptable), dict(alone.adaptable))


def test_a_shadow_and_its_twin_see_alike_after_a_restart(tmp_path):
    """Ended in the middle of what was gathered, and gone on from there."""

    class Estimating(Looks):
        def estimate(self):
            return 0.5

    def made(directory):
        monitor = Estimating(wants=("same_source", "features"))
        options = {"monitors": [monitor], "gather": 4, "directory": directory, "max_wait_ms": 0, "when_behind": "wait"}
        return Shadow(make_net("bn"), "tent", max_lag=1, **options, **TENT)

    def serve(shadow, first, last):
        with shadow:
            for image in singles(last - first, first):
                shadow.predict(image)
        return shadow.monitors[0].seen, shadow._twins[0].seen

    whole = serve(made(tmp_path / "whole"), 0, 8)
    serve(made(tmp_path / "parts"), 0, 6)
    parts = serve(made(tmp_path / "parts"), 6, 8)
    for one, other in zip(whole, parts, strict=True):
        assert len(one) == len(other) == 2
        for name in ("logits", "source", "same_source", "features"):
            assert torch.allclose(getattr(one[1], name), getattr(other[1], name), atol=1e-6)
        assert len(one[1].index) == len(other[1].index) == 4


def test_a_watch_that_is_saved_in_the_middle_goes_on_alike(looks):
    images = singles(16)
    watch = Watch(adapt(make_net("bn"), "tent", **TENT), gather=5, window=2)
    for image in images[:7]:
        watch(image)
    other = Watch(adapt(make_net("bn"), "tent", **TENT), gather=5, window=2)
    other.load_state_dict(watch.state_dict())
    twin = copy.deepcopy(watch)
    for image in images[7:]:
        answer = watch(image)
        assert torch.equal(other(image), answer)
        assert torch.equal(twin(image), answer)
    assert same(watch.state_dict()["watch"], other.state_dict()["watch"])
    assert same(watch.state_dict()["watch"], twin.state_dict()["watch"])


def test_single_requests_to_a_shadow_of_a_net_with_batch_norm():
    """No false alarm, though BatchNorm of one vector gives nothing but its bias; a collapse is still caught."""
    net, alarms = make_net("user"), {}
    for name, lr in (("healthy", 1e-3), ("sick", 3.0)):
        with Shadow(
            net, "tent", lr=lr, optimizer="sgd", window=16, monitors=["collapse"], max_wait_ms=0, max_lag=1,
            when_behind="wait",
        ) as shadow:  # fmt: skip
            for image in singles(90):
                shadow.predict(image)
        alarms[name] = [event["reason"] for event in shadow.events if event["event"] == "alarm"]
    assert alarms["healthy"] == []
    assert alarms["sick"]
    assert shadow.answering == "source"
