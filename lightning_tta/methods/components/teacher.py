"""Teachers: other weights for the same net, held as tensors; their moving average; stochastic restore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tta.draws import random_flags
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.components.drawing import DrawingMethod
from lightning_tta.views.jitter import jitter

_PORTION = 2**23  # weights; their masks take eight times as many bytes for a moment


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
    def update(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        where: Tensor | None = None,
        moving: Sequence[Tensor] | None = None,
    ) -> None:
        """``teacher = decay * teacher + (1 - decay) * student``; exactly nothing where both are equal.

        Args:
            parameters: The student's, by name; of others the averages stay.
            decay: In [0, 1].
            where: 0-dimensional: whether to move at all, bool, or which share of the step to take; ``None``: all.
            moving: Which entries of each weight move, in the order of the names; ``None``: all.
        """
        weights = {name: weight for name, weight in self.weights().items() if name in parameters}
        approach(weights, parameters, 1 - decay, where, moving)


@torch.no_grad()
def approach(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    share: float | Tensor,
    where: Tensor | None = None,
    moving: Sequence[Tensor] | None = None,
) -> None:
    """``tensor += share * (target - tensor)`` for each, in place; exactly nothing where both are equal.

    Args:
        tensors: By name.
        targets: By the same names, or more.
        share: In [0, 1].
        where: As of :meth:`Teacher.update`.
        moving: Likewise.
    """
    now, goals = list(tensors.values()), [targets[name].detach() for name in tensors]
    if any(goal.dtype != tensor.dtype for goal, tensor in zip(goals, now, strict=True)):
        cast = [torch.empty_like(tensor) for tensor in now]
        torch._foreach_copy_(cast, goals)
        goals = cast
    if where is None and moving is None and not isinstance(share, Tensor):
        torch._foreach_lerp_(now, goals, share)
        return
    steps = torch._foreach_sub(goals, now)  # there is no lerp by a tensor for all of them at once
    torch._foreach_mul_(steps, share if where is None else share * where.to(now[0].dtype))
    if moving is not None:
        torch._foreach_mul_(steps, [mask.to(step.dtype) for mask, step in zip(moving, steps, strict=True)])
    torch._foreach_add_(now, steps)


@torch.no_grad()
def restore_some(
    parameters: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    probability: float,
    key: Tensor,
    where: Tensor | None = None,
) -> None:
    """Each weight goes back to its source value with this probability, independently.

    Args:
        parameters: Weights, by name, finite.
        source: Their source values.
        probability: In [0, 1].
        key: Of the draw, see :mod:`~lightning_tta.draws`: the same weights on every device.
        where: 0-dimensional, bool: whether to do it at all; ``None``: yes.
    """
    if probability == 0 or not parameters:
        return
    tensors = [(parameter.detach(), source[name]) for name, parameter in parameters.items()]
    start = 0
    for portion in _portions(tensors):
        sizes = [tensor.numel() + tensor.numel() % 2 for tensor, _ in portion]
        restored = random_flags(key, sum(sizes), probability, start=start, device=portion[0][0].device)
        start += sum(sizes)
        if where is not None:
            restored &= where
        weights, values = ([pair[column] for pair in portion] for column in (0, 1))
        if len(portion) == 1:
            torch.where(restored[: weights[0].numel()].view_as(weights[0]), values[0], weights[0], out=weights[0])
            continue
        gone, kept = (  # there is no torch.where for all of them at once; w * 1 + s * 0 is w
            [m[: w.numel()].view_as(w) for m, w in zip(torch.split(mask, sizes), weights, strict=True)]
            for mask in (restored.to(weights[0].dtype), (~restored).to(weights[0].dtype))
        )
        torch._foreach_mul_(weights, kept)
        torch._foreach_addcmul_(weights, values, gone)


def _portions(tensors: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """One by one on a CPU, for its cache; else as many of a dtype as may be drawn at once."""
    portion: list[tuple[Tensor, Tensor]] = []
    number = 0
    for tensor, value in tensors:
        number += tensor.numel()
        if portion and (tensor.device.type == "cpu" or number > _PORTION or tensor.dtype != portion[0][0].dtype):
            yield portion
            portion, number = [], tensor.numel()
        portion.append((tensor, value))
    yield portion


class TeacherMethod(DrawingMethod):
    """What the methods share whose student follows a :class:`Teacher` that follows the student.

    Declares both. The source values for :meth:`reset` are the anchor, which such methods also ask: one copy serves
    student, teacher and anchor. All random draws come from ``seed`` and the number of steps taken, which is state.

    Args:
        model: A classifier.
        ema_decay: Share of the teacher that stays, in [0, 1].
        seed: Of all draws.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.

    Attributes:
        selected: Which parameters of the net learn, and have a teacher: as ``select`` takes it.
    """

    selected: ClassVar[str] = "all"
    uses_batch_statistics = True

    def __init__(self, model: nn.Module, *, ema_decay: float, seed: int = 0, **options: Any) -> None:
        super().__init__(model, seed=seed, **options)
        check_range("ema_decay", ema_decay, 0, 1)
        self.ema_decay = ema_decay
        self.learn_student()
        self.teacher = Teacher(self.student())
        for name, slot in self.teacher.slots.items():
            source = self.source_value(f"model.{name}")
            self.state(f"teacher.{slot}", self.teacher.get_buffer(slot), source=source)

    def learn_student(self) -> None:
        """Declare what the student learns, and with which optimizers. For the constructor."""
        self.learn(self.select(self.selected))

    def student(self) -> dict[str, Tensor]:
        """The net's own weights, which learn."""
        return {n.removeprefix("model."): t for n, t in self.adaptable.items() if n.startswith("model.")}

    def source(self) -> dict[str, Tensor]:
        """The weights that the student started with."""
        return {name: self.source_value(f"model.{name}") for name in self.teacher.slots}

    def stream_weights(self) -> dict[str, Tensor]:
        """The teacher's, which predicts."""
        return self.teacher.weights()

    def infer(self, x: Tensor) -> Tensor:
        """The teacher's prediction."""
        return self.teach(x, accounted=True)

    @torch.no_grad()
    def teach(self, x: Tensor, accounted: bool | None = None) -> Tensor:
        """The teacher's logits; arguments as of :meth:`logits`."""
        return self.logits(x, self.teacher.weights(), accounted=accounted)

    @torch.no_grad()
    def teach_features(self, x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        """The teacher's features (B, D), the input of the last linear layer, and its logits; ``groups`` of batches.

        Raises:
            UnsupportedModelError: If the net does not end in a linear layer.
        """
        return self.split(x, lambda x: self.logits(x, self.teacher.weights(), groups))

    def update_teacher(self, where: Tensor | None = None) -> None:
        """Move the teacher towards the student, if ``where`` is true, or ``None``; or a share of the way."""
        self.teacher.update(self.student(), self.ema_decay, where)

    def follow(self, taken: Tensor) -> None:
        """After a step, or none: the teacher moves, and the step is counted."""
        if not self.known(~taken):
            where = None if self.known(taken) else taken
            self.update_teacher(where)
            self.finish(where)
            self.count_step(where)

    def finish(self, where: Tensor | None) -> None:
        """What a method does once student and teacher have moved, if ``where``, as of :meth:`update_teacher`."""


class TogetherMethod(TeacherMethod):
    """A :class:`TeacherMethod` that predicts with the sum of the logits of student and teacher."""

    no_plain_net = (
        "it adds the logits of two nets, student and teacher. Deploy the method itself (method.predict), or adapt with "
        "'cotta', whose teacher is one net"
    )

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """The sum of the logits of student and teacher."""
        return at_least_float32(self.logits(x)) + at_least_float32(self.teach(x))


class ViewedMethod(TeacherMethod):
    """A :class:`TeacherMethod` whose teacher sees views too, and whose weights return to the source at random.

    Args:
        model: A classifier.
        views: Of each batch, at least 1.
        restore: Probability that a weight of the student returns after a step, in [0, 1].
        symmetric: Whether the loss is the mean of CE(p_t, p_s) and CE(p_s, p_t); else the first.
        chunk_views: At most this many images in one pass of views (but one view of the batch at least); ``None``: all.
        **options: Those of :class:`TeacherMethod`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        views: int,
        restore: float,
        symmetric: bool,
        chunk_views: int | None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("views", views, 1, integer=True)
        check_range("restore", restore, 0, 1)
        if chunk_views is not None:
            check_range("chunk_views", chunk_views, 1, integer=True)
        self.views, self.restore, self.chunk_views = views, restore, chunk_views
        self.reverse = 0.5 if symmetric else 0.0

    def finish(self, where: Tensor | None) -> None:
        """Some weights of the student go back to the source."""
        restore_some(self.student(), self.source(), self.restore, self.draw_key(), where)

    def teach_views(self, x: Tensor, steps_taken: int) -> Tensor:
        """The teacher's logits (V, B, K) of views, which are drawn and made on the host's word, after so many steps."""
        size = self.views if self.chunk_views is None else max(1, self.chunk_views // len(x))
        keys = [self.host_key(steps_taken, 1 + number) for number in range(self.views)]
        logits = []
        for start in range(0, self.views, size):
            views = torch.stack([self._view(x, key) for key in keys[start : start + size]])
            logits.append(self.replayed("pass of views", self._view_logits, views))
        return at_least_float32(torch.cat(logits))

    def _view(self, x: Tensor, key: Tensor) -> Tensor:
        if self.task.kind == "pixels":  # else predictions of pixels that have moved would be averaged
            return jitter(x, key, geometry=False)
        return jitter(x, key)

    @torch.no_grad()
    def _view_logits(self, views: Tensor) -> Tensor:
        """Logits (V, B, K) of views (V, B, C, H, W), the statistics of each view its own."""
        logits = self.logits(views.flatten(0, 1), self.teacher.weights(), groups=len(views))
        return logits.view(len(views), -1, *logits.shape[1:])
