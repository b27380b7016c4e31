"""ViDA: low- and high-rank adapters, weighted by the teacher's uncertainty, in a net that follows its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_tta.errors import ConfigError, UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.selection import choice_of
from lightning_tta.methods.base.task import plain_model
from lightning_tta.methods.components import adapters
from lightning_tta.methods.components.teacher import ViewedMethod


class ViDA(ViewedMethod):
    """Minimises the cross-entropy of the student under its teacher's predictions, with adapters of two ranks.

    Weights are ``W + s1 up1 down1 + s2 up2 down2``, of a low and a high rank. With student s, teacher t, logits u::

        U = 0.1 * mean_bk var_v u_t(view_v(x))_bk
        s2, s1 = 1 + U, 1 - U  if U >= threshold   (the teacher is unsure: more of the high rank)
                 1 - U, 1 + U  else                then
        L = mean_b CE(p_t(x), p_s(x))              one step of s
        t <- decay * t + (1 - decay) * s           pair_decay for the adapters
        each weight of s returns to the source with probability restore

    Parameters touched: all, and the adapters, by two optimizers; BatchNorm uses batch statistics, each view its own.
    State: s, t, the optimizers, s1 and s2, and the number of steps, from which views and masks are drawn. Returns the
    teacher's logits, before the step.

    Passes per batch and step: ``views`` + 2 forward, of which the views go ``chunk_views`` images at a time, and one
    backward. ``stats`` has the ``uncertainty`` U. Exported, the adapters are added to the weights, with s1 and s2 as
    they are.

    As long as s = t, at the start and after a reset, L above has no gradient: the first step of SGD is none, that of
    Adam is rounding noise, scaled up. Not so with ``symmetric``: half of its gradient is then that of the entropy.

    The authors train the adapters on the source first: ``SourceClassifier(adapters={"kind": "vida"})``. A net that has
    such pairs keeps them; another one gets new ones, which are 0 and learn on the stream alone.

    Args:
        model: Any classifier.
        lr: Learning rate of the net's own parameters, >= 0. Authors: 1e-4 with ``adam`` (CIFAR, batch 40), 5e-7 with
            ``sgd`` (ImageNet, batch 50).
        pair_lr: Of the adapters. Authors: 1e-5; 2e-7.
        ranks: Of the two products, at least 1. Authors: 1 and 128.
        targets: Layers with adapters: ``auto``: the linear layers of attention or, of a net that has none, all linear
            layers and convolutions but the last linear layer; ``attention``, or a pattern of names.
        threshold: Of U, >= 0. Authors: 0.05; 0.2.
        views: At least 2. Authors: 10.
        scaled: Which products U weighs: ``both``, as in the paper, or ``low``: s2 stays 1, as in the authors' code,
            where an ``elif`` never reaches it.
        ema_decay: Of the teacher, in [0, 1]. Authors: 0.999.
        pair_decay: Of the teacher's adapters. Authors: 0.999; 0.8.
        restore: Probability, in [0, 1]. Authors' code: 0.1; 0.
        symmetric: Whether L is the mean of both cross-entropies, as in the authors' ImageNet code.
        chunk_views: At most this many images in one pass of views (but one view of the batch at least).
        seed: Of views, masks and new adapters.
        **options: ``optimizer``, ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        ConfigError: If a value is out of range, or ``select=`` is given.
        UnsupportedModelError: If there is no layer for the adapters, or the net is quantised.

    Source: Liu et al., ViDA, ICLR 2024, arXiv 2306.04344; formula from code and paper. Differs from the authors' code:
    both products are weighted; the net stays in eval mode, with batch statistics; SGD has no Nesterov momentum;
    :meth:`reset` brings s1 and s2 back too; attention is found by structure, not by the name of a class.
    """

    about = About(
        does="cross-entropy to a teacher; low- and high-rank adapters weighted by its uncertainty over views",
        learns="all, and adapters",
        passes="10 views, and 2 / 1",
        needs="-",
        holds="a teacher",
        suits="long, continual",
        formula="code and paper",
        paper="ICLR 2024, arXiv 2306.04344",
    )
    step_on_host = "its views are drawn on the host"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-4,
        pair_lr: float = 1e-5,
        ranks: Sequence[int] = (1, 128),
        targets: str = "auto",
        threshold: float = 0.05,
        views: int = 10,
        scaled: Literal["both", "low"] = "both",
        ema_decay: float = 0.999,
        pair_decay: float = 0.999,
        restore: float = 0.1,
        symmetric: bool = False,
        chunk_views: int | None = 512,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_range("pair_lr", pair_lr, 0)
        check_range("threshold", threshold, 0)
        check_range("pair_decay", pair_decay, 0, 1)
        check_range("views", views, 2, integer=True)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        check_choice("scaled", scaled, ("both", "low"))
        model = plain_model(model)  # so that what no method takes is refused before it is changed
        _put_in(model, ranks, targets, seed)
        options |= {"lr": lr, "ema_decay": ema_decay, "seed": seed, "views": views, "chunk_views": chunk_views}
        super().__init__(model, restore=restore, symmetric=symmetric, **options)
        self.threshold, self.scaled, self.pair_decay = threshold, scaled, pair_decay
        pairs = [(name, m) for name, m in adapters.adapters_of(self.model) if isinstance(m, adapters.LowRank)]
        self._scales = [f"model.{name}.scales" for name, _ in pairs]
        for name, (_, module) in zip(self._scales, pairs, strict=True):
            self.state(name, module.scales)

    def learn_student(self) -> None:
        """The net's own parameters and the adapters, each with an optimizer."""
        learned, self._pairs = self.select("all"), adapters.adapter_names(self.model)
        self.learn({name: p for name, p in learned.items() if name not in set(self._pairs)})
        of_pairs = {name: learned[name] for name in self._pairs if name in learned}
        self.learn(of_pairs, optimizer="pairs", lr=self.options["pair_lr"])

    def step(self, x: Tensor) -> Tensor:
        """Views for the uncertainty, and a step of the student, of the teacher, and restore."""
        views = self.teach_views(x, int(self.value("steps_taken")))
        return cast(Tensor, self.replayed("step", self._step_towards, x, views))

    def update_teacher(self, where: Tensor | None = None) -> None:
        """Move the teacher towards the student, its adapters at their own rate."""
        student, pairs = self.student(), set(self._pairs)
        for decay, is_pair in ((self.ema_decay, False), (self.pair_decay, True)):
            self.teacher.update({n: p for n, p in student.items() if (n in pairs) == is_pair}, decay, where)

    def student(self) -> dict[str, Tensor]:
        """The net's weights and the adapters, which learn; not the scales, which are buffers."""
        return {name: tensor for name, tensor in super().student().items() if isinstance(tensor, nn.Parameter)}

    def _step_towards(self, x: Tensor, views: Tensor) -> Tensor:
        uncertainty = 0.1 * views.var(0).mean()
        self.note(uncertainty=uncertainty)
        high = 1 + torch.where(uncertainty >= self.threshold, uncertainty, -uncertainty)
        scales = torch.stack([2 - high, high if self.scaled == "both" else torch.ones_like(high)])
        with self.lend([self.value(name) for name in self._scales]):  # they come back if the pass breaks off
            for name in self._scales:
                self.write(name, scales, uncertainty.isfinite())
            target = self.infer(x)
            losses = soft_cross_entropy(target, self.logits(x), self.reverse)
            gradients = self.gradients(losses)
        taken = self.apply_gradients(gradients)
        for name in self._scales:
            self.write(name, scales, taken & uncertainty.isfinite())
        self.follow(taken)
        return target


def _put_in(model: nn.Module, ranks: Sequence[int], targets: str, seed: int) -> None:
    """Pairs of adapters, if the net has none, and the choice of all parameters."""
    if choice_of(model) is not None:
        raise ConfigError("select: 'vida' learns all parameters and adapters of its own. Leave select out.")
    if any(isinstance(module, adapters.LowRank) for _, module in adapters.adapters_of(model)):
        adapters.choose(model, ["all"])
        return
    chosen = None if targets == "auto" else targets
    if chosen is None:
        with suppress(UnsupportedModelError):  # no pass can be tried: all layers, then
            chosen = "attention" if adapters.attention_layers(model) else None
    adapters.choose(model, ["all", {"kind": "vida", "ranks": ranks, "seed": seed, "targets": chosen}])
