"""What a method's input is, and which of its samples are usable: the one look at a batch that asks the host."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lightning_tta.backbones.copying import PARALLEL, check_initialized
from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.quantized import is_quantized
from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import DataError, InputError, LightningTTAError, UnsupportedModelError, WeightsError
from lightning_tta.losses import at_least_float32

_ADVICE = (
    "Give a float batch (B, C, H, W) with pixels in [0, 1]; normalisation belongs inside the net: "
    "lightning_tta.backbones.Backbone(net, mean, std)."
)
OVERSHOOT = 0.2  # of resampling and of noise, beyond [0, 1]: above it there is a warning


class Task(Protocol):
    """The kind of input: images, or tokens; and what of its predictions counts.

    Attributes:
        kind: Its word.
        in_chunks: Whether losses are computed from features, some rows of the logits at a time.
        additions: What a method over such input takes beside its own options and ``select``.
        source_batch: What a batch of source data is, in words.
    """

    kind: str
    in_chunks: bool
    additions: frozenset[str]
    source_batch: str

    def take_in_source(self, batch: Any, device: torch.device) -> Tensor:
        """The tensor that the net takes, on a device, of a batch of source data.

        Raises:
            DataError: If it is no such batch.
        """

    def take_in(self, x: Any) -> Tensor:
        """The tensor that the net takes, of what a user gives."""

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input for a net of this dtype."""

    def answer(self, logits: Tensor) -> Tensor:
        """The logits that the user gets."""

    def measures(self, logits: Tensor, x: Tensor) -> dict[str, Tensor] | None:
        """What ``stats`` says of the logits of a step; ``None``: :func:`~lightning_tta.metrics.collapse_measures`."""

    def rows(self, x: Tensor) -> Tensor | None:
        """Which of the predictions of a batch count (B, ...), bool; ``None``: all."""

    def usable(self, x: Tensor) -> Tensor:
        """Refuse what is no input; which samples (B,) can be adapted on and predicted, bool, on the host."""

    def stand_in(self, x: Tensor) -> Tensor:
        """One sample like those of ``x``, for a process that has none of its own."""

    def logits(self, output: object) -> Tensor:
        """Logits (B, ..., K) in what the net returns."""


class Images:
    """Pixels (B, C, H, W) in [0, 1]; logits (B, K)."""

    kind = "images"
    in_chunks = False
    additions = frozenset({"statistics", "reservoir", "prior", "refine", "window", "gate"})
    source_batch = "dicts with 'image' (B, C, H, W) in [0, 1]"

    def __init__(self) -> None:
        self._warned = False

    def take_in_source(self, batch: Any, device: torch.device) -> Tensor:
        """Its ``image``.

        Raises:
            DataError: If there is none.
        """
        if not isinstance(batch, Mapping) or not isinstance(batch.get("image"), Tensor):
            raise DataError(f"Source batches must be {self.source_batch}; got {found_in(batch)}.")
        image: Tensor = batch["image"]
        return image.to(device)

    def take_in(self, x: Any) -> Any:
        """What was given; :meth:`usable` looks at it."""
        return x

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In the net's dtype."""
        return x.to(dtype)

    def answer(self, logits: Tensor) -> Tensor:
        """In at least float32."""
        return at_least_float32(logits)

    def measures(self, logits: Tensor, x: Tensor) -> dict[str, Tensor] | None:
        """Those of logits (B, K), when they are asked for."""
        return None

    def rows(self, x: Tensor) -> None:
        """One prediction an image."""

    def usable(self, x: Tensor) -> Tensor:
        """Whether each image is finite.

        Raises:
            InputError: If this is no batch of floating-point images, or pixels are far outside [0, 1] (resampling may
                overshoot a little, so below -1 or above 2).
        """
        check_shape(x)
        extremes = torch.stack(torch.aminmax(x.detach().flatten(1), dim=1)).cpu()  # NaN wins in both
        lows, highs = extremes.tolist()
        if all(low >= -OVERSHOOT for low in lows) and all(high <= 1 + OVERSHOOT for high in highs):
            return torch.ones(len(x), dtype=torch.bool)
        low, high = extremes.double()
        finite = torch.isfinite(low) & torch.isfinite(high)
        if bool((((low < -1) | (high > 2)) & finite).any()):
            raise InputError(
                f"Pixels must be in [0, 1]; this batch spans [{low[finite].min():.3g}, {high[finite].max():.3g}] "
                f"(0-255, or normalised already?). {_ADVICE}"
            )
        if not self._warned and bool((((low < -OVERSHOOT) | (high > 1 + OVERSHOOT)) & finite).any()):
            self._warned = True
            warnings.warn(
                f"Pixels must be in [0, 1]; this batch spans [{low[finite].min():.3g}, {high[finite].max():.3g}]: are "
                f"the images normalised already? Views would cut them, and the net's input is another. {_ADVICE}",
                stacklevel=3,
            )
        return finite

    def stand_in(self, x: Tensor) -> Tensor:
        """One grey image."""
        return x.new_full((1, *x.shape[1:]), 0.5)

    def logits(self, output: object) -> Tensor:
        """Logits (B, K)."""
        return as_logits(output)


