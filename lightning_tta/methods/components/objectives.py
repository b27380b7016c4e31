"""Objectives per sample that entropy methods can minimise, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_tta.errors import check_choice
from lightning_tta.losses import come_entropy, entropy

Objective = Callable[[Tensor], Tensor]
"""Logits (..., K) -> a loss (...) of each sample, in nats."""

EntropyName = Literal["softmax", "come"]
OBJECTIVES: dict[str, Objective] = {"softmax": entropy, "come": come_entropy}


def find_objective(entropy: EntropyName | Objective) -> Objective:
    """The objective of a name: ``softmax``, the entropy of the prediction, or ``come``; a function is itself.

    Raises:
        ConfigError: If there is no such objective.
    """
    if callable(entropy):
        return entropy
    check_choice("entropy", entropy, tuple(OBJECTIVES))
    return OBJECTIVES[entropy]
