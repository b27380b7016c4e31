"""Mixed batch norm: a learnable mixture of source and batch statistics, one weight a channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_tta.backbones.norms import batch_norm_layers, replaced_forwards
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_choice, check_range
from lightning_tta.meta.mixing import Inner, Source, mixed_batch_norm, source_batch_norm

Parametrization = Literal["raw", "sigmoid"]
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class MixedBatchNorm(_NormBase):
    """BatchNorm with the moments of a mixture of the source distribution and the batch's.

    With the weight w on the source, source statistics s and batch statistics t (unbiased variance), per channel::

        mean = w mean_s + (1 - w) mean_t
        var  = w var_s + (1 - w) var_t + w (1 - w) (mean_s - mean_t)^2
        y    = weight (x - mean) / sqrt(var + eps) + bias

    the same in train and eval mode. The source statistics (``running_mean``, ``running_var``) never move. Everything
    is folded into one scale and shift per channel, so that a pass keeps its input for backward and nothing else of
    that size. ``w = 1`` is BatchNorm in eval mode. Where a channel has one value, the source statistics are used.

    Shape: x (N, C) or (N, C, ...) -> the same. With ``domains`` D > 1, x holds D domains of N / D images one after
    the other, each with its own batch statistics; each parameter is (C,) for all or (D, C), one row a domain.

    Args:
        norm: The BatchNorm layer to take over; parameters, statistics and forward hooks are shared with it.
        source_weight: Initial w, in [0, 1] (sigmoid: strictly inside).
        std: Standard deviation of its initial values.
        parametrization: ``raw``: the parameter is w, as in the authors' code; it may leave [0, 1], so the variance is
            kept from falling below zero. ``sigmoid``: w = sigmoid(parameter), always inside.

    Attributes:
        source_weight: The raw parameter (C,), see :attr:`mixing` for w.
        domains: Number of domains in a batch, see :func:`batch_of_domains`.
        inner: Which gradients a pass computes, see there.

    Raises:
        UnsupportedModelError: If the layer keeps no running statistics, or computes more than BatchNorm.

    Source: Meta-TTT, arXiv 2410.01709. Differs from it: the sigmoid, the bound on the variance, the folding.
    """

    source_weight: nn.Parameter

    def __init__(
        self, norm: _BatchNorm, source_weight: float = 0.75, std: float = 0.0, parametrization: Parametrization = "raw"
    ) -> None:
        _check_mixing(source_weight, std, parametrization)
        running = norm.running_mean
        if running is None or norm.running_var is None:
            raise UnsupportedModelError(
                "A BatchNorm layer keeps no running statistics (track_running_stats=False), so there is no source to "
                "mix with. Train the net with running statistics."
            )
        if norm.affine and not all(isinstance(p, nn.Parameter) for p in (norm.weight, norm.bias)):
            raise UnsupportedModelError(
                "A BatchNorm layer's weight or bias is computed (parametrised or pruned), which mixed batch norm "
                "cannot take over. Make it permanent first: torch.nn.utils.parametrize.remove_parametrizations(layer, "
                "'weight'), or prune.remove(layer, 'weight'); or use method 'tent'."
            )
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.activation = _fused_activation(norm)
        self.affine = norm.affine
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = running, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        for name in _HOOKS:
            setattr(self, name, getattr(norm, name))
        self.parametrization = parametrization
        initial = torch.full_like(running, source_weight) + std * torch.randn_like(running)
        if parametrization == "sigmoid":
            initial = torch.logit(initial, eps=1e-3)
        self.source_weight = nn.Parameter(initial)
        self.domains = 1
        self.inner: Inner | None = None

    @property
    def mixing(self) -> Tensor:
        """The weight w on the source statistics: (C,) or (D, C)."""
        return self.source_weight.sigmoid() if self.parametrization == "sigmoid" else self.source_weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, ...)."""
        self._check_input_dim(x)
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        source = Source(mean, var, self.eps, self.parametrization == "raw")
        if x.numel() > self.domains * self.num_features:
            y = mixed_batch_norm(x, self.weight, self.bias, self.mixing, source, self.domains, self.inner)
        else:  # one value a channel: it has no variance
            y = source_batch_norm(x, self.weight, self.bias, source, self.domains)
        return y if self.activation is None else self.activation(y)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or len(x) % self.domains:
            raise ConfigError(
                f"MixedBatchNorm wants (N, C, ...), N a multiple of its {self.domains} domains; got {tuple(x.shape)}."
            )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.num_features}, eps={self.eps}, parametrization={self.parametrization}"


def _check_mixing(source_weight: float, std: float, parametrization: str) -> None:
    check_range("source_weight", source_weight, 0, 1)
    check_range("std", std, 0)
    check_choice("parametrization", parametrization, ("raw", "sigmoid"))
    if parametrization == "sigmoid" and source_weight in (0, 1):
        raise ConfigError(
            f"source_weight={source_weight} cannot be reached by a sigmoid. Give a value inside (0, 1), or use "
            "parametrization='raw'."
        )


