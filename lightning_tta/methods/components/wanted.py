"""What users ask for in a word, or in a dict of a kind and its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lightning_tta.errors import ConfigError, check_choice, did_you_mean

Wanted = str | Mapping[str, Any]
"""A word, or a dict of ``kind`` and its options."""


def listed(wanted: Wanted | Sequence[Wanted] | None) -> list[Wanted]:
    """What a list holds; one thing alone; or nothing, of ``None``. Dicts are copies."""
    if wanted is None:
        return []
    items = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    return [dict(item) if isinstance(item, Mapping) else item for item in items]


def read(wanted: Wanted, option: str, kinds: Mapping[str, Callable[..., Any]]) -> tuple[str, dict[str, Any]]:
    """The kind and its options.

    Args:
        wanted: What was given.
        option: Its name, for messages.
        kinds: What makes each kind, with the method or the net and the options as arguments.

    Raises:
        ConfigError: With what is allowed.
    """
    given = {"kind": wanted} if isinstance(wanted, str) else wanted
    kind = given.get("kind") if isinstance(given, Mapping) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{option} must be a word, or a dict with 'kind' and its options; got {wanted!r}.")
    if kind not in kinds:
        raise ConfigError(f"Unknown {option} {kind!r}.{did_you_mean(kind, kinds)} Available: {', '.join(kinds)}.")
    options = {name: value for name, value in given.items() if name != "kind"}
    check_options(options, f"{option} {kind!r}", kinds[kind])
    return kind, options


def check_options(options: Collection[str] | Mapping[str, Any], owner: str, maker: Callable[..., Any]) -> None:
    """Refuse options that a maker, whose first argument is the method or the net, does not take.

    Raises:
        ConfigError: With those that it takes.
    """
    parameters = inspect.signature(maker).parameters
    allowed = [name for name in parameters if name not in ("method", "net")]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ConfigError(
            f"{owner} has no option {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], allowed)} Its options: "
            f"{', '.join(allowed) or 'none'}."
        )
    for name, value in options.items() if isinstance(options, Mapping) else ():
        if parameters[name].annotation in (bool, "bool"):  # a text such as "false" would count as true
            check_choice(name, value, (True, False))
