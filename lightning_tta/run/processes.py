"""Adaptation on several processes: who may, who gets what, and how one result comes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.sharing import Sharing
from lightning_tta.errors import ConfigError, DataError
from lightning_tta.files import own_file
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run.group import ProcessGroup
from lightning_tta.run.summary import StreamSummary

ProcessMode = Literal["replicas", "synchronised"]


def share_stream(
    trainer: Trainer, data: Any, method: TTAMethod, mode: ProcessMode, reset: str, apart: Sequence[str] = ()
) -> Sharing:
    """This process's share of the stream of ``data``, which is told of it.

    Args:
        trainer: Knows how many processes there are.
        data: The data module.
        method: The method.
        mode: How the processes share the stream.
        reset: The reset policy.
        apart: Options in use that processes which adapt as one cannot have.

    Raises:
        ConfigError: If the method, the stream or the Trainer cannot do that on several processes.
    """
    world = trainer.world_size
    if world > 1:
        _check_trainer(trainer, data)
        _check_method(method, mode, world)
        if apart and mode == "synchronised":
            raise ConfigError(
                f"{' and '.join(apart)} cannot be used with synchronised processes: the saves of those that are killed "
                "may be of different batches, and one that skips a batch leaves the others waiting. Leave it out, or "
                "use --model.processes replicas, or --trainer.devices 1."
            )
    sharing = Sharing(mode, trainer.global_rank, world) if world > 1 else Sharing()
    if isinstance(data, ShiftedDataModule):
        if world > 1:
            _check_stream(data, mode, reset, world)
        data.share(sharing)
    return sharing


def _check_trainer(trainer: Trainer, data: Any) -> None:
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ConfigError(
            f"{trainer.world_size} processes of {type(trainer.strategy).__name__} cannot adapt: each needs the whole "
            "net. Use --trainer.strategy ddp, or --trainer.devices 1."
        )
    if trainer.limit_predict_batches != 1.0:
        raise ConfigError(
            f"limit_predict_batches={trainer.limit_predict_batches} cuts each process's share at another place of the "
            "stream. Shorten the stream instead (--data.num_images), or use --trainer.devices 1."
        )
    if not isinstance(data, ShiftedDataModule):
        raise ConfigError(
            f"A stream is sequential: {trainer.world_size} processes can only share one whose domains are known. Give "
            "a data module of lightning_tta, or use --trainer.devices 1 with a loader of your own."
        )


def _check_method(method: TTAMethod, mode: str, world: int) -> None:
    if mode not in method.parallel:
        other = "--model.processes replicas (whole domains)" if mode == "synchronised" else "--model.processes " + mode
        advice = f"{other}, or --trainer.devices 1" if "replicas" in method.parallel else "--trainer.devices 1"
        raise ConfigError(
            f"Method '{method.name}' cannot run {mode} on {world} processes; it can run "
            f"{' or '.join(sorted(method.parallel)) or 'on one only'}. Use {advice}."
        )
    untracked = any(layer.running_mean is None for layer in batch_norm_layers(method.model).values())
    if mode == "synchronised" and untracked and _plain(method):
        raise ConfigError(
            "The net's BatchNorm layers keep no running statistics, and method "
            f"'{method.name}' leaves them to each process's part of a batch. Use method 'norm', or --trainer.devices 1."
        )


def _plain(method: TTAMethod) -> bool:
    return type(method).infer is TTAMethod.infer and not method.uses_batch_statistics


def _check_stream(data: ShiftedDataModule, mode: str, reset: str, world: int) -> None:
    if data.charge is not None:
        raise ConfigError(
            f"charge={data.charge!r} times one process against the stream; {world} processes are another machine. Use "
            "--data.charge none, or --trainer.devices 1."
        )
    if mode == "replicas" and (reset == "never" or data.stream_kind == "mixed"):
        what = "a mixed stream has no domains of its own" if data.stream_kind == "mixed" else "it is never reset"
        raise ConfigError(
            f"Replicas take whole domains, which must not depend on each other; on this {data.stream_kind} stream "
            f"{what}. Use --model.reset domain or batch on a stream other than mixed, --model.processes synchronised, "
            "or --trainer.devices 1."
        )


# Files and accounts ----------------------------------------------------------------------------------------------


@dataclass
class _Part:
    summary: StreamSummary
    predictions: Path


class Gathering:
    """Brings together, when the stream has ended, what each process has. Every process makes one when it starts.

    Args:
        sharing: This process's share of the stream.
        protocol: Hash of what this process is about to run.
        group: The processes.

    Raises:
        ConfigError: If the processes are about to run different things.
    """

    def __init__(self, sharing: Sharing, protocol: str, group: ProcessGroup) -> None:
        self.sharing, self.group = sharing, group
        hashes = group.gather(protocol)
        if len(set(hashes)) > 1:
            raise ConfigError(
                f"The processes have different protocols ({', '.join(hashes)}): their nets or data differ. Give "
                "all the same source weights and files; for random weights set a seed (--seed_everything)."
            )

    def finish(self, trainer: Trainer, directory: Path, summary: StreamSummary) -> StreamSummary:
        """The account of the whole stream; the first process also writes the whole ``predictions.csv``.

        Raises:
            DataError: If an image was predicted twice, or not at all.
        """
        if self.sharing.world == 1:
            return summary
        path = directory / "predictions.csv"
        parts = self.group.gather(_Part(summary, own_file(trainer, path)))
        if self.sharing.rank == 0:
            stream = trainer.datamodule.stream  # type: ignore[attr-defined]
            order = [index for batch in stream.batches for index in batch]
            merge_predictions([part.predictions for part in parts], order, path)
        return StreamSummary.merged([part.summary for part in parts], together=self.sharing.mode == "synchronised")


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with ExitStack() as stack:
        readers = [stack.enter_context(file.open(newline="")) for file in files]
        writer = stack.enter_context(temporary.open("w", newline=""))
        headers = [reader.readline() for reader in readers]
        writer.write(headers[0])
        heads = [reader.readline() for reader in readers]
        for index in order:
            mine = [number for number, line in enumerate(heads) if _index(line) == index]
            if len(mine) != 1:
                raise _not_once(files, index, "missing" if not mine else "there twice")
            writer.write(heads[mine[0]])
            heads[mine[0]] = readers[mine[0]].readline()
        left = next((line for line in heads if line), None)
        if left is not None:
            raise _not_once(files, _index(left), "there twice, or not of this stream")
    os.replace(temporary, path)


def _index(line: str) -> int:
    return int(line.split(",", 1)[0]) if line else -1


def _not_once(files: Sequence[Path], index: int, how: str) -> DataError:
    names = ", ".join(file.name for file in files)
    return DataError(
        f"Image {index} of the stream is {how} in {names}: each must be predicted once. Run again, in an empty "
        "directory; if it happens again, the data are not the same on all processes."
    )
