"""What the trainings of source nets share: their life, and, of images, their net and measures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_tta.backbones import Backbone, create_backbone
from lightning_tta.errors import ConfigError
from lightning_tta.modules.classes import check_class_counts, class_names_of
from lightning_tta.modules.loading import check_options, describe_net
from lightning_tta.modules.training import TrainingRecord, find_checkpoint


class SourceModule(LightningModule):
    """The life of a training: weights that are random at first, optimizer, checkpoint.

    A leaf sets :attr:`backbone`, :attr:`optimizer`, :attr:`lr_scheduler` and ``_has_weights``.

    Attributes:
        backbone: The net.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer; stepped per epoch.
        example: A folder of such a training, for messages.
        predicts_in: The module that predicts with the net.
    """

    example: ClassVar[str] = "runs/digits/source"
    predicts_in: ClassVar[str] = "TestTimeAdaptation"
    backbone: nn.Module
    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    _has_weights: bool

    def configure_callbacks(self) -> list[Callback]:
        """What marks a finished training."""
        return [TrainingRecord()]

    def on_validation_start(self) -> None:
        """Say where the weights are random."""
        self._warn_of_random_weights()

    def on_test_start(self) -> None:
        """Say where the weights are random."""
        self._warn_of_random_weights()

    def _warn_of_random_weights(self) -> None:
        stage = self.trainer.state.fn
        if stage not in (None, TrainerFn.FITTING) and not self._has_weights:
            warnings.warn(
                f"The weights are random: {stage.value} measures chance. Name a training: --ckpt_path "
                f"{self.example} (its folder or a checkpoint), ckpt_path=... in Python.",
                stacklevel=2,
            )

    def on_train_start(self) -> None:
        """From now on the weights are not random."""
        self._has_weights = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the names of the classes, and note that there are weights.

        Raises:
            ConfigError: The weights belong to a net that was built or normalised otherwise.
        """
        self._has_weights = True
        saved = checkpoint.get("lightning_tta", {})
        if not isinstance(self.backbone, Backbone):
            return
        now, then = self.backbone.config, saved.get("backbone") or {}
        other = sorted(k for k in {*now, *then} - {"architecture"} if now and then and now.get(k) != then.get(k))
        if other:
            was, given = ({key: config.get(key) for key in other} for config in (then, now))
            raise ConfigError(
                f"The checkpoint is of a net with {was}, but this one has {given}. Give the net as in the training: "
                "--model.backbone and --model.backbone_options, or the training's own config.yaml as --config."
            )
        if names := saved.get("class_names"):
            self.backbone.class_names = list(names)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Refuses: predictions on a stream, adapted or not, go through the test-time module."""
        raise ConfigError(
            f"{type(self).__name__} does not predict. Use --model {self.predicts_in} --model.source_ckpt PATH with "
            "--model.method Source for predictions without adaptation."
        )

    def configure_optimizers(self) -> Any:
        """The optimizer and, per epoch, the schedule of the configuration."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        return optimizer if self.lr_scheduler is None else ([optimizer], [self.lr_scheduler(optimizer)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the class and the net, for whoever loads the file."""
        checkpoint["lightning_tta"] = {"class": type(self).__name__, **describe_net(self.backbone, checkpoint)}


class ImageSource(SourceModule):
    """A training on images: the net by its name, and a loss and metrics over outputs and what they should be.

    A leaf calls :meth:`take_net` and :meth:`take_metrics`, and implements :meth:`loss` and :meth:`matched`.

    Attributes:
        val_metrics: Of outputs and targets, on the validation split.
        test_metrics: The same on the test split.
    """

    val_metrics: MetricCollection
    test_metrics: MetricCollection

    def take_net(
        self,
        backbone: str | nn.Module,
        outputs: int,
        pretrained: bool,
        weights: str | None,
        backbone_options: dict[str, Any] | None,
    ) -> None:
        """Set :attr:`backbone`; the arguments are those of :class:`~lightning_tta.SourceClassifier`."""
        if weights is not None and Path(weights).is_dir():
            weights = str(find_checkpoint(weights, "weights"))
        if isinstance(backbone, nn.Module):
            self.backbone = backbone
        else:
            options = check_options(backbone_options)
            self.backbone = create_backbone(backbone, outputs, pretrained=pretrained, weights=weights, **options)
        self._has_weights = isinstance(backbone, nn.Module) or getattr(self.backbone, "weights", "") != "random"

    def take_metrics(self, metrics: MetricCollection) -> None:
        """Set :attr:`val_metrics` and :attr:`test_metrics`."""
        self.val_metrics = metrics.clone(prefix="source/val_")
        self.test_metrics = metrics.clone(prefix="source/test_")

    def match_classes(self, classes: int, stage: str) -> None:
        """Compare the classes of the data with the net's, and keep their names.

        Raises:
            ConfigError: The data has more classes than the net has logits, or other ones.
        """
        names = class_names_of(self.trainer)
        check_class_counts(names, classes, getattr(self.backbone, "class_names", None), "--model.num_classes")
        if isinstance(self.backbone, Backbone) and stage == "fit" and len(names) == classes:
            self.backbone.class_names = list(names)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError

    def matched(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What the net's output for a batch should be.

        Raises:
            ConfigError: If the net has other outputs than were said.
            DataError: If it does not go with the net's output.
        """
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and metrics on the validation split."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same on the clean test split."""
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        output = self(batch["image"])
        target = self.matched(output, batch)
        metrics.update(output, target)
        log_mean(self, f"{metrics.prefix}loss", self.loss(output, target), len(output))
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(output))


def log_mean(module: LightningModule, name: str, value: Tensor, count: float, **options: Any) -> None:
    """Log the mean of ``value`` over an epoch, weighted by ``count``, the number of samples it is the mean of.

    Processes may have different numbers of samples. Lightning (2.6, issue 21838) averages whole-number counts over
    processes and rounds the result down, so that 4 and 3 samples count as 3 each; as a float the count is kept.
    """
    weight: int = float(count)  # type: ignore[assignment]
    module.log(name, value, on_epoch=True, batch_size=weight, sync_dist=True, **options)
