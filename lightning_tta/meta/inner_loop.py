"""The inner loop of Meta-TTT: max and min entropy steps on a functional copy of the norm layers' parameters.

Training (:class:`lightning_tta.modules.meta_ttt.MetaTTT`) and test time (:class:`lightning_tta.methods.MetaTTT`) call
the same :func:`minimax`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lightning_tta.errors import ConfigError, UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import confident_loss, unconfident_entropy
from lightning_tta.meta.mixed_bn import domain_groups, mixed_batch_norm_layers
from lightning_tta.meta.prefix import shared_prefix

Phase = Literal["max", "min"]
ConfidentLoss = Literal["hard_ce", "entropy"]
Temperature = Literal["none", "gem_t"]


@dataclass(frozen=True)
class InnerLoop:
    """The settings of the inner loop; the defaults are those of the authors' code unless said otherwise.

    Attributes:
        max_steps: Steps of the max phase, >= 0; 0 switches it off (every shift then belongs to the min phase).
        min_steps: Steps of the min phase, >= 0.
        max_lr: Rate of the max step (shifts of the max layers).
        scale_lr: Rate of the scales in the min step.
        shift_lr: Rate of the other shifts in the min step.
        source_weight_lr: Rate of the mixing weights in the min step; 0 leaves them fixed, as in the authors' late
            scripts.
        threshold: Samples are confident where the largest probability is at least this, in [0, 1].
        confident_loss: ``hard_ce`` (code) or ``entropy`` (paper).
        temperature: ``none`` or ``gem_t``, of the unconfident samples' entropy.
        max_layers: Share of the norm layers, from the last, whose shifts the max step moves, in (0, 1]; at least one
            layer. The authors take the last one.
        adapt_layers: Share of the norm layers, from the last, that are adapted at all, in (0, 1]. Below 1, the layers
            before them run once for all passes.
    """

    max_steps: int = 1
    min_steps: int = 1
    max_lr: float = 0.1
    scale_lr: float = 0.1
    shift_lr: float = 0.1
    source_weight_lr: float = 0.0
    threshold: float = 0.75
    confident_loss: ConfidentLoss = "hard_ce"
    temperature: Temperature = "none"
    max_layers: float = 0.05
    adapt_layers: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("max_steps", "min_steps"):
            check_range(name, getattr(self, name), 0, integer=True)
        for name in ("max_lr", "scale_lr", "shift_lr", "source_weight_lr"):
            check_range(name, getattr(self, name), 0)
        check_range("threshold", self.threshold, 0, 1)
        for name in ("max_layers", "adapt_layers"):
            check_range(name, getattr(self, name), 0, 1, low_open=True)
        check_choice("confident_loss", self.confident_loss, ("hard_ce", "entropy"))
        check_choice("temperature", self.temperature, ("none", "gem_t"))
        if self.max_steps + self.min_steps == 0:
            raise ConfigError("max_steps and min_steps are both 0: nothing would be adapted. Give at least one step.")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each kind of parameter."""
        return {name: getattr(self, f"{name}_lr") for name in ("max", "scale", "shift", "source_weight")}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What happens at test time, in order: max, then min; without those that have no steps."""
        both: tuple[tuple[Phase, int], ...] = (("max", self.max_steps), ("min", self.min_steps))
        return tuple(phase for phase, steps in both if steps)

    def steps(self, phase: Phase) -> int:
        """Number of steps of a phase."""
        return self.max_steps if phase == "max" else self.min_steps

    def loss(self, logits: Tensor, phase: Phase) -> Tensor:
        """What a step of a phase descends, of logits (..., B, K): (...).

        Both phases push the confident samples further; max raises the entropy of the others, min lowers it.
        """
        confident = confident_loss(logits, self.threshold, self.confident_loss)
        unconfident = unconfident_entropy(logits, self.threshold, self.temperature)
        return confident - unconfident if phase == "max" else confident + unconfident


class Minimax:
    """A net's parameters by their part in the inner loop: ``rate_of[phase]`` is parameter name -> kind of rate."""

    def __init__(self, net: nn.Module, settings: InnerLoop) -> None:
        layers = list(mixed_batch_norm_layers(net))
        if not layers:
            raise UnsupportedModelError(
                f"{type(net).__name__} has no mixed batch norm. Convert it with convert_mixed_bn(net); for nets "
                "without BatchNorm use method 'tent' or 'zerosiam'."
            )
        aside = shortcut_norms(net)
        main = [name for name in layers if name not in aside and mixed_batch_norm_layers(net)[name].affine]
        if not main:
            raise UnsupportedModelError(
                f"The BatchNorm layers of {type(net).__name__} have no weight and bias to adapt. Use layers with "
                "affine=True, or method 'norm'."
            )
        adapted = _last(main, settings.adapt_layers)
        raised = _last(adapted, settings.max_layers * len(main) / len(adapted)) if settings.max_steps else []
        self.rate_of: dict[Phase, dict[str, str]] = {
            "max": {f"{name}.bias": "max" for name in raised},
            "min": {
                **{f"{name}.weight": "scale" for name in adapted},
                **{f"{name}.bias": "shift" for name in adapted if name not in raised},
            },
        }
        if settings.source_weight_lr > 0:
            self.rate_of["min"] |= {f"{name}.source_weight": "source_weight" for name in adapted}
        self.rate_of = {phase: rates for phase, rates in self.rate_of.items() if settings.steps(phase)}
        parameters = dict(net.named_parameters())
        self.parameters = {
            name: parameters[name] for name in sorted({name for rates in self.rate_of.values() for name in rates})
        }