def _fused_activation(norm: _BatchNorm) -> nn.Module | None:
    """What timm's BatchNormAct2d does after the normalisation; ``None`` for torch's own layers."""
    if "forward" in vars(norm):
        raise UnsupportedModelError(
            f"The forward of a {type(norm).__name__} was replaced by a function, which mixed batch norm cannot take "
            "over. Put a forward hook or a layer of its own in its place, or use method 'tent'."
        )
    if type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return None
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        return nn.Sequential(drop, act)
    raise UnsupportedModelError(
        f"{type(norm).__name__} is a BatchNorm with a forward of its own, which mixed batch norm cannot take over. "
        "Use torch.nn.BatchNorm2d (or timm's BatchNormAct2d) in its place."
    )


def mixed_batch_norm_layers(model: nn.Module) -> dict[str, MixedBatchNorm]:
    """All mixed layers by module name, in the net's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixedBatchNorm)}


MixedLayers = dict[_BatchNorm, MixedBatchNorm]


def make_mixed_layers(
    model: nn.Module, source_weight: float = 0.75, std: float = 0.0, parametrization: Parametrization = "raw"
) -> MixedLayers:
    """A :class:`MixedBatchNorm` for every BatchNorm layer of ``model``, which stays as it is.

    Arguments and errors as in :func:`convert_mixed_bn`.
    """
    _check_mixing(source_weight, std, parametrization)
    layers: MixedLayers = {}
    for name, norm in batch_norm_layers(model).items():
        try:
            layers[norm] = MixedBatchNorm(norm, source_weight, std, parametrization).train(norm.training)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"Layer '{name}': {error}") from None
    if not layers and not mixed_batch_norm_layers(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no BatchNorm layer, so there are no statistics to mix. For GroupNorm or "
            "LayerNorm nets use method 'tent' or 'zerosiam'."
        )
    return layers


def convert_mixed_bn(
    model: nn.Module, source_weight: float = 0.75, std: float = 0.0, parametrization: Parametrization = "raw"
) -> nn.Module:
    """Replace every BatchNorm layer of ``model``, in place, by a :class:`MixedBatchNorm` with the same parameters.

    Args:
        model: A net with BatchNorm layers; layers that are mixed already stay as they are.
        source_weight: Initial weight on the source statistics, in [0, 1]; the authors take 0.75.
        std: Spread of the initial weights over the channels, >= 0; the authors take 0.01 (drawn from torch's global
            RNG).
        parametrization: ``raw`` or ``sigmoid``.

    Returns:
        The net (a lone layer comes back as a new module).

    Raises:
        ConfigError: If a value is out of range.
        UnsupportedModelError: If the net has no BatchNorm layer, or one that cannot be taken over; it is unchanged.
    """
    layers = make_mixed_layers(model, source_weight, std, parametrization)
    for norm, layer in layers.items():
        vars(norm)["forward"] = partial(_run, layer)  # for a forward that walks through a plain list of its layers
    return _replace(model, layers)


@contextmanager
def mixed_layers(model: nn.Module, layers: MixedLayers) -> Iterator[None]:
    """While active, ``layers`` (see :func:`make_mixed_layers`) stand in for the BatchNorm layers of ``model``.

    Also where its forward does not ask the net for them, but goes through a plain list of its layers.
    """
    for norm, layer in layers.items():
        layer.running_mean, layer.running_var = norm.running_mean, norm.running_var  # moved since, perhaps
    _replace(model, layers)
    try:
        with replaced_forwards({norm: partial(_run, layer) for norm, layer in layers.items()}):
            yield
    finally:
        _replace(model, {layer: norm for norm, layer in layers.items()})


def _run(layer: MixedBatchNorm, x: Tensor) -> Tensor:
    """Without hooks, which the layer shares with the one that it stands in for; with its forward of the moment."""
    return layer.forward(x)


def _replace(model: nn.Module, replacement: Mapping[Any, nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a shared layer has several names
        parent, _, child = name.rpartition(".")
        if name and module in replacement:
            setattr(model.get_submodule(parent), child, replacement[module])
    return replacement.get(model, model)


@contextmanager
def batch_of_domains(model: nn.Module, domains: int) -> Iterator[Inner]:
    """While active, batches hold ``domains`` of equal size, one after the other; see :class:`MixedBatchNorm`.

    Yields the switch of the gradients that passes meanwhile compute.
    """
    check_range("domains", domains, 1, integer=True)
    layers = mixed_batch_norm_layers(model).values()
    inner = Inner()
    for layer in layers:
        layer.domains, layer.inner = domains, inner
    try:
        yield inner
    finally:
        for layer in layers:
            layer.domains, layer.inner = 1, None
