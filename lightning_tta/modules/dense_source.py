"""Training of source nets that give more than one class an image: segmentation, and regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.regression import MeanAbsoluteError, R2Score

from lightning_tta.backbones import Backbone
from lightning_tta.errors import ConfigError, DataError, check_range
from lightning_tta.modules.source_module import ImageSource

IGNORED = -1
"""What stands in a target mask where a pixel does not count."""


class DenseSource(ImageSource):
    """What the trainings of segmentation and of regression share.

    Args:
        backbone: As of :class:`~lightning_tta.SourceClassifier`.
        outputs: Number of the net's outputs.
        pretrained: The same.
        weights: The same.
        backbone_options: The same.
        optimizer: Called with the parameters. Default: AdamW with lr 3e-3.
        lr_scheduler: Called with the optimizer; stepped per epoch.
    """

    task: ClassVar[str]

    def __init__(
        self,
        backbone: str | nn.Module,
        outputs: int,
        pretrained: bool,
        weights: str | None,
        backbone_options: dict[str, Any] | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        self.take_net(backbone, outputs, pretrained, weights, backbone_options)
        if isinstance(self.backbone, Backbone):
            self.backbone.task = self.task
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def setup(self, stage: str) -> None:
        """Compare the data's task with the net's.

        Raises:
            ConfigError: If they are others.
        """
        data = getattr(self.trainer, "datamodule", None)
        theirs = getattr(data, "task", self.task)
        if theirs != self.task:
            raise ConfigError(
                f"{type(self).__name__} trains for task={self.task!r}, and {type(data).__name__} is for "
                f"task={theirs!r}. Give other data, or another model."
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        output = self(batch["image"])
        loss = self.loss(output, self.matched(output, batch))
        self.log("source/train_loss", loss, prog_bar=True)
        return loss


def _target_of(batch: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(batch.get("target"), Tensor):
        raise DataError(
            "The batches have no 'target' to train on: masks (B, H, W) or values (B, D). Give data that have them, "
            "such as ShapesData or a folder with masks."
        )
    return batch["target"]


class SourceSegmenter(DenseSource):
    """Minimises the mean cross-entropy over the pixels that count of a segmentation net.

    Batches are ``{image (B, C, H, W) in [0, 1], target (B, H, W)}``, masks of whole numbers, below 0 where a pixel does
    not count. Logs ``source/train_loss``, ``source/val_mean_iou``, the mean of the classes' IoU over all pixels of the
    split (torchmetrics' ``MulticlassJaccardIndex``), ``source/val_accuracy`` of pixels, ``source/val_loss``; the same
    for test. The checkpoint holds what rebuilds the net, and its task: ``TestTimeAdaptation(source_ckpt=...)`` needs
    nothing else.

    Args:
        backbone: A class of nets that give logits (B, K, H, W): ``lightning_tta.backbones.unet.UNet``, one of your own,
            ``torchvision/deeplabv3_mobilenet_v3_large``; in Python also a module, which is not in the checkpoint.
        num_classes: Number of classes K, at least 2.
        pretrained: Start from the library's pretrained weights (downloads them).
        weights: Start from the weights in this file, or of the last finished training in this folder.
        backbone_options: Further arguments of the backbone, such as ``{width: 32}``.
        optimizer: Called with the parameters. Default: AdamW with lr 3e-3.
        lr_scheduler: Called with the optimizer; stepped per epoch.
    """

    task = "pixels"

    def __init__(
        self,
        backbone: str | nn.Module = "lightning_tta.backbones.unet.UNet",
        num_classes: int = 2,
        pretrained: bool = False,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_range("num_classes", num_classes, 2, integer=True)
        super().__init__(backbone, num_classes, pretrained, weights, backbone_options, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *["backbone"] * isinstance(backbone, nn.Module)])
        self.num_classes = num_classes
        iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)
        accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED)
        self.take_metrics(MetricCollection({"mean_iou": iou, "accuracy": accuracy}))

    def setup(self, stage: str) -> None:
        """Compare the data's task and classes with the net's.

        Raises:
            ConfigError: If they are others, or the data has more classes.
        """
        super().setup(stage)
        self.match_classes(self.num_classes, stage)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W) in [0, 1]."""
        output = self.backbone(images)
        output = output["out"] if isinstance(output, Mapping) and "out" in output else getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != self.num_classes:
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"The net must return logits (B, {self.num_classes}, H, W), num_classes of them; it returned {what}."
            )
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the pixels that count; 0 where none does."""
        total = functional.cross_entropy(output, target, ignore_index=IGNORED, reduction="sum")
        return total / (target >= 0).sum().clamp_min(1)

    def matched(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Masks (B, H, W).

        Raises:
            DataError: If they are of another size, or have another class.
        """
        target = _target_of(batch).long()
        if target.shape != (len(output), *output.shape[2:]):
            raise DataError(
                f"Masks are {tuple(target.shape)}, but the net's logits {tuple(output.shape)}. Make them of one size."
            )
        if target.device.type == "cpu" and int(target.max()) >= self.num_classes:  # on a GPU this waits for the device
            raise DataError(
                f"A mask has the class {int(target.max())}, but num_classes is {self.num_classes}. Pixels that do not "
                "count have a number below 0."
            )
        return target.clamp_min(IGNORED)


