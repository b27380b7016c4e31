"""What TensorBoard shows beside curves: hyper-parameters with their outcome, images, histograms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.task import float_dtype
from lightning_tta.run.stream_run import Outputs, RunCallback, StreamRun

HISTOGRAMS = 20
"""About so many histograms in a stream."""
PICTURES = 2
"""So many batches of a stream are shown."""
SIDE, LINE = 96, 12  # pixels of an image, and of a line of text
ACCURACIES = ("meta/val_after", "source/val_accuracy")
"""What a fit is judged by."""


class StreamBoard(RunCallback):
    """Logs a predict run's images, histograms of entropy and hyper-parameters.

    Under ``adapt/<method>/<stream>/``: ``images``, the first ones of the first two batches with label, the source's
    prediction and the adapted one; ``entropies``, the entropy of every image of a batch, some 20 times in a stream (its
    mean hides whether a few images or all grew sure). With the hyper-parameters: ``hp_metric``, the accuracy.

    Args:
        images: How many images of each of the first batches are shown, for which the net is put back to the source for
            one pass; 0: none. On the command line ``--board.images 0``.
    """

    def __init__(self, images: int = 4) -> None:
        check_range("images", images, 0, integer=True)
        self.images = images
        self._pictures_left = 0
        self._every = 1

    def on_start(self, run: StreamRun) -> None:
        """Find out whether anybody looks."""
        self._pictures_left = PICTURES if self.images and _writers(run.trainer, "add_image") else 0
        batches = run.total_batches
        self._every = max(1, int(batches) // HISTOGRAMS) if batches != float("inf") else 100

    @rank_zero_only
    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Log the batch's images and entropies, where it is its turn."""
        if not output["logits"].numel():  # refused, or another process's
            return
        step = run.summary.images
        if (run.summary.batches - 1) % self._every == 0:
            for add_histogram in _writers(run.trainer, "add_histogram"):
                add_histogram(f"{run.tag}/entropies", output["entropy"].float(), global_step=step)
        if self._pictures_left and run.batch is not None and run.batch.images is not None:
            self._pictures_left -= 1
            names = None if run.classes is not None else getattr(run.data, "class_names", None)
            strip = draw(run.method, run.batch.images[: self.images], output["prediction"], output["label"], names)
            for add_image in _writers(run.trainer, "add_image"):
                add_image(f"{run.tag}/images", strip, global_step=step, dataformats="HWC")

    @rank_zero_only
    def on_end(self, run: StreamRun) -> None:
        """Log hyper-parameters with what came of them."""
        result, protocol = run.summary.result(), run.protocol.to_dict()
        parameters = {
            "net": run.net["name"],
            **{k: protocol[k] for k in ("data", "stream", "severity", "batch_size", "reset", "order_seed")},
            "method": run.method.name,
            **run.method.options,
        }
        images = result["images"]
        metrics = {
            "hp_metric": result["accuracy"],
            "hp/ece": result["ece"],
            "hp/ms_per_image": 1000 * result["seconds"] / images if images else None,
        }
        known = {name: value for name, value in metrics.items() if value is not None}
        texts = {name: "-" if value is None else value for name, value in parameters.items()}
        for logger in run.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and known:
                logger.log_hyperparams(texts, known)


class FitBoard(Callback):
    """At the end of a fit, ``hp_metric`` becomes the last validation accuracy instead of a placeholder.

    Of a meta-training, the accuracy after its inner step.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score."""
        accuracies = [trainer.callback_metrics[name] for name in ACCURACIES if name in trainer.callback_metrics]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and accuracies:
                logger.log_metrics({"hp_metric": float(accuracies[0])}, step=trainer.global_step)


def draw(
    method: TTAMethod, images: Tensor, adapted: Tensor, labels: Tensor, names: Sequence[str] | None
) -> NDArray[np.uint8]:
    """A strip (H, W, 3) of images (B, C, H, W), each with its label, the source's prediction and the adapted one."""
    usable = images.detach().float().nan_to_num(0, 0, 0).clamp(0, 1)
    source, usable = _source_prediction(method, usable), usable.cpu()

    def name(number: Tensor) -> str:
        k = int(number)
        return "?" if k < 0 else names[k][:10] if names is not None and k < len(names) else str(k)

    strip = Image.new("RGB", (len(usable) * (SIDE + 4), SIDE + 3 * LINE + 2), "white")
    pen = ImageDraw.Draw(strip)
    for column, image in enumerate(usable):
        pixels = (255 * image.expand(3, -1, -1) if len(image) == 1 else 255 * image[:3]).round().byte()
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        left = column * (SIDE + 4)
        strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, 0))
        lines = (("label", labels[column]), ("source", source[column]), ("adapted", adapted[column]))
        for row, (what, number) in enumerate(lines):
            wrong = what != "label" and int(labels[column]) >= 0 and int(number) != int(labels[column])
            text = f"{what} {name(number)}{' (wrong)' if wrong else ''}"
            pen.text((left + 1, SIDE + row * LINE), text, fill="black")
    return np.asarray(strip)


@torch.no_grad()
def _source_prediction(method: TTAMethod, images: Tensor) -> Tensor:
    """What the plain net predicts from its source weights; all that the method has learned or drawn is as before."""
    rng = torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])
    with rng, method.at_source():
        return as_logits(method.model(images.to(float_dtype(method.model)))).argmax(1).cpu()


def _writers(trainer: Trainer, call: str) -> list[Callable[..., Any]]:
    """The loggers' functions of this name, such as ``add_image``; TensorBoard's have them."""
    functions = [getattr(logger.experiment, call, None) for logger in trainer.loggers if hasattr(logger, "experiment")]
    return [function for function in functions if function is not None]
