"""ActMAD: mean and variance of each activation, at each position, as on the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones.norms import batch_norm_layers, norm_layers, owner
from lightning_tta.backbones.split import execution_order
from lightning_tta.errors import InputError, UnsupportedModelError, check_choice, check_names
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.activations import source_moments, watched_outputs

MOMENTS = ("mean", "variance")


class ActMAD(GradientMethod):
    """Minimises the L1 distance between the moments of the batch's activations and those of the source's.

    With the outputs a_l (B, ...) of the normalisation layers l, and moments over the batch alone, apart for each
    channel and position or token; those of the source, marked s, come from :meth:`prepare`. Of BatchNorm layers a_l is
    the positive part, max(output, 0), as in the authors' code::

        L = 1/2 sum_l ( mean |mean_b a_l - mean_s a_l|  +  mean |var_b a_l - var_s a_l| )

    Variances are unbiased; of one image they are 0, so that its mean alone has a gradient. Nothing depends on classes:
    a head of regression will do, of two outputs or more; what ``stats`` says of classes then means nothing.

    Parameters touched: all up to the last of these layers; BatchNorm keeps its source statistics. State: these and the
    optimizer; saved with them 2 floats for each activation. Images must have the size that :meth:`prepare` saw. Per
    batch and step: one forward, one backward pass. Returns the logits before the step. ``stats`` has both terms.

    Args:
        model: Any net with normalisation layers.
        lr: Learning rate, >= 0. Authors, at batch size 128: 1e-2 (CIFAR-10, WideResNet-40-2), 1e-3 (CIFAR-100), 2.5e-4
            (ImageNet). The gradient of an L1 distance does not shrink near its minimum, and the loss is a sum over
            layers: where ``stats["loss"]`` rises from batch to batch, the rate is too high.
        optimizer: ``nesterov`` (authors), ``sgd``, ``adam`` or ``adamw``.
        weight_decay: >= 0. Authors: 5e-4.
        params: ``all``: as above, the authors'; ``norm``: weight and bias of the normalisation layers.
        rectified: Whether the positive part of the outputs is compared; ``auto``: that of BatchNorm layers. In the
            authors' CIFAR code the ReLU overwrites the output that a hook holds; in that for detection, a copy: False.
        layers: Names of modules to compare instead; their outputs have the images first. Authors: all BatchNorm layers
            (CIFAR), six late ones of ResNet-50 (ImageNet, an earlier code), those after the 26th of a detector.
        **options: ``momentum`` (authors 0.9), ``steps``, ``lr_batch_size``.

    Raises:
        ConfigError: If ``layers`` is no list.
        UnsupportedModelError: If the net has no normalisation layer, or no such modules.

    Source: Mirza et al., CVPR 2023, arXiv 2211.12870; formula from the authors' CIFAR code; their detection code has no
    factor 1/2. Differs from it: moments of the source are those of all images together, not means over batches; images
    are not cropped and flipped at random, as there those of source and stream; any norm layers; the net stays in eval
    mode; a layer that runs twice in a pass is compared in its first run. The authors report the lowest error of the
    whole test set after any step, which is no online error.
    """

    about = About(
        does="L1 distance of mean and variance of each activation behind the norm layers to those of the source",
        learns="all",
        passes="1 / 1",
        needs="norm layers, 2,000 source images",
        holds="2 floats for each activation",
        suits="shuffled; no classes needed",
        formula="code",
        paper="CVPR 2023, arXiv 2211.12870",
    )

    needs_source = True
    synchronized = True
    tasks = frozenset({"images", "pixels", "regression"})

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "nesterov",
        weight_decay: float = 5e-4,
        params: Literal["all", "norm"] = "all",
        rectified: Literal["auto"] | bool = "auto",
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, weight_decay=weight_decay, **options)
        check_choice("params", params, ("all", "norm"))
        check_choice("rectified", rectified, ("auto", True, False))
        check_names("layers", layers)
        modules = dict(self.model.named_modules())
        missing = [name for name in layers or () if not name or name not in modules]
        self.layers = list(norm_layers(self.model) if layers is None else layers)
        if missing or not self.layers:
            what = f"no module {missing[0]!r}" if missing else "no normalisation layer"
            raise UnsupportedModelError(
                f"ActMAD compares the outputs of normalisation layers, or of layers=[...]; {type(model).__name__} has "
                f"{what}. Name modules of the net, as in model.named_modules(); or use a method that looks at "
                "features, such as 'neo'."
            )
        normed = batch_norm_layers(self.model)
        self.rectified = [name in normed if rectified == "auto" else bool(rectified) for name in self.layers]
        self.learn(self._before_the_last(self.select(params)))
        for number in range(len(self.layers)):
            for moment in MOMENTS:
                self.collect(f"source_{moment}_{number}", torch.zeros(0, device=self.learned[0].device))

    def _before_the_last(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Without those of modules that run behind all layers, which the loss does not depend on."""
        order = {name: place for place, name in enumerate(execution_order(self.model) or ())}
        last = max((order.get(name, -1) for name in self.layers), default=-1)
        leaves = {name for name, module in self.model.named_modules() if not any(module.children())}
        behind = {name for name in leaves if order.get(name, -1) > last >= 0}
        return {name: p for name, p in parameters.items() if owner(name) not in behind} or parameters

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take mean and variance of each activation over all images of ``source_batches``, at the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1], of one size; labels are not used.

        Raises:
            DataError: If there are fewer than two images, activations are not finite, or images differ in size.
            UnsupportedModelError: If the output of a layer does not have the images first.
        """
        moments = source_moments(self, source_batches, self.layers, self._taken)
        for number in range(len(self.layers)):
            for name, value in zip(MOMENTS, moments.get(number, ()), strict=False):
                self.collect(f"source_{name}_{number}", value)
        super().prepare(source_batches)

    def step(self, x: Tensor) -> Tensor:
        """One step on the whole batch."""
        outputs: dict[int, Tensor] = {}

        def keep(number: int, output: Tensor) -> None:
            source = self.get_buffer(f"source_mean_{number}")
            if source.numel():  # else it did not run for the source images
                self._check_size(number, output, source, x)
                outputs[number] = output.to(source.dtype, copy=True)  # what comes behind may write to it

        with watched_outputs(self.model, self.layers, keep):
            logits = self.logits(x)
        with torch.autocast(x.device.type, enabled=False):
            ones = at_least_float32(torch.ones_like(x[:, 0, 0, 0]))  # half precision cannot count
            images = collective.weighted_sums(ones, ones)[1]
            terms = [self._distances(number, output, images) for number, output in outputs.items()]
        apart = torch.stack(terms).sum(0)
        self.note(mean_distance=apart[0].detach(), variance_distance=apart[1].detach())
        self.descend(torch.zeros_like(apart[:1]), extra=apart.sum() / 2)
        return logits

    def _taken(self, number: int, output: Tensor) -> Tensor:
        """What is compared of a layer's output."""
        return output.relu() if self.rectified[number] else output

    def _distances(self, number: int, output: Tensor, images: Tensor) -> Tensor:
        """Of a layer's output (B, ...): the mean distance of means, and of variances, (2,); of so many images."""
        source = [self.get_buffer(f"source_{moment}_{number}") for moment in MOMENTS]
        output = self._taken(number, output)  # not in the pass: a checkpointed one would miss it when it runs again
        mean = collective.mean(output)
        variance = collective.mean((output - mean).square()) * (images / (images - 1).clamp_min(1))
        return torch.stack([(mean - source[0]).abs().mean(), (variance - source[1]).abs().mean()])

    def _check_size(self, number: int, output: Tensor, source: Tensor, x: Tensor) -> None:
        if output.shape[1:] != source.shape:
            raise InputError(
                f"ActMAD compares positions with those of the source. '{self.layers[number]}' gave "
                f"{tuple(source.shape)} for the images that prepare() saw, and gives {tuple(output.shape[1:])} for "
                f"images {tuple(x.shape[1:])}. Give images of the size that prepare() saw, or call prepare() with "
                "images of this size."
            )
