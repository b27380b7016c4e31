"""ETA: entropy minimisation on reliable and new samples; EATA without its Fisher penalty, so without source data."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.entropy import EntropyMethod
from lightning_tta.methods.components.filters import Diverse, LowLoss


class ETA(EntropyMethod):
    """Minimises the weighted entropy of reliable, non-redundant samples.

    A sample is kept if ``H(p) < E0 = entropy_margin * ln K`` and ``cos(pbar, p) < diversity_margin``, where pbar is
    the moving average (0.9) of the mean kept p, unknown before the first step. Over the kept samples::

        L = mean [ exp(E0 - stopgrad(H)) * H ]

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these,
    the optimizer and pbar. Per batch and step: one forward and one backward pass; no step when nothing is kept. Returns
    the logits before the step. ``stats["kept"]`` is the share of kept samples.

    With a reset every 1000 batches it is RDumb (Press et al., NeurIPS 2023, arXiv 2306.05401).

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Authors: 5e-3 (CIFAR-10), 2.5e-4 (ImageNet), SGD at batch 64.
        optimizer: ``sgd`` (authors), ``nesterov``, ``adam`` or ``adamw``.
        entropy_margin: E0 as a share of ln K, > 0; authors 0.4. ``None``: no such filter, and weights of 1.
        diversity_margin: Largest similarity to pbar, > 0; authors 0.4 (CIFAR-10), 0.05 (ImageNet). ``None``: no filter.
        **options: ``entropy``: H; pbar stays as it is. ``source_filter``, ``momentum``, ``weight_decay``, ``steps``,
            ``lr_batch_size``. Over tokens each token is a sample; AdamW, 5e-5, on LoRA, and no filter by diversity.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Niu et al., EATA, ICML 2022, arXiv 2204.02610, where it is an ablation. Differs from the authors' code:
    :meth:`reset` forgets pbar, which would carry one stream's classes into the next; pbar moves only with a step; the
    net stays in eval mode.
    """

    about = About(
        does="weighted entropy of reliable and new samples; with reset_every 1000 it is RDumb (2306.05401)",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers",
        holds="a mean probability",
        suits="shuffled, long",
        formula="code and paper",
        paper="ICML 2022, arXiv 2204.02610",
    )

    synchronized = True
    tasks = frozenset({"images", "tokens", "pixels"})
    task_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tokens": {"lr": 5e-5, "optimizer": "adamw", "diversity_margin": None}
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-3,
        optimizer: OptimizerName = "sgd",
        entropy_margin: float | None = 0.4,
        diversity_margin: float | None = 0.4,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, **options)
        self.reliable = LowLoss(entropy_margin)
        self.add_filter(self.reliable)
        if diversity_margin is not None or not self.task.in_chunks:  # a mean over a large vocabulary has its price
            self.add_filter(Diverse(diversity_margin))
        self.learn(self.select("norm"))

    def step(self, x: Tensor) -> Tensor:
        """One step on the samples that are kept."""
        self.look(x)
        logits, entropies = self.judged(x, self.entropy)
        kept = self.keep(logits, entropies)
        losses = self.reliable.weights(logits, entropies) * entropies
        taken = self.descend(losses, kept, extra=self.penalty())
        self.accept(logits, kept, taken)
        return logits

    def penalty(self) -> Tensor | float:
        """A term that holds the weights near the source; here none."""
        return 0.0
