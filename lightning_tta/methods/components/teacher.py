"""Teachers: other weights for the same net, held as tensors; their moving average; stochastic restore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_tta.backbones.norms import batch_statistics, grouped_batch_statistics
from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import check_range
from lightning_tta.methods.base.inputs import at_least_float32
from lightning_tta.methods.base.method import TTAMethod


class Teacher(nn.Module):
    """Exponential moving average of a net's parameters: buffers, no second net.

    In at least float32, for in half precision a step of 1 / 1000 would be rounded away; a later conversion of the
    method takes them along.

    Args:
        parameters: The student's, by name; the average starts there.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._slots = {name: name.replace(".", "/") for name in parameters}  # a buffer's name has no dots
        for name, parameter in parameters.items():
            self.register_buffer(self._slots[name], at_least_float32(parameter.detach()).clone())

    @property
    def slots(self) -> dict[str, str]:
        """Buffer name by the student's parameter name."""
        return dict(self._slots)

    def weights(self) -> dict[str, Tensor]:
        """The averages by the student's parameter names."""
        return {name: getattr(self, slot) for name, slot in self._slots.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """``teacher = decay * teacher + (1 - decay) * student``; exactly nothing where both are equal."""
        for name, average in self.weights().items():
            average.lerp_(parameters[name].to(average.dtype), 1 - decay)


@torch.no_grad()
def restore_some(parameters: Mapping[str, Tensor], source: Mapping[str, Tensor], probability: float, seed: int) -> None:
    """Each weight goes back to its source value with this probability, independently.

    Drawn on the parameters' device, where the weights are: masks on a GPU are others than on a CPU.
    """
    if probability == 0 or not parameters:
        return
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in parameters.items():
        mask = torch.rand(parameter.shape, generator=generator, device=device, dtype=torch.float32) < probability
        parameter.copy_(torch.where(mask, source[name], parameter))


class TeacherMethod(TTAMethod):
    """What the methods share whose student, all of the net, follows a :class:`Teacher` that follows the student.

    Declares both. The snapshot for :meth:`reset` is the source, which such methods also ask: one copy serves student,
    teacher and anchor. All random draws come from ``seed`` and the number of steps taken, which is state.
    """

    def __init__(self, model: nn.Module, *, ema_decay: float, seed: int = 0, steps: int = 1) -> None:
        super().__init__(model, steps=steps)
        check_range("ema_decay", ema_decay, 0, 1)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.ema_decay, self.seed, self.steps_taken = ema_decay, seed, 0
        self.declare({n: p for n, p in self.model.named_parameters() if p.is_floating_point()})
        self.teacher = Teacher(self.student())
        self.declare(dict(self.teacher.named_buffers()), prefix="teacher.")
        self._share_snapshot()

    def student(self) -> dict[str, Tensor]:
        """The net's own weights, which learn."""
        return {n: p for n, p in self.model.named_parameters() if f"model.{n}" in self._declared}

    def source(self) -> dict[str, Tensor]:
        """The weights that the student started with."""
        return {n: self._snapshot[f"model.{n}"] for n in self.teacher.slots}

    @property
    def weight_names(self) -> dict[str, str]:
        """The teacher's, which predicts."""
        return {**super().weight_names, **{name: f"teacher.{slot}" for name, slot in self.teacher.slots.items()}}

    def update_teacher(self) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student(), self.ema_decay)

    @torch.no_grad()
    def logits_with(self, weights: Mapping[str, Tensor], images: Tensor, parts: int = 1) -> Tensor:
        """A pass of the net with other weights, in the dtype of its own, and batch statistics of each of the parts."""
        own = self.student()
        cast = {name: weight.to(own[name].dtype) for name, weight in weights.items()}
        statistics = batch_statistics(self.model) if parts == 1 else grouped_batch_statistics(self.model, parts)
        with statistics:
            return as_logits(functional_call(self.model, cast, (images,)))

    def draw_seed(self, number: int = 0) -> int:
        """The seed of draw ``number`` (below a million) of the coming step."""
        return ((self.seed * 1_000_003 + self.steps_taken) * 1_000_003 + number) % 2**62

    def reset(self) -> None:
        """Back to the source, and to the first draw."""
        super().reset()
        self.steps_taken = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Adds the number of steps."""
        return {**super().get_extra_state(), "steps_taken": self.steps_taken}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`get_extra_state`."""
        super().set_extra_state(state)
        self.steps_taken = state["steps_taken"]

    def _share_snapshot(self) -> None:
        for name, slot in self.teacher.slots.items():
            self._snapshot[f"teacher.{slot}"] = self._snapshot[f"model.{name}"]

    def _apply(self, fn: Any, recurse: bool = True) -> TTAMethod:
        super()._apply(fn, recurse)
        self._share_snapshot()
        return self
