"""A stream shared by processes: the same results as one process, written once, or a refusal that says what to do."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapt_on_processes import REFUSED, REPLICAS, SYNCHRONISED, main
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_tta import ConfigError, DataError, DigitsData, adapt
from lightning_tta.data.sharing import Sharing, assign_domains, shard_batch
from lightning_tta.data.streams import build_stream
from lightning_tta.run.processes import merge_predictions, share_stream
from nets import make_net, same, without_running_statistics
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = {"seconds", "seconds_per_batch", "wall_seconds", "peak_memory_mb", "peak_memory"}


def report(directory):
    return json.loads((directory_of(directory) / "report.json").read_text())


def predictions(directory):
    with (directory_of(directory) / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without(report, *names):
    return {key: value for key, value in report.items() if key not in {*TIMES, *names}}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All cases on two processes, started as Lightning does."""
    root = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("adapt_on_processes.py")
    command = [sys.executable, str(script), "2", str(root), *REPLICAS, *SYNCHRONISED, *REFUSED]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_write_what_one_process_writes(two, tmp_path, case):
    main(1, tmp_path, case)
    one, both = directory_of(tmp_path / case), directory_of(two / case)
    assert (both / "predictions.csv").read_bytes() == (one / "predictions.csv").read_bytes()
    assert without(report(both), "protocol", "run_digest") == without(report(one), "protocol", "run_digest")
    protocol = report(both)["protocol"]
    assert (protocol["world_size"], protocol["mode"]) == (2, "replicas")
    same = {"world_size": 1, "mode": "single", "hash": report(one)["protocol"]["hash"]}
    assert protocol | same == report(one)["protocol"]
    shares = [len((both / f"predictions.rank{rank}.csv").read_text().splitlines()) - 1 for rank in range(2)]
    assert min(shares) > 0
    assert sum(shares) == report(one)["images"]
    assert all((both / f"batches.rank{rank}.jsonl").read_text() for rank in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("case", SYNCHRONISED)
def test_synchronised_processes_are_one_with_the_joined_batch(two, tmp_path, case):
    main(1, tmp_path, case)
    one, both = tmp_path / case, two / case
    found, expected = predictions(both), predictions(one)
    for name in ("index", "domain", "label", "prediction"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    for name in ("confidence", "entropy"):
        for row, wanted in zip(found, expected, strict=True):
            assert float(row[name]) == pytest.approx(float(wanted[name]), abs=2e-5)  # six digits are written
    inexact = (
        "protocol",
        "run_digest",
        "predictions_digest",
        "domains",
        "visits",
        "ece",
        "nll",
        "brier",
        "reliability",
    )
    for name in ("ece", "nll", "brier"):
        assert report(both)[name] == pytest.approx(report(one)[name], abs=1e-5)
    assert sum(report(both)["reliability"][0]) == sum(report(one)["reliability"][0])
    assert without(report(both), *inexact) == without(report(one), *inexact)
    for part in ("domains", "visits"):
        for name, numbers in report(one).get(part, {}).items():
            assert report(both)[part][name] == pytest.approx(numbers, abs=1e-5)
    assert report(both)["protocol"]["mode"] == "synchronised"
    states = [torch.load(both / f"state.rank{rank}.pt") for rank in range(2)]
    wanted = torch.load(one / "state.rank0.pt")
    for part in ("tensors", "memory"):
        assert wanted[part].keys() == states[0][part].keys()
        for name, value in wanted[part].items():
            torch.testing.assert_close(states[0][part][name], value, rtol=1e-5, atol=1e-5)
            assert same(states[0][part][name], states[1][part][name])


@pytest.mark.slow
def test_the_cases_filter_and_step(two):
    rows = [
        json.loads(line)
        for case in ("synchronised_eata", "synchronised_eta")
        for line in (directory_of(two / case) / "batches.rank0.jsonl").read_text().splitlines()
    ]
    assert sum(0 < row["kept"] < 1 for row in rows) > 5
    norm = [(directory_of(two / "synchronised_norm") / f"predictions.rank{rank}.csv").read_text() for rank in range(2)]
    assert norm[0].count("\n") == norm[1].count("\n") + 3  # one image more in each of three domains


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("never", "continual stream it is never reset"),
        ("mixed", "mixed stream has no domains"),
        ("method", "'lame' cannot run synchronised on 2 processes; it can run replicas"),
        ("domains", "2 processes cannot share 1 domains"),
        ("nets", "different protocols"),
    ],
)
def test_refused_on_every_process(two, case, words):
    for rank in range(2):
        message = (two / f"{case}.{rank}.txt").read_text()
        assert words in message
        assert "--trainer.devices" in message or case == "nets"
    assert not list((two / case).rglob("predictions.csv"))


# Without processes -----------------------------------------------------------------------------------------------


def fake(strategy=None, limit=1.0):
    return SimpleNamespace(world_size=2, global_rank=0, strategy=strategy or DDPStrategy(), limit_predict_batches=limit)


@pytest.mark.parametrize(
    ("trainer", "options", "words"),
    [
        (fake(SingleDeviceStrategy()), {}, "--trainer.strategy ddp"),
        (fake(limit=3), {}, "--data.num_images"),
        (fake(), None, "data module"),
        (fake(), {"charge": "passes"}, "--data.charge none"),
    ],
)
def test_refused_before_the_stream(trainer, options, words):
    data = None if options is None else DigitsData(domains=["clean"], **options)
    with pytest.raises(ConfigError, match=words):
        share_stream(trainer, data, adapt(make_net("bn"), "tent"), "replicas", "domain")


