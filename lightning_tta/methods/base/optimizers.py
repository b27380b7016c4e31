"""The optimizers a method may use, with one set of arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_tta.errors import ConfigError, check_choice, check_range

OptimizerName = Literal["sgd", "adam", "adamw"]


def make_optimizer(
    kind: OptimizerName, parameters: Iterable[Tensor], lr: float, *, momentum: float, weight_decay: float
) -> Optimizer:
    """An optimizer whose groups keep the given rate as ``initial_lr``; arguments as in ``TTAMethod.add_optimizer``.

    Raises:
        ConfigError: If an argument is out of range, or Adam is to learn float16 weights.
    """
    check_choice("optimizer", kind, ("sgd", "adam", "adamw"))
    check_range("lr", lr, 0)
    check_range("momentum", momentum, 0, 0.9999)
    check_range("weight_decay", weight_decay, 0)
    optimizer: Optimizer
    if kind == "sgd":
        optimizer = SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    else:
        family = Adam if kind == "adam" else AdamW
        optimizer = family(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
        for parameter in group["params"]:
            check_precision(optimizer, parameter.dtype)
    return optimizer


def check_precision(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Refuse Adam on float16: its second moments and its epsilon vanish there, and a step of 0 / 0 ends all.

    Raises:
        ConfigError: With what to use.
    """
    if dtype == torch.float16 and "betas" in optimizer.defaults:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot learn float16 weights: its second moments are too small for them, and "
            "the weights become NaN. Use optimizer='sgd', or keep the net in float32, with torch.autocast for speed, "
            "or in bfloat16."
        )
