"""Trainings: which of them were finished, and how one that was not goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tta.errors import WeightsError
from lightning_tta.files import read_json, write_json

RECORD = "training.json"
"""Beside the checkpoints of a training: whether it was finished, and how many epochs it did."""


class TrainingRecord(Callback):
    """Writes :data:`RECORD`, and lets a training that goes on with ``--ckpt_path`` equal the uninterrupted one.

    Lightning restores weights, optimizers and schedules. This adds the random numbers of the next epoch (order and
    augmentation of the images; on one process, and with ``num_workers: 0``) and the best checkpoint so far.
    """

    def __init__(self) -> None:
        self._random: dict[str, Any] = {}
        self._checkpoints: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the training is not finished, and take over the best checkpoint of the one that goes on."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _take_best(callback, self._checkpoints.get(callback.state_key, {}), trainer.is_global_zero)
        self._write(trainer, trainer.current_epoch, finished=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers of the checkpoint."""
        if self._random and trainer.world_size == 1:
            torch.set_rng_state(self._random["cpu"])
            if _uses_cuda() and len(self._random["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self._random["cuda"])
            fetcher = trainer.fit_loop._data_fetcher  # its iterator was made with the random numbers of a fresh run
            if fetcher is not None:
                iter(fetcher)
        self._random = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the epoch."""
        self._write(trainer, trainer.current_epoch + 1, finished=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the training is finished; not called where it was interrupted or failed."""
        self._write(trainer, trainer.current_epoch, finished=not trainer.interrupted)

    def state_dict(self) -> dict[str, Any]:
        """The random state, for the checkpoint."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if _uses_cuda() else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The random state of a checkpoint, for the next epoch."""
        self._random = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what the callbacks of the training knew that goes on."""
        self._checkpoints = checkpoint.get("callbacks", {})

    def _write(self, trainer: Trainer, epochs: int, finished: bool) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)
            record: dict[str, Any] = {"finished": finished, "epochs": epochs, "max_epochs": trainer.max_epochs}
            best = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or "")
            if finished and best.parent == Path(folder):
                record["best"] = best.name
            write_json(Path(folder) / RECORD, record)


def _take_best(callback: ModelCheckpoint, state: dict[str, Any], copy: bool) -> None:
    """Take over the best checkpoints of an earlier folder: Lightning forgets them where the folder is another one.

    All processes must know them, one copies the files.
    """
    scores = {Path(path): score for path, score in state.get("best_k_models", {}).items()}
    moved = bool(scores) and callback.dirpath not in (None, state["dirpath"])
    if callback.dirpath is None or not moved or not all(path.exists() for path in scores):
        return
    places = {str(path): str(Path(callback.dirpath) / path.name) for path in scores}
    if copy:
        Path(callback.dirpath).mkdir(parents=True, exist_ok=True)
        for old, new in places.items():
            shutil.copyfile(old, new)
    callback.best_k_models = {places[str(path)]: score for path, score in scores.items()}
    callback.best_model_path = places.get(state["best_model_path"], "")
    callback.kth_best_model_path = places.get(state["kth_best_model_path"], "")
    callback.best_model_score, callback.kth_value = state["best_model_score"], state["kth_value"]


def unfinished(folder: Path) -> str | None:
    """How far the training with checkpoints in this folder came, if it says that it was not finished."""
    record = read_json(folder / RECORD) or {}  # of an earlier version, or somebody else's: it counts as finished
    if record.get("finished", True):
        return None
    total = record.get("max_epochs")
    return f"{record.get('epochs', 0)} of {total if total and total > 0 else 'any number of'} epochs"


def _best(folder: Path) -> Path:
    """The best checkpoint of a training, which may be missing: the one that its record names, or ``best.ckpt``."""
    return folder / str((read_json(folder / RECORD) or {}).get("best", "best.ckpt"))


def find_checkpoint(path: str | Path, option: str = "source_ckpt") -> Path:
    """A weights file: ``path`` itself, or the best checkpoint of the last finished training in or below a directory.

    A training without a record, of an earlier version, counts as finished. Warns where a later one was not finished,
    and where the file is of one that was not.

    Raises:
        WeightsError: If there is none, or none was finished.
    """
    path = Path(path)
    if path.is_file():
        if far := unfinished(path.parent):
            warnings.warn(f"{option}={str(path)!r} is of a training that was not finished: {far}.", stacklevel=3)
        return path
    files = [*path.rglob("best.ckpt"), *path.rglob(RECORD)] if path.is_dir() else []
    folders = {file.parent: max(f.stat().st_mtime for f in files if f.parent == file.parent) for file in files}
    latest = sorted(folders, key=lambda folder: folders[folder], reverse=True)
    done = next((f for f in latest if unfinished(f) is None and _best(f).is_file()), None)
    later = [f for f in latest[: latest.index(done) if done else None] if unfinished(f)]
    if not later and done is None:
        others = sorted(str(file.relative_to(path)) for file in path.rglob("*.ckpt"))[:5] if path.is_dir() else []
        what = "holds no best.ckpt" if path.is_dir() else "does not exist"
        what += f" (there: {', '.join(others)})" if others else ""
        raise WeightsError(
            f"{option}={str(path)!r} {what}. Give a checkpoint or "
            "weights file, or the run directory of a source training (lightning-tta fit --config "
            "configs/digits/source.yaml, of a language model configs/language/source.yaml, makes one)."
        )
    if later:
        at = later[0].parent if later[0].name == "checkpoints" else later[0]
        files_there = [later[0] / name for name in ("last.ckpt", "best.ckpt") if (later[0] / name).exists()]
        how = (
            f" To go on: lightning-tta fit ... --ckpt_path {files_there[0]}. To take it as it is, give the file "
            f"{files_there[-1]}."
            if files_there
            else ""
        )
        text = f"The training in {at} was not finished: {unfinished(later[0])}.{how}"
        if done is None:
            raise WeightsError(f"{option}={str(path)!r} holds no finished training. {text}")
        warnings.warn(f"{text} Taken instead: {_best(done)}, of the last finished one.", stacklevel=3)
    assert done is not None
    return _best(done)


def _uses_cuda() -> bool:
    """Whether this process has a CUDA context: asking a GPU for anything would open one, of no use to a CPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