def _last(names: Sequence[str], share: float) -> list[str]:
    return list(names[-max(1, math.floor(min(share, 1) * len(names) + 1e-6)) :])


def shortcut_norms(net: nn.Module) -> set[str]:
    """Names of the norm layers in the shortcuts of residual blocks (often called downsample).

    A shortcut is a Sequential inside a block, itself no Sequential, that holds one 1x1 convolution, its norm layer
    and no activation.
    """
    found: set[str] = set()
    for name, module in net.named_modules():
        if isinstance(module, nn.Sequential):
            continue
        for child_name, child in module.named_children():
            if not isinstance(child, nn.Sequential):
                continue
            kinds = [part for part in child.modules() if not list(part.children())]
            convs = [part for part in kinds if isinstance(part, nn.Conv2d)]
            norms = [part for part in kinds if _is_norm(part)]
            others = [part for part in kinds if part not in convs and part not in norms]
            plain = all(isinstance(part, (nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout)) for part in others)
            if len(convs) == len(norms) == 1 and convs[0].kernel_size == (1, 1) and plain:
                prefix = f"{name}.{child_name}" if name else child_name
                found |= {f"{prefix}.{part_name}" for part_name, part in child.named_modules() if part in norms}
    return found


def _is_norm(module: nn.Module) -> bool:
    from lightning_tta.backbones.norms import is_norm_layer

    return is_norm_layer(module)


class Adapted(NamedTuple):
    """What :func:`minimax` returns, for D domains of B images and K classes.

    Attributes:
        logits: Before the first step and after the last: (D, B, K) each; ``after`` only if asked for.
        parameters: The adapted parameters by name, (C,) for one domain, (D, C) for several.
        losses: The mean over domains of the loss at each step, by phase.
        gradients: Of the first step of the first phase, by parameter name.
    """

    before: Tensor
    after: Tensor
    parameters: dict[str, Tensor]
    losses: dict[Phase, list[Tensor]]
    gradients: dict[str, Tensor]


