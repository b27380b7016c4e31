"""The inner loop of Meta-TTT: max and min entropy steps on a functional copy of the norm layers' parameters.

Training (:class:`lightning_tta.modules.meta_ttt.MetaTTT`) and test time (:class:`lightning_tta.methods.MetaTTT`) call
the same :func:`adapt_inner`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear

from lightning_tta.backbones.norms import shortcut_norms
from lightning_tta.backbones.passes import safe_checkpoints
from lightning_tta.backbones.split import HeadSplit, execution_order, is_idle
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import confident_loss, entropy, symmetric_kl, unconfident_entropy
from lightning_tta.meta.mixed_bn import batch_of_domains, mixed_batch_norm_layers
from lightning_tta.meta.prefix import shared_prefix
from lightning_tta.meta.unrolling import ParameterGroup, Step, by_name, unroll

Phase = Literal["max", "min"]
ConfidentLoss = Literal["hard_ce", "entropy"]
Temperature = Literal["none", "gem_t"]
MinObjective = Literal["confidence", "zerosiam"]
PREDICTOR = "predictor"
"""Name of ZeroSiam's predictor among the adapted parameters, and of its rate."""
Init = TypeVar("Init", bound=Callable[..., None])


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
        min_objective: What the min steps descend: ``confidence``, the authors', or ``zerosiam``, that of
            :class:`~lightning_tta.methods.ZeroSiam` over all samples, with a predictor that starts at the identity and
            moves too: ``mean H(p_o) + KL(p_t || p_o) + KL(p_o || p_t)``. Its first step moves the norm layers as Tent
            does, so that two min steps or more are needed for a difference. The target p_t counts as a constant, also
            in the derivative of the steps. An idea of this project.
        predictor_lr: Rate of that predictor in the min step.
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
    min_objective: MinObjective = "confidence"
    predictor_lr: float = 0.1

    def __post_init__(self) -> None:
        """Check every value."""
        for kind, rate in self.rates.items():
            check_range(f"{kind}_lr", rate, 0)
        for phase, steps in (("max", self.max_steps), ("min", self.min_steps)):
            check_range(f"{phase}_steps", steps, 0, integer=True)
        check_range("threshold", self.threshold, 0, 1)
        for name in ("max_layers", "adapt_layers"):
            check_range(name, getattr(self, name), 0, 1, low_open=True)
        check_choice("confident_loss", self.confident_loss, ("hard_ce", "entropy"))
        check_choice("temperature", self.temperature, ("none", "gem_t"))
        check_choice("min_objective", self.min_objective, ("confidence", "zerosiam"))
        check_range("predictor_lr", self.predictor_lr, 0)
        if self.max_steps + self.min_steps == 0:
            raise ConfigError("max_steps and min_steps are both 0: nothing would be adapted. Give at least one step.")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each kind of parameter."""
        kinds = ["max", "scale", "shift", "source_weight", *([PREDICTOR] if self.has_predictor else [])]
        return {name: getattr(self, f"{name}_lr") for name in kinds}

    @property
    def has_predictor(self) -> bool:
        """Whether the min steps have a second branch, through a predictor."""
        return self.min_objective == "zerosiam"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What happens at test time, in order: max, then min; without those that have no steps."""
        both: tuple[Phase, ...] = ("max", "min")
        return tuple(phase for phase in both if self.steps(phase))

    def steps(self, phase: Phase) -> int:
        """Number of steps of a phase."""
        return self.max_steps if phase == "max" else self.min_steps

    def loss(self, logits: Tensor, phase: Phase, online: Tensor | None = None) -> Tensor:
        """What a step of a phase descends, of logits (..., B, K): (...).

        Both phases push the confident samples further; max raises the entropy of the others, min lowers it.
        ``online`` are the logits (..., B, K) behind the predictor, where the min steps have one.
        """
        if phase == "min" and self.has_predictor:
            assert online is not None
            return (entropy(online) + symmetric_kl(logits.detach(), online)).mean(-1)
        confident = confident_loss(logits, self.threshold, self.confident_loss)
        unconfident = unconfident_entropy(logits, self.threshold, self.temperature)
        return confident - unconfident if phase == "max" else confident + unconfident


def with_inner_options(init: Init) -> Init:
    """Name the settings of :class:`InnerLoop` in the signature of a constructor with ``**inner``; default: ``None``.

    The command line, the check of options and ``help`` read them from the signature.
    """
    signature = inspect.signature(init)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind != Parameter.VAR_KEYWORD]
    hints = get_type_hints(InnerLoop).items()
    inner = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=hint | None) for name, hint in hints]
    init.__signature__ = signature.replace(parameters=[*named, *inner])  # type: ignore[attr-defined]
    return init


