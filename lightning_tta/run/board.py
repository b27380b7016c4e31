"""What TensorBoard shows: curves, hyper-parameters with their outcome, images, histograms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.task import float_dtype
from lightning_tta.run.stream_run import Outputs, RunCallback, StreamRun

HISTOGRAMS = 20
"""About so many histograms in a stream."""
PICTURES = 2
"""So many batches of a stream are shown."""
PALETTE = (
    *((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0)),
    *((204, 121, 167), (255, 255, 255), (148, 103, 189), (140, 86, 75), (23, 190, 207)),
)
"""Colors of the first classes of pixels, after Okabe and Ito; later ones begin anew."""
UNCOUNTED = (128, 128, 128)
SIDE, LINE, GAP = 96, 12, 8  # pixels of an image, of a line of text, between two images
SCORES_OF_FIT = (
    "meta/val_after",
    "source/val_mean_iou",
    "source/val_mean_absolute_error",
    "source/val_accuracy",
)
"""What a fit is judged by: the first that it has."""


CURVES = {
    "accuracy_so_far": "accuracy",
    "accuracy": "accuracy_of_batch",
    **{name: name for name in ("loss", "entropy", "recent_class_share", "largest_class_share", "logit_norm")},
    **{name: name for name in ("kept", "skipped_steps", "guard_alarms")},
    "mean_iou_so_far": "mean_iou",
    "mean_iou": "mean_iou_of_batch",
    "mean_absolute_error_so_far": "mean_absolute_error",
    "mean_absolute_error": "mean_absolute_error_of_batch",
    **{name: name for name in ("mean_value", "value_spread")},
}
"""What of a batch's account is a curve under ``adapt/``, and its name there."""


_SCORES = ("mean_iou", "mean_absolute_error", "accuracy")
"""What a run is judged by: the first that it has."""


