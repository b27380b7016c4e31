"""Two processes with whole domains are killed at any moment, and go on as if they had not been."""

import json
import os
import random
import signal

import pytest
from forked import OWN, line_count, outcome, run, saved, stopped_at, together, whole_runs
from test_kill import counting_lines
from test_resume import results

from lightning_tta.run import directory
from processes import MARKS, Processes
from runs import directory_of

pytestmark = MARKS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_runs(tmp_path_factory)


@pytest.mark.parametrize("name", ["tent", "cotta", "eata", "t3a"])
def test_each_goes_on_from_its_own_save(tmp_path, whole, name):
    root = tmp_path / "a"
    assert stopped_at(root, [7, 3], name) == [6, 2]
    assert not (directory_of(root) / "predictions.csv").exists()
    assert together(root, name)[0] == [0, 0]
    assert outcome(root) == whole(name)
    own = {name.format(rank) for rank in range(2) for name in (*OWN, "final_state.rank{}.pt")}
    whole = {"predictions.csv", "report.json", "run.lock", "run.rank1.lock"}
    assert {path.name for path in directory_of(root).iterdir()} == own | whole


def test_one_process_writes_the_same(tmp_path, whole):
    run(tmp_path, world=1, save_every=None)
    predictions, report, _ = results(tmp_path)
    assert whole()[0] == predictions
    other = {"protocol": None, "run_digest": None}
    assert json.loads(whole()[1]) | other == report | other


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (([9, None], [8, 4]), ([9, None], [8, 4])),  # one has finished
        (([5, 1], [4, 0]), ([6, 3], [6, 2])),  # one is as it began
        (([1, 1], [0, 0]), ([3, None], [2, 4])),
    ],
)
def test_one_may_be_far_ahead(tmp_path, whole, first, then):
    for at, after in (first, then):  # killed twice
        assert stopped_at(tmp_path, at) == after
    assert together(tmp_path)[0] == [0, 0]
    assert outcome(tmp_path) == whole()


def kill_and_compare(root, expected, name, kills, seed, different=0):
    """Kill both again and again, each time before a random line of the package of one of them; let them go on.

    So often, or more often until they were at different saves ``different`` times.

    Returns:
        How often they were then at different saves.
    """
    rng, killed, apart, tries = random.Random(seed), 0, 0, 0
    lines = line_count(root / "counted", name)
    while killed < kills or (apart < different and killed < 5 * kills):
        place, tries = root / f"run{tries}", tries + 1
        while not list(place.glob("*/report.json")):
            victim = rng.randrange(2)
            limit = rng.randrange(1, lines[victim])

            def work(rank, place=place, victim=victim, limit=limit):
                if rank == victim:
                    counting_lines(lambda: run(place, name), limit, lambda: os.killpg(0, signal.SIGKILL))
                else:
                    run(place, name)

            processes = Processes(work, place)
            codes = processes.wait()
            assert set(codes) <= {0, -signal.SIGKILL}, processes.said()
            killed += -signal.SIGKILL in codes
            apart += len(set(saved(place))) > 1
        assert outcome(place) == expected
    return apart


def test_killed_at_any_line(tmp_path, whole):
    kill_and_compare(tmp_path, whole(), "tent", 3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cotta", "eata"])
def test_eight_kills(tmp_path, whole, name):
    assert kill_and_compare(tmp_path, whole(name), name, 8, seed=len(name), different=1) > 0


@pytest.mark.parametrize("moment", ["before predictions", "after predictions", "before report", "after report"])
def test_killed_at_the_very_end(tmp_path, whole, moment):
    """Both have ended their shares; the first one writes what they have together, then removes the states."""
    when, what = moment.split()

    def work(rank):
        replace = os.replace

        def replaced(source, target):
            mine = os.path.basename(target) == {"predictions": "predictions.csv", "report": "report.json"}[what]
            if mine and when == "before":
                os.killpg(0, signal.SIGKILL)
            replace(source, target)
            if mine:
                os.killpg(0, signal.SIGKILL)

        os.replace = replaced  # in this child only
        run(tmp_path)

    assert -signal.SIGKILL in Processes(work, tmp_path).wait()
    if moment != "after report":
        assert saved(tmp_path) == [8, 4]
        assert together(tmp_path)[0] == [0, 0]
    assert outcome(tmp_path) == whole()
    assert not list(directory_of(tmp_path).glob(".*"))


# Damage ----------------------------------------------------------------------------------------------------------


def test_a_state_that_cannot_be_read_after_all(tmp_path, whole):
    stopped_at(tmp_path, [5, 3])

    def work(rank):
        read = directory.read_state
        if rank == 1:  # of this child only
            directory.read_state = lambda path, head=False: read(path, head=True) if head else None
        run(tmp_path)

    assert Processes(work, tmp_path).wait() == [0, 0]
    assert outcome(tmp_path) == whole()


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_without_one_state_both_start_anew(tmp_path, whole, damage):
    stopped_at(tmp_path, [5, 3])
    path = directory_of(tmp_path) / "state.rank1.pt"
    content = path.read_bytes()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
        codes, said = together(tmp_path)
        assert codes == [1, 1]
        assert all("state.rank1.pt is damaged" in each for each in said)
    path.unlink()
    assert stopped_at(tmp_path, [3, 1]) == [2, 0]
    assert together(tmp_path)[0] == [0, 0]
    assert outcome(tmp_path) == whole()
