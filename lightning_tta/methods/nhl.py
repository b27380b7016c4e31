"""NHL: the first convolution learns by a soft Hebbian rule, and a gain for each of its channels by the entropy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.auxiliary.base import other_forwards
from lightning_tta.backbones.quantized import has_quantized
from lightning_tta.backbones.split import execution_order
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName


class NHL(GradientMethod):
    """Minimises the entropy in a gain of each channel of the first convolution, whose weights learn without a loss.

    With x a patch that the convolution sees, w_k its filters, a_k the gains, all 0 at the start::

        u_k = w_k . x,   y = softmax_k(inverse_temperature * u),   out_k = (1 + a_k) * (u_k + bias_k)
        w_k <- w_k + hebbian_lr * mean over patches of y_k (x - u_k w_k)        (the soft Hebbian rule)
        a   <- one step down mean_b H(p)                                        (the feedback)

    Parameters touched: the weight of the first convolution, and the gains. BatchNorm has its source statistics: behind
    the batch's own, a gain would do nothing. State: these and the gains' optimizer. Per batch and step one forward and
    one backward pass. Returns the logits before the step. ``stats["hebbian"]`` is the largest change of a weight.

    Args:
        model: Any net that runs a convolution.
        lr: Of the gains, >= 0. No published value.
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``.
        hebbian_lr: >= 0; no published value. The rule alone makes one filter the first principal direction of the
            patches; large rates forget what the source has learned.
        inverse_temperature: >= 0; no published value. 0: all channels alike.
        **options: ``momentum``, ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If no convolution runs, or the first one has a weight that is computed or quantised.

    Source: Tang et al., CVPR 2023, arXiv 2303.00914; no public code. Reconstruction: the abstract names a soft Hebbian
    rule in the first layers and a neuro-modulator that is fed back from the output; the rule is that of SoftHebb
    (Journé et al., ICLR 2023, arXiv 2209.11883), the gain and the place of both are ours. It may not be what the
    authors measured.
    """

    about = About(
        does="a Hebbian rule in the first convolution; entropy in a gain of its channels",
        learns="first convolution, its gains",
        passes="1 / 1",
        needs="a convolution",
        holds="-",
        suits="shuffled",
        formula="reconstruction",
        paper="CVPR 2023, arXiv 2303.00914",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "sgd",
        hebbian_lr: float = 1e-3,
        inverse_temperature: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, **options)
        check_range("hebbian_lr", hebbian_lr, 0)
        check_range("inverse_temperature", inverse_temperature, 0)
        self.hebbian_lr, self.inverse_temperature = hebbian_lr, inverse_temperature
        order = execution_order(self.model)
        modules = dict(self.model.named_modules())
        names = [name for name in (modules if order is None else order) if isinstance(modules[name], nn.Conv2d)]
        if not names or "weight" not in dict(modules[names[0]].named_parameters(recurse=False)):
            what = f"the weight of '{names[0]}' is computed" if names else "it runs no convolution"
            quantized = " (its layers are quantised)" if has_quantized(self.model) else ""
            raise UnsupportedModelError(
                f"NHL changes the first convolution of {type(self.model).__name__}, but {what}{quantized}. Use method "
                "'tent', or 'lame', which changes no weights."
            )
        self.convolution = names[0]
        layer = self.layer
        self.state(f"model.{self.convolution}.weight", layer.weight)
        layer.weight.requires_grad_(False)
        self.gains = nn.Parameter(torch.zeros_like(layer.weight[:, 0, 0, 0]))
        self.learn({"gains": self.gains}, "", optimizer="gains")

    @property
    def layer(self) -> nn.Conv2d:
        """The first convolution."""
        layer = self.model.get_submodule(self.convolution)
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _gained(self, seen: list[Tensor] | None = None) -> AbstractContextManager[None]:
        """While active, the convolution has its gains; what it takes is noted."""
        plain: Callable[[Tensor], Tensor] = self.layer.forward

        def forward(x: Tensor) -> Tensor:
            if seen is not None:
                seen.append(x.detach())
            return plain(x) * (1 + self.gains.to(x.dtype)).view(-1, 1, 1)

        return other_forwards({self.layer: forward})

    def step(self, x: Tensor) -> Tensor:
        """One step of the gains, and one of the rule."""
        seen: list[Tensor] = []
        with self._gained(seen):
            logits = self.logits(x)
        taken = self.descend(entropy(at_least_float32(logits)))
        change = self.hebbian_lr * self.hebbian_change(seen[0])
        name = f"model.{self.convolution}.weight"
        with torch.no_grad():
            moved = self.layer.weight + change
            self.write(name, moved, taken & moved.isfinite().all())
        self.note(hebbian=change.abs().amax())
        return logits

    def hebbian_change(self, x: Tensor) -> Tensor:
        """The mean over all patches of y_k (x - u_k w_k), of the shape of the weight."""
        layer = self.layer
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            weight = layer.weight.detach().clone().requires_grad_()
            u = torch.func.functional_call(layer, {"weight": weight}, (x.to(weight.dtype),))
            u = u if layer.bias is None else u - layer.bias.detach().view(-1, 1, 1)
            y = (self.inverse_temperature * at_least_float32(u.detach())).softmax(1)
            patches = len(u) * u[0, 0].numel()
            mean_of_x = torch.autograd.grad(u, weight, (y / patches).to(u.dtype))[0]  # sum of y_k x, whatever padding
        mean_of_u = (y * u.detach()).sum((0, 2, 3)) / patches
        change: Tensor = mean_of_x - mean_of_u.to(weight.dtype).view(-1, 1, 1, 1) * weight.detach()
        return change

    def infer(self, x: Tensor) -> Tensor:
        """The net with the gains."""
        with self._gained():
            return self.logits(x)

    def stream_weights(self) -> dict[str, Tensor]:
        """The convolution's, with the gains in them."""
        gains, layer = (1 + self.gains.detach()), self.layer
        bias = {} if layer.bias is None else {f"{self.convolution}.bias": layer.bias.detach() * gains}
        return {f"{self.convolution}.weight": layer.weight.detach() * gains.view(-1, 1, 1, 1), **bias}
