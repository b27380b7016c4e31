"""DeYO: entropy minimisation on samples whose prediction depends on the object's shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import early_norm_parameters
from lightning_tta.errors import check_range
from lightning_tta.losses import entropy
from lightning_tta.methods.base.inputs import at_least_float32
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import reliable
from lightning_tta.views.augmix import shuffle_patches


class DeYO(TTAMethod):
    """Minimises the weighted entropy of samples that are sure, and sure because of the object.

    With x' the image with its patches shuffled and y the arg-max of p(x), PLPD = p_y(x) - p_y(x'). A sample is kept
    if ``H < entropy_margin * ln K`` and ``PLPD > plpd_threshold``. Over the kept samples::

        L = mean [ stopgrad( exp(weight_margin * ln K - H) + exp(PLPD) ) * H ]

    Parameters touched: weight and bias of the normalisation layers but for the last blocks'
    (:func:`~lightning_tta.backbones.norms.early_norm_parameters`); BatchNorm uses batch statistics. State: these, the
    optimizer, and the generator of the shuffles. Per batch and step: one forward pass, one without gradient on the
    shuffled images of the samples that the entropy keeps, if any, and one backward pass if a sample is kept; else no
    step. Returns the logits before the step. ``stats``: ``kept_by_entropy`` and ``kept``, shares of the batch, and
    ``plpd``, its mean over the former.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0. Authors (ImageNet, SGD, batch 64): 2.5e-4 for ResNet-50, 1e-3 for ViT-B. They give none
            for CIFAR; the default, Adam 1e-3 at batch 200, is Tent's there and usual in public benchmarks.
        optimizer: ``adam``, ``sgd`` (authors) or ``adamw``.
        momentum: Momentum of SGD, or Adam's first beta, in [0, 0.9999].
        weight_decay: >= 0; authors 0.
        steps: Steps per batch, >= 1.
        lr_batch_size: If given, the learning rate is multiplied by (batch size / this).
        entropy_margin: As a share of ln K, > 0; authors 0.5. ``None``: no such filter.
        weight_margin: As a share of ln K, >= 0; authors 0.4.
        plpd_threshold: In [-1, 1]; authors 0.2, and 0.3 for mild shifts.
        patches: Patches along a side, >= 1; authors 4.
        frozen_fraction: Share of the net's stages or blocks, from the last, that stay fixed, see
            :class:`~lightning_tta.methods.sar.SAR`, whose parameters these are.
        seed: Of the shuffles.

    Raises:
        ConfigError: If an image has fewer pixels than patches along a side.
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Lee et al., DeYO, ICLR 2024, arXiv 2403.07366. Differs from the authors' code: the shuffles are seeded and
    resumed; the last blocks are found by depth, not by name; the net stays in eval mode.
    """

    uses_batch_statistics = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 1,
        lr_batch_size: int | None = None,
        entropy_margin: float | None = 0.5,
        weight_margin: float = 0.4,
        plpd_threshold: float = 0.2,
        patches: int = 4,
        frozen_fraction: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__(model, steps=steps)
        if entropy_margin is not None:
            check_range("entropy_margin", entropy_margin, 0, low_open=True)
        check_range("weight_margin", weight_margin, 0)
        check_range("plpd_threshold", plpd_threshold, -1, 1)
        check_range("patches", patches, 1, integer=True)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.entropy_margin, self.weight_margin = entropy_margin, weight_margin
        self.plpd_threshold, self.patches = plpd_threshold, patches
        parameters = self.declare(early_norm_parameters(self.model, frozen_fraction))
        self.add_optimizer("model", parameters, optimizer, lr, momentum=momentum, weight_decay=weight_decay)
        self.scale_lr_by_batch(lr_batch_size)
        self.remember(generator=torch.Generator().manual_seed(seed).get_state())

    def adapt(self, images: Tensor) -> Tensor:
        """One step on the samples that are kept, if any."""
        logits = self.infer(images)
        entropies = entropy(logits)
        sure = reliable(entropies, logits, self.entropy_margin)
        self.record(kept_by_entropy=sure.float().mean(), kept=sure.new_zeros((), dtype=torch.float32))
        entropies = entropies[sure]
        if not len(entropies):
            return logits
        generator = self._generator()
        plpd = self._plpd(images[sure], logits[sure], generator)
        keep = plpd > self.plpd_threshold
        self.record(kept=keep.sum() / len(logits), plpd=plpd.mean())
        entropies, plpd = entropies[keep], plpd[keep]
        if len(entropies):
            bound = self.weight_margin * math.log(logits.shape[-1])
            weights = (bound - entropies.detach()).exp() + plpd.exp()
            if not self.step((weights * entropies).mean()):
                return logits
        self.memory["generator"] = generator.get_state()
        return logits

    @torch.no_grad()
    def _plpd(self, images: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
        """How much of the probability of the predicted class is lost with the object's shape, (B,)."""
        shuffled = self.infer(shuffle_patches(images, self.patches, generator))
        before, after = (at_least_float32(u).softmax(-1) for u in (logits, shuffled))
        highest, label = before.max(-1)
        return highest - after.gather(-1, label[:, None]).squeeze(-1)

    def _generator(self) -> torch.Generator:
        state = self.memory["generator"]
        assert state is not None
        generator = torch.Generator()
        generator.set_state(state.cpu())
        return generator
