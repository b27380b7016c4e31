"""EM-INF: at each token of an answer the logits themselves are moved towards a surer prediction; no weight learns."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import at_least_float32, divergence, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.tokens import PROMPTS_DIFFER


class EMInf(TTAMethod):
    """Minimises the entropy of the next token over its logits, while an answer is written.

    With u the logits of the next token, u_0 those of the net, at each token that is written, for each prompt apart::

        Adam (lr) on  H(softmax(u)) + kl_weight * KL(softmax(u_0) || softmax(u)),  at most descent_steps steps,
        none once H < threshold

    With ``search="temperature"`` the same end is met by one number: the temperature tau in [0.01, 1] with
    ``H(softmax(u / tau)) = max(threshold, ratio * H(softmax(u)))``, by bisection; the order of tokens stays as it is.
    Of greedy answers this changes nothing; Adam's steps can change the likeliest token, but seldom do: it matters where
    tokens are drawn (``temperature > 0``).

    Parameters touched: none. State: none. Calls that do not generate return the net's own logits.

    Args:
        model: A causal language model.
        lr: >= 0. Authors: 0.1.
        descent_steps: At least 1. Authors: 5; 20 in a plain variant.
        threshold: In nats, >= 0. Authors: 0.3; of ``temperature`` 1e-6.
        kl_weight: >= 0. Authors: 0.001.
        search: ``adam``, or ``temperature``.
        ratio: Of ``temperature``, in (0, 1]. Authors: 0.2.

    Raises:
        UnsupportedModelError: If the net is no language model.

    Source: Agarwal et al., arXiv 2505.15134; both formulas from a copy of the authors' code. Differs from it: each
    prompt of a batch stops by itself, where the code compares the sum of the batch's entropies with the threshold; the
    bisection goes on to rounding, where the code ends within 0.1 nats.
    """

    about = About(
        does="moves the logits of each new token towards a surer prediction",
        learns="none",
        passes="1 / 0",
        needs="a language model",
        holds="-",
        suits="answers that are drawn",
        formula="code",
        paper="arXiv 2505.15134",
    )

    tasks = frozenset({"tokens"})
    loss_on: ClassVar[str] = "auto"
    step_on_host = PROMPTS_DIFFER
    no_plain_net = "it changes the logits of each token while it answers. Deploy the method itself"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 0.1,
        descent_steps: int = 5,
        threshold: float = 0.3,
        kl_weight: float = 0.001,
        search: Literal["adam", "temperature"] = "adam",
        ratio: float = 0.2,
    ) -> None:
        super().__init__(model)
        check_range("lr", lr, 0)
        check_range("descent_steps", descent_steps, 1, integer=True)
        check_range("threshold", threshold, 0)
        check_range("kl_weight", kl_weight, 0)
        check_choice("search", search, ("adam", "temperature"))
        check_range("ratio", ratio, 0, 1, low_open=True)
        self.lr, self.descent_steps, self.threshold = lr, descent_steps, threshold
        self.kl_weight, self.search, self.ratio = kl_weight, search, ratio

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The net's own logits."""
        return self.infer(x)

    def decode(self, logits: Tensor) -> Tensor:
        """Logits (B, V) of the next token, moved."""
        start = at_least_float32(logits.detach())
        return self._descended(start) if self.search == "adam" else start / self._temperature(start)

    def _descended(self, start: Tensor) -> Tensor:
        """Adam on each row, until it is sure enough."""
        with outside_inference_mode(), torch.enable_grad():
            start = start.clone()
            u, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
            for number in range(1, self.descent_steps + 1):
                u = u.detach().requires_grad_()
                uncertain = entropy(u)
                losses = uncertain + self.kl_weight * divergence(start, u, "kl")
                (gradient,) = torch.autograd.grad(losses.sum(), [u])
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
                mean, square = first / (1 - 0.9**number), second / (1 - 0.999**number)
                going = (uncertain.detach() >= self.threshold)[:, None]
                u = torch.where(going, u.detach() - self.lr * mean / (square.sqrt() + 1e-8), u.detach())
        return u

    def _temperature(self, start: Tensor) -> Tensor:
        """The temperature (B, 1) by bisection of its logarithm."""
        whole = entropy(start)
        target = torch.minimum(whole, (self.ratio * whole).clamp_min(self.threshold))
        low, high = torch.full_like(whole, math.log(0.01)), torch.zeros_like(whole)
        for _ in range(50):
            middle = (low + high) / 2
            too_sure = entropy(start / middle.exp()[:, None]) < target
            low, high = torch.where(too_sure, middle, low), torch.where(too_sure, high, middle)
        return high.exp()[:, None]