def found_in(batch: object) -> str:
    """What a batch is that is not what it should be, in words."""
    return f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__


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
    """The net itself: what is inside a compiled net, DataParallel or DistributedDataParallel, also where parts are.

    A compiled graph would not see the statistics change; replicas would not see what a method puts in place.

    Raises:
        UnsupportedModelError: If parameters have no values, a module is a ScriptModule, or the net does not take the
            image alone.
        WeightsError: If a parameter is not a number.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is, or contains, a scripted or traced module, whose layers cannot be adapted. "
            "Adapt the module that it was made from."
        )
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    if compiled:
        warnings.warn("A compiled model is adapted through its original module, uncompiled.", stacklevel=5)
    if compiled or any(isinstance(module, PARALLEL) for module in model.modules()):
        model = _unwrapped(model)
        for module in model.modules():
            module._compiled_call_impl = None
            for name, child in list(module._modules.items()):
                module._modules[name] = None if child is None else _unwrapped(child)
    check_initialized(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} was made under torch.inference_mode, so that its parameters can never learn. "
            "Make it outside of it, or let adapt() make a copy (in_place=False)."
        )
    _check_signature(model)
    _check_numbers(model)
    return model


def _unwrapped(module: nn.Module) -> nn.Module:
    while "_orig_mod" in module._modules or isinstance(module, PARALLEL):
        module = cast(nn.Module, module._modules.get("_orig_mod", module._modules.get("module")))
    return module


def _check_signature(model: nn.Module) -> None:
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError as error:
        raise _takes_no_image(model, str(error)) from None
    except ValueError:  # a forward without a signature: its first pass will show
        pass


def _takes_no_image(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be called with a batch of images alone: {reason}. Wrap it in a module whose "
        "forward(images) takes the images (B, C, H, W) alone, gives the net what else it needs, and returns the logits."
    )


@torch.no_grad()
def _check_numbers(model: nn.Module) -> None:
    named: dict[str, Tensor] = dict(model.named_parameters())
    for name, layer in batch_norm_layers(model).items():
        named |= dict(layer.named_buffers(name, recurse=False))
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    named = {name: t for name, t in named.items() if not is_quantized(t)}
    dense = {name: t for name, t in named.items() if t.dtype in usual and t.layout == torch.strided}
    wrong = {name: tensor.isnan().any() for name, tensor in dense.items()}
    devices = {flag.device for flag in wrong.values()}
    if any(bool(torch.stack([f for f in wrong.values() if f.device == device]).any()) for device in devices):
        name = next(name for name, flag in wrong.items() if flag)
        raise WeightsError(
            f"The weights contain NaN: '{name}' of {type(model).__name__}, so every prediction would be NaN. The file "
            "is damaged, or the training diverged: load other weights."
        )


@contextmanager
def explained(model: nn.Module, x: Tensor, *, has_run: bool = True) -> Iterator[None]:
    """An error of the net that the input causes becomes an :class:`~lightning_tta.errors.InputError`.

    The input causes an error if the plain net, asked again, refuses it as well. Any other error is passed on. Costs
    nothing unless something is raised.

    Args:
        model: The net.
        x: The images.
        has_run: Whether the net has taken images before. Otherwise an error that comes from how it is called is one of
            the net, not of this batch.
    """
    try:
        yield
    except (LightningTTAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        device = next((p.device for p in model.parameters()), x.device)
        if device != x.device:
            text = (
                f"The images are on {x.device}, the net on {device}. Move one of them: images.to('{device}'), or "
                f"method.to('{x.device}')."
            )
            raise InputError(text if x.is_floating_point() else text.replace("images", "tokens")) from error
        refusal = _refusal(model, x)
        if refusal is None:
            raise
        reason = (str(refusal).strip().splitlines() or [type(refusal).__name__])[0].rstrip(".")
        if not x.is_floating_point():
            if not has_run and isinstance(refusal, (TypeError, AttributeError, NotImplementedError)):
                raise UnsupportedModelError(
                    f"{type(getattr(model, 'net', model)).__name__} cannot be called with token ids alone: "
                    f"{type(refusal).__name__}: {reason}. Wrap it in a module whose forward(input_ids, attention_mask) "
                    "gives the net what else it needs, and returns logits (B, T, V)."
                ) from error
            raise InputError(
                f"The net cannot take token ids {(len(x), x.shape[-1])} (B, T): {reason}. Are there more tokens than "
                "it has positions for, or ids of another tokenizer?"
            ) from error
        if not has_run and (isinstance(refusal, _OF_THE_CALL) or _names_an_argument(model, reason)):
            raise _takes_no_image(model, f"{type(refusal).__name__}: {reason}") from error
        raise InputError(
            f"The net cannot take {tuple(x.shape)} images (B, C, H, W): {reason}. Give the channels and the size "
            "that it was trained on; check both, and resize or drop the frame."
        ) from error


_OF_THE_CALL = (TypeError, LookupError, AttributeError, NotImplementedError)  # torch tells shapes by RuntimeError


def _names_an_argument(model: nn.Module, reason: str) -> bool:
    """Whether an error speaks of another argument of the net's forward than its first one."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    except ValueError:
        return False
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and len(p.name) > 3]
    return any(re.search(rf"\b{re.escape(name)}\b", reason) for name in names)


@torch.no_grad()
def _refusal(model: nn.Module, x: Tensor) -> Exception | None:
    try:
        model(x.to(float_dtype(model) if x.is_floating_point() else x.dtype, copy=True))  # it may write to its input
    except Exception as error:
        return error
    return None


@contextmanager
def with_gradients(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Gradients on, whatever the caller's mode; inference tensors cannot be saved for backward, so clone them."""
    with outside_inference_mode(), torch.enable_grad(), fresh_casts():
        x = x.clone() if x.is_inference() else x.detach()
        yield x.to(dtype) if x.is_floating_point() else x


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
