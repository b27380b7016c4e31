"""Processes that decide together, here as threads; and the directory that they hold together."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from lightning_tta.errors import DataError, FinishedError
from lightning_tta.run.directory import DirectoryLock, differences
from lightning_tta.run.processes import ProcessGroup

WORLD = 3


def on_all(work):
    """What ``work(group)`` returns, or raises, on each of three."""
    shared, barrier = [None] * WORLD, Barrier(WORLD, timeout=10)

    class Threads(ProcessGroup):
        def __init__(self, rank):
            super().__init__()
            self.rank, self.world = rank, WORLD

        def gather(self, mine):
            shared[self.rank] = mine
            barrier.wait()
            found = list(shared)
            barrier.wait()
            return found

    def outcome(rank):
        try:
            return work(Threads(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(outcome, range(WORLD)))


def test_results_of_all_and_of_the_first():
    assert on_all(lambda group: group.each(lambda: group.rank**2)) == [[0, 1, 4]] * WORLD
    assert on_all(lambda group: group.first(lambda: f"of {group.rank}")) == ["of 0"] * WORLD
    assert ProcessGroup().each(lambda: 5) == [5]
    assert ProcessGroup().first(lambda: 5) == 5


def failing(rank, error):
    def work(group):
        if group.rank == rank:
            raise error
        return group.rank

    return on_all(lambda group: (group.each(lambda: work(group)), pytest.fail("it went on")))


def test_an_error_of_one_is_raised_by_all():
    error = DataError("no labels")
    assert failing(1, error) == [error] * WORLD
    own = KeyError("label")
    first, second, third = failing(1, own)
    assert second is own
    assert str(first) == str(third) == "Process 1 has stopped: KeyError: 'label'"
    finished = FinishedError("done")
    assert on_all(lambda group: group.first(lambda: (_ for _ in ()).throw(finished))) == [finished] * WORLD


def test_alone_errors_are_as_they_are():
    with pytest.raises(KeyError):
        ProcessGroup().each(lambda: {}["a"])


def test_the_first_takes_a_directory_for_all(tmp_path):
    first, second, other = DirectoryLock(), DirectoryLock(), DirectoryLock()
    assert first.take(tmp_path)
    assert not other.take(tmp_path)
    assert second.take(tmp_path, 1)
    first.release()
    assert not other.take(tmp_path)  # the second still lives
    assert first.take(tmp_path / "elsewhere")
    second.release()
    assert other.take(tmp_path)
    assert other.take(tmp_path)
    assert not second.take(tmp_path)


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    names = ["state.pt", "state.rank1.pt", "final_state.rank12.pt", "predictions.csv", "report.json"]
    left, kept = [f".{name}.77.tmp" for name in names], [*names, ".other.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    assert DirectoryLock().take(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "run.lock"}


def test_options_are_compared_where_the_method_is_the_same():
    saved = {"method": "tent", "method.lr": 1, "reset_every": None}
    assert differences(saved, saved | {"method.lr": 2, "reset_every": 3}) == [
        "method.lr: 1 != 2",
        "reset_every: None != 3",
    ]
    assert differences(saved, {"method": "eata", "reset_every": None}) == ["method: 'tent' != 'eata'"]
