"""The base of data modules whose images have targets, of pixels or values, in the place of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_tta.data.augmentations import Augmentation
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import CLEAN, FunctionSetName, corruption_names
from lightning_tta.data.domain_names import expand_domains, split_severity
from lightning_tta.data.images import StackedImages
from lightning_tta.errors import ConfigError, check_choice

MOVING = frozenset({"elastic", "rotate", "shear", "elastic_transform"})
"""Corruptions that move pixels: the masks and values of clean images are not those of what comes out."""
STREAMS = ("iid", "continual", "gradual", "mixed", "ordered", "recurring")
"""Kinds of stream that order by no label."""


class TargetImages(StackedImages):
    """Images in memory with their targets.

    Args:
        pixels: uint8 (N, C, H, W).
        values: Masks int64 (N, H, W), or values float32 (N, D).
    """

    has_targets = True

    def __init__(self, pixels: Tensor, values: Tensor) -> None:
        super().__init__(pixels, torch.full((len(pixels),), -1))
        self.values = values

    def targets(self, positions: Tensor) -> Tensor:
        """Targets of several images."""
        return self.values[positions]


class DenseData(ShiftedDataModule):
    """Images with masks, or with values: to train a source on, and as a stream of shifted test images.

    As :class:`~lightning_tta.ShiftedDataModule`, but batches have ``target`` in the place of ``label``: masks int64
    (B, H, W), below 0 where a pixel does not count, or values float32 (B, D), NaN where one is not known. Batches whose
    images have none lack it. Corruptions that move pixels (``elastic``, ``rotate``, ``shear``, ``elastic_transform``)
    are left out of the groups. Training images are not augmented.

    Args:
        stream: ``iid``, ``continual``, ``gradual``, ``mixed``, ``ordered`` or ``recurring``: those that sort by no
            label.
        domains: As there, without corruptions that move pixels.
        val_domains: The same.
        function_set: As there.
        **kwargs: Batch sizes, severity, seeds: the other arguments of :class:`~lightning_tta.ShiftedDataModule`.

    Raises:
        ConfigError: On any wrong value, before data is read.
    """

    task: ClassVar[str]
    has_labels = False

    def __init__(
        self,
        *,
        stream: Literal["iid", "continual", "gradual", "mixed", "ordered", "recurring"] = "iid",
        domains: list[str] | None = None,
        val_domains: list[str] | None = None,
        function_set: FunctionSetName = "builtin",
        **kwargs: Any,
    ) -> None:
        check_choice("stream", stream, STREAMS)
        check_choice("function_set", function_set, ("builtin", "imagenet_c", "published"))
        if kwargs.get("dirichlet") is not None:
            raise ConfigError("dirichlet orders images by labels, and these have none. Leave it out.")
        natural = self.natural_names()
        names = _still("domains", domains, natural, function_set)
        if names is None and not natural and not self.own_images:
            names = [name for name in corruption_names(function_set) if name not in MOVING]
        validation = _still("val_domains", val_domains, [], function_set)
        super().__init__(stream=stream, domains=names, val_domains=validation, function_set=function_set, **kwargs)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of pixels, in the order of the logits; empty of values."""
        return []

    def augmentation(self) -> Augmentation | None:
        """None: what moves an image would have to move its mask."""
        return None


def _still(option: str, names: Sequence[str] | None, natural: list[str], function_set: str) -> list[str] | None:
    """Names of domains with groups written out, without corruptions that move pixels.

    Raises:
        ConfigError: If one of those is named itself.
    """
    if names is None:
        return None
    given = list(names)
    expanded = expand_domains(given, natural, function_set)
    moving = [name for name in expanded if name not in (*natural, CLEAN) and split_severity(name)[0] in MOVING]
    if wrong := [name for name in moving if name in given]:
        raise ConfigError(
            f"{option}: {', '.join(wrong)} moves pixels, so that masks and values of the clean images would be wrong. "
            f"Leave out {', '.join(sorted(MOVING))}."
        )
    return [name for name in expanded if name not in moving]
