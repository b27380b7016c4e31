"""Which run goes on: where it is, whether it is this one, and whether every process can go on with its share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from lightning_tta.errors import ConfigError, FinishedError
from lightning_tta.files import of_all, of_process, own_file
from lightning_tta.run import state_files
from lightning_tta.run.group import ProcessGroup
from lightning_tta.run.state_files import FINAL, STATE, DirectoryLock, State

if TYPE_CHECKING:
    from lightning_tta.modules.adaptation import TestTimeAdaptation


@dataclass
class _Found:
    """What is in a directory. ``complete``: every process has a state; ``differ``: it belongs to another run."""

    done: bool
    complete: bool = False
    differ: tuple[str, ...] = ()


class Search:
    """The search for the run to be continued. Every process of the group makes one, and asks it the same.

    Args:
        module: What is about to run.
        group: The processes; all find the same, or raise together.
        lock: Holds the directory that was found.

    Attributes:
        state: What this process goes on from, once a run was found; ``None``: from the beginning.
    """

    def __init__(self, module: TestTimeAdaptation, group: ProcessGroup, lock: DirectoryLock) -> None:
        self.module, self.group, self.lock = module, group, lock
        self.state: State | None = None
        self._identity: State = {}

    def newest(self, root: Path) -> Path | None:
        """The newest version of this run, taken into use, if there is one that is not.

        Raises:
            FinishedError: If there is only a finished one.
        """
        others: list[str] = []
        finished: Path | None = None
        for directory in self.group.first(lambda: _versions(root)):
            found = self._look(directory)
            if found is None:
                continue
            if found.differ:
                others += [] if found.done else [f"{directory} ({'; '.join(found.differ[:3])})"]
            elif found.done:
                finished = finished or directory
            elif not found.complete:
                others.append(f"{directory} (not every process had saved its state)")
            elif take(self.lock, self.group, directory):
                self._load(directory)
                return directory
        if finished is not None:
            raise _finished(finished)
        if others:
            rank_zero_info(f"No unfinished run agrees with this one, so it starts anew. The last: {others[0]}.")
        return None

    def named(self, directory: Path) -> None:
        """Take a directory that was asked for into use, if there is a run in it.

        Raises:
            FinishedError: If that is finished.
            ConfigError: If it is another run, or in use.
        """
        found = self._look(directory)
        if found is None:
            if self.group.first(lambda: (directory / "report.json").exists()):
                raise _finished(directory)
            return
        if found.differ:
            raise ConfigError(
                f"{directory} holds {'a finished' if found.done else 'an unfinished'} run that differs from this one "
                f"(there != here): {'; '.join(found.differ)}. Run with the same settings to continue it, choose "
                "another directory (--trainer.default_root_dir, or the logger's name or version), or remove this one."
            )
        if found.done:
            raise _finished(directory)
        if not take(self.lock, self.group, directory):
            raise ConfigError(f"{directory} is in use by another process. Wait for it, or choose another directory.")
        if found.complete:
            self._load(directory)
        else:
            rank_zero_info(f"Not every process of {directory} had saved its state, so the run starts anew.")

    # Internals -------------------------------------------------------------------------------------------------------

    def _look(self, directory: Path) -> _Found | None:
        """What is there, for all processes; ``None`` without a state."""
        done = self.group.first(lambda: (directory / "report.json").exists())
        name = FINAL if done else STATE
        if not self.group.first(lambda: bool(of_all(directory / name))):
            return None
        self._prepare()
        found = self.group.each(lambda: self._compare(directory / name))
        if not any(own or differ for own, differ in found):  # damaged, all of them
            return None
        differ = next((differ for _, differ in found if differ), ())
        return _Found(done, all(own for own, _ in found), differ)

    def _prepare(self) -> None:
        """Know what this process is about to run; of several, Lightning has not called ``prepare_data`` yet."""
        if self._identity:
            return
        trainer = self.module.trainer
        data = getattr(trainer, "datamodule", None)
        if self.group.world > 1 and data is not None:
            mine = trainer.local_rank == 0 and (data.prepare_data_per_node or trainer.node_rank == 0)
            self.group.each(lambda: data.prepare_data() if mine else None)
        self.group.each(self.module.fix_protocol)
        self._identity = state_files.identity(self.module)

    def _compare(self, path: Path) -> tuple[bool, tuple[str, ...]]:
        """Whether this process has a state under ``path``, and in what it, or another group's, is of another run."""
        own = own_file(self.module.trainer, path)
        ours = {own, *(of_process(path, rank) for rank in range(self.group.world) if self.group.world > 1)}
        state = state_files.read_state(own, head=True)
        known = [state] if state is not None else []
        if state is None:  # is there what another number of processes has left?
            left = [state_files.read_state(other, head=True) for other in of_all(path) if other not in ours]
            known = [other for other in left if other is not None]
        differ = state_files.differences(known[0]["identity"], self._identity) if known else []
        return state is not None, tuple(differ)

    def _load(self, directory: Path) -> None:
        """Read this process's state; all go on, or all start anew."""
        path = own_file(self.module.trainer, directory / STATE)

        def load() -> int | None:
            self.state = state_files.read_state(path)
            if self.state is None:
                return None
            state_files.check_lengths(path, self.state)
            return int(self.state["batches"])

        batches = self.group.each(load)
        if None in batches:
            self.state = None
        else:
            rank_zero_info(f"Continuing {directory} after batch {', '.join(map(str, batches))}.")


def take(lock: DirectoryLock, group: ProcessGroup, directory: Path) -> bool:
    """Whether the directory is this group's: the first process takes it for all, then each says that it lives."""
    if not group.first(lambda: lock.take(directory)):
        return False
    return all(group.each(lambda: lock.take(directory, group.rank)))


def _versions(root: Path) -> list[Path]:
    """The versions that a logger has counted, the newest first."""
    found = [path for path in root.glob("version_*") if path.name[8:].isdecimal()]
    return sorted(found, key=lambda path: -int(path.name[8:]))


def _finished(directory: Path) -> FinishedError:
    return FinishedError(
        f"{directory} is finished: its report.json is written, there is nothing to continue. To run once more use "
        "--model.resume never, and another directory."
    )
