"""The classes of ImageNet nets, by the lists that timm ships: 1000 synsets, and the 200 of ImageNet-A and -R."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from numbers import Integral

from lightning_tta.errors import ConfigError, check_choice

SUBSETS = ("imagenet_a", "imagenet_r")


@cache
def _lines(name: str) -> tuple[str, ...]:
    text = (files("timm.data") / "_info" / name).read_text()
    return tuple(line.split()[0] for line in text.splitlines() if line.strip())


def imagenet_synsets() -> list[str]:
    """The 1000 synsets (``n01440764``, ...) in the order of the logits."""
    return list(_lines("imagenet_synsets.txt"))


def class_subset(classes: Sequence[int] | str | None, option: str) -> list[int] | None:
    """Positions of some classes among the logits.

    Args:
        classes: The positions themselves, or ``imagenet_a`` or ``imagenet_r`` for their 200 of 1000; ``None``: all.
        option: The option's name, for messages.

    Raises:
        ConfigError: If there are none, one is named twice or negative, or the name is unknown.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        check_choice(option, classes, SUBSETS)
        return [int(line) for line in _lines(f"{classes}_indices.txt")]
    positions = list(classes) if isinstance(classes, Iterable) else []
    whole = all(isinstance(each, Integral) and each >= 0 for each in positions)
    if not positions or not whole or len(set(positions)) < len(positions):
        raise ConfigError(f"{option} must name different classes, from 0, or be one of {SUBSETS}; got {classes!r}.")
    return positions