def set_inner_loop(net: nn.Module, settings: InnerLoop) -> None:
    """Note on a meta-trained net how it was trained, as its attribute ``inner_loop``; copies of the net keep it."""
    net.inner_loop = settings  # type: ignore[assignment]  # a plain attribute is neither a tensor nor a module


def inner_loop_of(net: nn.Module) -> InnerLoop:
    """The settings that a net was meta-trained with, see :func:`set_inner_loop`; else the defaults."""
    settings = getattr(net, "inner_loop", None)
    return settings if isinstance(settings, InnerLoop) else InnerLoop()


class InnerParameters:
    """The parameters of a net with mixed batch norm that the inner loop moves.

    Attributes:
        rate_of: For each phase with steps: parameter name -> kind of learning rate, see :attr:`InnerLoop.rates`.
        parameters: All of them that are the net's, by name, sorted.

        split: Where features part from the head, if the settings have a predictor between them.

    Raises:
        UnsupportedModelError: If the net has no mixed batch norm, or none with weight and bias, or, for a predictor, no
            linear head.
    """

    def __init__(self, net: nn.Module, settings: InnerLoop) -> None:
        layers = mixed_batch_norm_layers(net)
        if not layers:
            raise UnsupportedModelError(
                f"{type(net).__name__} has no mixed batch norm. Convert it with convert_mixed_bn(net); for nets "
                "without BatchNorm use method 'tent' or 'zerosiam'."
            )
        shortcuts = shortcut_norms(net)
        main = [name for name, layer in layers.items() if name not in shortcuts and layer.affine]
        order = execution_order(net)  # else the net's own: an auxiliary head may come last there, and not run
        if order is not None:
            main = [name for name in main if not is_idle(name, order)] or main
            main = sorted(main, key=order.index) if set(main) <= set(order) else main
        if not main:
            raise UnsupportedModelError(
                f"The BatchNorm layers of {type(net).__name__} have no weight and bias to adapt. Use layers with "
                "affine=True, or method 'norm'."
            )
        adapted = _last(main, settings.adapt_layers)
        raised = _last(adapted, settings.max_layers * len(main) / len(adapted)) if settings.max_steps else []
        lowered = {f"{name}.weight": "scale" for name in adapted}
        lowered |= {f"{name}.bias": "shift" for name in adapted if name not in raised}
        if settings.source_weight_lr > 0:
            lowered |= {f"{name}.source_weight": "source_weight" for name in adapted}
        rate_of: dict[Phase, dict[str, str]] = {"max": {f"{name}.bias": "max" for name in raised}, "min": lowered}
        named = dict(net.named_parameters())
        first = {id(parameter): name for name, parameter in named.items()}  # of a shared parameter's names
        every = dict(net.named_parameters(remove_duplicate=False))
        self.rate_of = {
            phase: {first[id(every[name])]: kind for name, kind in rate_of[phase].items()} for phase in settings.phases
        }
        self.parameters = {name: named[name] for name in sorted(set().union(*self.rate_of.values()))}
        self.split = HeadSplit(net) if settings.has_predictor else None


def _last(names: Sequence[str], share: float) -> list[str]:
    return list(names[-max(1, math.floor(min(share, 1) * len(names) + 1e-6)) :])


class Branches(NamedTuple):
    """What a pass gives: logits (D, B, K), and those behind the predictor, if there is one."""

    logits: Tensor
    online: Tensor | None


class Adapted(NamedTuple):
    """What :func:`adapt_inner` returns, for D domains of B images and K classes.

    Attributes:
        before: Logits (D, B, K) before the first step.
        after: Logits (D, B, K) after the last step.
        parameters: The adapted parameters by name, (C,) for one domain, (D, C) for several; ``predictor``, if there is
            one, (F, F) or (D, F, F).
        losses: The mean over domains of the loss at each step, by phase.
        gradients: Of the first step of the first phase, by parameter name.
    """

    before: Tensor
    after: Tensor
    parameters: dict[str, Tensor]
    losses: dict[Phase, list[Tensor]]
    gradients: dict[str, Tensor]


