"""Several monitors at once: which alarms act, what goes on after a stop, and states that are saved and loaded."""

import copy
import json
import pickle
import warnings
from functools import partial

import pytest
import torch

from lightning_tta import ConfigError, DataError, Guard, InputError, NotPreparedError, Watch, adapt
from lightning_tta.cli.main import main
from lightning_tta.guard.monitors import kinds
from lightning_tta.guard.monitors.base import Monitor
from lightning_tta.methods import Tent
from nets import make_images, make_net, make_stream, same
from run.test_resume import make_data, results, run
from runs import directory_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]
ALL = [
    "collapse",
    {"kind": "poem", "alpha": 0.5},
    "aetta",
    "labels",
    {"kind": "drift", "alpha": 0.5},
    "consensus",
    "view_agreement",
]


class Speaker(Monitor):
    """Alarms at given batches of those that it has seen, and remembers what it was told."""

    def __init__(self, at=()):
        self.at, self.number, self.forgot = list(at), 0, 0

    def see(self, seen):
        self.number += 1

    def alarm(self):
        return f"said_{self.name}" if self.number - 1 in self.at else ""

    def estimate(self):
        return self.number / 100

    def forget(self):
        self.forgot += 1

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Acting(Speaker):
    name = "acting"


class Informing(Speaker):
    name = "aetta"  # one of those whose alarms inform


class Comparing(Speaker):
    name = "comparing"
    wants = frozenset({"same_source"})


@pytest.fixture
def speakers(monkeypatch):
    for kind in (Acting, Informing, Comparing):
        monkeypatch.setitem(kinds.MONITORS, kind.name, kind)


def source_batches():
    return [{"image": images, "label": torch.arange(len(images)) % 5} for images in make_stream(3, 8)]


def spoken(action, monitors, batches=8, **settings):
    watch = Watch(adapt(make_net("gn"), "tent", lr=0.1), action, monitors=monitors, window=2, **settings)
    for images in make_stream(batches):
        watch(images)
    return watch


def lines(watch):
    return [(event["batch"], event["monitor"], event["action"]) for event in watch.events]


@pytest.mark.usefixtures("speakers")
def test_an_informing_beside_an_acting_alarm():
    """In one batch: both are noted, one acts; informing ones are neither counted for retries nor end a probation."""
    monitors = [{"kind": "acting", "at": [3]}, {"kind": "aetta", "at": [1, 3, 4, 5]}]
    watch = spoken("reset", monitors, batches=5, retries=2)
    assert lines(watch) == [
        (1, "aetta", "inform"),
        (3, "aetta", "inform"),
        (3, "acting", "reset"),
        (4, "aetta", "inform"),
    ]
    assert not watch.stopped
    alone = adapt(make_net("gn"), "tent", lr=0.1)
    alone(make_stream(5)[4])  # what has come since the reset
    assert same(watch.method.adaptable, alone.adaptable)
    assert watch.stats["guard_alarms"] == 4
    both = spoken("reset", [{"kind": "acting", "at": [3]}, {"kind": "aetta", "at": [3]}], act_on=["acting", "aetta"])
    assert lines(both) == [(3, "acting", "reset"), (3, "aetta", "reset")]
    assert not spoken("reset", monitors, act_on=[], retries=1).stopped


@pytest.mark.usefixtures("speakers")
@pytest.mark.parametrize(
    ("act_on", "actions"),
    [
        (None, ["inform", "rollback"]),
        ([], ["inform", "inform"]),
        (["aetta"], ["rollback", "inform"]),
        ("aetta", ["rollback", "inform"]),
        (["aetta", "acting"], ["rollback", "rollback"]),
    ],
)
def test_act_on(act_on, actions):
    watch = spoken("rollback", [{"kind": "aetta", "at": [2]}, {"kind": "acting", "at": [4]}], act_on=act_on)
    assert lines(watch) == [(2, "aetta", actions[0]), (4, "acting", actions[1])]
    report = watch.report()["monitors"]
    assert [report[name]["acts"] for name in ("aetta", "acting")] == [action != "inform" for action in actions]
    assert watch.monitors["acting"].forgot == 1 + actions.count("rollback")  # at the beginning, and with each action


def test_act_on_names_a_monitor_that_is_there():
    method = adapt(make_net("gn"), "tent")
    for wrong in (["poem"], "poem", [3], {"collapse": True}):
        with pytest.raises(ConfigError, match=r"act_on.*(collapse|list)"):
            Watch(method, act_on=wrong)
    assert Watch(method, act_on=[]).settings.act_on == []


