"""Earlier images against a false alarm of one class: which are kept, what is asked of them, and what comes of it."""

import pickle

import numpy as np
import pytest
import torch

from lightning_tta import ConfigError, Watch, adapt
from lightning_tta.guard.monitors.base import Seen
from lightning_tta.guard.monitors.collapse import Collapse
from lightning_tta.guard.monitors.earlier import EarlierImages
from nets import make_net, make_stream, same

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]
K = 4


def images_called(numbers, size=2):
    """Images (B, 3, size, size) whose first pixel is a number below 1,024, exact in float16."""
    images = torch.zeros(len(numbers), 3, size, size)
    images[:, 0, 0, 0] = torch.as_tensor(numbers) / 1024
    return images


def numbers_of(images):
    return (1024 * images[:, 0, 0, 0]).long()


def logits_of(classes):
    return torch.eye(K)[torch.as_tensor(classes)]


def test_two_images_of_each_of_the_last_batches():
    earlier = EarlierImages(3)
    for first, size in ((0, 5), (10, 4), (20, 1), (30, 6)):
        numbers = range(first, first + size)
        earlier.add(images_called(numbers), logits_of([number % K for number in numbers]))
    state = earlier.state_dict()
    assert numbers_of(state["images"].float()).tolist() == [2, 10, 12, 20, 30, 33]
    assert state["source"] == [2, 2, 0, 0, 2, 1]
    earlier.add(images_called([40], size=3), logits_of([0]))
    assert len(earlier) == 1  # one size, for they go through the net together
    none = EarlierImages(0)
    none.add(images_called([0]), logits_of([0]))
    assert len(none) == 0


def plain_alarms(stream, table, window, excess, back):
    """The rule in NumPy, float64: at each batch whether there is an alarm, and whether earlier images were asked."""
    recent, kept, found = [], [], []
    for step, (numbers, answers, source) in enumerate(stream):
        recent = [*recent, (answers, source)][-window:]
        mine, its = (np.bincount(np.concatenate(each), minlength=K).astype(float) for each in zip(*recent, strict=True))
        mine, its = mine / mine.sum(), its / its.sum()
        asked, alarm = False, False
        if 2 * len(recent) >= window and min((mine - its).max(), 3 * (mine.max() - its.max())) > excess:
            label, alarm = int((mine - its).argmax()), True
            others = [number for number, of_source in kept if of_source != label]
            if len(others) >= 8:
                asked = True
                of_class = np.mean([table[step, number] == label for number in others])
                now = np.bincount([table[step, number] for number, _ in kept], minlength=K)
                then = np.bincount([of_source for _, of_source in kept], minlength=K)
                alarm = min(of_class, 3 * (now.max() - then.max()) / len(kept)) > excess
        for place in sorted({0, len(numbers) // 2}):
            kept = [*kept, (numbers[place], source[place])][-2 * window * back :]
        if alarm:
            recent = []
        found.append((alarm, asked))
    return found


@pytest.mark.parametrize("back", [1, 3])
def test_against_the_rule_in_numpy(back):
    """A method that leans to one class for a while, and of earlier images says so or not."""
    rng, window, excess = np.random.default_rng(back), 4, 0.2071
    stream, table = [], np.empty((120, 1000), dtype=int)
    for step in range(120):
        leaning, label = step % 12 > 5, step // 12 % K
        number = rng.integers(1, 9)
        source, answers = rng.integers(0, K, number), rng.integers(0, K, number)
        answers[rng.random(number) < 0.7 * leaning] = label
        stream.append((rng.integers(0, 1000, number), answers, source))
        table[step] = rng.integers(0, K, 1000)
        table[step, rng.random(1000) < rng.choice([0.0, 0.3, 0.9])] = label
    monitor, found = Collapse(window=window, share_excess=excess, norm_ratio=9.0, earlier_windows=back), []
    for step, (numbers, answers, source) in enumerate(stream):
        asked = []

        def predict(images, step=step, asked=asked):
            asked.append(len(images))
            return logits_of(table[step, numbers_of(images)])

        seen = Seen(logits_of(answers), same_source=logits_of(source), predict=predict, images=images_called(numbers))
        monitor.see(seen)
        found.append((monitor.alarm() == "one_class", bool(asked)))
        assert (monitor.evidence()["earlier"] is not None) == bool(asked)
        assert all(0 < number <= 2 * window * back for number in asked)
    assert found == plain_alarms(stream, table, window, excess, back)
    assert {(True, True), (False, True), (False, False)} <= set(found)


@pytest.mark.parametrize("lost", ["spread", "another class"])
@pytest.mark.parametrize("collapsed", [False, True])
def test_a_source_that_is_nearly_lost(lost, collapsed):
    """Runs of six batches of a class; in the last the source is lost; the method is right, or gives all to that class.

    The window looks alike in both. Without earlier images both alarm; with them a collapse alone does, no later.
    """
    alarms = {}
    for back in (0, 2):
        monitor, alarms[back] = Collapse(window=4, earlier_windows=back), []
        for step in range(18):
            truth = torch.full((8,), step // 6 + 1)
            source, is_last = truth, step >= 12
            if is_last:
                source = torch.arange(8) % K if lost == "spread" else torch.arange(8) % 2 * 2

            def predict(images, is_last=is_last):
                classes = numbers_of(images)
                return logits_of(torch.full_like(classes, 3) if collapsed and is_last else classes)

            seen = Seen(logits_of(truth), same_source=logits_of(source), predict=predict, images=images_called(truth))
            monitor.see(seen)
            alarms[back] += [step] if monitor.alarm() else []
    assert alarms[0]
    assert alarms[2][:1] == (alarms[0][:1] if collapsed else [])


def test_a_watch_counts_what_it_asks_and_goes_on_from_a_state():
    """One pass more for each batch that looks like a collapse, also where no alarm comes of it; none for others."""
    stream = make_stream(12, 8)

    def made(excess=0.1, back=4):
        net = make_net("gn")
        with torch.no_grad():  # predictions of several classes
            net.head.weight.mul_(8)
            net.head.bias.sub_(net(torch.cat(stream)).mean(0))
        collapse = {"kind": "collapse", "earlier_windows": back, "share_excess": excess, "norm_ratio": 1e6}
        return Watch(adapt(net, "tent", lr=0.05), "warn", gather=1, window=2, monitors=[collapse])

    quiet, whole, first, second = made(excess=1.0), made(), made(), made()
    expected, asked = [], []
    for images in stream:
        quiet(images)
        expected.append(whole(images))
        asked.append(whole.monitors["collapse"].evidence()["earlier"] is not None)
    assert quiet.forwards == 12
    assert whole.forwards == 12 + sum(asked)
    events = {event["batch"] for event in whole.events}
    assert [batch for batch, is_asked in enumerate(asked) if is_asked and batch not in events]
    assert [event for event in whole.events if event["earlier"] is not None]
    for images in stream[:6]:
        first(images)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert all(torch.equal(second(x), y) for x, y in zip(stream[6:], expected[6:], strict=True))
    assert second.events == whole.events
    assert same(second.state_dict(), whole.state_dict())


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="earlier_windows"):
        Collapse(earlier_windows=-1)
    assert Collapse("history").wants == frozenset()
    assert Collapse(earlier_windows=0).wants == {"same_source"}