class StreamBoard(RunCallback):
    """Logs a predict run's curves, images, histograms of entropy and hyper-parameters.

    The names are the same for all methods and streams, so that the curves of several runs lie over each other. To all
    loggers of the Trainer, over the images seen: ``adapt/accuracy`` (so far), ``adapt/accuracy_of_batch``,
    ``adapt/loss``, ``adapt/entropy``, ``adapt/recent_class_share`` and the others of ``CURVES``. To TensorBoard:
    ``images``, the first ones of the first two batches with label, the source's prediction and the adapted one (of
    pixels their masks; none of values);
    ``entropies``, the entropy of every image of a batch, some 20 times in a stream (its mean hides whether a few
    images or all grew sure). With the hyper-parameters: ``hp_metric``, the accuracy; of pixels mean IoU, of values
    the mean absolute error.

    Args:
        images: How many images of each of the first batches are shown, for which the net is put back to the source for
            one pass; 0: none. On the command line ``--board.images 0``.
        details: Also log ``domain/<name>``, the accuracy so far in each domain, and ``method/<name>``, whatever else
            is in the method's ``stats``.
    """

    may_lag = True

    def __init__(self, images: int = 4, details: bool = False) -> None:
        check_range("images", images, 0, integer=True)
        self.images, self.details = images, details
        self._pictures_left = 0
        self._every = 1

    def on_start(self, run: StreamRun) -> None:
        """Find out whether anybody looks."""
        self._pictures_left = PICTURES if self.images and _writers(run.trainer, "add_image") else 0
        batches = run.total_batches
        self._every = max(1, int(batches) // HISTOGRAMS) if batches != float("inf") else 100

    @rank_zero_only
    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Log the batch's numbers, and its images and entropies, where it is its turn."""
        if not len(output["index"]) or (run.batch is not None and run.batch.error):  # another process's, or refused
            return
        step = run.summary.images
        numbers = self._numbers(run)
        for logger in run.trainer.loggers:
            log_numbers(logger, numbers, step)
        if "entropy" in output and (run.summary.batches - 1) % self._every == 0:
            for add_histogram in _writers(run.trainer, "add_histogram"):
                add_histogram("entropies", output["entropy"].float(), global_step=step)
        if self._pictures_left and run.batch is not None and run.batch.images is not None:
            self._pictures_left -= 1
            names = None if run.classes is not None else getattr(run.data, "class_names", None)
            shown, kind = run.batch.images[: self.images], run.method.task.kind
            if kind == "regression":
                return
            if kind == "pixels":
                strip = draw_masks(run.method, shown, output["prediction"], getattr(run.batch, "target", None))
            else:
                strip = draw(run.method, shown, output["prediction"], output["label"], names)
            for add_image in _writers(run.trainer, "add_image"):
                add_image("images", strip, global_step=step, dataformats="HWC")

    def _numbers(self, run: StreamRun) -> dict[str, float]:
        """The batch's curves; with ``details`` all else that is a number."""
        row = {name: value for name, value in run.summary.last.items() if isinstance(value, float)}
        numbers = {f"adapt/{CURVES[name]}": value for name, value in row.items() if name in CURVES}
        if self.details:
            rest = row.keys() - CURVES.keys() - {"seconds"}
            numbers |= {f"method/{name}": row[name] for name in sorted(rest)}
            domain = run.summary.last["domain"]
            accuracy = None if domain == "mixed" else run.summary.domain_accuracy(domain)
            if accuracy is not None:
                numbers["domain/" + re.sub(r"[^\w.:+-]+", "_", domain)] = accuracy
        return numbers

    @rank_zero_only
    def on_end(self, run: StreamRun) -> None:
        """Log hyper-parameters with what came of them."""
        result, protocol = run.summary.result(), run.protocol.to_dict()
        parameters = {
            "method": run.method.name,
            "stream": protocol["stream"],
            "net": run.net["name"],
            **{k: protocol[k] for k in ("data", "severity", "batch_size", "reset", "order_seed")},
            **run.method.options,
        }
        images = result["images"]
        metrics = {
            "hp_metric": next((result[name] for name in _SCORES if result.get(name) is not None), None),
            "hp/ece": result["ece"],
            "hp/ms_per_image": 1000 * result["seconds"] / images if images else None,
        }
        known = {name: value for name, value in metrics.items() if value is not None}
        for logger in run.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and known:
                logger.log_hyperparams(plain(parameters), known)


class FitBoard(Callback):
    """Logs the hyper-parameters of a fit, without those that only Lightning reads.

    To TensorBoard at the end, with ``hp_metric``, the last validation accuracy; of a meta-training, that after its
    inner step; of pixels mean IoU, of values the mean absolute error. To other loggers at the start.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning would log them all, and an accuracy of -1."""
        for each in (pl_module, getattr(trainer, "datamodule", None)):
            if stage == "fit" and each is not None:
                each._log_hyperparams = False

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log them where they need no outcome; TensorBoard's logger keeps them for its file ``hparams.yaml``."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.hparams.update(_of_fit(trainer, pl_module))
            else:
                logger.log_hyperparams(_of_fit(trainer, pl_module))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log them with the score."""
        scores = [trainer.callback_metrics[name] for name in SCORES_OF_FIT if name in trainer.callback_metrics]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and scores:
                logger.log_hyperparams(_of_fit(trainer, pl_module), {"hp_metric": float(scores[0])})


def _of_fit(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What a fit is told apart by: its net and data, the optimizer and its rate, and the module's other options."""
    data: Any = getattr(trainer, "datamodule", None)
    parameters = {"data": type(data).__name__} if data is not None else {}
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        parameters |= {"optimizer": type(optimizer).__name__, "lr": group.get("initial_lr", group["lr"])}
        parameters |= {name: group[name] for name in ("weight_decay", "momentum") if name in group}
    rest = dict(pl_module.hparams) | (dict(data.hparams) if hasattr(data, "hparams") else {})
    return plain({**parameters, "max_epochs": trainer.max_epochs, **{k: v for k, v in rest.items() if k[:1] != "_"}})


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as TensorBoard shows them: nested ones by dotted names, and classes by their names alone."""
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and "class_path" in value:
            flat[name] = str(value["class_path"]).rpartition(".")[2]
            value = value.get("init_args") or {}
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": each for key, each in plain(value).items()}
        else:
            flat[name] = "-" if value is None else value
    return flat


def draw(
    method: TTAMethod, images: Tensor, adapted: Tensor, labels: Tensor, names: Sequence[str] | None
) -> NDArray[np.uint8]:
    """A strip (H, W, 3) of images (B, C, H, W), each with its label, the source's prediction and the adapted one.

    It is as wide as the longest of the lines below the images needs.
    """
    usable = images.detach().float().nan_to_num(0, 0, 0).clamp(0, 1)
    source, usable = _source_prediction(method, usable), usable.cpu()

    def name(number: Tensor) -> str:
        k = int(number)
        return "?" if k < 0 else names[k][:24] if names is not None and k < len(names) else str(k)

    def is_wrong(number: Tensor, label: Tensor) -> bool:
        return int(label) >= 0 and int(number) != int(label)

    lines = [("label", labels), ("source", source), ("adapted", adapted)]
    captions = [
        [f"{what} {name(each[k])}{' (wrong)' * is_wrong(each[k], labels[k])}" for what, each in lines]
        for k in range(len(usable))
    ]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = GAP + max([SIDE, *(math.ceil(pen.textlength(text)) for each in captions for text in each)])
    strip = Image.new("RGB", (len(usable) * width, SIDE + 3 * LINE + 2), "white")
    pen = ImageDraw.Draw(strip)
    for column, image in enumerate(usable):
        pixels = (255 * image.expand(3, -1, -1) if len(image) == 1 else 255 * image[:3]).round().byte()
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        left = column * width
        strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, 0))
        for row, (text, (_, numbers)) in enumerate(zip(captions[column], lines, strict=True)):
            color = "firebrick" if is_wrong(numbers[column], labels[column]) else "black"
            pen.text((left + 1, SIDE + row * LINE), text, fill=color)
    return np.asarray(strip)


def draw_masks(method: TTAMethod, images: Tensor, adapted: Tensor, target: Tensor | None) -> NDArray[np.uint8]:
    """A picture (H, W, 3) of images (B, C, H, W), a column each: image, mask, the source's and the adapted one.

    Classes have the colors of :data:`PALETTE`; pixels that do not count, or have no prediction, are grey.
    """
    usable = images.detach().float().nan_to_num(0, 0, 0).clamp(0, 1)
    with torch.no_grad():
        source = method.task.answer(_source_output(method, usable)).argmax(1).cpu()
    pixels = (255 * usable.cpu()).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    masks = [source, adapted[: len(usable)].long()]
    masks = masks if target is None else [target[: len(usable)], *masks]
    table = torch.tensor([*PALETTE, UNCOUNTED], dtype=torch.uint8)
    colors = [table[torch.where(mask < 0, len(PALETTE), mask % len(PALETTE))].permute(0, 3, 1, 2) for mask in masks]
    rows = [torch.cat(list(functional.pad(row, (0, 2, 0, 2), value=255)), 2) for row in (pixels, *colors)]
    picture = Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy())
    scale = SIDE / max(usable.shape[-2:])
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))


def _source_output(method: TTAMethod, images: Tensor) -> Tensor:
    """What the plain net gives from its source weights; all that the method has learned or drawn is as before."""
    rng = torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])
    with rng, method.at_source():
        output: Tensor = method.model(images.to(float_dtype(method.model)))
        return output


@torch.no_grad()
def _source_prediction(method: TTAMethod, images: Tensor) -> Tensor:
    """What the plain net predicts from its source weights."""
    return as_logits(_source_output(method, images)).argmax(1).cpu()


def log_numbers(logger: Logger, numbers: Mapping[str, float], step: int) -> None:
    """As the logger's ``log_metrics``; to TensorBoard all as one event, which it shows as so many curves.

    An event takes as long as its way into TensorBoard's queue, whatever it holds.
    """
    writer = None
    if isinstance(logger, TensorBoardLogger) and not logger._prefix:
        writer = getattr(logger.experiment, "file_writer", None)
    if writer is None:  # another logger, a closed writer, or names that the logger puts its prefix before
        logger.log_metrics(dict(numbers), step=step)
        return
    values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
    writer.add_summary(Summary(value=values), step)


def _writers(trainer: Trainer, call: str) -> list[Callable[..., Any]]:
    """The loggers' functions of this name, such as ``add_image``; TensorBoard's have them."""
    functions = [getattr(logger.experiment, call, None) for logger in trainer.loggers if hasattr(logger, "experiment")]
    return [function for function in functions if function is not None]
