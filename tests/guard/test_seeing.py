"""What monitors see of a batch, for methods of every kind: compared with plain passes of copies of the net."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from contract import VARIANTS, build
from lightning_tta import ConfigError, DataError, InputError, NotPreparedError, UnsupportedModelError, Watch, adapt
from lightning_tta.guard.monitors import kinds
from lightning_tta.guard.monitors.base import Monitor
from nets import make_images, make_net, make_stream, same

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]
LABELS = torch.arange(8) % 5


class Everything(Monitor):
    """Keeps what it sees."""

    name = "everything"
    wants = frozenset({"source", "same_source", "features", "predict"})
    needs_source = True

    def __init__(self, wants=None):
        if wants is not None:
            self.wants = frozenset(wants)
        self.seen, self.prepared_with, self.forgot, self.word = [], [], 0, ""

    def prepare(self, batches):
        self.prepared_with = list(batches)

    def see(self, seen):
        self.seen.append(seen)

    def alarm(self):
        return self.word

    def forget(self):
        self.forgot += 1

    def state_dict(self):
        return {"seen": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [None] * state["seen"]


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    monkeypatch.setitem(kinds.MONITORS, "everything", Everything)


def source_batches(count=2):
    return [{"image": images, "label": LABELS[: len(images)]} for images in make_stream(count)]


def watched(name, options, kind="bn"):
    net = make_net(kind)
    method = build(name, options, kind, net=net, in_place=False)
    return copy.deepcopy(net), Watch(method, "warn", monitors="everything")


# How the answer comes from the features and the head of the pass that gave it; and passes more than the source's two.
def by_head(seen, method):
    return seen.head(seen.features)


def by_prototypes(seen, method):
    return seen.features @ normalize(method.sums, dim=1).T


def by_shift(seen, method):
    return seen.head(seen.features - method.value("shift"))


SURE = {"lr": 1e-2, "ema_decay": 0.7, "anchor_threshold": 0.0, "restore": 0.0}
CASES = {
    "tent": (VARIANTS["tent"][0], by_head, 0),
    "tent all": ({"lr": 1e-2, "select": "all"}, by_head, 0),
    "sar": (VARIANTS["sar"][1], by_head, 0),
    "cotta": (SURE, by_head, 0),
    "rotta": ({**VARIANTS["rotta"][0], "capacity": 8}, by_head, 0),
    "note": (VARIANTS["note"][0], by_head, 0),
    "memo norm": ({"lr": 0.05, "views": 4, "params": "norm", "augment": "crop_flip"}, by_head, 0),
    "t3a": ({"filter_k": None}, by_prototypes, 0),
    "neo": ({}, by_shift, 0),
    "source": ({}, by_head, -1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_arrives_is_right(case):
    options, answer, more = CASES[case]
    name = case.split()[0]
    net, watch = watched(name, options)
    watch.prepare(source_batches())
    plain = copy.deepcopy(watch.method)
    for images in make_stream(3):
        before = watch.forwards
        logits = watch(images)
        seen = watch.monitors["everything"].seen[-1]
        assert torch.equal(logits, plain(images))  # watching changes nothing
        assert torch.equal(seen.logits, logits)
        torch.testing.assert_close(answer(seen, plain), logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(seen.source, net(images))
        with plain.at_source():
            assert torch.equal(seen.same_source, plain.predict(images, statistics="batch"))
        assert watch.forwards - before == 2 + more
        assert torch.equal(seen.predict(images), plain.predict(images, statistics="batch"))
        assert watch.forwards - before == 3 + more
        assert seen.images is images
    assert watch.stats["forwards"] == plain.stats["forwards"]


@pytest.mark.parametrize("name", ["lame", "zero", "memo", "cotta", "rmt"])
def test_features_where_the_answer_is_no_output_of_one_pass(name):
    """LAME's agreement, views, episodes with other last layers, a mean over views, a mean of two nets."""
    net, watch = watched(name, VARIANTS[name][0])
    watch.prepare(source_batches(1))
    images = make_images(6)
    watch(images)
    seen = watch.monitors["everything"].seen[-1]
    if name in ("lame", "zero", "memo"):  # the net has its source weights before and after
        torch.testing.assert_close(seen.features, net.features(images))
        torch.testing.assert_close(seen.head.weight, net.head.weight)
    else:  # the adapted nets are near to the source with the statistics of the batch
        near = adapt(net, "norm")(images)
        assert (seen.head(seen.features) - near).abs().max() < 1.0 < (net(images) - near).abs().max()


def test_a_head_that_learns_is_that_of_the_pass():
    """The answer of Tent comes from before its step, that of the copied head too."""
    net, watch = watched("tent", {"lr": 0.1, "select": "all"})
    watch.prepare(source_batches(1))
    logits = watch(make_images(8))
    seen = watch.monitors["everything"].seen[-1]
    assert torch.equal(seen.head.weight, net.head.weight)
    assert not torch.allclose(watch.model.head.weight, net.head.weight)
    assert torch.equal(seen.head(seen.features), logits)
    assert not seen.logits.requires_grad
    assert not seen.features.requires_grad