def test_source_on_a_net_without_running_statistics_cannot_be_synchronised():
    source = adapt(without_running_statistics(make_net("bn")), "source")
    with pytest.raises(ConfigError, match="method 'norm'"):
        share_stream(fake(), DigitsData(domains=["clean"]), source, "synchronised", "domain")


@pytest.mark.parametrize(("options", "words"), [({"window": 16}, "window=16"), ({"refine": "lame"}, "refine='lame'")])
def test_what_was_put_on_a_method_is_named_where_it_cannot_be_synchronised(options, words):
    tent = adapt(make_net("bn"), "tent", **options)
    with pytest.raises(ConfigError, match=f"'tent' with {words} cannot run synchronised"):
        share_stream(fake(), DigitsData(domains=["clean"]), tent, "synchronised", "domain")


def test_only_replicas_save_continue_and_skip():
    tent, options = adapt(make_net("bn"), "tent"), ["save_every", "on_bad_batch='skip'"]
    with pytest.raises(ConfigError, match=r"save_every and on_bad_batch='skip' cannot .* --model\.processes replicas"):
        share_stream(fake(), DigitsData(domains=["clean"]), tent, "synchronised", "domain", options)
    data = DigitsData(domains=["clean", "contrast"], num_images=4)
    assert share_stream(fake(), data, tent, "replicas", "domain", options).mode == "replicas"


def test_a_part_of_each_batch():
    assert [shard_batch([1, 2, 3, 4, 5], rank, 3) for rank in range(3)] == [[1, 2], [3, 4], [5]]
    assert [shard_batch([7], rank, 2) for rank in range(2)] == [[7], []]


def test_domains_are_dealt_by_size_and_stay_whole():
    stream = build_stream([torch.zeros(n) for n in (3, 9, 4, 5, 2)], batch_size=2)
    assert assign_domains(stream, set(), 2) == [0, 0, 1, 1, 1]  # 9 | 5 + 4; then 3 | 2
    parts = [Sharing("replicas", rank, 2).batches(stream, set()) for rank in range(2)]
    assert sorted(index for batch in parts[0] + parts[1] for index in batch) == list(range(23))
    assert [batch for batch in stream.batches if batch in parts[0]] == parts[0]
    assert assign_domains(stream, {2}, 2) == [1, 0, 0, 1, 1]  # a frozen domain stays with the one before
    with pytest.raises(ConfigError, match="6 processes cannot share 5 domains"):
        assign_domains(stream, set(), 6)


def test_polluting_images_stay_with_their_domain():
    stream = build_stream([torch.zeros(n) for n in (3, 9, 4)], kind="polluted", batch_size=2, pollution=0.5)
    assert assign_domains(stream, set(), 2) == [1, 0, 1, 1, 0, 1]
    parts = [Sharing("replicas", rank, 2).batches(stream, set()) for rank in range(2)]
    assert [batch for batch in stream.batches if batch in parts[1]] == parts[1]
    assert sorted(index for batch in parts[0] + parts[1] for index in batch) == list(range(32))


def test_markov_streams_are_dealt_out_only_where_domains_follow_each_other():
    labels = [torch.arange(4).repeat(20)] * 2
    with pytest.raises(ConfigError, match="batches of a markov stream span domains"):
        assign_domains(build_stream(labels, kind="markov"), set(), 2)
    in_turn = build_stream(labels, kind="markov", domain_correlation=1)
    parts = [Sharing("replicas", rank, 2).batches(in_turn, set()) for rank in range(2)]
    assert parts[0] + parts[1] == in_turn.batches
    data = DigitsData(domains=["clean", "contrast"], num_images=200, stream="markov")
    with pytest.raises(ConfigError, match=r"a markov stream has no domains of its own.*on a stream other than markov"):
        share_stream(fake(), data, adapt(make_net("bn"), "tent"), "replicas", "batch")


def parts_of(tmp_path, *contents):
    files = []
    for number, indices in enumerate(contents):
        files.append(tmp_path / f"predictions.rank{number}.csv")
        files[-1].write_text("index,x\r\n" + "".join(f"{index},{index * index}\r\n" for index in indices), newline="")
    return files


def test_merging(tmp_path):
    path = tmp_path / "predictions.csv"
    merge_predictions(parts_of(tmp_path, [4, 1], [0, 2, 3]), [4, 0, 2, 1, 3], path)
    assert path.read_bytes() == b"index,x\r\n4,16\r\n0,0\r\n2,4\r\n1,1\r\n3,9\r\n"


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (([0], [2]), "Image 1 .* missing"),
        (([0, 1], [1, 2]), "Image 1 .* there twice"),
        (([0, 1], [2, 1]), "Image 1 .* there twice"),
        (([0, 1], [2, 5]), "Image 5 .* not of this stream"),
        (([0, 1], []), "Image 2 .* missing"),
    ],
)
def test_every_index_exactly_once(tmp_path, contents, words):
    with pytest.raises(DataError, match=words):
        merge_predictions(parts_of(tmp_path, *contents), [0, 1, 2], tmp_path / "predictions.csv")
    assert not (tmp_path / "predictions.csv").exists()


def test_a_file_that_is_not_there(tmp_path):
    files = parts_of(tmp_path, [0])
    with pytest.raises(DataError, match="file system that all have"):
        merge_predictions([*files, tmp_path / "predictions.rank1.csv"], [0, 1], tmp_path / "predictions.csv")
