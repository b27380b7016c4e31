"""What every method takes beside its own: ``statistics``, ``prior``, ``refine``, ``window``, ``reservoir``, ``gate``.

And ``select``, of every method that learns by gradients: what learns.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_tta.errors import ConfigError, LightningTTAError, UnsupportedModelError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.task import plain_model
from lightning_tta.methods.components import adapters, gates, priors, refinements, reservoir, statistics
from lightning_tta.methods.components.wanted import Wanted, listed

ADDITIONS: dict[str, Callable[[TTAMethod, Any], None]] = {
    "statistics": statistics.choose,
    "reservoir": reservoir.choose,
    "prior": priors.choose,
    "refine": refinements.choose,
    "window": TTAMethod.slide,
    "gate": gates.choose,
}
"""By the option's name, in the order in which they are put on a method: a reservoir remembers what is declared before
it, so not what a prior has learned, which is of the whole stream; what refines sees predictions with the prior in them.
"""


OPTIONS = ("select", *ADDITIONS)
"""All of them by name; ``select`` changes the net before the method is made."""


def make_selecting(make: Callable[[nn.Module], TTAMethod], net: nn.Module, select: adapters.Select | None) -> TTAMethod:
    """A method around a net, which learns what ``select`` says.

    Args:
        make: Makes the method around the net.
        net: Is changed in place.
        select: See :mod:`~lightning_tta.methods.components.adapters`; ``None``: what the method learns by itself.

    Raises:
        ConfigError: If the method learns nothing by gradients, or what it learns cannot be another thing.
        UnsupportedModelError: If an adapter has no place in the net.
    """
    if select is None:
        return make(net)
    net = plain_model(net)  # so that what no method takes is refused before it is changed
    choice = adapters.choose(net, select)
    method = make(net)
    if not isinstance(method, TTAMethod):
        return method  # whoever asked for it says so
    if not choice.used:
        raise ConfigError(
            f"select={select!r}: '{method.name}' learns no parameters of the net, or none but its own. Leave select "
            "out, or use a method that learns by gradients, such as 'tent', 'eta', 'sar', 'deyo', 'cotta', 'memo'."
        )
    items = listed(select)
    method.options["select"] = items if len(items) > 1 else items[0]
    return method


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
            try:
                put(method, value)
            except ConfigError as error:
                if re.match(rf"(Unknown )?{name}\b", str(error)):
                    raise
                raise type(error)(f"{name}: {error}") from error  # what it is an option of
            method.options[name] = dict(value) if isinstance(value, Mapping) else value


OF_THE_NET = ("layer", "groups")
"""Options whose values only the net can tell to be right."""


def check(makers: Sequence[Callable[[nn.Module], TTAMethod]], **wanted: Wanted | int | None) -> None:
    """Refuse what no net would make right, by putting it on a method of a tiny net: before weights are loaded.

    Args:
        makers: Make the method around a net; the first that can is taken. None has to be able to.
        **wanted: As of :func:`add`.

    Raises:
        ConfigError: The same.
    """
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    method = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come with the net itself
        for make in makers:
            with suppress(LightningTTAError):
                method = make(net)
                break
        if method is not None:
            with suppress(UnsupportedModelError):
                add(method, **{name: _without(value, OF_THE_NET) for name, value in wanted.items()})


def _without(value: Wanted | int | None, names: Sequence[str]) -> Wanted | int | None:
    return {k: v for k, v in value.items() if k not in names} if isinstance(value, Mapping) else value
