"""What every method takes beside its own options: ``statistics``, ``prior``, ``refine``, ``window``, ``reservoir``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components import priors, refinements, reservoir, statistics

Wanted = str | Mapping[str, Any]
"""A word, or a dict of ``kind`` and its options."""

ADDITIONS: dict[str, Callable[[TTAMethod, Any], None]] = {
    "statistics": statistics.choose,
    "reservoir": reservoir.choose,
    "prior": priors.choose,
    "refine": refinements.choose,
    "window": TTAMethod.slide,
}
"""By the option's name, in the order in which they are put on a method: a reservoir remembers what is declared before
it, so not what a prior has learned, which is of the whole stream; what refines sees predictions with the prior in them.
"""


def add(method: TTAMethod, **wanted: Wanted | int | None) -> None:
    """Put what is wanted on a method, before its first batch; its ``options`` say it from then on.

    Args:
        method: The method.
        **wanted: By the names of :data:`ADDITIONS`; ``None``: without.

    Raises:
        ConfigError: If a value is none of those allowed, or does not go with the method.
    """
    for name, put in ADDITIONS.items():
        value = wanted.get(name)
        if value is not None:
            put(method, value)
            method.options[name] = dict(value) if isinstance(value, Mapping) else value
