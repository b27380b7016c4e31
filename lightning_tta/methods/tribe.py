"""TRIBE: self-training with three nets, anchored at the source, on BatchNorm statistics that are balanced by class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.passes import safe_checkpoints
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.account import Statistics
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.class_statistics import Balanced
from lightning_tta.methods.components.drawing import DrawingMethod
from lightning_tta.methods.components.memory_statistics import Prefixed, check_tracked

NETS = ("teacher", "student", "anchor")


class TRIBE(DrawingMethod):
    """Minimises the cross-entropy of a view under the teacher's labels, and the teacher's distance from the source.

    Teacher t and student s have the same weights, the anchor a those of the source; each has BatchNorm statistics of
    its own, balanced by class (:class:`~lightning_tta.methods.components.class_statistics.Balanced`, BBN). The teacher
    predicts with its statistics as they are; these labels are those of the batch for the statistics of all three, which
    then take the batch in. With logits u of passes that have it in them, one random view v, and K classes::

        y = arg-max u_t(x)    kept: H(softmax(u_t(x))) < entropy_margin ln K
        L = mean_kept CE(y, u_s(v(x))) + weight * mean_kept mean_k (u_t(x)_k - u_a(x)_k)^2

    with gradient through teacher and student.

    Parameters touched: weight and bias of the normalisation layers. State: these, the optimizer, 3 K x C x 2 floats of
    statistics (C channels of all BatchNorm layers together), and the number of steps, from which views are drawn.
    Returns the teacher's logits, before the step. Passes: four forward and one backward. ``stats``: ``kept``.

    Args:
        model: A classifier with normalisation layers.
        entropy_margin: Bound of the entropy as a share of ln K, > 0; authors 0.05 (CIFAR-10), 0.2 (CIFAR-100), 0.4
            (ImageNet).
        weight: Of the distance, >= 0; authors 0.5.
        eta: Step of the statistics, in (0, 1]; authors 0.01 (CIFAR-10), 0.05 (CIFAR-100), 0.5 (ImageNet).
        gamma: Share of a change that all classes take, in [0, 1]; authors 0, 0.1 and 0.5.
        max_bytes: Bound of the statistics of one net; beyond it classes share rows.
        seed: Of the views.
        **options: ``lr`` and ``optimizer``: authors 1e-3 with ``adam`` at batch 64. ``momentum``, ``weight_decay``
            (authors 0), ``steps`` (authors 1), ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or a BatchNorm layer without source
            statistics, or BatchNorm layers and no linear layer at its end.

    Source: Su et al., TRIBE, AAAI 2024, arXiv 2309.14949. Formula from the authors' code, in which the teacher is no
    moving average, but shares the student's weights. Differs from it: no gradient through the statistics; the variance
    between classes is that of a population; what all classes take with ``gamma`` is a mean over all of them (there over
    those in the batch), from the variance before the batch; where nothing is kept there is no step (there NaN); the net
    stays in eval mode (no dropout); GroupNorm and LayerNorm nets are allowed; a batch that is not finite leaves no
    trace.
    """

    about = About(
        does="cross-entropy of a view to hard labels, and distance to the source, on balanced BatchNorm",
        learns="norm layers",
        passes="4 / 1",
        needs="norm layers, a linear head",
        holds="3 x K means and variances a layer",
        suits="sorted by class, rare classes, long",
        formula="code",
        paper="AAAI 2024, arXiv 2309.14949",
    )

    own_statistics = "each of its three nets has balanced ones, with eta and gamma"
    draws = 1
    step_on_host = "it asks for the number of steps, from which it draws the view"

    def __init__(
        self,
        model: nn.Module,
        *,
        entropy_margin: float = 0.05,
        weight: float = 0.5,
        eta: float = 0.01,
        gamma: float = 0.0,
        max_bytes: int = 2**26,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, seed=seed, **options)
        check_range("entropy_margin", entropy_margin, 0, low_open=True)
        check_range("weight", weight, 0)
        self.entropy_margin, self.weight = entropy_margin, weight
        self.learn(self.select("norm"))
        self.balanced: dict[str, tuple[TTAMethod, Balanced]] = {}
        if batch_norm_layers(self.model):
            check_tracked(self)
            assert self.split  # which refuses a net without a head
            for net in NETS:
                seen_as = cast(TTAMethod, Prefixed(self, net))
                self.balanced[net] = seen_as, Balanced(seen_as, eta=eta, gamma=gamma, max_bytes=max_bytes)

    def step(self, x: Tensor) -> Tensor:
        """Predict; then all statistics take the batch in, and student and teacher step."""
        return cast(Tensor, self.replayed("step", self._step, x, self.view(x)))

    def running(self) -> AbstractContextManager[None]:
        """With the teacher's statistics."""
        for method, statistics in self.balanced.values():
            statistics.running(method)  # makes the layers' forwards, while no others are in place
        if not self.balanced:
            return nullcontext()
        method, statistics = self.balanced["teacher"]
        return statistics.running(method)

    def stream_statistics(self) -> Statistics | None:
        """The teacher's."""
        if not self.balanced:
            return None
        method, statistics = self.balanced["teacher"]
        return statistics.statistics(method, self.model)

    @contextmanager
    def taking_in(self, net: str) -> Iterator[None]:
        """While active, a pass takes the batch into the statistics of a net, and is normalised with them."""
        if not self.balanced:
            yield
            return
        method, statistics = self.balanced[net]
        statistics.begin(method)
        try:
            with safe_checkpoints(recompute=False), statistics.running(method):  # the backward pass is outside
                yield
        finally:
            statistics.end()

    def _step(self, x: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad():
            predicted = self.logits(x)
        with ExitStack() as stack:
            for method, statistics in self.balanced.values():
                stack.callback(statistics.drop)
                statistics.label(method, predicted.argmax(1))
            source = {name.removeprefix("model."): self.source_value(name) for name in self.adaptable}
            with torch.no_grad(), self.taking_in("anchor"):  # first: graphs need the weights as they are
                anchor = at_least_float32(self.logits(x, source))
            with self.taking_in("teacher"):
                teacher = at_least_float32(self.logits(x, accounted=False))
            with self.taking_in("student"):
                student = at_least_float32(self.logits(view))
            kept = entropy(teacher.detach()) < self.entropy_margin * math.log(teacher.shape[1])
            self.note(kept=kept.float().mean())
            losses = cross_entropy(student, teacher.argmax(1), reduction="none")
            taken = self.descend(losses + self.weight * (teacher - anchor).square().mean(1), kept)
            with torch.no_grad():
                nothing = torch.isfinite(teacher.sum() + student.sum() + anchor.sum() + predicted.sum()) & ~kept.any()
                self.count("skipped_steps", ~kept.any() & ~nothing)
                for method, statistics in self.balanced.values():
                    statistics.write(method, [statistics.seen(method)], taken | nothing, len(x))
                self.count_step(taken | nothing)
        return predicted
