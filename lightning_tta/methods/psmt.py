"""PSMT: a mean teacher that leaves its important weights alone, and a student that moves its own little."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import Gradients
from lightning_tta.methods.components.fisher import quantile_bound
from lightning_tta.methods.components.pull import PullMethod
from lightning_tta.methods.components.teacher import TogetherMethod


class PSMT(PullMethod, TogetherMethod):
    """Minimises a symmetric cross-entropy with a teacher; important weights of student and teacher hardly move.

    With student s, teacher t, view x~ of x, logits u, ``SCE(u, v) = CE(p_u, p_v) / 2 + CE(p_v, p_u) / 2``, the gradient
    g of the first term below, and Fisher information F of the student, with the teacher's predictions as labels::

        F <- fisher_decay * F + (1 - fisher_decay) * g^2
        L = mean_b [ SCE(u_s(x), u_t(x)) + SCE(u_s(x~), u_t(x)) ] / 2 + fisher_alpha * sum_i F_i (s_i - s_i^before)^2
        one step of s, where s^before is s before the step of the batch before
        t_i <- ema_decay * t_i + (1 - ema_decay) * s_i   where F_i is not among the ``preserve`` largest; else t_i stays

    Parameters touched: all, of s and t; BatchNorm uses batch statistics, each pass its own. State: s, t, F, s^before,
    the optimizer, the number of steps. Per batch and step: three forward passes, of student, view and teacher, and one
    backward pass. Returns the sum of the logits of student and teacher, before the step. ``stats`` has ``pull``, the
    last term of L.

    Args:
        model: Any classifier.
        fisher_alpha: >= 0; the released code has 500, for another F (below). 0: no such term.
        fisher_decay: In [0, 1]; our choice. 0: of the batch alone.
        preserve: Share of the teacher's weights that stay, in [0, 1]; unverified: 0.03 is the share that the released
            code selects, which are the least important there. 0: a plain mean teacher.
        augment: Whether with x~, one draw for the whole batch, as CoTTA's; without, two forward passes.
        ema_decay: Of the teacher, in [0, 1]; authors 0.999.
        seed: Of the views.
        **options: ``lr`` and ``optimizer``: as CoTTA's, 1e-3 with ``adam`` (CIFAR, batch 200), 1e-2 with ``sgd``
            (ImageNet, batch 64); unverified. ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Source: Tian and Lyu, ACCV 2024, arXiv 2407.02253. The form of the paper: both terms with F are its formulas; how F
    is estimated, the share that stays and their weights are our reconstruction. The released code is another method:
    there F, of 10,000 source images, holds the student near the source (EATA's penalty); the least important 3 % of the
    student's weights return to the source, and the teacher takes them over; the view is made and not used.
    """

    about = About(
        does="symmetric cross-entropy with a teacher; weights of large Fisher information hardly move",
        learns="all",
        passes="3 / 1",
        needs="-",
        holds="a teacher, Fisher information, the weights of a step ago",
        suits="long, domains that change",
        formula="paper",
        paper="ACCV 2024, arXiv 2407.02253",
    )
    step_on_host = "it draws its view on the host; augment=False has none"
    _reached: Sequence[str] = ()  # names of the weights that have a gradient

    def __init__(
        self,
        model: nn.Module,
        *,
        fisher_alpha: float = 500.0,
        fisher_decay: float = 0.9,
        preserve: float = 0.03,
        augment: bool = True,
        ema_decay: float = 0.999,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, ema_decay=ema_decay, seed=seed, **options)
        check_range("fisher_alpha", fisher_alpha, 0)
        check_range("fisher_decay", fisher_decay, 0, 1)
        check_range("preserve", preserve, 0, 1)
        self.fisher_alpha, self.fisher_decay, self.preserve = fisher_alpha, fisher_decay, preserve
        self.augment = augment
        if not augment:
            self.step_on_host = ""
        for name, weight in self.student().items():
            like = at_least_float32(weight.detach())
            self.state(f"fisher.{name}", torch.zeros_like(like), source=0.0)
            self.state(f"before.{name}", weight.detach().clone(), source=self.source_value(f"model.{name}"))
        self.keep_wide(*(f"fisher.{name}" for name in self.student()))

    def step(self, x: Tensor) -> Tensor:
        """One step of the student, and of the teacher towards the student."""
        if not self.augment:
            return self._step(x)
        return cast(Tensor, self.replayed("step", self._step, x, self.view(x, 1)))

    def _step(self, x: Tensor, view: Tensor | None = None) -> Tensor:
        target = self.teach(x)  # before there is a graph, whose weights the teacher's may replace for a moment
        logits = self.logits(x)
        losses = soft_cross_entropy(target, logits, 0.5)
        if view is not None:
            losses = (losses + soft_cross_entropy(target, self.logits(view), 0.5)) / 2
        self.follow(self.apply_gradients(self._held(self.gradients(losses))))
        return at_least_float32(logits.detach()) + at_least_float32(target)

    @torch.no_grad()
    def _held(self, gradients: Gradients) -> Gradients:
        """Take in F and the weights as they are; the gradients with those of the last term."""
        where = None if self.known(gradients.usable) else gradients.usable
        reached = {n: g for n, g in zip(self.student(), gradients.values, strict=True) if g is not None}
        for name, gradient in reached.items():
            fisher = self.value(f"fisher.{name}")
            self.write(f"fisher.{name}", fisher.lerp(gradient.to(fisher).square(), 1 - self.fisher_decay), where)
        self._reached = list(reached)
        before, fishers = ([self.value(f"{kind}.{n}") for n in self.student()] for kind in ("before", "fisher"))
        pull = self.pull(before, fishers, self.fisher_alpha)
        for name, weight in self.student().items():
            self.write(f"before.{name}", weight, where)
        self.note(pull=pull, loss=gradients.loss + pull)
        return dataclasses.replace(gradients, values=self.pulled(gradients.values), loss=gradients.loss + pull)

    def update_teacher(self, where: Tensor | None = None) -> None:
        """Move the teacher towards the student, but for its important weights."""
        fishers = {name: self.value(f"fisher.{name}") for name in self.student()}
        bound = quantile_bound([fishers[name] for name in self._reached], 1 - self.preserve)
        moving = [fisher <= bound for fisher in fishers.values()]  # also what has no gradient, of which F is 0
        self.teacher.update(self.student(), self.ema_decay, where, moving)