def alignment(result: Adapted, groups: Minimax, labels: Tensor) -> Tensor:
    """Cosine between the gradients of the inner loss and of the cross-entropy with ``labels``, before the first step.

    In [-1, 1]; 1: adapting without labels goes where labels would lead. ``result`` needs its ``before`` kept.
    """
    parameters = [groups.parameters[name] for name in result.gradients]
    loss = cross_entropy(result.before.flatten(0, 1), labels)
    main = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    inner = [gradient.mean(0) if gradient.ndim > 1 else gradient for gradient in result.gradients.values()]
    return cosine_similarity(torch.cat(inner).detach(), torch.cat(main), dim=0)


def _by_domain(logits: Tensor, domains: int) -> Tensor:
    return logits.view(domains, -1, logits.shape[-1])


@dataclass
class _Trace:
    losses: dict[Phase, list[Tensor]] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def minimax(
    net: nn.Module,
    images: Tensor,
    settings: InnerLoop,
    *,
    phases: Sequence[Phase] | None = None,
    domains: int = 1,
    second_order: bool = False,
    differentiable: bool = False,
    keep_before: bool = False,
    rates: Mapping[str, Tensor | float] | None = None,
    groups: Minimax | None = None,
) -> Adapted:
    """Adapt the norm layers' parameters to unlabelled images, on a functional copy; the net itself does not change.

    Each domain adapts its own copy. A step is plain gradient descent on :meth:`InnerLoop.loss`. All domains run in
    one pass, and layers before the first adapted one run once.

    Args:
        net: A classifier with mixed batch norm, deterministic between passes (eval mode).
        images: (D * B, C, H, W), domain after domain.
        settings: Steps, rates, losses, layers.
        phases: In order; by default those of ``settings`` at test time. Without any, nothing is adapted.
        domains: Number of domains D.
        second_order: Whether the result is differentiable through the steps' own gradients.
        differentiable: Whether ``after`` and ``parameters`` keep a graph to the net's parameters; implied by
            ``second_order``. Alone it is the first-order approximation: the steps' gradients count as constants.
        keep_before: Whether ``before`` keeps a graph of its own, which the first-order steps otherwise use up.
        rates: Learning rates by kind, in place of the settings' (tensors may be learned).
        groups: The parameter groups, if they are known already.

    Returns:
        See :class:`Adapted`.

    Source: Meta-TTT, arXiv 2410.01709.
    """
    groups = groups or Minimax(net, settings)
    rates = rates or settings.rates
    phases = settings.phases if phases is None else phases
    trace = _Trace()
    differentiable = differentiable or second_order
    start = dict(net.named_parameters())
    current: dict[str, Tensor] = {}
    for name in [name for phase in phases for name in groups.rate_of[phase]]:
        value = start[name] if differentiable else start[name].detach()
        value = value.expand(domains, -1) if domains > 1 else value
        current[name] = value if value.requires_grad else value.clone().requires_grad_()
    first: Tensor | None = None
    with domain_groups(net, domains), shared_prefix(net, images, list(current)) as run:
        for phase in phases:
            names = groups.rate_of[phase]
            for _ in range(settings.steps(phase)):
                # Aliases of this pass alone: else, at second order, a gradient would also run through earlier steps.
                used = {name: value.view_as(value) for name, value in current.items()}
                logits = _by_domain(run(used), domains)
                first = logits if first is None else first
                loss = settings.loss(logits, phase)
                wanted = [used[name] for name in names]
                gradients = torch.autograd.grad(
                    loss.sum(),
                    wanted,
                    create_graph=second_order,
                    retain_graph=second_order or keep_before,
                    materialize_grads=True,
                )
                trace.losses.setdefault(phase, []).append(loss.detach().mean())
                trace.gradients = trace.gradients or dict(zip(names, gradients, strict=True))
                for (name, kind), gradient in zip(names.items(), gradients, strict=True):
                    current[name] = current[name] - rates[kind] * gradient
        with torch.set_grad_enabled(differentiable):
            after = _by_domain(run(current), domains)
    before = after if first is None else first
    return Adapted(before if differentiable else before.detach(), after, current, trace.losses, trace.gradients)
