"""ITTA: scales and shifts after each stage are set so that a change of style changes the features less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.auxiliary.consistency import Consistency
from lightning_tta.auxiliary.method import AuxiliaryMethod
from lightning_tta.methods.base.description import About


class ITTA(AuxiliaryMethod[Consistency]):
    """Minimises a learned measure of how much the features change with an image's style.

    With features z of an image, z' of the same image in a style mixed with another one, and f from the source's
    training (:class:`~lightning_tta.auxiliary.consistency.Consistency`)::

        h_k <- scale_k * h_k + shift_k   after each stage k: the identity at the start
        L   = mean_b mean_i f(z' - z)_i^2;   one step of the scales and shifts;   then the prediction

    A batch of one has no other style: it is mixed with styles of the source that f's training has kept. In the
    authors' code its z' equals z, and nothing is learned.

    Parameters touched: the scales and shifts, one for each channel. BatchNorm has its source statistics. State: these,
    the optimizer, the number of steps. Per batch and step one forward pass of the images twice over, one backward pass,
    and one forward pass at the end. Returns the logits after the step. ``stats["loss"]`` is L.

    The net must have been trained with f: ``lightning-tta fit --config configs/digits/source.yaml --model.auxiliary
    consistency``. For other nets :meth:`prepare` trains f on labelled source images, the net as it is; our addition.

    Args:
        model: A classifier that ends in a linear layer, with stages whose outputs are maps or tokens.
        lr: Learning rate, >= 0; authors 5e-6, a tenth of the training's.
        mix_with_source: Whether every batch is mixed with styles of the source, not only a batch of one.
        **options: ``head_from``, ``head_epochs``, ``head_lr``, ``seed``: see
            :class:`~lightning_tta.auxiliary.method.AuxiliaryMethod`. ``optimizer`` (authors ``adam``), ``momentum``,
            ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer, has no such stages, or was not trained with f
            and ``head_from="trained"``.

    Source: Chen et al., CVPR 2023, arXiv 2304.04494; formula from the authors' code. Differs from it: their scales and
    shifts are one for each position, five in a row with ReLU between, for ResNet-18 and 224 pixels; ours fit any size
    and are the identity on any net. f is aligned by the gradients of the features, not of all weights.
    """

    about = About(
        does="a learned measure of how much features change with an image's style",
        learns="a scale and shift of each channel after each stage",
        passes="2, one of twice the batch / 1",
        needs="linear head, stages of maps or tokens; a source trained with auxiliary consistency",
        holds="scales, shifts, 64 styles",
        suits="any; batches of one",
        formula="code",
        paper="CVPR 2023, arXiv 2304.04494",
    )

    returns = "after the step"
    needs_labels = True
    no_plain_net = (
        "it has scales and shifts after the net's stages. Deploy the method itself (method.predict), or adapt with "
        "'norm' or 'tent', which leave the net as it is built"
    )

    def __init__(self, model: nn.Module, *, lr: float = 5e-6, mix_with_source: bool = False, **options: Any) -> None:
        super().__init__(model, lr=lr, **options)
        self.mix_with_source = mix_with_source
        self.take_auxiliary(Consistency)
        like = self.split.head.weight.detach()
        widths = self.auxiliary.widths
        self.scales = nn.ParameterList([torch.ones(width).to(like) for width in widths])
        self.shifts = nn.ParameterList([torch.zeros(width).to(like) for width in widths])
        for name in ("scales", "shifts"):
            self.learn(dict(getattr(self, name).named_parameters()), f"{name}.", optimizer=name)

    def step(self, x: Tensor) -> Tensor:
        """One step of the scales and shifts, and the prediction after it."""
        mix = self.auxiliary.mixing(self.draw_key(), self.mix_with_source or len(x) == 1)
        with self.auxiliary.changed(self.model, lambda number, h: self._scaled(number, mix(number, h))):
            features, _ = self.features(torch.cat([x, x]))
        own, other = features.chunk(2)
        self.count_step(self.descend(self.auxiliary.compare(other - own)))
        with torch.no_grad():
            return self.infer(x)

    def infer(self, x: Tensor) -> Tensor:
        """The net with its scales and shifts."""
        with self.auxiliary.changed(self.model, self._scaled):
            return self.logits(x)

    def _scaled(self, number: int, h: Tensor) -> Tensor:
        shape = (-1, 1, 1) if h.ndim == 4 else (-1,)
        scale, shift = (each[number].view(shape).to(h.dtype) for each in (self.scales, self.shifts))
        return torch.addcmul(shift, h, scale)
