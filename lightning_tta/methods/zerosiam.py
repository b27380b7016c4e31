"""ZeroSiam: asymmetric entropy minimisation that does not collapse."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import batch_norm_layers, norm_layers
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import divergence
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.entropy import EntropyMethod
from lightning_tta.methods.components.filters import Diverse, LowLoss, NeedsShape
from lightning_tta.methods.components.objectives import EntropyName
from lightning_tta.methods.components.predictor import make_predictor

Predictor = Literal["learned", "identity", "random"]
Divergence = Literal["symmetric_kl", "kl", "reverse_kl", "js", "mse"]


def default_learning_rates(model: nn.Module) -> tuple[float, float]:
    """The authors' learning rates (norm parameters, predictor) at batch 64 for the kind of net ``model`` is.

    Told apart by structure: GroupNorm (their ResNet50-GN) 2.5e-3, 2.5e-2; LayerNorm of one width (ViT) from 768 up
    (Base) 5e-3, 5e-3, else (Small) 1e-3, 1e-2; LayerNorm of several widths with attention (Swin-T) 5e-4, 2.5e-3, and
    without (ConvNeXt-T) 2.5e-4, 2.5e-3. For BatchNorm nets the authors give none: the GroupNorm ratio with Tent's
    ImageNet rate, 2.5e-4 and 2.5e-3, is our choice.
    """
    if batch_norm_layers(model):
        return 2.5e-4, 2.5e-3
    layers = list(norm_layers(model).values())
    if any(isinstance(layer, nn.GroupNorm) for layer in layers):
        return 2.5e-3, 2.5e-2
    widths = {p.shape[0] for layer in layers for p in layer.parameters(recurse=False)}
    if len(widths) <= 1:
        return (5e-3, 5e-3) if widths and min(widths) >= 768 else (1e-3, 1e-2)
    attention = any(
        isinstance(m, nn.MultiheadAttention) or (isinstance(m, nn.Linear) and m.out_features == 3 * m.in_features)
        for m in model.modules()
    )
    return (5e-4, 2.5e-3) if attention else (2.5e-4, 2.5e-3)


class ZeroSiam(EntropyMethod):
    """Minimises the entropy of an online branch plus its symmetric KL divergence to a stop-gradient reference branch.

    With features z, frozen head g and a predictor h (linear, no bias, identity at the start)::

        u = g(z)    t = stopgrad(u)    o = g(h(z))
        L = mean_b [ H(p_o) + alpha * (KL(p_t || p_o) + KL(p_o || p_t)) ]

    Parameters touched: weight and bias of every normalisation layer, and h, by two SGD optimizers; BatchNorm uses
    batch statistics. State: these. Per batch and step: one forward and one backward pass (the second branch is the
    head only). Returns u, the reference branch before the step.

    Of a language model the same over the tokens that count, with the predictor between the final norm and the frozen
    head; AdamW, on LoRA of the query and value projections where there are such. The paper does not give its rates,
    tokens and steps: 5e-5 is that of TLM (arXiv 2505.20633), four times that for h is our choice.

    ``stats`` has the collapse measures, and ``predictor_distance``, the Frobenius distance of h from the identity.

    Args:
        model: A classifier with normalisation layers that ends in one linear layer.
        lr: Learning rate of the norm parameters at ``lr_batch_size`` images, >= 0; ``None``: by architecture, see
            :func:`default_learning_rates`.
        predictor_lr: Same for h.
        alpha: Weight of the alignment term, >= 0.
        divergence: The alignment term, of p_t and p_o, see :func:`~lightning_tta.losses.divergence`; ``symmetric_kl``
            above, the authors'; the paper tries the others too.
        momentum: Momentum of both optimizers, in [0, 0.9999].
        optimizer: Of both: ``sgd`` (authors, images), ``nesterov``, ``adam`` or ``adamw``.
        steps: Steps per batch, >= 1.
        predictor: ``learned``; controls: ``identity`` (h fixed: Tent) or ``random`` (h fixed at a seeded orthogonal
            matrix).
        predictor_seed: Seed of ``random``.
        lr_batch_size: Learning rates are multiplied by (batch size / this); ``None`` takes them as given.
        head: Name of the last linear layer where the search finds another.
        entropy: ``softmax``, H above, or ``come``, :func:`~lightning_tta.losses.come_entropy` in its place.
        source_filter: Take the mean over the samples that OSTTA's filter keeps, by the reference branch
            (:class:`~lightning_tta.methods.components.filters.SureAsSource`), one more forward pass; no step if it
            keeps none.
        entropy_margin: Also leave out samples with an entropy above this share of ln K (EATA's and DeYO's first
            filter), > 0; ``None``: no such filter, as the authors.
        diversity_margin: EATA's second filter (:class:`~lightning_tta.methods.components.filters.Diverse`), likewise.
        plpd_threshold: DeYO's second filter (:class:`~lightning_tta.methods.components.filters.NeedsShape`), likewise;
            one more forward pass.

    Raises:
        ConfigError: If these last two are set over other input than images.
        UnsupportedModelError: If the net has no affine normalisation layer, or does not end in a linear layer.

    Source: ZeroSiam, ICLR 2026, arXiv 2509.23183. Differs from the authors' first code: :meth:`reset` restores norm
    parameters, h and both optimizers, not h alone.
    """

    about = About(
        does="entropy behind a predictor, and the divergence of its branch from the plain one, which resists collapse",
        learns="norm layers, predictor",
        passes="1 / 1",
        needs="norm layers, linear head",
        holds="a D x D predictor",
        suits="sorted by class, batches of one, mixed",
        formula="code and paper",
        paper="ICLR 2026, arXiv 2509.23183",
    )

    synchronized = True
    tasks = frozenset({"images", "tokens", "pixels"})
    task_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tokens": {"lr": 5e-5, "predictor_lr": 2e-4, "optimizer": "adamw", "lr_batch_size": None}
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        predictor_lr: float | None = None,
        alpha: float = 1.0,
        momentum: float = 0.9,
        optimizer: OptimizerName = "sgd",
        steps: int = 1,
        predictor: Predictor = "learned",
        predictor_seed: int = 0,
        lr_batch_size: int | None = 64,
        head: str | None = None,
        entropy: EntropyName = "softmax",
        source_filter: bool = False,
        divergence: Divergence = "symmetric_kl",
        entropy_margin: float | None = None,
        diversity_margin: float | None = None,
        plpd_threshold: float | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer=optimizer,
            momentum=momentum,
            steps=steps,
            lr_batch_size=lr_batch_size,
            entropy=entropy,
            source_filter=source_filter,
        )
        check_range("alpha", alpha, 0)
        check_choice("predictor", predictor, ("learned", "identity", "random"))
        check_choice("divergence", divergence, get_args(Divergence))
        self.alpha, self.divergence = alpha, divergence
        if self.task.kind != "images" and (diversity_margin, plpd_threshold) != (None, None):
            raise ConfigError(
                f"diversity_margin and plpd_threshold are for images with one class each; this net's task is "
                f"{self.task.kind!r}. Leave them out."
            )
        if entropy_margin is not None:
            self.add_filter(LowLoss(entropy_margin))
        if diversity_margin is not None:
            self.add_filter(Diverse(diversity_margin))
        if plpd_threshold is not None:
            self.add_filter(NeedsShape(plpd_threshold))
        self.split = HeadSplit(self.model, head)
        default_lr, default_predictor_lr = default_learning_rates(self.model)
        matrix = torch.eye(self.split.num_features)
        if predictor == "random":
            matrix = nn.init.orthogonal_(matrix, generator=torch.Generator().manual_seed(predictor_seed))
        self.predictor = make_predictor(self.split, matrix)
        self.learn(self.select("norm"), lr=default_lr if lr is None else lr)
        if predictor == "learned":
            predictor_lr = default_predictor_lr if predictor_lr is None else predictor_lr
            self.learn({"weight": self.predictor.weight}, "predictor.", optimizer="predictor", lr=predictor_lr)

    def step(self, x: Tensor) -> Tensor:
        """One step of the asymmetric objective on the samples that the filters keep."""
        self.look(x)
        features, logits = self.features(x)
        features = features.to(self.predictor.weight.dtype)  # of a net with an autocast of its own
        entropies, alignment = self.by_rows(self._terms, features, logits.detach())
        kept = self.keep(logits, entropies)
        taken = self.descend(entropies + self.alpha * alignment, kept)
        self.accept(logits, kept, taken)
        self.note(online_entropy=self.mean(entropies, kept), alignment=self.mean(alignment, kept))
        identity = torch.eye(self.split.num_features, device=features.device, dtype=self.predictor.weight.dtype)
        self.note(predictor_distance=(self.predictor.weight - identity).norm())
        return logits

    def _terms(self, features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy of the online branch, and its divergence from the reference, of each row."""
        online = self.split.finished(self.split.head(self.predictor(features)), reference.shape)
        return self.entropy(online), divergence(reference, online, self.divergence)
