"""SPA: deteriorated views of an image must predict what the image itself predicts."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import at_least_float32, entropy, soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import Diverse, LowLoss
from lightning_tta.methods.components.predictor import make_predictor
from lightning_tta.views.deteriorated import noised, without_frequencies

Auxiliary = Literal["none", "tent", "eta"]


class SPA(GradientMethod):
    """Minimises the divergence of two deteriorated views from the prediction of the image, where that one is surer.

    With features f, frozen head g and a predictor h (linear, no bias, identity at the start), of a view x'::

        p = softmax g(f(x))    q = softmax g(h(f(x')))
        L = sum over both views of mean_kept KL(stopgrad(p) || q) + auxiliary_weight * L_auxiliary

    A sample is kept for a view if ``max_k p_k > max_k q_k``; a view that keeps none adds nothing, and if neither keeps
    any there is no step. The views (:mod:`~lightning_tta.views.deteriorated`): one lacks low frequencies; the other is
    ``(1 - a^2) x + a^2 v``, v Gaussian noise. a, one number for each of ``cells`` x ``cells`` parts of the image,
    learns to *raise* L, by SGD, and is then scaled to a mean of ``a^2`` of ``noise_ratio``, and clipped to [-1, 1].

    Parameters touched: weight and bias of every normalisation layer, h and a; BatchNorm uses batch statistics, in each
    pass those of its images. State: these, three optimizers, and the number of draws. Per batch and step: three forward
    passes and one backward pass, through two of them, or three with an auxiliary loss. Returns the logits before the
    step, without h. ``stats``: ``kept_by_frequencies`` and ``kept_by_noise``, shares of the batch.

    Args:
        model: A classifier with normalisation layers that ends in one linear layer.
        lr: Learning rate of the norm parameters, >= 0. Authors (ImageNet, batch 64): 2.5e-3 for ResNet50-GN, 1e-2 for
            ViT-B. They give no CIFAR setting.
        predictor_lr: Of h, >= 0. Authors: 2.5e-2, and 5e-2 for ViT-B.
        frequency_ratio: Probability with which a frequency is missing, in [0, 1]. Authors: 0.1, and 0.2 for ViT-B.
        low_share: Share of each side of the spectrum whose frequencies may be missing, in (0, 1]. Authors: 0.2.
        noise_ratio: In [0, 1]. Authors: 0.1, and 0.4 for ViT-B.
        noise_lr: Of a, >= 0. Authors: 1.
        cells: Along a side, >= 1. Authors: patches of 16 pixels in 224, so 14.
        auxiliary: ``tent``: the mean entropy of p; ``eta``: of reliable and diverse samples, weighted, as
            :class:`~lightning_tta.methods.eta.ETA` with the authors' ImageNet margins, 0.4 and 0.05; ``none``.
        auxiliary_weight: >= 0. Authors: 0.1.
        seed: Of the draws, which are the same on every device.
        head: Name of the last linear layer where the search finds another.
        **options: ``optimizer``: authors ``sgd``; ``momentum``: authors 0.9, of a too; ``weight_decay``, ``steps``,
            ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no affine normalisation layer, or does not end in a linear layer.

    Source: SPA, ICML 2025, arXiv 2504.08010. The formulas are from the authors' code. Differs from it: frequencies and
    cells follow the size of the image (there 224 pixels); images are deteriorated as pixels, which is the same for
    ViT-B's normalisation, and for others not (there the normalised ones, noise of mean 0 and deviation 1, clipped to
    [-1, 1]); ``a^2`` starts at ``noise_ratio`` (there at 0.4 in the first stream); an empty selection is no NaN.
    """

    about = About(
        does="divergence of two views (low frequencies missing; learned noise) from the image's prediction",
        learns="norm layers, predictor, noise",
        passes="3 / 1",
        needs="norm layers, linear head",
        holds="a D x D predictor",
        suits="shuffled, reset at each domain",
        formula="code",
        paper="ICML 2025, arXiv 2504.08010",
    )

    uses_batch_statistics = True
    synchronized = False  # the draws are those of a batch's first samples

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 2.5e-3,
        predictor_lr: float = 2.5e-2,
        optimizer: OptimizerName = "sgd",
        frequency_ratio: float = 0.1,
        low_share: float = 0.2,
        noise_ratio: float = 0.1,
        noise_lr: float = 1.0,
        cells: int = 14,
        auxiliary: Auxiliary = "none",
        auxiliary_weight: float = 0.1,
        seed: int = 0,
        head: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, **options)
        check_range("frequency_ratio", frequency_ratio, 0, 1)
        check_range("low_share", low_share, 0, 1, low_open=True)
        check_range("noise_ratio", noise_ratio, 0, 1)
        check_range("cells", cells, 1, integer=True)
        check_choice("auxiliary", auxiliary, ("none", "tent", "eta"))
        check_range("auxiliary_weight", auxiliary_weight, 0)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.frequency_ratio, self.low_share, self.noise_ratio = frequency_ratio, low_share, noise_ratio
        self.auxiliary, self.auxiliary_weight = auxiliary, auxiliary_weight
        self.split = HeadSplit(self.model, head)
        self.predictor = make_predictor(self.split)
        self.reliable, self.diverse = LowLoss(0.4), Diverse(0.05)
        if auxiliary == "eta":
            self.diverse.attach(self)
        (first, *_) = self.learn(self.select("norm"))
        self.learn({"weight": self.predictor.weight}, "predictor.", optimizer="predictor", lr=predictor_lr)
        like = at_least_float32(first.detach()).new_full((cells, cells), math.sqrt(noise_ratio))
        self.noise = nn.Parameter(like)
        self.learn({"noise": self.noise}, "", optimizer="noise", kind="sgd", lr=noise_lr, weight_decay=0.0)
        self.optimizers["noise"].param_groups[0]["maximize"] = True
        self.state("draws", torch.tensor([seed, 0], device=first.device))  # the key of the next one

    def step(self, x: Tensor) -> Tensor:
        """One step of both views together."""
        with torch.set_grad_enabled(self.auxiliary != "none"):
            logits = self.logits(x)
        target, key = logits.detach(), self.value("draws")
        after = torch.arange(2, device=key.device)  # its counter is the next one
        views = {
            "frequencies": without_frequencies(x, key, self.frequency_ratio, self.low_share),
            "noise": noised(x, key + after, self.noise.square()),
        }
        sure = at_least_float32(target).softmax(-1).amax(-1)
        losses, weights = [], []
        for name, view in views.items():
            features, _ = self.features(view)
            worse = self.split.head(self.predictor(features.to(self.predictor.weight.dtype)))
            kept = (sure > at_least_float32(worse.detach()).softmax(-1).amax(-1)).to(sure.dtype)
            losses.append(soft_cross_entropy(target, worse) - entropy(target))
            weights.append(kept / kept.sum().clamp(min=1))
            self.note(**{f"kept_by_{name}": kept.mean()})
        share = torch.cat(weights)
        extra, counting = self._auxiliary(logits)
        taken = self.descend(torch.cat(losses) * share.sum(), share, extra)  # the sum: views that keep a sample
        if self.auxiliary == "eta":
            self.diverse.accept(self, target, counting, taken & counting.any())
        noise = self.noise.detach()
        scale = (self.noise_ratio / noise.square().mean().clamp(min=torch.finfo(noise.dtype).tiny)).sqrt()
        self.write("noise", (noise * scale).clamp(-1, 1), taken)
        self.write("draws", key + 2 * after, taken)
        return logits

    def _auxiliary(self, logits: Tensor) -> tuple[Tensor | float, Tensor]:
        """The weighted auxiliary loss, and which samples it counts."""
        counting = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if self.auxiliary == "none":
            return 0.0, counting
        losses = entropies = entropy(logits)
        if self.auxiliary == "eta":
            counting = self.reliable.keep(self, logits, entropies) & self.diverse.keep(self, logits, entropies)
            losses = self.reliable.weights(logits, entropies) * entropies
        mean = torch.where(counting, losses, 0).sum() / counting.sum().clamp(min=1)
        return self.auxiliary_weight * mean, counting
