"""SLOT: a vector for each prompt, added to the last hidden states, with which the model expects the prompt better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from lightning_tta import collective
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.tokens import PROMPTS_DIFFER


class SLOT(TTAMethod):
    """Minimises, for each prompt anew, the cross-entropy of its tokens over one vector d before the head.

    With the hidden states z_t after the final norm and the frozen head g, from d = 0, ``descent_steps`` steps of AdamW
    on ``mean_t CE(g(z_t + d), token t + 1)`` over the prompt; then every token is predicted by ``g(z + d)``, those of
    the answer too (:meth:`generate`). The net runs once for it; only the head is differentiated.

    Parameters touched: none of the net's. State: none: each prompt of a batch has its d, and the next one starts
    from 0. Returns the logits with d. ``stats``: ``prompt_loss``, before the steps.

    Args:
        model: A causal language model. Positions that count are those of the prompt (``loss_on: prompt``).
        lr: Learning rate, >= 0. Authors: 0.1.
        descent_steps: At least 1. Authors: 5.
        weight_decay: >= 0. Authors: 1e-8.
        eps: Of AdamW, > 0. Authors: 1e-5.

    Raises:
        UnsupportedModelError: If the net is no language model, or does not end in its head.

    Source: Hu et al., arXiv 2505.12392; formula from the authors' code. Differs from it: each prompt of a batch has a
    vector of its own, where the code has one for the whole batch, padding included, and gives it one prompt at a time;
    the vector is in float32 where the net is in half precision.
    """

    about = About(
        does="a vector for each prompt before the head, by the cross-entropy of the prompt's own tokens",
        learns="none",
        passes="1 / 5, of the head",
        needs="a language model",
        holds="a vector for each prompt of the batch",
        suits="prompts of any kind: each for itself",
        formula="code",
        paper="arXiv 2505.12392",
    )

    tasks = frozenset({"tokens"})
    loss_on: ClassVar[str] = "prompt"
    step_on_host = PROMPTS_DIFFER
    returns = "after the step"
    no_plain_net = "it has another vector for each prompt. Deploy the method itself"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 0.1,
        descent_steps: int = 5,
        weight_decay: float = 1e-8,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(model)
        check_range("lr", lr, 0)
        check_range("descent_steps", descent_steps, 1, integer=True)
        check_range("weight_decay", weight_decay, 0)
        check_range("eps", eps, 0, low_open=True)
        self.lr, self.descent_steps, self.weight_decay, self.eps = lr, descent_steps, weight_decay, eps
        self._vector: Tensor | None = None  # of the prompts that are being answered

    def step(self, x: Tensor) -> Tensor:
        """The logits with each prompt's vector."""
        return self.infer(x)

    def infer(self, x: Tensor) -> Tensor:
        """The same."""
        with torch.no_grad():
            features, _ = self.features(x)
        vector = self._solved(x, features.detach())
        with torch.no_grad():
            logits: Tensor = self.split.head(features + vector.to(features))
        return logits

    def _solved(self, x: Tensor, features: Tensor) -> Tensor:
        """The vector (B, 1, D) of each prompt, from its hidden states (B, T, D)."""
        rows = self.task.rows(x)
        assert rows is not None
        targets = self.task.ids(x).roll(-1, 1).flatten()  # type: ignore[attr-defined]
        index, number = rows.flatten().nonzero()[:, 0], rows.sum(1).clamp_min(1)
        with outside_inference_mode(), torch.enable_grad():
            flat = (features.clone() if features.is_inference() else features).flatten(0, 1)
            vector = at_least_float32(torch.zeros_like(features[:, 0])).requires_grad_()
            optimizer = AdamW([vector], lr=self.lr, weight_decay=self.weight_decay, eps=self.eps)
            for step in range(self.descent_steps):
                vector.grad, each = torch.zeros_like(vector), vector.new_zeros(len(vector))
                for part in torch.split(index, self.task.chunk):  # type: ignore[attr-defined]
                    prompt = part // rows.shape[1]
                    logits = at_least_float32(self.split.head(flat[part] + vector[prompt].to(flat)))
                    losses = cross_entropy(logits, targets[part], reduction="none") / number[prompt]
                    vector.grad += torch.autograd.grad(losses.sum(), [vector])[0]  # so no graph outlives its part
                    each.index_add_(0, prompt, losses.detach().to(each))
                if step == 0:
                    self.note(prompt_loss=collective.mean(each, rows.any(1)))
                optimizer.step()
        self.count("backwards", self.descent_steps)
        return vector.detach()[:, None]

    def generate(self, batch: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """As of every method, with each prompt's vector."""
        with self.hold():
            x = self.task.take_in(batch)
            before, self.scalars = self.scalars, ({}, {})
            try:
                with torch.no_grad(), self.computing(x.device):
                    features, _ = self.split.before_head(x)
                    self._vector = self._solved(x, features.detach())
                return super().generate(batch, **options)
            finally:
                self._vector, self.scalars = None, before

    def generating(self) -> AbstractContextManager[None]:
        """While active, the head sees hidden states with the vector of their prompt."""
        return self._shifted(self._vector)

    @contextmanager
    def _shifted(self, vector: Tensor | None) -> Iterator[None]:
        assert vector is not None
        handle = self.split.layer.register_forward_pre_hook(lambda layer, given: (given[0] + vector.to(given[0]),))
        try:
            yield
        finally:
            handle.remove()
