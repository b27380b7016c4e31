"""What TensorBoard shows beside curves: hyper-parameters with their outcome, images, histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_tta.run.pictures import StreamPictures

HISTOGRAMS = 20
"""About so many histograms in a stream."""


ACCURACIES = ("meta/val_after", "source/val_accuracy")
"""What a fit is judged by."""


def _writers(trainer: Trainer, call: str) -> list[Callable[..., Any]]:
    """The loggers' functions of this name, such as ``add_image``; TensorBoard's have them."""
    found = [getattr(logger.experiment, call, None) for logger in trainer.loggers if hasattr(logger, "experiment")]
    return [function for function in found if function is not None]


class StreamBoard(Callback):
    """Logs a predict run's images, histograms of entropy and hyper-parameters.

    Under ``adapt/<method>/<stream>/``: ``images``, the first ones of the first two batches with label, the source's
    prediction and the adapted one; ``entropies``, the entropy of every image of a batch, some 20 times in a stream (its
    mean hides whether a few images or all grew sure). With the hyper-parameters: ``hp_metric``, the accuracy.
    """

    def __init__(self, pictures: StreamPictures) -> None:
        self.pictures = pictures
        self._every = 1

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether anybody looks."""
        self.pictures.begin(wanted=bool(_writers(trainer, "add_image")))
        batches = trainer.num_predict_batches[0] if trainer.num_predict_batches else 1
        self._every = max(1, int(batches) // HISTOGRAMS) if batches != float("inf") else 100

    @rank_zero_only
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the batch's images and entropies, where it is its turn."""
        if outputs is None or not outputs["logits"].numel():  # done before, skipped, or another process's
            return
        module: Any = pl_module
        scheme, step = f"adapt/{module.method.name}/{module.protocol.stream}", module.summary.images
        if batch_idx % self._every == 0:
            for add_histogram in _writers(trainer, "add_histogram"):
                add_histogram(f"{scheme}/entropies", outputs["entropy"].float(), global_step=step)
        if self.pictures.left:
            names = None if module.classes is not None else class_names(trainer)
            shown = (batch["image"], outputs["prediction"], outputs["label"], names)
            strip = self.pictures.draw(module.method, *shown)
            for add_image in _writers(trainer, "add_image"):
                add_image(f"{scheme}/images", strip, global_step=step, dataformats="HWC")

    @rank_zero_only
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log hyper-parameters with what came of them."""
        module: Any = pl_module
        result = module.summary.result()
        protocol = module.protocol.to_dict()
        parameters = {
            "net": module.net_info["name"],
            **{k: protocol[k] for k in ("data", "stream", "severity", "batch_size", "reset", "order_seed")},
            "method": module.method.name,
            **module.method.options,
        }
        images = result["images"]
        metrics = {
            "hp_metric": result["accuracy"],
            "hp/ece": result["ece"],
            "hp/ms_per_image": 1000 * result["seconds"] / images if images else None,
        }
        known = {name: value for name, value in metrics.items() if value is not None}
        said = {name: "-" if value is None else value for name, value in parameters.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and known:
                logger.log_hyperparams(said, known)


def class_names(trainer: Trainer) -> list[str] | None:
    """The data module's names of the classes, where it has some."""
    data = getattr(trainer, "datamodule", None)
    found = getattr(data, "class_names", None)
    return list(found) if found is not None else None


class FitBoard(Callback):
    """At the end of a fit, ``hp_metric`` becomes the last validation accuracy instead of a placeholder.

    Of a meta-training, the accuracy after its inner step.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score."""
        found = [trainer.callback_metrics[name] for name in ACCURACIES if name in trainer.callback_metrics]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and found:
                logger.log_metrics({"hp_metric": float(found[0])}, step=trainer.global_step)
