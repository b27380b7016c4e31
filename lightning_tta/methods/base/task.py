"""What a method's input is, and which of its samples are usable: the one look at a batch that asks the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import InputError, LightningTTAError, UnsupportedModelError

_ADVICE = "Give a float batch (B, C, H, W) with pixels in [0, 1]; normalisation is inside the net."


class Task(Protocol):
    """The kind of input: images today; tokens or pixels another day."""

    def usable(self, x: Tensor) -> Tensor:
        """Refuse what is no input; which samples (B,) can be adapted on and predicted, bool, on the host."""

    def stand_in(self, x: Tensor) -> Tensor:
        """One sample like those of ``x``, for a process that has none of its own."""

    def logits(self, output: object) -> Tensor:
        """Logits (B, ..., K) in what the net returns."""


class Images:
    """Pixels (B, C, H, W) in [0, 1]; logits (B, K)."""

    def usable(self, x: Tensor) -> Tensor:
        """Whether each image is finite.

        Raises:
            InputError: If this is no batch of floating-point images, or pixels are far outside [0, 1] (resampling may
                overshoot a little, so below -1 or above 2).
        """
        check_shape(x)
        low, high = torch.stack(torch.aminmax(x.detach().flatten(1), dim=1)).cpu().double()  # NaN wins in both
        finite = torch.isfinite(low) & torch.isfinite(high)
        if bool((((low < -1) | (high > 2)) & finite).any()):
            raise InputError(
                f"Pixels must be in [0, 1]; this batch spans [{low[finite].min():.3g}, {high[finite].max():.3g}] "
                f"(0-255, or normalised already?). {_ADVICE}"
            )
        return finite

    def stand_in(self, x: Tensor) -> Tensor:
        """One grey image."""
        return x.new_full((1, *x.shape[1:]), 0.5)

    def logits(self, output: object) -> Tensor:
        """Logits (B, K)."""
        return as_logits(output)


def check_shape(images: object) -> None:
    """Refuse what is no batch (B, C, H, W) of floating-point images.

    Raises:
        InputError: With what was given.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not images.numel():
        what = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Not a batch of images: {what}. {_ADVICE}")


def fill(logits: Tensor, usable: Tensor) -> Tensor:
    """Logits (B, ..., K) from those of the usable samples; the other rows are zero, the uniform distribution."""
    if len(logits) == len(usable):
        return logits
    filled = logits.new_zeros(len(usable), *logits.shape[1:])
    filled[usable.to(logits.device)] = logits
    return filled


def plain_model(model: nn.Module) -> nn.Module:
    """The model itself where it, or a module in it, is compiled: that graph would not see the statistics change.

    Raises:
        UnsupportedModelError: If parameters have no values (device ``meta``), or a module is a ScriptModule.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is, or contains, a scripted or traced module, whose layers cannot be adapted. "
            "Adapt the module that it was made from."
        )
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        warnings.warn("A compiled model is adapted through its original module, uncompiled.", stacklevel=5)
        model = cast(nn.Module, model._modules.get("_orig_mod", model))
        for module in model.modules():
            module._compiled_call_impl = None
            for name, child in module.named_children():
                module._modules[name] = child._modules.get("_orig_mod", child)
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise UnsupportedModelError(
            f"Parameter '{empty}' of {type(model).__name__} has no values (device 'meta'). Create the model on a real "
            "device, or load its weights first (to_empty, then load_state_dict), and adapt it after that."
        )
    return model


@contextmanager
def explained(model: nn.Module, x: Tensor) -> Iterator[None]:
    """An error of the net that the input causes becomes an :class:`~lightning_tta.errors.InputError`.

    The input causes an error if the plain net, asked again, refuses it as well. Any other error is passed on. Costs
    nothing unless something is raised.
    """
    try:
        yield
    except (LightningTTAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        device = next((p.device for p in model.parameters()), x.device)
        if device != x.device:
            raise InputError(
                f"The images are on {x.device}, the net on {device}. Move one of them: images.to('{device}'), or "
                f"method.to('{x.device}')."
            ) from error
        refusal = _refusal(model, x)
        if refusal is None:
            raise
        raise InputError(
            f"The net cannot take {tuple(x.shape)} images (B, C, H, W): {refusal}. Give the channels and the size "
            "that it was trained on; check both, and resize or drop the frame."
        ) from error


@torch.no_grad()
def _refusal(model: nn.Module, x: Tensor) -> str | None:
    try:
        model(x.to(float_dtype(model)))
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


@contextmanager
def with_gradients(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Gradients on, whatever the caller's mode; inference tensors cannot be saved for backward, so clone them."""
    with torch.inference_mode(False), torch.enable_grad(), fresh_casts():
        x = x.clone() if x.is_inference() else x.detach()
        yield x.to(dtype)


@contextmanager
def fresh_casts() -> Iterator[None]:
    """While active, autocast casts weights anew in each pass: the copies that it keeps miss what a step changes."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def float_dtype(model: nn.Module) -> torch.dtype:
    """Of the net's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
