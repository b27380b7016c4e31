"""The optimizers a method may use: torch's fused ones, whose state is fixed from the start and whose step is masked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_tta.errors import ConfigError, check_choice, check_range

OptimizerName = Literal["sgd", "nesterov", "adam", "adamw"]


def make_optimizer(
    kind: OptimizerName, parameters: Iterable[Tensor], lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> Optimizer:
    """An optimizer whose groups keep the given rate as ``initial_lr`` and whose moments exist, as zeros.

    Zeros are what torch's own start from, so the steps are the same.

    Args:
        kind: ``sgd``; ``nesterov``: the same with Nesterov's momentum; ``adam`` or ``adamw``.
        parameters: What it steps.
        lr: Learning rate, >= 0.
        momentum: SGD's, or Adam's first beta (the second is 0.999), in [0, 0.9999]; of ``nesterov`` above 0.
        weight_decay: >= 0.

    Raises:
        ConfigError: If an argument is out of range, or Adam is to learn float16 weights.
    """
    check_choice("optimizer", kind, ("sgd", "nesterov", "adam", "adamw"))
    check_range("lr", lr, 0)
    check_range("momentum", momentum, 0, 0.9999, low_open=kind == "nesterov")
    check_range("weight_decay", weight_decay, 0)
    optimizer: Optimizer
    if kind in ("sgd", "nesterov"):
        nesterov = kind == "nesterov"
        optimizer = SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    else:
        family = Adam if kind == "adam" else AdamW
        optimizer = family(parameters, lr=lr, betas=(float(momentum), 0.999), weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
        for parameter in group["params"]:
            check_precision(optimizer, parameter.dtype)
            optimizer.state[parameter].update(_moments(kind, momentum, parameter))
    return optimizer


def _moments(kind: OptimizerName, momentum: float, parameter: Tensor) -> dict[str, Tensor]:
    if kind in ("sgd", "nesterov"):
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)} if momentum else {}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # as torch has it, in any precision
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


@torch.no_grad()
def masked_step(
    optimizer: Optimizer, gradients: Sequence[Tensor | None], taken: Tensor, lr_factor: float = 1.0
) -> None:
    """One step, or none, without asking the host which.

    Calls torch's fused kernels themselves: ``optimizer.step()`` takes longer than they do, and Adam's asks CUDA whether
    a graph is being captured, which opens a context in a process that runs on the CPU.

    Args:
        optimizer: From :func:`make_optimizer`.
        gradients: Of its parameters, in order; where there is none, the parameter stays.
        taken: 0-dimensional, bool: whether parameters and moments change.
        lr_factor: Learning rates are ``initial_lr`` times this.
    """
    not_taken, remaining = (~taken).float(), iter(gradients)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor
        alike: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
        for parameter, gradient in zip(group["params"], remaining, strict=False):
            if gradient is None:
                continue
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)  # fused kernels walk through memory
            alike.setdefault((parameter.dtype, parameter.device), []).append((parameter, gradient))
        for pairs in alike.values():
            parameters, values = (list(tensors) for tensors in zip(*pairs, strict=True))
            _fused_step(optimizer, group, parameters, values, not_taken)


def _fused_step(
    optimizer: Optimizer, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], not_taken: Tensor
) -> None:
    """A step of parameters of one kind; moments move with them, and neither does where ``not_taken`` is 1."""
    states = [optimizer.state[parameter] for parameter in parameters]
    settings: dict[str, Any] = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
    settings |= {"grad_scale": None, "found_inf": not_taken}  # the interface of torch's gradient scaling
    if isinstance(optimizer, SGD):
        buffers = [state["momentum_buffer"] for state in states] if group["momentum"] else []
        more = {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        torch._fused_sgd_(parameters, gradients, buffers, **settings, **more, is_first_step=False)
        return
    first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    step: Any = torch._fused_adamw_ if isinstance(optimizer, AdamW) else torch._fused_adam_
    settings |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"], "amsgrad": False}
    torch._foreach_add_(steps, 1)
    step(parameters, gradients, first, second, [], steps, **settings)
    torch._foreach_sub_(steps, [not_taken] * len(steps))


def check_precision(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Refuse Adam on float16: its second moments and its epsilon vanish there, and a step of 0 / 0 ends all.

    Any learning of 16-bit weights is warned of: a step of less than half their spacing is rounded away.

    Raises:
        ConfigError: With what to use.
    """
    if dtype == torch.float16 and "betas" in optimizer.defaults:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot learn float16 weights: its second moments are too small for them, and "
            "the weights become NaN. Use optimizer='sgd', or keep the net in float32, with torch.autocast for speed, "
            "or in bfloat16."
        )
    if dtype in (torch.float16, torch.bfloat16):
        warnings.warn(
            f"The method is to learn {str(dtype).removeprefix('torch.')} weights. A step smaller than "
            f"{torch.finfo(dtype).eps / 2:.1g} of a weight's size is rounded away there; at small learning rates (SGD "
            "at 2.5e-4, Adam at 1e-4) most steps are, and the net hardly adapts. Keep the net in float32 and let it "
            "compute in 16 bits: adapt(net.float(), ..., precision='bf16').",
            stacklevel=2,
        )
