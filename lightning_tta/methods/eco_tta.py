"""EcoTTA: a frozen net with small parts beside it, which alone learn and are held near what the net itself gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.auxiliary.meta_parts import MetaParts, Moments
from lightning_tta.auxiliary.method import AuxiliaryMethod
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import features_at
from lightning_tta.errors import DataError, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.source_training import all_or_nothing

FEW = 8
"""Images whose statistics are enough for the BatchNorm of the meta parts."""


class EcoTTA(AuxiliaryMethod[MetaParts]):
    """Minimises the entropy of sure samples, plus how far meta parts move the outputs of the net's parts.

    The frozen net is cut into parts f_k. Beside each stands a meta part, with BatchNorm and a 3 x 3 convolution::

        y_k = f_k(x_{k-1}),   x_k = BN(y_k) + ReLU(BN(conv(x_{k-1})))
        L   = mean_b [ H_b 1{H_b < entropy_margin ln K} ] + penalty * sum_k mean |x_k - y_k|

    The gradient of the penalty of a part reaches its own meta part alone. Parameters touched: the meta parts. Their
    BatchNorm takes the batch's own statistics in a step, so give no batches of a few images, and in :meth:`predict`
    their moving average; the net's own has its source statistics. State: the meta parts, these averages, the optimizer.
    Per batch and step one forward and one backward pass. Returns the logits before the step. ``stats`` has ``kept``,
    the share of sure samples, and ``penalty``.

    :meth:`prepare` lets BN(y_k) be the identity on source images, with a share of the convolution that is next to
    nothing, and then trains the meta parts by the cross-entropy of labelled source images, the net frozen.

    Args:
        model: A net of blocks that take and return feature maps, such as a ResNet, with any norm layers or none.
        lr: Learning rate, >= 0; 5e-3 from the paper (CIFAR), quoted.
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``.
        momentum: In [0, 0.9999]; 0.9 in community code.
        parts: K, >= 1; authors 5 or 4. The net's blocks are shared out evenly.
        entropy_margin: Share of ln K, > 0; authors 0.4.
        penalty: >= 0; the paper's value is not verified: 0.5 and 0.25 are quoted.
        warmup_epochs: Passes of :meth:`prepare` over the source images, >= 0; authors 10, over the whole training set.
            0: no labels are needed.
        warmup_lr: Rate of AdamW meanwhile, >= 0; authors: SGD at 0.05.
        **options: ``seed``, which nothing depends on; ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net has no blocks that take and return feature maps.

    Source: Song et al., CVPR 2023, arXiv 2303.01904. The meta parts and the penalty are from the authors' sample code,
    loss and rates from community code (Lily-Le/EcoTTA); nobody has reproduced the ImageNet results in public. Differs
    from them: the identity at the start; the optimizer of the warm-up, and its number of images; even parts.
    """

    about = About(
        does="entropy of sure samples; small parts beside a frozen net, held near what it gives",
        learns="meta parts",
        passes="1 / 1",
        needs="blocks of feature maps; 2,000 labelled source images",
        holds="meta parts, one convolution each",
        suits="long, domains that change",
        formula="code",
        paper="CVPR 2023, arXiv 2303.01904",
    )

    fixed_options = frozenset({"head_from", "head_epochs", "head_lr"})
    needs_labels = True
    no_plain_net = (
        "it has meta parts beside the modules of the net. Deploy the method itself (method.predict), or adapt with "
        "'norm' or 'tent', which leave the net as it is built"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-3,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.9,
        parts: int = 5,
        entropy_margin: float = 0.4,
        penalty: float = 0.5,
        warmup_epochs: int = 10,
        warmup_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        check_range("warmup_epochs", warmup_epochs, 0, integer=True)
        super().__init__(
            model,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            head_from="prepare",
            head_epochs=max(1, warmup_epochs),
            head_lr=warmup_lr,
            **options,
        )
        check_range("parts", parts, 1, integer=True)
        check_range("entropy_margin", entropy_margin, 0, low_open=True)
        check_range("penalty", penalty, 0)
        self.entropy_margin, self.penalty = entropy_margin, penalty
        self.take_auxiliary(MetaParts, parts=parts)
        self.trains_head = warmup_epochs > 0
        self.learn(dict(self.auxiliary.named_parameters()), "auxiliary.")
        for name, buffer in self.auxiliary.named_buffers():
            if buffer.is_floating_point():
                self.state(f"auxiliary.{name}", buffer)

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Start as the net itself on source images, and train the meta parts on them.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and, unless ``warmup_epochs`` is 0, ``label``.

        Raises:
            ConfigError: If the method is prepared already.
            DataError: If there is no image, a label is missing or no class of the net, or maps are not finite.
        """
        self.check_not_prepared()
        source_batches = list(source_batches) if isinstance(source_batches, Iterator) else source_batches
        ends = [last for _, last in self.auxiliary.names]
        sums: list[Tensor] = []  # by part: (3, C) of number, sum, sum of squares

        @torch.no_grad()
        def see(images: Tensor) -> None:
            maps = [features_at(self.model, images, ends)[0][name].double() for name in ends]
            new = [torch.stack([torch.ones_like(y), y, y * y]).sum((1, 3, 4)).cpu() for y in maps]
            sums[:] = [a + b for a, b in zip(sums, new, strict=True)] if sums else new

        see_source_images(self, source_batches, see)
        moments = [(total / n, (squares / n - (total / n) ** 2).clamp_min(0)) for n, total, squares in sums]
        if not moments or not all(bool(value.isfinite().all()) for pair in moments for value in pair):
            raise DataError(
                f"'{self.name}' needs finite feature maps of source images; found "
                f"{'some that are not finite' if moments else 'no image'}. Give batches {{'image': (B, C, H, W) in "
                "[0, 1], 'label': (B,)} of the training set."
            )
        with all_or_nothing(self.auxiliary), outside_inference_mode():
            self.auxiliary.begin_as_identity(moments)
            super().prepare(source_batches)
        for name in self.adaptable:
            self.renew_source(name)

    def of_batches(self, images: int) -> str:
        """What so few images mean for the meta parts, which have BatchNorm on any net."""
        if images >= FEW or self._window is not None:
            return super().of_batches(images)
        return (
            f"'{self.name}' normalises BatchNorm layers with the statistics of each batch, those of its meta parts, "
            f"which are noise below about {FEW} images; batches of {images} image{'s' if images > 1 else ''} are too "
            "small for that. Give larger batches; or window=64, which adapts on the last 64 images together; or use a "
            "method that takes images one by one ('memo', 'itta', 'neo')."
        )

    def step(self, x: Tensor) -> Tensor:
        """One step of the meta parts."""
        noted: Moments = {}
        penalties: list[Tensor] = []
        with self.auxiliary.running(self.model, noted, penalties):
            logits = self.logits(x)
        losses = entropy(at_least_float32(logits))
        if not losses.requires_grad:
            raise self._no_gradient(losses)
        if not self._reach_checked:  # here, for the penalty reaches the parts where the entropy does not
            self._check_reach(torch.autograd.grad(losses.sum(), self.learned, allow_unused=True, retain_graph=True))
            self._reach_checked = True
        kept = (losses.detach() < self.entropy_margin * math.log(logits.shape[-1])).to(losses.dtype)
        penalty = torch.stack(penalties).sum()
        taken = self.descend(losses * kept, extra=self.penalty * penalty)
        self.note(kept=collective.mean(kept), penalty=penalty)
        for name, value in self.auxiliary.moved(noted).items():
            self.write(f"auxiliary.{name}", value, taken)
        return logits

    def infer(self, x: Tensor) -> Tensor:
        """The net with the meta parts, their BatchNorm at its moving averages."""
        with self.auxiliary.running(self.model):
            return self.logits(x)
