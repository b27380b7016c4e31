"""Which samples count: filters, as weights of 0 and 1, that entropy methods put together."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_tta import collective
from lightning_tta.draws import random_orders
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.views.augmix import permute_patches


class Filter:
    """Keeps some samples of a batch. In a step :meth:`look`, :meth:`keep` and :meth:`accept` are called, in this order.

    Args of the methods: ``method``, which uses the filter; ``logits`` (B, K) and ``losses`` (B,) of its pass.
    """

    def attach(self, method: TTAMethod) -> None:
        """Declare on ``method`` what the filter remembers; once, in the method's constructor."""

    def look(self, method: TTAMethod, x: Tensor) -> None:
        """See the batch (B, C, H, W) before the pass that is to be filtered."""

    def keep(self, method: TTAMethod, logits: Tensor, losses: Tensor) -> Tensor:
        """Which samples to keep: (B,), bool."""
        raise NotImplementedError

    def accept(self, method: TTAMethod, logits: Tensor, kept: Tensor, taken: Tensor) -> None:
        """Learn from the samples that all filters kept, (B,) bool, if the step was ``taken``, 0-dimensional bool."""


class LowLoss(Filter):
    """Keeps samples whose loss is below a share of log K (EATA, SAR, DeYO); those whose loss is NaN it never keeps.

    Args:
        margin: The share, > 0; ``None``: every finite loss will do.
        name: Of the option, for messages.
    """

    def __init__(self, margin: float | None, name: str = "entropy_margin") -> None:
        if margin is not None:
            check_range(name, margin, 0, low_open=True)
        self.margin = margin

    def bound(self, logits: Tensor) -> float:
        """The largest loss, in nats, for logits (..., K)."""
        return math.inf if self.margin is None else self.margin * math.log(logits.shape[-1])

    def weights(self, logits: Tensor, losses: Tensor) -> Tensor:
        """EATA's weights, exp(bound - loss), (B,), without gradient; 1 without a margin."""
        losses = losses.detach()
        return torch.ones_like(losses) if self.margin is None else (self.bound(logits) - losses).exp()

    def keep(self, method: TTAMethod, logits: Tensor, losses: Tensor) -> Tensor:
        """Losses below the bound."""
        return losses.detach() < self.bound(logits)


class Diverse(Filter):
    """EATA's second filter: keeps samples whose prediction differs from the moving average of those kept before.

    ``cos(pbar, p) < margin``; all while there is no pbar yet, which is ``mean_probability`` in the method's state.

    Args:
        margin: Largest similarity, > 0; ``None``: no filter, but pbar is kept all the same.
    """

    def __init__(self, margin: float | None) -> None:
        if margin is not None:
            check_range("diversity_margin", margin, 0, low_open=True)
        self.margin = margin

    def attach(self, method: TTAMethod) -> None:
        """Declare pbar."""
        method.state("mean_probability", empty_by_class(method.model), source=NOT_YET)

    def keep(self, method: TTAMethod, logits: Tensor, losses: Tensor) -> Tensor:
        """What is unlike pbar."""
        probabilities = at_least_float32(logits.detach()).softmax(-1)
        average = method.sized("mean_probability", probabilities[0])
        if self.margin is None:
            return torch.ones_like(losses, dtype=torch.bool)
        similarity = cosine_similarity(average[None], probabilities, dim=-1)
        return (similarity < self.margin) | average.isnan().any()

    def accept(self, method: TTAMethod, logits: Tensor, kept: Tensor, taken: Tensor) -> None:
        """Move pbar towards the mean prediction of the kept samples."""
        probabilities = at_least_float32(logits.detach()).softmax(-1)
        move_average(method, "mean_probability", collective.mean(probabilities, kept), 0.9, taken)


