"""TLM: a language model learns to expect its prompts better; the answers are not looked at."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta import collective
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.base.tokens import PROMPTS_DIFFER


class TLM(GradientMethod):
    """Minimises the perplexity of the prompts that the model finds hard.

    With c_b the mean cross-entropy of the tokens of prompt b, each given those before it::

        L = mean over b with c_b > threshold of  scale * exp(stopgrad(c_b) - threshold) * c_b

    Parameters touched: LoRA of the query and value projections (rank 8), or what ``select`` names. State: these and the
    optimizer. Per batch and step: one forward, one backward pass; no step if no prompt is kept. Returns the logits
    before the step. ``stats``: ``kept``, and ``prompt_loss``, the mean of c_b.

    Args:
        model: A causal language model. Positions that count are those of the prompt (``loss_on: prompt``) unless the
            task says otherwise.
        lr: Learning rate, >= 0. Authors: 5e-5.
        optimizer: ``adamw`` (authors), ``adam``, ``sgd`` or ``nesterov``.
        threshold: In nats, >= 0. Authors: 3, of models with a vocabulary of words. A net of characters has lower
            losses: choose it lower.
        scale: > 0. Authors: 0.1.
        **options: ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net is no language model.

    Source: Hu et al., ICML 2025, arXiv 2505.20633. Settings from the authors' code, which takes prompts one by one, in
    chunks of 8 that are answered first; the trainer with the formula, and that the weight has no gradient, from a
    repository that builds on it. There, offline training judges prompts by the source's loss; this is the online form.
    """

    about = About(
        does="cross-entropy of the prompt's own tokens, of prompts above a threshold",
        learns="LoRA",
        passes="1 / 1",
        needs="a language model",
        holds="-",
        suits="prompts of another domain or format",
        formula="code",
        paper="ICML 2025, arXiv 2505.20633",
    )

    tasks = frozenset({"tokens"})
    loss_on: ClassVar[str] = "prompt"
    step_on_host = PROMPTS_DIFFER
    synchronized = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-5,
        optimizer: OptimizerName = "adamw",
        threshold: float = 3.0,
        scale: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, **options)
        check_range("threshold", threshold, 0)
        check_range("scale", scale, 0, low_open=True)
        self.threshold, self.scale = threshold, scale
        self.learn(self.select("norm"))

    def step(self, x: Tensor) -> Tensor:
        """One step on the prompts above the threshold."""
        assert self.rows is not None
        features, logits = self.features(x)
        losses = self.by_rows(self._losses, features, self.task.ids(x).roll(-1, 1))  # type: ignore[attr-defined]
        number = self.rows.sum(1)
        each = losses.sum(1) / number.clamp_min(1)
        fixed = each.detach()
        kept = (fixed > self.threshold) & (number > 0)
        self.note(kept=collective.mean(kept.float()), prompt_loss=collective.mean(fixed, number > 0))
        self.descend(self.scale * (fixed - self.threshold).exp() * each, kept)
        return logits

    def _losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the next token, of each row."""
        return cross_entropy(at_least_float32(self.split.head(features)), targets, reduction="none")
