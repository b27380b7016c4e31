"""Passes of a net with other values of its parameters, and of nets that compute parts of a pass twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils import checkpoint


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Inference mode off and gradients on, as within ``torch.inference_mode(False)``.

    That guard restores gradients a second time when it is collected. After an interrupt at the wrong moment this comes
    late, and leaves them off for the whole process; so it is taken only where it is needed.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()


def names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every place of each parameter, by name; a shared one has several, one in a module held twice has the first."""
    places: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append(name)
    return places


def call_with(model: nn.Module, weights: Mapping[nn.Parameter, Tensor], *args: Any) -> Any:
    """A pass with other values in place of some parameters, in all places where these are.

    torch's own ``functional_call`` leaves the new values in a module that the net holds under two names.
    """
    places = names_by_parameter(model)
    values = {name: value for parameter, value in weights.items() for name in places[parameter]}
    return functional_call(model, values, args, tie_weights=False)


class _Recomputed:
    """In place of torch's reentrant checkpoint: the one that knows of inputs without gradient and of autograd.grad."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


class _Direct:
    """In its place where nothing may be computed again."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What torch's checkpoint does before and after the function that it calls: here nothing."""
    yield


def _group_norm(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """In place of torch's: backward on a CPU crashes the process if x is channels-last and needs no gradient itself."""
    if x.device.type == "cpu" and torch.is_grad_enabled():  # nobody knows yet whether x will be asked for its gradient
        x = x.contiguous()
    y: Tensor = _ORIGINAL_GROUP_NORM(x, *args, **options)
    return y


_ORIGINAL_GROUP_NORM: Any = functional.group_norm
_GROUP_NORM_CRASHES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)  # 2.11, 2.12, 2.13
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
_ACTIVE: list[bool] = []  # whether each context that is open, in any thread, forbids to compute again
_LOCK = threading.Lock()
_ORIGINALS = {name: getattr(checkpoint, name, None) for name in ("CheckpointFunction", *_GENERATORS)}


def _install() -> None:
    direct = any(_ACTIVE)
    replaced: dict[str, Any] = {"CheckpointFunction": _Direct if direct else _Recomputed} if _ACTIVE else {}
    if direct:
        replaced |= dict.fromkeys(_GENERATORS, _nothing)
    for name, original in _ORIGINALS.items():
        if original is not None:
            setattr(checkpoint, name, replaced.get(name, original))
    if _GROUP_NORM_CRASHES:
        functional.group_norm = _group_norm if _ACTIVE else _ORIGINAL_GROUP_NORM  # type: ignore[assignment]


@contextmanager
def safe_checkpoints(*, recompute: bool = True) -> Iterator[None]:
    """While active, layers under ``torch.utils.checkpoint`` give the gradients that they give without it.

    Reentrant checkpoints lose them where the input has none, and refuse ``autograd.grad``: the other kind runs instead.
    GroupNorm, too, gives its gradients for any layout of its input, with a torch where it crashes otherwise.

    Args:
        recompute: Whether parts of a pass may be computed again in the backward pass, which saves memory. Not where the
            net has other values by then: ``False`` keeps all activations.
    """
    with _LOCK:
        _ACTIVE.append(not recompute)
        _install()
    try:
        yield
    finally:
        with _LOCK:
            _ACTIVE.remove(not recompute)
            _install()