@pytest.mark.usefixtures("speakers")
def test_after_a_stop_monitors_go_on_but_those_that_compare_with_the_source():
    """Their alarms are noted only; what they have seen is what was answered: by the state that proved healthy."""
    names = [{"kind": "acting", "at": [2, 5]}, {"kind": "aetta", "at": [6]}, {"kind": "comparing", "at": [6]}]
    watch = spoken("stop", names, probation=0)
    assert lines(watch) == [(2, "acting", "stop"), (5, "acting", "inform"), (6, "aetta", "inform")]
    assert [watch.monitors[name].number for name in ("acting", "aetta", "comparing")] == [8, 8, 3]
    assert watch.stats["only_predicted"] == 1
    assert watch.stats["acting_accuracy"] == 0.08
    forwards = watch.forwards
    images = make_images(4)
    assert torch.equal(watch(images), watch.method.predict(images, statistics="batch"))
    assert watch.forwards == forwards


def everything():
    method = adapt(make_net("bn"), "tent", lr=0.1)
    return Watch(method, window=2, snapshot_every=2, monitors=ALL, share_excess=0.05)


def test_a_state_of_several_monitors_goes_on():
    """Bit by bit, from the middle of the stream, with labels on their way; in a copy too."""
    stream = [images * torch.tensor([1, 0.1, 0.1])[:, None, None] for images in make_stream(16, 8, seed=1)]

    def go(watch, start, end, between=lambda watch: watch):
        answers = []
        for number in range(start, end):
            answers.append((watch(stream[number]), watch.stats, watch.estimates))
            if number > 2:
                watch.tell([8 * (number - 2) + k for k in (0, 3)], [1, 2])
        return answers

    whole, first, loaded = everything(), everything(), everything()
    whole.prepare(source_batches())
    first.prepare(source_batches())
    expected = go(whole, 0, 16)
    assert len({event["monitor"] for event in whole.events}) > 1
    estimating = {name for _, _, estimates in expected[7:] for name in estimates}
    assert estimating == {"aetta", "labels", "consensus", "view_agreement"}
    go(first, 0, 7)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    loaded.load_state_dict(state)  # it has seen no source images: they are in the state
    for other in (loaded, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        for (logits, stats, estimates), (x, s, e) in zip(go(other, 7, 16), expected[7:], strict=True):
            assert torch.equal(logits, x)
            assert stats == s
            assert estimates == e
        assert other.events == whole.events
        assert other.report() == whole.report()


def of_earlier_versions(watch):
    """The state as it was before there were several monitors: what ``collapse`` knows beside the rest."""
    state = copy.deepcopy(watch.state_dict())
    seen = state["watch"]
    seen |= seen.pop("monitors")["collapse"]
    for name in ("next_image", "_monitors_prepared"):
        del seen[name]
    for name in ("monitors", "act_on"):
        del seen["settings"][name]
    return state


def test_states_of_earlier_versions():
    def made(**options):
        return Watch(adapt(make_net("gn"), "tent", lr=0.3), window=2, snapshot_every=2, share_excess=0.05, **options)

    stream, whole, first = make_stream(20), made(), made()
    expected = [whole(images) for images in stream]
    for images in stream[:9]:
        first(images)
    state = of_earlier_versions(first)
    later = made()
    later.load_state_dict(state)
    assert all(torch.equal(later(x), y) for x, y in zip(stream[9:], expected[9:], strict=True))
    assert later.events == whole.events != []
    del state["watch"]["settings"]  # of the earliest
    for monitors in (["collapse", "labels"], ["labels"], ["collapse", "poem"]):
        if monitors != ["labels"]:
            other = made(monitors=monitors)
        else:
            other = Watch(adapt(make_net("gn"), "tent", lr=0.3), window=2, snapshot_every=2, monitors=monitors)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ConfigError, match=r"monitors=\['collapse'\], here"):
            other.load_state_dict(state)
        assert same(other.state_dict(), before)


@pytest.mark.parametrize("name", ["poem", "consensus", "collapse", "labels"])
def test_a_broken_state_of_one_monitor_changes_nothing(name):
    watch, other = (Watch(adapt(make_net("gn"), "tent"), monitors=["aetta", name]) for _ in range(2))
    for each in (watch, other):
        each.prepare(source_batches())
    watch(make_images(4))
    state = watch.state_dict()
    before = copy.deepcopy(other.state_dict())
    for broken in ({}, None, {"test": 3, "late": {}, "_recent": 1}):
        state["watch"]["monitors"][name] = broken
        with pytest.raises(ConfigError, match=f"of monitor '{name}' is none of it"):
            other.load_state_dict(state)
        assert same(other.state_dict(), before)


