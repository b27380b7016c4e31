"""Supervised training of the source model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_tta.auxiliary.base import Auxiliary, place
from lightning_tta.auxiliary.kinds import KINDS
from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import ConfigError, check_range
from lightning_tta.methods.components.wanted import listed, read
from lightning_tta.modules.classes import check_labels
from lightning_tta.modules.loading import train_adapters
from lightning_tta.modules.mosa import MoSA
from lightning_tta.modules.source_module import ImageSource


class SourceClassifier(ImageSource):
    """Minimises the cross-entropy of a backbone on labelled source images, plus auxiliary losses if there are any.

    Batches are ``{image (B, C, H, W) in [0, 1], label (B,)}``. Logs ``source/train_loss``, ``source/val_accuracy``,
    ``source/val_loss``, ``source/val_ece`` (the same for test), and ``source/KIND_loss`` of each auxiliary. The
    checkpoint holds what rebuilds the net, so that ``TestTimeAdaptation(source_ckpt=...)`` needs nothing else.

    On several processes gradients are averaged and validation measures are those of all samples: training equals one
    process with the joined batch, up to summation order. Not so for BatchNorm nets, whose statistics stay on their
    process unless ``--trainer.sync_batchnorm true`` (GPU only) joins them.

    Args:
        backbone: Name for :func:`lightning_tta.create_backbone`, such as ``timm/test_resnet``, or of a class of your
            own: ``my_net.MyNet``, ``path/to/my_net.py:MyNet``; in Python also a module, which is not in the checkpoint.
        num_classes: Number of classes K, at least 2.
        pretrained: Start from the library's pretrained weights (downloads them).
        weights: Start from the weights in this file, or of the last finished training in this folder.
        backbone_options: Further arguments of the backbone, such as ``{img_size: 32}``.
        optimizer: Called with the parameters. Default: AdamW with lr 3e-3.
        lr_scheduler: Called with the optimizer; stepped per epoch.
        label_smoothing: In [0, 1).
        adapters: Train these alone, with the last linear layer: a kind (``lora``), a dict of ``kind`` and its options,
            or a list, see :mod:`lightning_tta.methods.components.adapters`. The checkpoint holds them, and whatever
            loads it has them; at test time ``select="adapters"`` goes on with them, and ``vida`` uses its pairs.
        adapter_parts: Train them a part at a time, of so many, see :class:`~lightning_tta.modules.mosa.MoSA`.
        auxiliary: What is learned beside the classes, for a method that adapts by it: a word such as ``rotation`` (for
            method ``ttt``), or a dict of ``kind`` and its options, ``{kind: rotation, at: 0.5}``, or a list of these;
            see :mod:`lightning_tta.auxiliary`. Its heads are in the checkpoint, where the method finds them.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int = 10,
        pretrained: bool = False,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        adapters: str | dict[str, Any] | list[Any] | None = None,
        adapter_parts: int | None = None,
        auxiliary: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        check_range("num_classes", num_classes, 2, integer=True)
        check_range("label_smoothing", label_smoothing, 0, 0.999)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *["backbone"] * isinstance(backbone, nn.Module)])
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.take_net(backbone, num_classes, pretrained, weights, backbone_options)
        if adapters is not None:
            train_adapters(self.backbone, adapters)
        elif adapter_parts is not None:
            raise ConfigError(f"adapter_parts={adapter_parts} needs adapters to train: give adapters, such as 'lora'.")
        self.mosa = None if adapter_parts is None else MoSA(adapter_parts)
        if adapters is not None and not self._has_weights:
            warnings.warn(
                "The weights beside the adapters are random, and stay so: only adapters and the last linear layer "
                "learn. Start from a trained net: --model.weights FILE, or --model.pretrained true.",
                stacklevel=2,
            )
        self.auxiliary = nn.ModuleDict()
        self._auxiliary_options: dict[str, dict[str, Any]] = {}
        for wanted in listed(auxiliary):
            kind, options = read(wanted, "auxiliary", KINDS)
            if kind in self.auxiliary:
                raise ConfigError(f"auxiliary names {kind!r} twice. Leave one out.")
            self.auxiliary[kind] = place(KINDS[kind](self.backbone, **options), self.backbone)
            self._auxiliary_options[kind] = options
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        accuracy, ece = MulticlassAccuracy(num_classes, average="micro"), MulticlassCalibrationError(num_classes)
        self.take_metrics(MetricCollection({"accuracy": accuracy, "ece": ece}))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1]."""
        return as_logits(self.backbone(images))

    def configure_callbacks(self) -> list[Callback]:
        """What marks a finished training."""
        return super().configure_callbacks() if self.mosa is None else [*super().configure_callbacks(), self.mosa]

    def setup(self, stage: str) -> None:
        """Compare the classes of the data with the logits.

        Raises:
            ConfigError: The data has more classes than the net has logits.
        """
        self.match_classes(self.num_classes, stage)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of logits (B, K) and labels (B,)."""
        return cross_entropy(output, target, label_smoothing=self.label_smoothing)

    def matched(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Labels (B,).

        Raises:
            ConfigError: If the net has not K logits.
            DataError: If a label is none of the K.
        """
        self._check(output, batch["label"], 0)
        return batch["label"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, plus the auxiliary losses."""
        images, labels = batch["image"], batch["label"]
        logits = self(images)
        self._check(logits, labels, batch_idx)
        loss = self.loss(logits, labels)
        self.log("source/train_loss", loss, prog_bar=True)
        for kind, auxiliary in self.auxiliary.items():
            assert isinstance(auxiliary, Auxiliary)
            key = torch.randint(2**62, (2,)).to(images.device, non_blocking=True)
            term = auxiliary.loss(self.backbone, images, labels, key)
            self.log(f"source/{kind}_loss", term)
            loss = loss + auxiliary.weight * term
        return loss

    def _check(self, logits: Tensor, labels: Tensor, batch_idx: int) -> None:
        """Raise where the net has not K logits, or a label is none of the K: before the loss does it in its own way."""
        if logits.shape[1] != self.num_classes:
            raise ConfigError(
                f"The net has {logits.shape[1]} logits, but num_classes is {self.num_classes}. Set --model.num_classes "
                f"{logits.shape[1]}, or build the net with {self.num_classes} (--model.backbone_options)."
            )
        if batch_idx == 0 or labels.device.type == "cpu":  # on a GPU this waits for the device
            check_labels(labels, self.num_classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the class, the net and what it was trained with beside the classes."""
        super().on_save_checkpoint(checkpoint)
        if self._auxiliary_options:
            checkpoint["lightning_tta"]["auxiliary"] = self._auxiliary_options