def test_nothing_is_made_that_nobody_wants():
    watch = Watch(adapt(make_net("bn"), "tent"), "warn", monitors={"kind": "everything", "wants": []})
    watch.prepare(source_batches(1))
    assert watch.forwards == 1
    watch(make_images(4))
    (seen,) = watch.monitors["everything"].seen
    assert (seen.source, seen.same_source, seen.features, seen.head, seen.predict, seen.images) == (None,) * 6
    assert watch.forwards == 1
    assert not watch.model.head._forward_hooks


def test_images_that_are_left_out():
    _, watch = watched("tent", {})
    watch.prepare(source_batches(1))
    images = make_images(6)
    images[[1, 4]] = float("nan")
    logits = watch(images, index=list("abcdef"))
    seen = watch.monitors["everything"].seen[-1]
    assert seen.index == ["a", "c", "d", "f"]
    assert torch.equal(seen.logits, logits[[0, 2, 3, 5]])
    assert torch.equal(seen.head(seen.features), seen.logits)
    assert len(seen.source) == len(seen.same_source) == len(seen.images) == 4
    images[:] = float("nan")
    watch(images)
    assert len(watch.monitors["everything"].seen) == 1  # nothing to see


def test_names_of_images():
    _, watch = watched("tent", {})
    watch.prepare(source_batches(1))
    seen = watch.monitors["everything"].seen
    watch(make_images(3))
    watch(make_images(2), index=["x", "y"])
    watch(make_images(2))
    assert [list(each.index) for each in seen] == [[0, 1, 2], ["x", "y"], [5, 6]]
    before = watch.revision
    with pytest.raises(InputError, match="each of the 2 images; it has 3"):
        watch(make_images(2), index=[1, 2, 3])
    assert watch.revision == before


def test_source_images_come_to_method_and_monitors():
    net = make_net("bn")
    watch = Watch(adapt(net, "eata", fisher_alpha=1.0), "warn", monitors=["everything"])
    assert watch.needs_source
    assert not watch.prepared
    with pytest.raises(NotPreparedError, match="Monitor 'everything' must see source images"):
        watch(make_images(4))
    train, held_out = source_batches(2), [{"image": make_images(5, seed=9)}, {"image": make_images(3, seed=8)}]
    with pytest.raises(DataError, match="iterator"):
        watch.prepare(iter(train))
    watch.prepare(iter(train), held_out)
    assert watch.prepared
    seen = watch.monitors["everything"].prepared_with
    assert [len(each.logits) for each in seen] == [5, 3]
    for batch, each in zip(held_out, seen, strict=True):
        images = batch["image"]
        assert torch.equal(each.logits, net(images))
        assert torch.equal(each.source, net(images))
        assert torch.equal(each.head(each.features), each.logits)
        assert each.labels is None
    alone = Watch(adapt(net, "eata", fisher_alpha=1.0), "warn", compare="history")
    alone.prepare(train)
    assert same(watch.memory, alone.memory)
    watch.prepare([{"image": make_images(4, seed=7), "label": torch.tensor([1, 2, -1, 3])}])  # monitors alone again
    assert watch.monitors["everything"].prepared_with[0].labels.tolist() == [1, 2, -1, 3]
    with pytest.raises(DataError, match="Source batches must be"):
        watch.prepare(held_out[0])


def test_nets_without_a_last_linear_layer():
    class NoHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 16)

        def forward(self, x):
            return self.conv(x).flatten(1)

    with pytest.raises(UnsupportedModelError, match=r"Monitor 'everything' needs the features .*no linear layer"):
        Watch(adapt(NoHead(), "source"), monitors="everything")
    softmax = nn.Sequential(make_net("bn"), nn.LogSoftmax(1))
    watch = Watch(adapt(softmax, "source"), "warn", monitors="everything")
    with pytest.raises(UnsupportedModelError, match="not the output of its head"):
        watch.prepare(source_batches(1))


def test_labels_come_late_to_monitors_alone():
    watch = Watch(adapt(make_net("bn"), "tent"))
    with pytest.raises(ConfigError, match=r"None of the monitors \(collapse\) takes labels"):
        watch.tell([0], [1])
    _, watch = watched("tent", {})
    told = []
    watch.monitors["everything"].tell = lambda index, labels: told.append((index, labels.tolist()))
    watch.tell(torch.tensor([3, 0]), [1, 4])
    watch.tell(["a"], torch.tensor([2]))
    assert told == [([3, 0], [1, 4]), (["a"], [2])]
    with pytest.raises(InputError, match="one label for each image"):
        watch.tell([1, 2], [0])