class SourceRegressor(DenseSource):
    """Minimises the mean squared error of a net that gives values.

    Batches are ``{image (B, C, H, W) in [0, 1], target (B, D)}``. Logs
    ``source/train_loss``, ``source/val_mean_absolute_error``, ``source/val_r2``,
    ``source/val_loss``; the same for test.

    Args:
        backbone: Name for :func:`lightning_tta.create_backbone`, such as ``timm/test_resnet``, or a class of your own;
            in Python also a module, which is not in the checkpoint.
        num_values: Number of values D.
        pretrained: Start from the library's pretrained weights (downloads them).
        weights: Start from the weights in this file, or of the last finished training in this folder.
        backbone_options: Further arguments of the backbone.
        scale: Errors are divided by this in the loss, above 0: about the spread of the targets.
        optimizer: Called with the parameters. Default: AdamW with lr 3e-3.
        lr_scheduler: Called with the optimizer; stepped per epoch.
    """

    task = "regression"

    def __init__(
        self,
        backbone: str | nn.Module,
        num_values: int = 1,
        pretrained: bool = False,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        scale: float = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_range("num_values", num_values, 1, integer=True)
        check_range("scale", scale, 0, low_open=True)
        super().__init__(backbone, num_values, pretrained, weights, backbone_options, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *["backbone"] * isinstance(backbone, nn.Module)])
        self.num_values, self.scale = num_values, scale
        self.take_metrics(MetricCollection({"mean_absolute_error": MeanAbsoluteError(), "r2": R2Score()}))

    def forward(self, images: Tensor) -> Tensor:
        """Values (B, D) of images (B, C, H, W) in [0, 1]."""
        output = self.backbone(images)
        output = output[:, None] if isinstance(output, Tensor) and output.ndim == 1 else output
        if not isinstance(output, Tensor) or output.shape != (len(images), self.num_values):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(f"The net must return values (B, {self.num_values}), num_values of them; it gave {what}.")
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, in units of ``scale``."""
        return functional.mse_loss(output / self.scale, target / self.scale)

    def matched(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Values (B, D).

        Raises:
            DataError: If they are another number, or not finite.
        """
        target = _target_of(batch)
        if len(target) != len(output) or target.numel() != output.numel():
            raise DataError(f"Targets are {tuple(target.shape)}, but the net's values {tuple(output.shape)} (B, D).")
        if target.device.type == "cpu" and not bool(target.isfinite().all()):
            raise DataError("A target is not finite: leave images without a known value out of the training.")
        return target.to(output.dtype).view_as(output)
