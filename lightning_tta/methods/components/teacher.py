"""Teachers: other weights for the same net, held as tensors; their moving average; stochastic restore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.gradient import GradientMethod


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
        averages = self.weights()
        students = [parameters[name].detach().to(average.dtype) for name, average in averages.items()]
        torch._foreach_lerp_(list(averages.values()), students, 1 - decay)


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


class TeacherMethod(GradientMethod):
    """What the methods share whose student, all of the net, follows a :class:`Teacher` that follows the student.

    Declares both. The source values for :meth:`reset` are the anchor, which such methods also ask: one copy serves
    student, teacher and anchor. All random draws come from ``seed`` and the number of steps taken, which is state.

    Args:
        model: A classifier.
        ema_decay: Share of the teacher that stays, in [0, 1].
        seed: Of all draws.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.
    """

    uses_batch_statistics = True

    def __init__(self, model: nn.Module, *, ema_decay: float, seed: int = 0, **options: Any) -> None:
        super().__init__(model, **options)
        check_range("ema_decay", ema_decay, 0, 1)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.ema_decay, self.seed = ema_decay, seed
        learned = self.learn(self.select("all"))
        self.teacher = Teacher(self.student())
        for name, slot in self.teacher.slots.items():
            source = self.source_value(f"model.{name}")
            self.state(f"teacher.{slot}", self.teacher.get_buffer(slot), source=source)
        self.state("steps_taken", torch.zeros((), dtype=torch.int64, device=learned[0].device), source=0)

    def student(self) -> dict[str, Tensor]:
        """The net's own weights, which learn."""
        return {n.removeprefix("model."): t for n, t in self.adaptable.items() if n.startswith("model.")}

    def source(self) -> dict[str, Tensor]:
        """The weights that the student started with."""
        return {name: self.source_value(f"model.{name}") for name in self.teacher.slots}

    def stream_weights(self) -> dict[str, Tensor]:
        """The teacher's, which predicts."""
        return self.teacher.weights()

    def update_teacher(self) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student(), self.ema_decay)

    def draw_seed(self, number: int = 0) -> int:
        """The seed of draw ``number`` (below a million) of the coming step. Asks the device."""
        return ((self.seed * 1_000_003 + int(self.value("steps_taken"))) * 1_000_003 + number) % 2**62
