"""Meta-TTT at test time: entropy up, then down, with mixed batch norm."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.errors import ConfigError
from lightning_tta.meta.inner_loop import (
    PREDICTOR,
    InnerParameters,
    adapt_inner,
    inner_loop_of,
    with_inner_options,
)
from lightning_tta.meta.mixed_bn import MixedLayers, make_mixed_layers, mixed_batch_norm_layers, mixed_layers
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.predictor import make_predictor


class MetaTTT(TTAMethod):
    """Minimises ``L_conf - L_ent`` in the shifts of the last norm layer(s), then ``L_conf + L_ent`` in the rest.

    ``L_conf`` is the cross-entropy of the confident samples with their own arg-max, ``L_ent`` the entropy of the
    others (:mod:`lightning_tta.losses`); the rest are the scales of all norm layers and the other shifts. BatchNorm
    mixes source and batch statistics (:class:`~lightning_tta.meta.mixed_bn.MixedBatchNorm`). Steps are plain
    gradient descent on a functional copy, see :func:`lightning_tta.meta.inner_loop.adapt_inner`.

    ``min_objective="zerosiam"`` has the objective of :class:`~lightning_tta.methods.ZeroSiam` in the min steps, with a
    predictor that moves too, an idea of this project.

    Meant for nets that were meta-trained (``lightning-tta fit --config configs/digits/meta_ttt.yaml``), which bring
    their settings along; runs on any BatchNorm net, whose layers then mix with ``source_weight``.

    Parameters touched: none (``episodic``), else those adapted. State: the parameters. Per batch:
    ``max_steps + min_steps`` backward passes and one forward pass more; what comes before the first adapted layer
    runs once. Logits are those after the steps. If a result is not finite, the batch is predicted without adapting.

    Args:
        model: A net with BatchNorm or mixed batch norm layers.
        episodic: Every batch starts from the source. ``False``: from where the batch before ended.
        source_weight: Weight on the source statistics where the net is not meta-trained, in [0, 1].
        inner: Settings of :class:`~lightning_tta.meta.inner_loop.InnerLoop` by name, such as ``max_lr=0.3``; those not
            given, or ``None``, are as the net was trained, else the defaults there.

    Raises:
        ConfigError: If a value is out of range.
        UnsupportedModelError: If the net has no affine BatchNorm layer, or one without running statistics.

    Source: Meta-TTT, arXiv 2410.01709, and the authors' code. Differs from it: an evaluation path there throws the
    max step away; masks may be empty; the max layers are chosen by depth.
    """

    about = About(
        does="entropy of unsure samples up, then down, with mixed BatchNorm; for meta-trained nets, runs on any",
        learns="norm layers",
        passes="by its steps",
        needs="BatchNorm; better a meta-trained net",
        holds="-",
        suits="each batch for itself",
        formula="code",
        paper="arXiv 2410.01709",
    )

    returns = "after the step"

    @with_inner_options
    def __init__(self, model: nn.Module, *, episodic: bool = True, source_weight: float = 0.75, **inner: Any) -> None:
        super().__init__(model)
        self.episodic = episodic
        changes = {name: value for name, value in inner.items() if value is not None}
        self.settings = dataclasses.replace(inner_loop_of(self.model), **changes)
        self._layers: MixedLayers = make_mixed_layers(self.model, source_weight)
        if self._layers and mixed_batch_norm_layers(self.model):
            raise ConfigError("The net has both BatchNorm and mixed batch norm layers. Convert all or none of them.")
        for layer in self._layers.values():
            layer.source_weight.requires_grad_(False)
        self.mixing = nn.ParameterList([layer.source_weight for layer in self._layers.values()])
        with self.running():
            self._inner_parameters = InnerParameters(self.model, self.settings)
        mixing_names = {id(parameter): f"mixing.{number}" for number, parameter in enumerate(self.mixing)}
        self._state_names: dict[str, str] = {}
        for name, parameter in self._inner_parameters.parameters.items():
            self._state_names[name] = mixing_names.get(id(parameter), f"model.{name}")
            self.state(self._state_names[name], parameter)
        split = self._inner_parameters.split
        self.predictor = None if split is None else make_predictor(split)
        if self.predictor is not None:
            self._state_names[PREDICTOR] = "predictor.weight"
            self.state("predictor.weight", self.predictor.weight)

    def step(self, x: Tensor) -> Tensor:
        """Max steps, min steps, and a forward pass with the result."""
        predictor = None if self.predictor is None else self.predictor.weight
        result = adapt_inner(self.model, x, self.settings, inner_parameters=self._inner_parameters, predictor=predictor)
        steps = sum(map(len, result.losses.values()))
        self.count("backwards", steps)
        for phase, losses in result.losses.items():
            self.note(**{f"{phase}_loss": losses[0], "loss": losses[-1]})
        values = torch.cat([value.flatten() for value in result.parameters.values()])
        finite = torch.cat([result.after.flatten(), values.to(result.after.dtype)]).isfinite().all()
        self.count("skipped_steps", steps * ~finite)
        if not self.episodic:
            for name, value in result.parameters.items():
                self.write(self._state_names[name], value, finite)
        return torch.where(finite, result.after[0], result.before[0])

    own_statistics = "its layers mix the source's with the batch's, by weights that it learns"
    no_plain_net = (
        "it adapts to each batch in several passes, with layers that mix the source's BatchNorm statistics with the "
        "batch's. Deploy the method itself, or adapt with 'tent' or 'norm'"
    )

    def running(self) -> AbstractContextManager[None]:
        """Mixed layers in place of BatchNorm, only while the net runs: the net itself stays what it was."""
        return mixed_layers(self.model, self._layers)
