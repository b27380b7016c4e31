"""The methods. A file ``foo_bar.py`` with a class ``FooBar`` here is a method named "foo_bar"; nothing to register."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import pkgutil
from typing import Any

import torch
from torch import nn

from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.method import TTAMethod

__all__ = ["TTAMethod", "adapt", "available_methods", "create_method"]


def _discover() -> dict[str, type[TTAMethod]]:
    found: dict[str, type[TTAMethod]] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        wanted = info.name.replace("_", "")
        matches = [
            member
            for name, member in vars(module).items()
            if name.lower() == wanted and inspect.isclass(member) and issubclass(member, TTAMethod)
        ]
        if len(matches) != 1:
            raise ImportError(f"{module.__name__} must define one TTAMethod named like the file, '{info.name}'.")
        found[info.name] = matches[0]
    return found


_METHODS = _discover()
for _method in _METHODS.values():  # so that `lightning_tta.methods.Tent` works
    globals()[_method.__name__] = _method
    __all__.append(_method.__name__)


def available_methods() -> dict[str, type[TTAMethod]]:
    """Method classes by name (the file names in this package), alphabetically."""
    return dict(_METHODS)


def create_method(name: str, model: nn.Module, **options: Any) -> TTAMethod:
    """Wrap ``model`` (in place) with a method.

    Args:
        name: One of :func:`available_methods`.
        model: Pixels in [0, 1] -> logits.
        **options: Arguments of the method's class.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is out of range.
        UnsupportedModelError: If the method cannot run on this net.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"Unknown method {name!r}.{hint} Available: {', '.join(_METHODS)}.")
    allowed = [p for p in inspect.signature(_METHODS[name]).parameters if p != "model"]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ConfigError(
            f"Method '{name}' has no option {', '.join(map(repr, unknown))}. "
            f"Its options: {', '.join(allowed) or 'none'}."
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    with torch.inference_mode(False):  # what is created under inference_mode could not be adapted
        return _METHODS[name](model, **options)


def adapt(model: nn.Module, method: str = "zerosiam", *, in_place: bool = False, **options: Any) -> TTAMethod:
    """Wrap a classifier so that it adapts to the unlabelled images it predicts.

    Args:
        model: Any classifier: pixels (B, C, H, W) in [0, 1] -> logits (B, K). Normalisation belongs inside it.
        method: Name of a method, see :func:`lightning_tta.available_methods`.
        in_place: Adapt ``model`` itself. By default a copy is adapted and ``model`` stays as it is.
        **options: Arguments of the method's class, such as ``lr``.

    Returns:
        A module with ``method(images) -> logits``, ``reset()``, complete ``state_dict()``, ``stats``.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is out of range.
        UnsupportedModelError: If the method cannot run on this net.
    """
    if not in_place and isinstance(model, nn.Module):
        with torch.inference_mode(False):  # a copy made under inference_mode could not be adapted
            model = copy.deepcopy(model)
    return create_method(method, model, **options)