# What users give


@pytest.mark.parametrize(
    "given", [None, [[1.0]], torch.zeros(3, 16, 16), torch.zeros(()), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]
)
def test_what_is_no_batch(given):
    watch = Watch(adapt(make_net("gn"), "tent"), monitors=["labels", "aetta", "collapse"])
    for options in ({}, {"index": [5]}):
        with pytest.raises(InputError):
            watch(given, **options)
    assert watch.next_image == watch.next_batch == 0


LABELS = {
    "1 to 5": (torch.arange(8) % 5 + 1, "from 0 to 4; got 5"),
    "floats": (torch.arange(8) % 5 + 0.5, "whole numbers in a tensor"),
    "one-hot": (torch.eye(5)[torch.arange(8) % 5].long(), r"got torch.int64 \(8, 5\)"),
    "list": ([0, 1] * 4, "got list"),
    "too short": (torch.arange(5), r"one for each image"),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("name", ["doc", "consensus"])
def test_labels_of_the_source_that_are_no_classes(name, case):
    labels, message = LABELS[case]
    watch = Watch(adapt(make_net("gn"), "source"), monitors=[name])
    with pytest.raises(DataError, match=message):
        watch.prepare([{"image": images, "label": labels} for images in make_stream(2, 8)])


@pytest.mark.parametrize("name", ["doc", "atc", "consensus"])
def test_too_few_source_images_with_labels(name):
    watch = Watch(adapt(make_net("gn"), "source"), monitors=[name, "poem"])
    watch.prepare(source_batches())
    watch(make_images(4))
    with pytest.raises(DataError, match=r"10 at least.*got 9"):
        watch.prepare(
            [{"image": make_images(30), "label": torch.arange(30).remainder(5).where(torch.arange(30) < 9, -1)}]
        )
    assert not watch.prepared  # what others have seen of the new images fits nothing
    with pytest.raises(NotPreparedError, match=r"call watch\.prepare"):
        watch(make_images(4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 5], "from 0 to 4; got 5"), (["a", "b"], "whole numbers"), (None, "whole numbers"), ([0.5, 1], "classes")],
)
def test_late_labels_that_are_no_classes(labels, message):
    watch = Watch(adapt(make_net("gn"), "source"), monitors=["labels"])
    watch(make_images(2))
    with pytest.raises(InputError, match=message):
        watch.tell([0, 1], labels)
    watch.tell([0, 1], [-1, 4])
    assert watch.monitors["labels"].late.number == 1


@pytest.mark.parametrize("made", [torch.tensor, tuple, iter])
def test_names_of_images_may_be_a_tensor(made):
    watch = Watch(adapt(make_net("gn"), "source"), monitors=["labels"])
    watch(make_images(2), index=made([7, 9]))
    watch.tell([9, 7], [0, 1])
    assert watch.monitors["labels"].late.number == 2


@pytest.mark.parametrize("call", ["eval", "train", "double", "bfloat16", "cpu", "share_memory"])
def test_what_returns_the_method_returns_its_watch(call):
    """``watch = watch.to(device)`` must not take the guard off."""
    watch = Watch(adapt(make_net("gn"), "tent"), monitors=["collapse"])
    stream = make_stream(3)
    watch(stream[0])
    assert getattr(watch, call)() is watch
    assert watch.to("cpu") is watch
    watch(stream[1])
    assert watch.next_image == 8


# In runs

ROBUST = ["collapse", {"kind": "poem", "alpha": 0.5}, "aetta", "labels"]


def guarded(root, crash=None, data=None, **options):
    options = {"window": 2, "history": 4, "share_excess": 0.05, "norm_ratio": 1.2, "retries": None, **options}
    guard = Guard(monitors=ROBUST, labels_every=3, **{"labels_delay": 1, **options})
    data = data or make_data(num_images=64, batch_size=8, severity=5, domains=["contrast", "gaussian_noise"])
    module = run(root, partial(Tent, lr=0.02), crash=crash, data=data, callbacks=[guard])
    return module.run.method


