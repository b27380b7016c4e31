"""The classes of the data beside the logits of the net: compared before a run, with their names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_tta.errors import ConfigError, DataError

_NAMED = 5


def class_names_of(trainer: Trainer) -> Sequence[str]:
    """Names of the classes of the Trainer's data module, in the order of the labels; empty where it has none."""
    return list(getattr(getattr(trainer, "datamodule", None), "class_names", None) or ())


def count_logits(net: nn.Module) -> int | None:
    """Number of logits of a net: what it says itself, else the outputs of its only linear layer.

    ``None`` where it cannot be told without running the net: any of several linear layers may be the last one.
    """
    known = getattr(net, "num_classes", None)
    if isinstance(known, int) and known > 0:
        return known
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return linear[0].out_features if len(linear) == 1 else None


def check_class_counts(
    names: Sequence[str],
    logits: int | None,
    net_names: Sequence[str] | None = None,
    option: str = "",
    *,
    of_pixels: bool = False,
) -> None:
    """Compare the classes ``names`` of the data with those of a net; nothing where either is not known.

    Warns where there are logits for which the data has no class, and where the net calls a class otherwise.

    Args:
        names: Names of the data's classes in the order of the labels.
        logits: Number of logits K of the net.
        net_names: Names of the net's classes, in the order of the logits.
        option: The option that sets K, for the message.
        of_pixels: Whether they are classes of pixels, from which a net cannot be cut.

    Raises:
        ConfigError: If the data has more classes than the net has logits.
    """
    if not names or not logits:
        return
    count = f"{len(names)} classes, {logits} logits"
    if len(names) > logits:
        remedy = f" Set {option} {len(names)}, or take a net that was trained on them." if option else ""
        raise ConfigError(
            f"{count}: the data has classes for which the net has no logit. Classes: {_some(names)}; without a logit: "
            f"{_some(names[logits:])}.{remedy or ' Take a net that was trained on them.'}"
        )
    moved = [n for n, name in enumerate(names) if net_names and name in net_names and net_names[n] != name]
    if moved and net_names:
        n = moved[0]
        warnings.warn(
            f"{len(moved)} classes have another number in the data than in the net: label {n} is {names[n]!r} in the "
            f"data and {net_names[n]!r} in the net, so the accuracy is wrong. Classes are numbered by the sorted names "
            "of their folders: give the data the same folders as in training, empty ones included.",
            stacklevel=3,
        )
    elif len(names) < logits:
        unused = _some(net_names[len(names) :]) if net_names else f"{logits - len(names)}"
        remedy = "Name all classes of the net" if of_pixels else "Cut the net to the classes it needs: --model.classes"
        remedy += f": --data.classes {logits}." if of_pixels else " [0, 1, ...]."
        warnings.warn(
            f"{count}: logits without a class in the data ({unused}) count as wrong where they are the largest. "
            f"Classes: {_some(names)}. {remedy}",
            stacklevel=3,
        )


def check_labels(labels: Tensor, logits: int) -> None:
    """Raise :class:`~lightning_tta.errors.DataError` if a label (B,) is none of the K ``logits``; -1 is not known."""
    highest = int(labels.max()) if labels.numel() else -1
    if highest >= logits:
        raise DataError(
            f"An image has the label {highest}, but the net has {logits} logits (labels 0 to {logits - 1}). Take a net "
            "with a logit for each class (num_classes), or leave the labels out."
        )


def _some(names: Sequence[str]) -> str:
    more = f", ... and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more
