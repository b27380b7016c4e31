"""ITTA's learnable consistency: features of an image in its own style and in another one, compared by a learned f."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lightning_tta.auxiliary.base import Auxiliary, other_forwards
from lightning_tta.auxiliary.stages import find_stages
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.draws import random_integers
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32

ALPHA, EPS = 0.1, 1e-6
"""Of the Beta distribution from which shares of styles are drawn; beside a variance."""
Change = Callable[[int, Tensor], Tensor]
"""What becomes of a stage's output, by the number of the stage."""


class Consistency(Auxiliary):
    """Cross-entropy in a mixed style, and the mean square of ``f(z' - z)``, where f is learned to pull as labels do.

    z are an image's features, z' those in another style: means and deviations of its channels, after the first or the
    second stage of the net, are mixed with those of another image (MixStyle). f is a chain of scales and shifts of each
    feature with ReLU between. The net learns from ``CE(z') + mean f(z' - z)^2``, f fixed; f learns from
    ``align * (1 - cosine)`` of the gradients, by (z, z'), of ``mean f(z' - z)^2`` and of ``CE(z) + CE(z')``.

    Args:
        net: A classifier that ends in a linear layer, with stages whose outputs are maps (B, C, H, W) or tokens.
        weight: See :class:`~lightning_tta.auxiliary.base.Auxiliary`; authors 1.
        depth: Scales and shifts in f, >= 1; authors 10.
        align: >= 0; authors 0.1, of a squared distance.
        styles: Styles of the last training images that are kept, for a batch of one at test time, >= 1; our addition.

    Raises:
        UnsupportedModelError: If no stage gives maps or tokens.

    Source: Chen et al., CVPR 2023, arXiv 2304.04494; MixStyle: Zhou et al., ICLR 2021. The authors' code takes the
    gradients by all weights of the features, which is a second backward pass through the net.
    """

    kind: ClassVar[str] = "consistency"
    scales: Tensor
    shifts: Tensor
    seen: Tensor

    def __init__(
        self, net: nn.Module, weight: float = 1.0, depth: int = 10, align: float = 0.1, styles: int = 64
    ) -> None:
        super().__init__(net, weight)
        check_range("depth", depth, 1, integer=True)
        check_range("align", align, 0)
        check_range("styles", styles, 1, integer=True)
        self.align = align
        self.stages, self.widths = _stages(net)
        width = HeadSplit(net).num_features
        self.scales = nn.Parameter(torch.ones(depth, width))
        self.shifts = nn.Parameter(torch.zeros(depth, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        for number, channel in enumerate(self.widths[:2]):
            self.register_buffer(f"styles_{number}", torch.zeros(styles, 2, channel))

    def compare(self, difference: Tensor, *, fixed: bool = False) -> Tensor:
        """The mean of f(z' - z)^2 of each image, (B,)."""
        x = at_least_float32(difference)
        scales, shifts = (p.detach() if fixed else p for p in (self.scales, self.shifts))
        for number, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
            x = torch.addcmul(shift.to(x), x.relu() if number else x, scale.to(x))
        return x.square().mean(1)

    def changed(self, net: nn.Module, change: Change) -> AbstractContextManager[None]:
        """While active, each stage of the net gives what ``change`` makes of its output."""

        def forward(number: int, plain: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *inputs, **options: change(number, plain(*inputs, **options))

        modules = [net.get_submodule(name) for name in self.stages]
        return other_forwards({m: forward(number, m.forward) for number, m in enumerate(modules)})

    def mixing(self, key: Tensor, stored: bool) -> Change:
        """A change that gives the second half of a batch, which equals the first, other styles after one stage.

        Args:
            key: Of the draw, (2,), int64, on the device.
            stored: Whether styles are mixed with those kept of the source; else with those of the batch.
        """
        which = random_integers(key, 1)[0] >> 16 & 1 if len(self.stages) > 1 else torch.zeros_like(key[0])

        def change(number: int, x: Tensor) -> Tensor:
            if number > 1:
                return x
            own, again = x.chunk(2)
            others = None
            if stored:
                kept = self.get_buffer(f"styles_{number}").to(x)
                rows = random_integers(key + 2, len(own)) % self.seen.clamp(1, len(kept))
                others = kept[rows].unbind(1)
            mixed = mix_styles(again, key + 1, others)
            return torch.cat([own, torch.where(which == number, mixed, again)])

        return change

    @torch.no_grad()
    def keep_styles(self, number: int, x: Tensor) -> None:
        """Keep the styles of the last images after a stage: the first were seen by a net that had learned nothing."""
        kept = self.get_buffer(f"styles_{number}")
        mean, deviation = (value.flatten(1) for value in _style(x))
        kept.copy_(torch.cat([torch.stack([mean, deviation], 1).to(kept), kept])[: len(kept)])

    def loss(self, net: nn.Module, images: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        """The mean over the batch."""
        split, mix = HeadSplit(net), self.mixing(key, False)

        def change(number: int, x: Tensor) -> Tensor:
            if number < 2:
                self.keep_styles(number, x.chunk(2)[0])
            return mix(number, x)

        with self.changed(net, change):
            features, logits = split(torch.cat([images, images]))
        self.seen.add_(len(images)).clamp_(max=len(self.get_buffer("styles_0")))
        own, other = at_least_float32(features).chunk(2)
        term = cross_entropy(logits.chunk(2)[1], labels) + self.compare(other - own, fixed=True).mean()
        with torch.enable_grad():
            z = features.detach().to(split.head.weight.dtype, copy=True).requires_grad_()
            main = cross_entropy(at_least_float32(split.head(z)), labels.repeat(2)) * 2
            pull = torch.autograd.grad(main, z)[0]
            halves = z.chunk(2)
            compared = self.compare(halves[1] - halves[0]).mean()
            push = torch.autograd.grad(compared, z, create_graph=True)[0]
        return term + self.align * (1 - cosine_similarity(push.flatten(), pull.flatten().to(push), 0))


def mix_styles(x: Tensor, key: Tensor, others: tuple[Tensor, ...] | None = None) -> Tensor:
    """MixStyle: each image's mean and deviation by channel, mixed with those of another one, in shares of its own.

    Args:
        x: (B, C, H, W), or tokens (B, N, C).
        key: Of the draw, (2,), int64, on its device.
        others: Means and deviations to mix with, each (B, C); ``None``: those of the batch, in a random order.
    """
    mean, deviation = _style(x)
    numbers = random_integers(key, 3, len(x))
    logs = (((numbers[:2] >> 11).bitwise_and_(2**53 - 1).double() + 0.5) * 2**-53).log().to(at_least_float32(x).dtype)
    # Of U, V uniform, U^(1/a) / (U^(1/a) + V^(1/a)) is Beta(a, a) where the sum is below 1 (Joehnk): 98.6 % at a = 0.1.
    share = ((logs[0] - logs[1]) / ALPHA).sigmoid().view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
    if others is None:
        order = numbers[2].argsort()
        other_mean, other_deviation = mean[order], deviation[order]
    else:
        other_mean, other_deviation = (value.view_as(mean) for value in others)
    mixed = torch.lerp(other_deviation, deviation, share), torch.lerp(other_mean, mean, share)
    return (x - mean) / deviation * mixed[0] + mixed[1]


def _style(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = (2, 3) if x.ndim == 4 else (1,)
    positions = x[0, 0].numel() if x.ndim == 4 else x.shape[1]
    var, mean = torch.var_mean(x.detach(), dims, correction=min(1, positions - 1), keepdim=True)
    return mean, (var + EPS).sqrt()


def _stages(net: nn.Module) -> tuple[list[str], list[int]]:
    """The stages whose outputs are maps or tokens, in the order in which they run, and their channels."""
    stages = find_stages(net, "use method 'tent'")
    outputs = {name: stages.calls[name][0][1] for name in stages.names if len(stages.calls[name]) == 1}
    found = {name: t for name, t in outputs.items() if isinstance(t, Tensor) and t.ndim in (3, 4)}
    if not found:
        raise UnsupportedModelError(
            f"{type(net).__name__} has no stages that give maps (B, C, H, W) or tokens (B, N, C), whose style could be "
            "changed. Use method 'tent', or 'memo'."
        )
    return list(found), [t.shape[1] if t.ndim == 4 else t.shape[2] for t in found.values()]
