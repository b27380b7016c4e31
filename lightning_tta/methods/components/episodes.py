"""Methods that treat each image of a batch on its own, through its views; norm layers that do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, interpolate, layer_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_tta.backbones import norms
from lightning_tta.backbones.norms import affine, batch_norm_layers
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_choice, check_range
from lightning_tta.imagenet_classes import class_subset
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import Account
from lightning_tta.methods.base.correction import Correction
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.room import Room
from lightning_tta.views.augmix import AUGMENTATIONS, make_views

Affine = Mapping[str, Tensor]


def per_image_layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """The norm layers, by name; ``None`` if one is not plain.

    That is of another kind, layout, with a fused activation, or with a weight that is computed (parametrised, pruned).
    """
    layers = norms.norm_layers(model)
    plain = (_BatchNorm.forward, nn.GroupNorm.forward, nn.LayerNorm.forward)
    for layer in layers.values():
        affine = [getattr(layer, "weight", None), getattr(layer, "bias", None)]
        if type(layer).forward not in plain or any(t is not None and not isinstance(t, nn.Parameter) for t in affine):
            return None
    return layers


def per_image(
    model: nn.Module, images: int, rows: Affine | None = None, prior: int | None = None
) -> AbstractContextManager[None]:
    """While active, the net takes batches of ``images`` times some views, image by image, each on its own.

    Args:
        model: A net in eval mode all of whose norm layers are in :func:`per_image_layers`.
        images: S, the number of images.
        rows: Scales and shifts by parameter name, each (S, C): one row an image. Others are the layer's own.
        prior: N: BatchNorm takes ``N / (N + 1)`` of the source statistics and ``1 / (N + 1)`` of those of the image's
            views (unbiased variance, detached). ``None``: the source statistics.
    """
    layers = per_image_layers(model)
    assert layers is not None
    forwards = {}
    for name, layer in layers.items():
        weight, bias = ((rows or {}).get(f"{name}.{leaf}", getattr(layer, leaf)) for leaf in ("weight", "bias"))
        forwards[layer] = _forward(layer, images, weight, bias, prior)
    return norms.replaced_forwards(forwards)


def _forward(
    layer: nn.Module, images: int, weight: Tensor | None, bias: Tensor | None, prior: int | None
) -> Callable[[Tensor], Tensor]:
    def spread(value: Tensor, x: Tensor) -> Tensor:
        """A parameter (C,) or (S, C) in the layout of x (S, B, C, ...); for LayerNorm (S, B, ..., C)."""
        rows = value.expand(images, *value.shape) if value.ndim == per_row else value
        if isinstance(layer, nn.LayerNorm):
            return rows.view(images, *(1,) * (x.ndim - 1 - per_row), *rows.shape[1:])
        return rows.view(images, 1, -1, *(1,) * (x.ndim - 3))

    per_row = len(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else 1

    def forward(x: Tensor) -> Tensor:
        groups = x.view(images, len(x) // images, *x.shape[1:])
        if isinstance(layer, _BatchNorm):
            scale, shift = _batch_norm(layer, groups, prior)
            if weight is not None and bias is not None:
                scale, shift = scale * weight, shift * weight + bias
            return affine(groups, spread(scale, groups), spread(shift, groups)).flatten(0, 1)
        if isinstance(layer, nn.GroupNorm):
            normed = group_norm(x, layer.num_groups, eps=layer.eps).view_as(groups)
        else:
            assert isinstance(layer, nn.LayerNorm)
            normed = layer_norm(x, layer.normalized_shape, eps=layer.eps).view_as(groups)
        if weight is not None:
            shift = torch.zeros_like(weight) if bias is None else bias
            normed = affine(normed, spread(weight, groups), spread(shift, groups))
        return normed.flatten(0, 1)

    return forward


def _batch_norm(layer: _BatchNorm, x: Tensor, prior: int | None) -> tuple[Tensor, Tensor]:
    """Scale and shift, before weight and bias, for x (S, B, C, ...): (S, C) or (C,)."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise RuntimeError("BatchNorm without source statistics")  # refused when the method is built
    if prior is not None and x[:, :, 0].numel() > len(x):  # else one value a channel: it has no variance
        image_mean, image_var = norms.moments(x.detach(), [1, *range(3, x.ndim)], unbiased=True)
        mean = torch.lerp(mean.to(image_mean), image_mean, 1 / (prior + 1))
        var = torch.lerp(var.to(image_var), image_var, 1 / (prior + 1))
    scale = (var + layer.eps).rsqrt()
    return scale, -mean * scale