class SureAsSource(Filter):
    """OSTTA's filter: keeps a sample while the net is at least as sure of the source's answer as the source was.

    ``p_theta(x_i)[c_i] >= p_theta0(x_i)[c_i]``, ``c_i`` the arg-max of the source model theta0, which sees the same
    batch statistics. Costs one forward pass without gradient; no second net is kept.

    Source: Lee et al., OSTTA, ICCV 2023, arXiv 2308.06879.
    """

    @torch.no_grad()
    def look(self, method: TTAMethod, x: Tensor) -> None:
        """Ask the source."""
        with method.at_source(), _usual_attention():
            self.confidence, self.answer = at_least_float32(method.infer(x)).softmax(-1).max(-1)

    def keep(self, method: TTAMethod, logits: Tensor, losses: Tensor) -> Tensor:
        """What the net is still as sure of."""
        probabilities = at_least_float32(logits.detach()).softmax(-1)
        kept = probabilities.gather(-1, self.answer[:, None]).squeeze(-1) >= self.confidence
        del self.confidence, self.answer
        method.note(kept_by_source_filter=collective.mean(kept.float()))
        return kept


class NeedsShape(Filter):
    """DeYO's second filter: keeps samples whose prediction suffers when the patches of the image are shuffled.

    ``PLPD = p_y(x) - p_y(x') > threshold``, y the arg-max of p(x), x' the image with its patches in another order.
    Costs one forward pass without gradient. BatchNorm takes the statistics of all shuffled images; method ``deyo``
    takes those of the samples that are sure.

    Args:
        threshold: In [-1, 1]; authors 0.2.
        patches: Along a side, >= 1; authors 4.
        seed: Of the shuffles.

    Source: Lee et al., DeYO, ICLR 2024, arXiv 2403.07366.
    """

    def __init__(self, threshold: float, patches: int = 4, seed: int = 0) -> None:
        check_range("plpd_threshold", threshold, -1, 1)
        self.threshold, self.patches, self.seed = threshold, patches, seed

    def attach(self, method: TTAMethod) -> None:
        """Declare the key of the next shuffles."""
        device = next(method.model.parameters()).device
        method.state("shuffles", torch.tensor([self.seed, 0], device=device))

    def look(self, method: TTAMethod, x: Tensor) -> None:
        """Keep the batch until the pass over it is known."""
        self.x = x

    @torch.no_grad()
    def keep(self, method: TTAMethod, logits: Tensor, losses: Tensor) -> Tensor:
        """What needs the object's shape."""
        x = self.x
        del self.x
        shuffled = permute_patches(x, self.patches, random_orders(method.value("shuffles"), len(x), self.patches**2))
        before, after = (at_least_float32(u).softmax(-1) for u in (logits, method.logits(shuffled)))
        highest, label = before.max(-1)
        plpd = highest - after.gather(-1, label[:, None]).squeeze(-1)
        method.note(plpd=collective.mean(plpd))
        return plpd > self.threshold

    def accept(self, method: TTAMethod, logits: Tensor, kept: Tensor, taken: Tensor) -> None:
        """Other shuffles for the next batch."""
        key = method.value("shuffles")
        method.write("shuffles", key + torch.arange(2, device=key.device))


def empty_by_class(model: torch.nn.Module) -> Tensor:
    """A number for each class (K,) that has no value yet, in at least float32: a state to declare.

    K is that of the last linear layer; :meth:`~lightning_tta.methods.base.state.State.sized` puts it right at the first
    batch.
    """
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return at_least_float32(like.detach()).new_full((linear[-1].out_features if linear else 0,), NOT_YET)


def move_average(method: TTAMethod, name: str, new: Tensor, momentum: float, where: Tensor) -> Tensor:
    """``momentum * average + (1 - momentum) * new`` into a state, where ``where``; ``new`` itself the first time.

    Returns:
        The average as it is now.
    """
    new = new.detach()
    average = method.sized(name, new)
    method.write(name, torch.where(average.isnan(), new, momentum * average + (1 - momentum) * new), where)
    return average


@contextmanager
def _usual_attention() -> Iterator[None]:
    """While active, torch's attention layers run without gradients as they do with them, to the last bit."""
    with _FASTPATH.lock:  # the switch is one for all threads
        if _FASTPATH.users == 0:
            _FASTPATH.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _FASTPATH.users += 1
    try:
        yield
    finally:
        with _FASTPATH.lock:
            _FASTPATH.users -= 1
            if _FASTPATH.users == 0:
                torch.backends.mha.set_fastpath_enabled(_FASTPATH.before)


class _Fastpath:
    lock, users, before = threading.Lock(), 0, True


_FASTPATH = _Fastpath()