def test_a_run_with_several_monitors_goes_on(tmp_path):
    """Killed twice, before and after the first alarm: the same files as of one that was not."""
    whole = guarded(tmp_path / "whole")
    for crash in (3, 11):
        guarded(tmp_path / "cut", crash=crash)
    guarded(tmp_path / "cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    events, cut = ((directory_of(tmp_path / name) / "guard.jsonl").read_text() for name in ("whole", "cut"))
    assert cut == events
    assert {json.loads(line)["monitor"] for line in events.splitlines()} >= {"collapse", "poem"}
    assert whole.monitors["labels"].late.number > 0


def test_labels_become_known_every_so_many_images_and_so_many_batches_later(tmp_path, monkeypatch):
    told = []
    tell = Watch.tell
    monkeypatch.setattr(
        Watch, "tell", lambda self, *args: (told.append((self.next_batch, *args)), tell(self, *args))[1]
    )
    data = make_data(batch_size=8, domains=["contrast"])
    guarded(tmp_path, data=data, labels_delay=2, share_excess=1.0, norm_ratio=1e9, probation=0)
    (first, index, _), *told = told
    assert (first, index) == (0, [])  # at the beginning: whether a monitor listens
    rows = [line.split(",") for line in (directory_of(tmp_path) / "predictions.csv").read_text().splitlines()]
    at, label, prediction = (rows[0].index(name) for name in ("index", "label", "prediction"))
    rows, stream = rows[1:], []
    for number in range(0, len(rows), 8):
        part = [row for place, row in enumerate(rows[number : number + 8], number) if place % 3 == 0]
        stream.append(([int(row[at]) for row in part], [int(row[label]) for row in part]))
    assert [(list(names), list(labels)) for _, names, labels in told] == stream[: len(stream) - 2]
    assert [batch for batch, *_ in told] == list(range(3, len(stream) + 1))  # two batches after the image's own
    right = [row[label] == row[prediction] for row in rows[: 8 * (len(stream) - 3)][::3]]
    report = json.loads((directory_of(tmp_path) / "report.json").read_text())["guard"]
    assert report["estimates"]["labels"]["accuracy"] is not None
    last = json.loads((directory_of(tmp_path) / "batches.jsonl").read_text().splitlines()[-1])
    assert last["labels_accuracy"] == pytest.approx(sum(right) / len(right))


def test_options_for_labels_are_checked():
    for wrong in ({"labels_every": 0}, {"labels_every": 2.5}, {"labels_every": 2, "labels_delay": -1}):
        with pytest.raises(ConfigError, match="labels_"):
            Guard(monitors=["labels"], **wrong)
    with pytest.raises(ConfigError, match=r"labels_delay=3.*labels_every"):
        Guard(monitors=["labels"], labels_delay=3)


def test_a_monitor_of_labels_that_gets_none_is_warned_of():
    method = adapt(make_net("gn"), "tent")
    with pytest.warns(UserWarning, match="'labels' gets no label from this run"):
        Guard(monitors=["labels"]).wrap(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guard(monitors=["labels"], labels_every=20).wrap(method)
        Guard(monitors=["aetta"]).wrap(method)


def test_labels_that_nobody_takes_are_refused_before_the_stream(tmp_path):
    net = partial(Tent, lr=0.1)
    with pytest.raises(ConfigError, match=r"None of the monitors \(collapse\) takes labels"):
        run(tmp_path, net, callbacks=[Guard(labels_every=2)])


def test_monitors_on_the_command_line(tmp_path, capsys):
    args = ["predict", "--config=configs/digits/predict.yaml", "--model.source_ckpt=none", "--model.method=Tent"]
    args += ["--model.backbone=cifar/resnet20", "--data.domains=[contrast]", "--data.num_images=32"]
    args += ["--data.batch_size=8", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    args += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--input.source_images=64"]
    callback = "--trainer.callbacks"
    args += [f"{callback}+=lightning_tta.Guard", f"{callback}.monitors", "[collapse, {kind: poem, alpha: 0.01}]"]
    main(args)
    (path,) = tmp_path.glob("predict/*/report.json")
    report = json.loads(path.read_text())["guard"]
    assert list(report["monitors"]) == ["collapse", "poem"]
    assert report["monitors"]["poem"]["acts"] is False
    assert report["settings"]["monitors"] == ["collapse", {"kind": "poem", "alpha": 0.01}]
    rows = [json.loads(line) for line in (path.parent / "batches.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all("poem_log_wealth" in row for row in rows)