class ViewMethod(TTAMethod):
    """What the methods of one image and its views share: options, seeds, passes that keep images apart.

    Args:
        model: Any classifier.
        views: Views of each image, at least 1.
        augment: One of :data:`lightning_tta.views.augmix.AUGMENTATIONS`.
        bn_prior: N: BatchNorm takes N / (N + 1) of the source statistics, the rest of the image's views; ``None``:
            the source statistics.
        predict_classes: Classes that may be predicted: positions, ``imagenet_a`` or ``imagenet_r``; ``None``: all.
        chunk_views: At most this many views in one pass; ``None``: as many as fit into memory, see
            :class:`~lightning_tta.methods.components.room.Room`.
        seed: Seed of the views; an image's views depend on it and the pixels alone.
        crop: Two numbers (R, S): the images are given before they are fitted to the net. Views are made of them as they
            are; then the shorter side of views and images is resized to R, and the middle S x S cut out. ``None``: they
            fit.
        **options: Of a further base class.
    """

    predictable: Tensor
    fixed_options = frozenset({"steps"})
    images_apart = True
    step_on_host: str = "its views are drawn on the host"
    no_plain_net = (
        "it treats each image on its own, from the source anew, so that nothing learned remains in the net. Deploy the "
        "method itself, or adapt with 'tent', 'zerosiam' or 'norm'"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        views: int,
        augment: str,
        bn_prior: int | None = None,
        chunk_views: int | None = None,
        seed: int = 0,
        predict_classes: list[int] | str | None = None,
        crop: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, steps=1, **options)
        check_range("views", views, 1, integer=True)
        check_choice("augment", augment, AUGMENTATIONS)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        if crop is not None:
            if not isinstance(crop, (list, tuple)) or len(crop) != 2:
                raise ConfigError(f"crop is two numbers, such as [232, 224], or null; got {crop!r}.")
            check_range("crop: the square's side", crop[1], 1, integer=True)
            check_range("crop: the shorter side", crop[0], crop[1], integer=True)
            self.crop = crop[0], crop[1]
        if bn_prior is not None:
            check_range("bn_prior", bn_prior, 1, integer=True)
            untracked = [name for name, layer in batch_norm_layers(model).items() if layer.running_mean is None]
            if untracked:
                raise UnsupportedModelError(
                    f"BatchNorm layer '{untracked[0]}' keeps no running statistics (track_running_stats=False), so "
                    "there is no source to mix with. Use bn_prior=None."
                )
        if chunk_views is not None:
            check_range("chunk_views", chunk_views, 1, integer=True)
            if chunk_views < views and bn_prior is not None and batch_norm_layers(model):
                raise ConfigError(
                    f"chunk_views={chunk_views} splits an image's {views} views, whose common statistics bn_prior "
                    "takes. Give chunk_views of at least views, or bn_prior=None."
                )
        self.views, self.augment, self.bn_prior = views, augment, bn_prior
        self.replaces_statistics = bn_prior is not None
        self.chunk_views, self.seed = chunk_views, seed
        self.predict_classes = class_subset(predict_classes, "predict_classes")
        self.register_buffer("predictable", self.positions(self.predict_classes), persistent=False)
        self.room = Room()
        self._common = bn_prior is not None and bool(batch_norm_layers(self.model))  # statistics of an image's views
        self._views_at_once = views
        tracked = all(layer.running_mean is not None for layer in batch_norm_layers(self.model).values())
        self.runs_per_image = tracked and per_image_layers(self.model) is not None

    def source_statistics(self) -> AbstractContextManager[None]:
        """The statistics of the views of one image: the source's, or its own mixed in."""
        if self.bn_prior is None:
            return nullcontext()
        return norms.batch_statistics(self.model, self.bn_prior / (self.bn_prior + 1), unbiased=True)

    def fitted(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) as the net takes them: resized, and the middle cut out, where that is asked for."""
        if self.crop is None:
            return images
        shorter, side = self.crop
        height, width = images.shape[-2:]
        sizes = [length * shorter // min(height, width) for length in (height, width)]
        with torch.autocast(images.device.type, enabled=False):
            x = at_least_float32(images).flatten(0, -4)
            x = interpolate(x, sizes, mode="bilinear", align_corners=False, antialias=True)
        top, left = (round((length - side) / 2) for length in sizes)  # as torchvision
        return x[..., top : top + side, left : left + side].to(images.dtype).view(*images.shape[:-2], side, side)

    def take_up(self, account: Account | None) -> None:
        """As of the base, where images are fitted to the net already."""
        if account is not None:
            self._refuse_with_crop("statistics=")
        super().take_up(account)

    def put_on(self, correction: Correction) -> None:
        """As of the base, where images are fitted to the net already, or no features are wanted."""
        if correction.wants_features:
            self._refuse_with_crop("refine=")
        super().put_on(correction)

    def _refuse_with_crop(self, option: str) -> None:
        if self.crop is not None:
            raise ConfigError(
                f"crop={list(self.crop)} and {option} exclude each other: that takes images that fit the net. Leave "
                "one of them out."
            )

    def infer(self, x: Tensor) -> Tensor:
        """The source's prediction of the images themselves, with each image's own statistics if there is a prior."""
        return self.voted(x, make=False)

    def vote(self, logits: Tensor) -> Tensor:
        """Logits (S, K) of images, from those of their views (S, V, K). Override where there are several views."""
        return logits[:, 0]

    def voted(self, x: Tensor, *, make: bool = True, replays: bool = False) -> Tensor:
        """The votes of each image's views; nothing learns.

        Args:
            x: Images (B, C, H, W).
            make: Whether to make views; else each image is its only one.
            replays: Whether passes may be recorded and replayed.
        """
        views = self.views if make else 1
        images, self._views_at_once = self.fitting(self.fitted(x), self._pass_of_source, "source", views)
        seeds = self.seeds(x) if make else []
        logits = []
        for first in range(0, len(x), images):
            chunk = x[first : first + images]
            made = make_views(chunk, views, self.augment, seeds[first : first + images]) if make else chunk[:, None]
            made = self.fitted(made)
            logits.append(self.replayed("vote", self._vote_of, made) if replays else self._vote_of(made))
        return self.allowed(torch.cat(logits))

    def _vote_of(self, views: Tensor) -> Tensor:
        return self.vote(self.view_logits(views))

    @torch.no_grad()
    def view_logits(self, views: Tensor) -> Tensor:
        """Logits (S, V, K) of views (S, V, C, H, W), the statistics of each image its own; nothing learns."""
        images, samples = len(views), views.flatten(0, 1)
        if not self._common:
            logits = [self.logits(chunk) for chunk in torch.split(samples, images * self._views_at_once)]
        elif self.runs_per_image:
            with per_image(self.model, images, prior=self.bn_prior):
                logits = [self.logits(samples)]
        else:
            with self.source_statistics():
                logits = [self.logits(chunk) for chunk in torch.split(samples, views.shape[1])]
        return torch.cat(logits).view(images, views.shape[1], -1)

    def fitting(self, x: Tensor, run: Callable[[Tensor], Tensor], kind: str, views: int) -> tuple[int, int]:
        """Number of images, and of views of one image, for a pass; see :class:`Room`.

        Views with common statistics are not split, whatever the memory.
        """
        number = self.chunk_views or self.room.fitting(run, x, self.model, kind)
        return max(1, number // views), views if self._common else min(number, views)

    def _pass_of_source(self, samples: Tensor) -> Tensor:
        """A pass that keeps no less than one without gradients has in memory at a time."""
        return self.logits(samples.requires_grad_())

    def seeds(self, images: Tensor) -> list[int]:
        """A seed for each image, from its pixels: the same in any order, batch and process, and on every device.

        Whole numbers in 64-bit arithmetic, which wraps: exact anywhere. Asks the device once.
        """
        bits = images.detach().float().contiguous().view(torch.int32).flatten(1).long()
        factors = 2 * torch.arange(bits.shape[1], device=bits.device) + 1
        sums: list[int] = (bits * factors * 0x9E3779B1).sum(1).tolist()
        return [(total ^ (self.seed * 0x85EBCA6B)) & (2**62 - 1) for total in sums]

    def positions(self, classes: Sequence[int] | None) -> Tensor | None:
        """Classes as a tensor beside the net's parameters."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return None if classes is None else torch.tensor(classes, device=device)

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits with the classes that may not be predicted far below the others."""
        if self.predict_classes is None:
            return logits
        check_classes("predict_classes", self.predict_classes, logits.shape[-1])
        out = torch.ones_like(logits[0], dtype=torch.bool).index_fill_(0, self.predictable, False)
        return torch.where(out, logits.min() - 1e4, logits)


def made_again(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``run(x)``, whose activations are not kept, but made again in the backward pass.

    With the same random numbers, but not in a CUDA graph, whose generator cannot be asked.
    """
    preserve = x.device.type == "cpu" or not torch.cuda.is_current_stream_capturing()
    output: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=preserve)
    return output


def check_classes(option: str, classes: Sequence[int], number: int) -> None:
    """Refuse positions that the logits do not have, which a GPU would answer with an error of all its work.

    Raises:
        ConfigError: With how many there are.
    """
    if max(classes) >= number:
        raise ConfigError(
            f"{option} names class {max(classes)}, but the net has {number} logits, from 0. Leave it out."
        )
