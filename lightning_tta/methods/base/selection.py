"""Which parameters of a net a method learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from lightning_tta.backbones.norms import early_norm_parameters, norm_parameters
from lightning_tta.backbones.quantized import FORWARD_ONLY, has_quantized, is_quantized
from lightning_tta.errors import UnsupportedModelError


@dataclass
class Flags:
    """What a net's ``requires_grad`` flags mean; kept with the net as methods change them, and copied with it.

    Attributes:
        frozen: Names of the parameters that the user had frozen.
        learned: Names of those that a method lets learn; it freezes all others.
    """

    frozen: frozenset[str]
    learned: set[str] = field(default_factory=set)


@dataclass
class Choice:
    """What a method is to learn in the place of what it selects by itself; with the net until a method takes it up.

    Attributes:
        words: As of :func:`select_parameters`.
        names: Of parameters besides.
        finish: Makes a net that was adapted so as plain as it can be, in place; a function of a module.
        added: Names of the parameters that the net has got for it.
        used: Whether a method has taken it up.
    """

    words: tuple[str, ...]
    names: tuple[str, ...]
    finish: Callable[[nn.Module], None]
    added: tuple[str, ...] = ()
    used: bool = False


def choice_of(model: nn.Module) -> Choice | None:
    """The choice that was made for a net, if one was."""
    choice = model.__dict__.get("_tta_choice")
    return choice if isinstance(choice, Choice) else None


def take_choice(model: nn.Module) -> Choice | None:
    """The choice that was made for a net, which is the method's from here on."""
    choice = choice_of(model)
    model.__dict__.pop("_tta_choice", None)
    return choice


def set_choice(model: nn.Module, choice: Choice) -> Choice:
    """Keep a choice with the net."""
    model.__dict__["_tta_choice"] = choice
    return choice


def select_chosen(
    model: nn.Module, choice: Choice, frozen_fraction: float, frozen: frozenset[str]
) -> dict[str, nn.Parameter]:
    """The parameters that were chosen, by name."""
    choice.used = True
    chosen: dict[str, nn.Parameter] = {}
    for word in choice.words:
        chosen |= select_parameters(model, word, frozen_fraction, frozen)
    return chosen | {name: model.get_parameter(name) for name in choice.names}


def read_flags(model: nn.Module) -> Flags:
    """Which parameters of a net the user froze: those that require no gradient, in a net of which others do.

    A net all of whose parameters are frozen is one for inference, which says nothing about any of them. In a net that
    was adapted before, and whose flags the user has not touched since, the answer is what it was then.
    """
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = model.__dict__.get("_tta_flags")
    if isinstance(before, Flags) and before.learned == learn:
        frozen = before.frozen
    else:
        frozen = frozenset(name for name, _ in model.named_parameters() if name not in learn) if learn else frozenset()
    flags = Flags(frozen)
    model.__dict__["_tta_flags"] = flags
    return flags


def select_parameters(
    model: nn.Module, what: str | re.Pattern[str], frozen_fraction: float, frozen: frozenset[str]
) -> dict[str, nn.Parameter]:
    """Parameters by name, see :meth:`~lightning_tta.methods.base.method.TTAMethod.select`; ``frozen`` are left out."""
    if what == "norm":
        chosen = norm_parameters(model)
    elif what == "early_norm":
        chosen = early_norm_parameters(model, frozen_fraction)
    else:
        pattern = re.compile(r"(?s).*" if what == "all" else what)
        named = ((name, p) for name, p in model.named_parameters() if not is_quantized(p))
        chosen = {name: p for name, p in named if p.is_floating_point() and pattern.fullmatch(name)}
        if what == "all":  # the mean and std that normalise pixels are parameters in some nets, and no weights
            chosen = {name: p for name, p in chosen.items() if name.rpartition(".")[2] not in ("mean", "std")}
    free = {name: parameter for name, parameter in chosen.items() if name not in frozen}
    if not free:
        reason = (
            f"all {len(chosen)} parameters that it would learn are frozen (requires_grad=False), while others of the "
            "net are not. Call requires_grad_() on those that may adapt, before the method is made"
            if chosen
            else f"the net has no parameter whose name matches {what!r}, or only quantised ones. A quantised net runs "
            f"with a method without gradients ({FORWARD_ONLY})"
            if has_quantized(model)
            else f"the net has no parameter whose name matches {what!r}"
        )
        raise UnsupportedModelError(f"{type(model).__name__} has nothing to adapt here: {reason}.")
    return free
