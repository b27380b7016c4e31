"""The base of methods that learn by gradient descent: one set of options, and one descent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tta import collective
from lightning_tta.backbones.norms import batch_norm_layers, owner
from lightning_tta.backbones.quantized import FORWARD_ONLY, has_quantized
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.optimizers import OptimizerName, check_precision, make_optimizer, masked_step


@dataclass
class Gradients:
    """What :meth:`GradientMethod.gradients` returns.

    Attributes:
        values: By each learned tensor, in order; ``None`` where the loss does not depend on it.
        loss: The loss, 0-dimensional, detached.
        usable: 0-dimensional, bool: a sample counts, and loss and gradients are finite.
        norm: L2 norm of all of them.
    """

    values: Sequence[Tensor | None]
    loss: Tensor
    usable: Tensor
    norm: Tensor


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all of them together, as ``torch.nn.utils.get_total_norm``, which sorts them first."""
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        return nn.utils.get_total_norm(tensors, error_if_nonfinite=False)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return norm


class GradientMethod(TTAMethod):
    """Learns some of the net's parameters with an optimizer.

    To write one: call ``super().__init__(model, **options)`` and :meth:`learn`, and implement ``step``, which calls
    :meth:`descend` with the loss of each sample.

    Args:
        model: Pixels (B, C, H, W) in [0, 1] -> logits (B, K).
        lr: Learning rate, >= 0.
        optimizer: ``adam``, ``sgd``, ``nesterov`` (SGD with Nesterov's momentum) or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999]; of ``nesterov`` above 0.
        weight_decay: >= 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).

    Attributes:
        selects: Whether it learns parameters of the net, so that ``select`` may name others.
    """

    selects: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 1,
        lr_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, steps=steps)
        if lr_batch_size is not None:
            check_range("lr_batch_size", lr_batch_size, 1, integer=True)
        self.lr_batch_size = lr_batch_size
        self._reach_checked = False
        self._moments: dict[str, tuple[str, str, str]] = {}  # state -> optimizer, parameter, key
        self._settings: dict[str, Any] = {
            "kind": optimizer,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }

    def learn(
        self, parameters: Mapping[str, Tensor], prefix: str = "model.", optimizer: str = "model", **settings: Any
    ) -> list[Tensor]:
        """Declare parameters as state, with an optimizer of their own.

        Args:
            parameters: By name under ``prefix``.
            prefix: Of their names in the state dict.
            optimizer: The optimizer's name.
            **settings: What differs from this method's options: ``kind``, ``lr``, ``momentum``, ``weight_decay``.

        Returns:
            The parameters.
        """
        tensors = [self.state(prefix + name, tensor) for name, tensor in parameters.items()]
        new = make_optimizer(parameters=tensors, **{**self._settings, **settings})
        self.optimizers[optimizer] = new
        for name, tensor in zip(parameters, tensors, strict=True):
            for key, moment in new.state[tensor].items():
                state = f"optimizers.{optimizer}.{key}.{name}"
                self.state(state, moment, source=0.0, fixed_dtype=key == "step")
                self._moments[state] = (optimizer, prefix + name, key)
        return tensors

    def new_optimizer(self, tensors: Sequence[Tensor]) -> Optimizer:
        """One with this method's settings over other tensors, which is no state."""
        return make_optimizer(parameters=tensors, **self._settings)

    @torch.no_grad()
    def forget_moments(self) -> None:
        """Bring the moments of all optimizers to where they start."""
        if self._moments:
            torch._foreach_zero_([self.value(name) for name in self._moments])

    @property
    def learned(self) -> list[Tensor]:
        """What the optimizers hold, in order."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    def descend(self, losses: Tensor, weights: Tensor | None = None, extra: Tensor | float = 0.0) -> Tensor:
        """One step of every optimizer down ``sum_b w_b l_b / sum_b w_b + extra``, over all processes, or none.

        There is none where all weights are 0, or where the loss or a gradient is not finite; nothing changes then, and
        the host is not asked. ``stats`` gets ``loss``, and counts of ``backwards`` and ``skipped_steps``.

        Args:
            losses: Of each sample, (B, ...), with a graph; of several positions the mean.
            weights: (B,), or of each position (B, ...), >= 0; ``None``: 1 for all that count.
            extra: A term that is no mean over samples, 0-dimensional.

        Returns:
            Whether the step was taken, 0-dimensional, bool.

        Raises:
            UnsupportedModelError: If no gradient reaches what is to learn.
        """
        return self.apply_gradients(self.gradients(losses, weights, extra))

    def gradients(self, losses: Tensor, weights: Tensor | None = None, extra: Tensor | float = 0.0) -> Gradients:
        """Gradients of the loss that :meth:`descend` has, by :attr:`learned`."""
        if weights is None and self.rows is not None and losses.shape == self.rows.shape:
            weights = self.rows
        if weights is None:
            loss, counts = collective.mean(losses.flatten()), None
        else:
            each = weights if weights.shape == losses.shape else weights.view(-1, *(1,) * (losses.ndim - 1))
            each = each.expand_as(losses)
            loss, number = collective.weighted_sums(losses.flatten(), each.flatten())
            counts = number > 0
        if isinstance(extra, Tensor) or extra:
            loss = loss + extra
        before = self.scalars[0].get("loss")  # of an earlier pass of this step, which stands if no sample counts now
        self.note(loss=loss if counts is None or before is None else torch.where(counts, loss, before))
        if not loss.requires_grad:
            raise self._no_gradient(loss)
        if counts is not None and self.known(~counts):
            return Gradients([None] * len(self.learned), loss.detach(), counts, torch.zeros_like(loss))
        values = collective.average(self.differentiate(loss))
        present = [value for value in values if value is not None]
        self.count("backwards")
        norm = total_norm(present)
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        usable = finite if counts is None else finite & counts
        self.count("skipped_steps", ~finite if counts is None else ~finite & counts)
        return Gradients(values, loss.detach(), usable, norm)

    def differentiate(self, loss: Tensor, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of a loss, 0-dimensional, by :attr:`learned`; ``None`` where the loss does not depend on one.

        Args:
            loss: With a graph.
            tensors: Others in the place of :attr:`learned`, one for each.

        Raises:
            UnsupportedModelError: If that is so of all that an optimizer holds.
        """
        tensors = self.learned if tensors is None else tensors
        if not loss.requires_grad or not all(tensor.requires_grad for tensor in tensors):
            raise self._no_gradient(loss)
        values = torch.autograd.grad(loss, tensors, allow_unused=True)
        if not self._reach_checked:
            self._check_reach(values)
            self._reach_checked = True
        return values

    def _check_reach(self, values: Sequence[Tensor | None]) -> None:
        """Once: refuse a net where no gradient reaches what an optimizer holds, or statistics cannot be replaced."""
        reached = iter(value is not None for value in values)
        for optimizer in self.optimizers.values():
            flags = [next(reached) for group in optimizer.param_groups for _ in group["params"]]
            if not any(flags):
                raise self._no_gradient()
        has_gradient = {id(t): value is not None for t, value in zip(self.learned, values, strict=True)}
        names = {
            n.removeprefix("model."): has_gradient[id(t)] for n, t in self.adaptable.items() if id(t) in has_gradient
        }
        ran = self.ran if self.ran is not None else {owner(name) for name in names}
        layers = batch_norm_layers(self.model) if self.uses_batch_statistics else {}
        passed_by = [name for name, flag in names.items() if flag and owner(name) in layers and owner(name) not in ran]
        if passed_by:
            raise UnsupportedModelError(
                f"The net uses '{passed_by[0]}', but does not call its BatchNorm layer '{owner(passed_by[0])}' (does "
                "its forward call torch.nn.functional.batch_norm?), so that its statistics cannot be those of the "
                "batch. Call the layer itself."
            )
        modules_run = any(owner(name) in ran for name in names)  # else it cannot tell: a graph of operations
        missing = [name for name, flag in names.items() if not flag and (owner(name) in ran or not modules_run)]
        if missing and has_quantized(self.model):
            raise self._no_gradient(None, f", but for {len(values) - len(missing)} of {len(values)} tensors")
        if missing:
            warnings.warn(
                f"No gradient reaches {len(missing)} of the {len(values)} tensors that {type(self).__name__} is to "
                f"learn, so they stay as they are: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. "
                "Their layers run, but the net's output does not depend on them: it is that of another head (an "
                "auxiliary one has no part in it), or a detach, no_grad or a quantised layer cuts them off.",
                stacklevel=2,
            )

    def apply_gradients(self, gradients: Gradients) -> Tensor:
        """Step every optimizer with these gradients, where they are usable; returns whether that was so."""
        if any(value is not None for value in gradients.values):
            factor = 1.0 if self.lr_batch_size is None else self._batch_size / self.lr_batch_size
            values = iter(gradients.values)
            for optimizer in self.optimizers.values():
                number = sum(len(group["params"]) for group in optimizer.param_groups)
                masked_step(optimizer, [next(values) for _ in range(number)], gradients.usable, factor)
        return gradients.usable

    @contextmanager
    def moved(self, gradients: Gradients, radius: float) -> Iterator[None]:
        """While active, what is learned is ``radius`` up the gradient; afterwards exactly where it was."""
        pairs = [(t.detach(), g) for t, g in zip(self.learned, gradients.values, strict=True) if g is not None]
        tensors, directions = [t for t, _ in pairs], [g for _, g in pairs]
        with self.lend(tensors):
            with torch.no_grad():
                torch._foreach_add_(tensors, torch._foreach_mul(directions, radius / (gradients.norm + 1e-12)))
            yield

    def reset_where(self, condition: Tensor | None) -> None:
        """Every state back to its source value, and learning rates to those given."""
        super().reset_where(condition)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for optimizer in self.optimizers.values():
            check_precision(optimizer, fn(torch.empty(0)).dtype)
        super()._apply(fn, recurse)
        for name, (kind, parameter, key) in self._moments.items():  # which are other tensors now
            self.optimizers[kind].state[self.value(parameter)][key] = self.value(name)
        return self

    def _no_gradient(self, loss: Tensor | None = None, but: str = "") -> UnsupportedModelError:
        if not all(tensor.requires_grad for tensor in self.learned):
            return UnsupportedModelError(
                f"What {type(self).__name__} is to learn does not require gradients any more: the parameters were "
                "frozen after the method was made (requires_grad_(False), or freeze() of a LightningModule that holds "
                "it). Thaw them, [p.requires_grad_() for p in method.learned], or leave the freeze out: the method "
                "itself freezes all the others."
            )
        reason = (
            "the loss does not depend on what is to learn (a quantised, detached or bypassed layer, or layers that do "
            "not run?)"
            if loss is None
            else "the logits have none (torch.no_grad, detach in its forward?)"
        )
        return UnsupportedModelError(
            f"No gradient reaches what {type(self).__name__} is to learn in {type(self.model).__name__}{but}: "
            f"{reason}. Take that out, or use a method without gradients ({FORWARD_ONLY})."
        )
