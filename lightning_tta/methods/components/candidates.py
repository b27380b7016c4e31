"""Methods to choose among, each on a copy of a net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_tta.backbones.norms import batch_norm_layers, norm_layers
from lightning_tta.errors import ConfigError, UnsupportedModelError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.wanted import Wanted, listed

Make = Callable[..., TTAMethod]
"""Called with a net, the name of a method, and its options."""

MARKOV, BOTH = {"prior": "markov"}, {"prior": "markov", "refine": "lame"}
DEFAULT: dict[str, list[dict[str, Any]]] = {
    "batch": [
        {"method": "zerosiam"},
        {"method": "zerosiam", "statistics": "auto", **MARKOV},
        {"method": "norm", "statistics": "auto", **BOTH},
    ],
    "other": [{"method": "zerosiam"}, {"method": "zerosiam", **MARKOV}, {"method": "source", **BOTH}],
    "none": [{"method": "t3a"}, {"method": "lame"}, {"method": "source", **BOTH}],
}
"""By the kind of the net's norm layers: three that differ in what they suit: shuffled streams, any, sorted by class."""


def make_candidates(model: nn.Module, wanted: Wanted | Sequence[Wanted], make: Make) -> list[tuple[str, TTAMethod]]:
    """The methods wanted, in order, each with its name and options in words.

    Args:
        model: Is left alone; each method gets a copy.
        wanted: Names of methods, or dicts of ``method`` and its options; or ``default``: of :data:`DEFAULT`, those that
            run on the net.
        make: :func:`lightning_tta.adapt`.

    Raises:
        ConfigError: If there is none, or one is neither, or names no method, or has a wrong option.
        UnsupportedModelError: If a method does not run on the net; of ``default``, if none does.
    """
    if wanted == "default":
        return _default(model, make)
    chosen = [_read(each) for each in listed(wanted)]
    if not chosen:
        raise ConfigError("candidates must name at least one method beside the source; got none.")
    return [(_label(options), _made(model, options, make)) for options in chosen]


def _label(options: Mapping[str, Any]) -> str:
    words = ", ".join(f"{name} {value}" for name, value in options.items() if name != "method")
    return f"{options['method']} ({words})" if words else str(options["method"])


@torch.no_grad()
def has_strayed(method: TTAMethod) -> bool:
    """Whether the parameters that a method learns are farther from the source than those are long. Asks the device.

    Norm parameters under a usual rate move by a few percent. That says so of a method alone, whatever it predicts: with
    an absurd rate it may be sure of all classes alike, and nobody but the source is there to outvote it.
    """
    learned = {name: tensor for name, tensor in method.adaptable.items() if isinstance(tensor, nn.Parameter)}
    if not learned:
        return False
    sources = [method.source_value(name).expand_as(tensor) for name, tensor in learned.items()]
    moved = torch.stack([(now - source).norm() for now, source in zip(learned.values(), sources, strict=True)]).norm()
    length = torch.stack([source.norm() for source in sources]).norm()
    return bool((moved > length) & (length > 0))


def _read(wanted: Wanted) -> dict[str, Any]:
    given = {"method": wanted} if isinstance(wanted, str) else wanted
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise ConfigError(
            "candidates must be names of methods, or dicts of 'method' and its options such as {'method': 'tent', "
            f"'lr': 1e-3, 'statistics': 'auto'}}, or 'default'; got {wanted!r}."
        )
    if given["method"].replace("_", "").lower() == "auto":
        raise ConfigError("candidates must be methods that adapt; 'auto' is no candidate of itself. Name others.")
    return dict(given)


def _made(model: nn.Module, options: Mapping[str, Any], make: Make) -> TTAMethod:
    try:
        return make(model, **options)
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(f"candidate '{options['method']}': {error}") from error


def _default(model: nn.Module, make: Make) -> list[tuple[str, TTAMethod]]:
    kind = "batch" if batch_norm_layers(model) else "other" if norm_layers(model) else "none"
    for each in dict.fromkeys((kind, "none")):
        methods = []
        for options in DEFAULT[each]:
            try:
                methods.append((_label(options), make(model, **options)))
            except UnsupportedModelError as error:
                refusal = error
        if methods:
            return methods
    raise refusal
