"""What surrounds every method's pass: checks of the input, gradients, counting, left-out images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lightning_tta.errors import InputError, LightningTTAError, UnsupportedModelError

_ADVICE = "Give a float batch (B, C, H, W) with pixels in [0, 1]; normalisation is inside the net."


def plain_model(model: nn.Module) -> nn.Module:
    """The model itself where it, or a part of it, is compiled: that graph would not see the statistics change.

    Raises:
        UnsupportedModelError: If parameters have no values (device ``meta``), or a part is a ScriptModule.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is, or contains, a scripted or traced module, whose layers cannot be adapted. "
            "Adapt the module that it was made from."
        )
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        warnings.warn("A compiled model is adapted through its original module, uncompiled.", stacklevel=4)
        model = cast(nn.Module, model._modules.get("_orig_mod", model))
        for module in model.modules():
            module._compiled_call_impl = None
            for name, part in module.named_children():
                module._modules[name] = part._modules.get("_orig_mod", part)
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise UnsupportedModelError(
            f"Parameter '{empty}' of {type(model).__name__} has no values (device 'meta'). Create the model on a real "
            "device, or load its weights first (to_empty, then load_state_dict), and adapt it after that."
        )
    return model


def check_shape(images: object) -> None:
    """Refuse what is no batch (B, C, H, W) of floating-point images.

    Raises:
        InputError: With what was given.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not images.numel():
        given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Not a batch of images: {given}. {_ADVICE}")


def check_images(images: Tensor) -> Tensor:
    """Whether each image of a batch (B, C, H, W) is finite, as a bool tensor (B,).

    Raises:
        InputError: If this is no batch of floating-point images, or pixels are far outside [0, 1] (resampling may
            overshoot a little, so below -1 or above 2).
    """
    check_shape(images)
    low, high = torch.aminmax(images.detach().flatten(1), dim=1)  # NaN wins in both
    finite = torch.isfinite(low) & torch.isfinite(high)
    if bool((((low < -1) | (high > 2)) & finite).any()):
        raise InputError(
            f"Pixels must be in [0, 1]; this batch spans [{low[finite].min():.3g}, {high[finite].max():.3g}] "
            f"(0-255, or normalised already?). {_ADVICE}"
        )
    return finite


@contextmanager
def explained(model: nn.Module, images: Tensor) -> Iterator[None]:
    """What the net itself says to the images, as an :class:`~lightning_tta.errors.InputError`.

    An error inside is the input's fault if the plain net, asked again, refuses the images as well; any other error,
    and want of memory, is passed on as it is. Costs nothing unless something is raised.
    """
    try:
        yield
    except (LightningTTAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        device = next((p.device for p in model.parameters()), images.device)
        if device != images.device:
            raise InputError(
                f"The images are on {images.device}, the net on {device}. Move one of them: images.to('{device}'), or "
                f"method.to('{images.device}')."
            ) from error
        says = _refusal(model, images)
        if says is None:
            raise
        raise InputError(
            f"The net cannot take {tuple(images.shape)} images (B, C, H, W): {says}. Give the channels and the size "
            "that it was trained on; check both, and resize or drop the frame."
        ) from error


@torch.no_grad()
def _refusal(model: nn.Module, images: Tensor) -> str | None:
    try:
        model(images.to(float_dtype(model)))
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


@contextmanager
def adapting(model: nn.Module, images: Tensor, counts: dict[str, int]) -> Iterator[Tensor]:
    """The images as the net wants them, gradients on; passes are counted, and the net's refusal explained."""
    with (
        explained(model, images),
        with_gradients(images, float_dtype(model)) as given,
        count_forwards(model, counts),
    ):
        yield given


@contextmanager
def with_gradients(images: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Gradients on, whatever the caller's mode; inference tensors cannot be saved for backward, so clone them."""
    with torch.inference_mode(False), torch.enable_grad(), fresh_casts():
        images = images.clone() if images.is_inference() else images.detach()
        yield images.to(dtype)


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


@contextmanager
def count_forwards(model: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """While active, every forward pass of ``model`` adds one to ``counts["forwards"]``."""

    def count(module: nn.Module, inputs: object) -> None:
        counts["forwards"] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def zero_rows(logits: Tensor, finite: Tensor) -> Tensor:
    """Logits (B, K) from those of the finite images alone; the other rows are zero, the uniform distribution."""
    if len(logits) == len(finite):
        return logits
    filled = logits.new_zeros(len(finite), logits.shape[1])
    filled[finite] = logits
    return filled
