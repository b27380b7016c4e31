"""Which parameters of a net a method learns."""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

from torch import nn

from lightning_tta.backbones.norms import early_norm_parameters, norm_parameters
from lightning_tta.errors import UnsupportedModelError

_FROZEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def frozen_by_the_user(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that do not require a gradient, in a net of which others do.

    A net all of whose parameters are frozen is one for inference, which says nothing about any of them. The answer is
    kept with the net, as methods change these flags and a net may be wrapped twice.
    """
    if model not in _FROZEN:
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()}
        learn = any(p.requires_grad for p in model.parameters())
        _FROZEN[model] = frozenset(frozen) if learn else frozenset()
    return _FROZEN[model]


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
        named = model.named_parameters()
        chosen = {name: p for name, p in named if p.is_floating_point() and pattern.fullmatch(name)}
    free = {name: parameter for name, parameter in chosen.items() if name not in frozen}
    if not free:
        reason = (
            f"all {len(chosen)} parameters that it would learn are frozen (requires_grad=False), while others of the "
            "net are not. Call requires_grad_() on those that may adapt, before the method is made"
            if chosen
            else f"the net has no parameter whose name matches {what!r}"
        )
        raise UnsupportedModelError(f"{type(model).__name__} has nothing to adapt here: {reason}.")
    return free
