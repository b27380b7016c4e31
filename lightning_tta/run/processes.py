"""Adaptation on several processes: who may, who gets what, and how one result comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.sharing import Sharing
from lightning_tta.errors import ConfigError, DataError, LightningTTAError
from lightning_tta.files import write_whole
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.additions import OPTIONS

ProcessMode = Literal["replicas", "synchronised"]
T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # processes with smaller domains wait for the others at the end


class ProcessGroup:
    """The ``world`` processes of a run, of which this is ``rank``. All must make it, and call it, in the same order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        # not the strategy's group: members may be late
        self._group: Any = distributed.new_group(backend="gloo", timeout=_PATIENCE) if world > 1 else None

    def gather(self, value: T) -> list[T]:
        """What each process has, in order."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do something on every process; the results of all.

        Raises:
            Exception: On every process, if one has raised it; what is not of this package, as a RuntimeError elsewhere.
        """
        try:
            result = work()
        except Exception as error:
            stopped = RuntimeError(f"Process {self.rank} has stopped: {type(error).__name__}: {error}")
            self.gather((None, error if isinstance(error, LightningTTAError) else stopped))
            raise
        outcomes: list[tuple[T, Exception | None]] = self.gather((result, None))
        for _, other in outcomes:
            if other is not None:
                raise other
        return [value for value, _ in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """Do something on the first process; its result, or its error, on all."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def share_stream(
    trainer: Trainer, data: Any, method: TTAMethod, mode: ProcessMode, reset: str, incompatible: Sequence[str] = ()
) -> Sharing:
    """This process's share of the stream of ``data``, which is told of it.

    ``incompatible`` names options in use that processes which adapt as one cannot have.

    Raises:
        ConfigError: If the method, the stream or the Trainer cannot do that on several processes.
    """
    several = trainer.world_size > 1
    for refusal in _refusals(trainer, data, method, mode, reset, incompatible) if several else ():
        raise ConfigError(refusal)
    sharing = Sharing(mode, trainer.global_rank, trainer.world_size) if several else Sharing()
    if isinstance(data, ShiftedDataModule):
        data.share(sharing)
    return sharing


def _refusals(
    trainer: Trainer, data: Any, method: TTAMethod, mode: ProcessMode, reset: str, incompatible: Sequence[str]
) -> Iterator[str]:
    """Why several processes cannot share the stream; the first reason counts."""
    world, synchronized = trainer.world_size, mode == "synchronised"
    if not isinstance(trainer.strategy, DDPStrategy):
        yield (
            f"{world} processes of {type(trainer.strategy).__name__} cannot adapt: each needs the whole net. Use "
            "--trainer.strategy ddp, or --trainer.devices 1."
        )
    if trainer.limit_predict_batches != 1.0:
        yield (
            f"limit_predict_batches={trainer.limit_predict_batches} cuts each process's share at another place of the "
            "stream. Shorten the stream instead (--data.num_images), or use --trainer.devices 1."
        )
    if not isinstance(data, ShiftedDataModule):
        yield (
            f"A stream is sequential: {world} processes can only share one whose domains are known. Give a data module "
            "of lightning_tta, or use --trainer.devices 1 with a loader of your own."
        )
    if mode not in method.parallel:
        other = "--model.processes replicas (whole domains)" if synchronized else f"--model.processes {mode}"
        advice = f"{other}, or --trainer.devices 1" if "replicas" in method.parallel else "--trainer.devices 1"
        yield (
            f"Method '{method.name}'{_with_additions(method)} cannot run {mode} on {world} processes; it can run "
            f"{' or '.join(sorted(method.parallel)) or 'on one only'}. Use {advice}."
        )
    plain = type(method).infer is TTAMethod.infer and not method.uses_batch_statistics
    untracked = any(layer.running_mean is None for layer in batch_norm_layers(method.model).values())
    if synchronized and untracked and plain:
        yield (
            "The net's BatchNorm layers keep no running statistics, and method "
            f"'{method.name}' leaves them to each process's part of a batch. Use method 'norm', or --trainer.devices 1."
        )
    if synchronized and incompatible:
        yield (
            f"{' and '.join(incompatible)} cannot be used with synchronised processes: the saves of those that are "
            "killed may be of different batches, and one that skips a batch leaves the others waiting. Leave it out, "
            "or use --model.processes replicas, or --trainer.devices 1."
        )
    if data.charge is not None:
        yield (
            f"charge={data.charge!r} times one process against the stream; {world} processes are another machine. Use "
            "--data.charge none, or --trainer.devices 1."
        )
    if not synchronized and (reset == "never" or data.spans_domains):
        kind = data.stream_kind
        reason = f"a {kind} stream has no domains of its own" if data.spans_domains else "it is never reset"
        other = f" on a stream other than {kind}" if data.spans_domains else ""
        yield (
            f"Replicas take whole domains, which must not depend on each other; on this {kind} stream {reason}. Use "
            f"--model.reset domain or batch{other}, --model.processes synchronised, or --trainer.devices 1."
        )


def merge_predictions(files: Sequence[Path], order: Sequence[int], path: Path) -> None:
    """Write the lines of ``files``, which begin with an image's index, in the order of the stream.

    Each file has its lines in that order already, so one line of each is in memory at a time.

    Raises:
        DataError: If an index is missing, or there twice.
    """
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]} is not there: machines must share the directory of a run. Give one on a file system that "
            "all have (--trainer.default_root_dir, or the logger's save_dir)."
        )
    write_whole(path, lambda file: file.writelines(_merged_lines(files, order)))


def _merged_lines(files: Sequence[Path], order: Sequence[int]) -> Iterator[bytes]:
    with ExitStack() as stack:
        readers = [stack.enter_context(file.open("rb")) for file in files]
        header, *_ = [reader.readline() for reader in readers]
        yield header
        lines = [reader.readline() for reader in readers]
        for index in order:
            holders = [number for number, line in enumerate(lines) if _index(line) == index]
            if len(holders) != 1:
                raise _not_once(files, index, "missing" if not holders else "there twice")
            (holder,) = holders
            yield lines[holder]
            lines[holder] = readers[holder].readline()
        for line in filter(None, lines):
            raise _not_once(files, _index(line), "there twice, or not of this stream")


def _index(line: bytes) -> int:
    return int(line.split(b",", 1)[0]) if line else -1


def _not_once(files: Sequence[Path], index: int, how: str) -> DataError:
    names = ", ".join(file.name for file in files)
    return DataError(
        f"Image {index} of the stream is {how} in {names}: each must be predicted once. Run again, in an empty "
        "directory; if it happens again, the data are not the same on all processes."
    )


def _with_additions(method: TTAMethod) -> str:
    """What was put on the method, which may be why it cannot: `` with window=16``."""
    words = [f"{name}={method.options[name]!r}" for name in OPTIONS if name in method.options]
    return f" with {', '.join(words)}" if words else ""
