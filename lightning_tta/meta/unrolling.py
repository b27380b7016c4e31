"""Steps of descent on a functional copy of a net's parameters that can be differentiated: of Meta-TTT and of PERK."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tta.backbones.quantized import FORWARD_ONLY
from lightning_tta.errors import UnsupportedModelError

Rate = Tensor | float
Rule = Callable[[int, Tensor, Tensor, Rate], Tensor]
"""A step of an optimizer: number of the group, its values, their gradient, the rate -> the new values."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that move together, as one tensor: a step is one operation, whatever the net's depth.

    Attributes:
        parameters: By name, of any shape; all of one dtype, on one device.
        kinds: Of their learning rates, by phase.
    """

    parameters: dict[str, Tensor]
    kinds: dict[Any, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return list(self.parameters)

    @property
    def sizes(self) -> list[int]:
        """Number of values of each parameter."""
        return [parameter.numel() for parameter in self.parameters.values()]

    def values(self, copies: int, differentiable: bool) -> Tensor:
        """The values to start from, (N,), N = the sum of the sizes; or (D, N) for several copies."""
        values = torch.cat([(p if differentiable else p.detach()).flatten() for p in self.parameters.values()])
        values = values.expand(copies, -1) if copies > 1 else values
        return values if values.requires_grad else values.requires_grad_()


def by_name(groups: Sequence[ParameterGroup], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensor of each group, taken apart; with the shapes of the parameters, after the axis of copies if any."""
    named: dict[str, Tensor] = {}
    for group, value in zip(groups, values, strict=True):
        pieces = torch.split(value, group.sizes, -1)
        for (name, parameter), piece in zip(group.parameters.items(), pieces, strict=True):
            named[name] = piece if parameter.ndim == 1 else piece.view(piece.shape[:-1] + parameter.shape)
    return named


def descend(number: int, values: Tensor, gradient: Tensor, rate: Rate) -> Tensor:
    """A step of plain gradient descent."""
    return values - rate * gradient if isinstance(rate, Tensor) else torch.sub(values, gradient, alpha=rate)


class AdamW:
    """Steps of AdamW without weight decay, which can be differentiated; one object for one run of steps.

    Where all gradients so far are exactly 0, as those of a LoRA's ``down`` are while its ``up`` is 0, a value stays
    where it is and passes no derivative on: the rule's own is infinite there.

    Args:
        betas: Of the means of gradients and of their squares. PERK's authors take 0.9 and 0.95.
        eps: Added to the root.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self._means: dict[int, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, number: int, values: Tensor, gradient: Tensor, rate: Rate) -> Tensor:
        """The values after a step, see :data:`Rule`."""
        zero = torch.zeros_like(gradient)
        step, first, second = self._means.get(number, (0, zero, zero))
        step += 1
        first = self.betas[0] * first + (1 - self.betas[0]) * gradient
        second = self.betas[1] * second + (1 - self.betas[1]) * gradient.square()
        self._means[number] = step, first, second
        still = second == 0
        root = torch.where(still, 1.0, second).sqrt() / math.sqrt(1 - self.betas[1] ** step) + self.eps
        move = torch.where(still, 0.0, first / (1 - self.betas[0] ** step) / root)
        return values - rate * move


class Step(NamedTuple):
    """One step.

    Attributes:
        rates: By number of the group that moves.
        loss: Of what a pass returns: one for each copy, (D,), or one.
        rule: The optimizer's.
        during: What surrounds the backward pass.
    """

    rates: Mapping[int, Rate]
    loss: Callable[[Any], Tensor]
    rule: Rule = descend
    during: Callable[[], AbstractContextManager[Any]] = nullcontext


class Unrolled(NamedTuple):
    """What :func:`unroll` returns.

    Attributes:
        values: Of each group, after the last step.
        first: What the first pass returned; ``None`` without steps.
        losses: Of each step, the mean over copies, without graph.
        gradients: Of the first step, of the groups that move in it.
    """

    values: list[Tensor]
    first: Any
    losses: list[Tensor]
    gradients: list[Tensor]


def unroll(
    net: nn.Module,
    run: Callable[[dict[str, Tensor]], Any],
    groups: Sequence[ParameterGroup],
    steps: Sequence[Step],
    *,
    copies: int = 1,
    differentiable: bool = False,
    last: int = 0,
    keep_first: bool = False,
    what: str = "parameters",
) -> Unrolled:
    """Do the steps, each on the values that the one before has left.

    A step is ``v' = v - rate * g(v)`` with ``g`` the gradient of its loss. The derivative of the result with respect
    to the start is the product of the steps' ``I - rate * dg/dv``; of the first ``len(steps) - last`` steps ``g``
    counts as constant, so that theirs is ``I``, and their passes are not held. ``last = 0`` is the first-order
    approximation, ``last = len(steps)`` is exact. Rates that are tensors get their derivative from every step.

    Args:
        net: The net, for the words of an error.
        run: A pass with these parameters, by name.
        groups: What moves.
        steps: In order.
        copies: Number of copies D that move on their own. ``run`` then gets parameters with an axis (D, ...) first.
        differentiable: Whether the values keep a graph to the parameters.
        last: Number of the last steps that are differentiated twice; above 0 it implies ``differentiable``.
        keep_first: Whether the first pass keeps a graph of its own, which steps of first order otherwise use up.
        what: The parameters, in an error.

    Raises:
        UnsupportedModelError: If no gradient reaches what is to move in a step.
    """
    current = [group.values(copies, differentiable or last > 0) for group in groups]
    first: Any = None
    first_gradients: list[Tensor] = []
    losses: list[Tensor] = []
    for number, step in enumerate(steps):
        twice = number >= len(steps) - last
        # Aliases of this pass alone: else, at second order, a gradient would also run through earlier steps.
        used = current if number == 0 else [values.view_as(values) for values in current]
        output = run(by_name(groups, used))
        loss = step.loss(output)
        moved = [used[group] for group in step.rates]
        with step.during():
            gradients = _gradients(net, loss.sum(), moved, twice, twice or keep_first, what)
        losses.append(loss.detach().mean())
        if number == 0:
            first, first_gradients = output, gradients
        for (group, rate), gradient in zip(step.rates.items(), gradients, strict=True):
            current[group] = step.rule(group, current[group], gradient, rate)
    return Unrolled(current, first, losses, first_gradients)


def _gradients(
    net: nn.Module, loss: Tensor, tensors: Sequence[Tensor], create_graph: bool, retain_graph: bool, what: str
) -> list[Tensor]:
    """Zero where the loss does not depend on one of ``tensors``; refused where it depends on none of them."""
    values: Sequence[Tensor | None] = [None for _ in tensors]
    if loss.requires_grad:
        values = torch.autograd.grad(
            loss, tensors, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
        )
    if all(value is None for value in values):
        raise UnsupportedModelError(
            f"No gradient reaches the {what} of {type(net).__name__} that are to be adapted (torch.no_grad, "
            "detach or a quantised layer behind them, or layers that do not run?). Take that out, or use a method "
            f"without gradients ({FORWARD_ONLY})."
        )
    return [torch.zeros_like(t) if value is None else value for t, value in zip(tensors, values, strict=True)]