def alignment(result: Adapted, inner_parameters: InnerParameters, labels: Tensor) -> Tensor:
    """Cosine between the gradients of the inner loss and of the cross-entropy with ``labels``, before the first step.

    In [-1, 1]; 1: adapting without labels goes where labels would lead. ``result`` needs its ``before`` kept.
    """
    gradients = {name: gradient for name, gradient in result.gradients.items() if name != PREDICTOR}
    parameters = [inner_parameters.parameters[name] for name in gradients]
    loss = cross_entropy(result.before.flatten(0, 1), labels)
    main = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    inner = [gradient.view(-1, gradient.shape[-1]).mean(0) for gradient in gradients.values()]
    return cosine_similarity(torch.cat(inner).detach(), torch.cat(main), dim=0)


def adapt_inner(
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
    inner_parameters: InnerParameters | None = None,
    predictor: Tensor | None = None,
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
        inner_parameters: The net's, if they are known already.
        predictor: What the predictor of ``min_objective="zerosiam"`` starts from, (F, F); by default the identity.

    Source: Meta-TTT, arXiv 2410.01709.
    """
    inner_parameters = inner_parameters or InnerParameters(net, settings)
    rate_of, split = inner_parameters.rate_of, inner_parameters.split
    rates = rates or settings.rates
    phases = settings.phases if phases is None else phases
    differentiable = differentiable or second_order
    groups = _groups(net, {phase: rate_of[phase] for phase in phases})
    moving = [name for group in groups for name in group.names]
    if split is not None and "min" in phases:
        groups.append(ParameterGroup({PREDICTOR: _start(split, predictor)}, {"min": PREDICTOR}))
    # Checkpointed layers would compute again with the net's own parameters, for the others are in place in a pass only.
    once = safe_checkpoints(recompute=False)
    with once, batch_of_domains(net, domains) as inner, shared_prefix(net, images, moving) as run:

        @contextmanager
        def mixing(phase: Phase) -> Iterator[None]:
            inner.mixing = "source_weight" in rate_of[phase].values()
            yield
            inner.mixing = True

        def pass_with(parameters: dict[str, Tensor]) -> Branches:
            own = {name: value for name, value in parameters.items() if name != PREDICTOR}
            if split is None or PREDICTOR not in parameters:
                return Branches(_by_domain(run(own), domains), None)
            features, logits = split(images, lambda _: run(own))
            features = _by_domain(features, domains) @ parameters[PREDICTOR].mT.to(features.dtype)
            return Branches(_by_domain(logits, domains), linear(features, split.head.weight, split.head.bias))

        def loss_of(phase: Phase, branches: Branches) -> Tensor:
            return settings.loss(branches.logits, phase, branches.online)

        order = [phase for phase in phases for _ in range(settings.steps(phase))]
        moved = {p: {n: rates[g.kinds[p]] for n, g in enumerate(groups) if p in g.kinds} for p in phases}
        steps = [Step(moved[phase], partial(loss_of, phase), during=partial(mixing, phase)) for phase in order]
        done = unroll(
            net,
            pass_with,
            groups,
            steps,
            copies=domains,
            differentiable=differentiable,
            last=len(steps) if second_order else 0,
            keep_first=keep_before,
            what="BatchNorm layers",
        )
        parameters = by_name(groups, done.values)
        with torch.set_grad_enabled(differentiable):
            after = pass_with({name: value for name, value in parameters.items() if name != PREDICTOR}).logits
    before = after if done.first is None else done.first.logits
    losses: dict[Phase, list[Tensor]] = {}
    for phase, loss in zip(order, done.losses, strict=True):
        losses.setdefault(phase, []).append(loss)
    gradients = by_name([groups[number] for number in moved[order[0]]], done.gradients) if order else {}
    return Adapted(before if differentiable else before.detach(), after, parameters, losses, gradients)


def _groups(net: nn.Module, rate_of: Mapping[Phase, Mapping[str, str]]) -> list[ParameterGroup]:
    """The parameters of all phases, those together that have the same kind of rate in each phase."""
    named = dict(net.named_parameters())
    groups: dict[Any, ParameterGroup] = {}
    for name in dict.fromkeys(name for kinds in rate_of.values() for name in kinds):
        kinds = {phase: rate_of[phase][name] for phase in rate_of if name in rate_of[phase]}
        key = (*kinds.items(), named[name].dtype, named[name].device)
        groups.setdefault(key, ParameterGroup({}, kinds)).parameters[name] = named[name]
    return list(groups.values())


def _start(split: HeadSplit, predictor: Tensor | None) -> Tensor:
    like = split.head.weight
    return torch.eye(split.num_features, dtype=like.dtype, device=like.device) if predictor is None else predictor


def _by_domain(logits: Tensor, domains: int) -> Tensor:
    return logits.view(domains, -1, logits.shape[-1])
