"""What ROID and CMF share: the weighted soft likelihood ratio, consistency with a view, and the prior of the batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_tta.errors import check_choice, check_range
from lightning_tta.losses import at_least_float32, entropy, soft_cross_entropy, soft_likelihood_ratio
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.methods.components.drawing import DrawingMethod
from lightning_tta.methods.components.filters import empty_by_class
from lightning_tta.methods.components.priors import Moving

PriorCorrection = Literal["probabilities", "logits", "none"]


class LikelihoodMethod(DrawingMethod):
    """Minimises the soft likelihood ratio and the consistency with a view, of sure and diverse samples.

    To write one: call ``super().__init__`` and implement :meth:`merge`, what happens to the weights after a step.

    Args:
        model: A classifier with normalisation layers.
        weighting: Whether samples have weights by diversity and certainty; else all count alike.
        temperature: tau of the weights, above 0; authors 1/3.
        diversity_momentum: Share of the mean prediction that stays with each batch, in [0, 1]; authors 0.9.
        clip: Largest probability in the soft likelihood ratio, in (0, 0.9999]; authors 0.99. What is above has no
            gradient.
        consistency: Whether with the term of the view.
        detach_target: Whether the image's own prediction is a constant in that term; in the authors' code the gradient
            flows into both.
        prior_correction: What the smoothed mean prediction of the batch multiplies: ``probabilities``, as in the paper;
            ``logits``, as in the authors' code, which takes rank from negative logits of frequent classes; ``none``.
        seed: Of the views.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.
    """

    draws = 1
    uses_batch_statistics = True
    step_on_host = "it draws a view of the images, which is made on the host's word"

    def __init__(
        self,
        model: nn.Module,
        *,
        weighting: bool = True,
        temperature: float = 1 / 3,
        diversity_momentum: float = 0.9,
        clip: float = 0.99,
        consistency: bool = True,
        detach_target: bool = False,
        prior_correction: PriorCorrection = "probabilities",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, seed=seed, **options)
        check_range("temperature", temperature, 0, low_open=True)
        check_range("diversity_momentum", diversity_momentum, 0, 1)
        check_range("clip", clip, 0, 0.9999, low_open=True)
        check_choice("prior_correction", prior_correction, ("probabilities", "logits", "none"))
        self.weighting, self.temperature, self.diversity_momentum = weighting, temperature, diversity_momentum
        self.clip, self.consistency, self.detach_target = clip, consistency, detach_target
        if not consistency:
            self.step_on_host = ""
        self.learn(self.select("norm"))
        self.state("mean_probability", empty_by_class(self.model), source=NOT_YET)
        if prior_correction != "none":
            self.put_on(Moving(self, form=prior_correction))
            self.own_prior = "the method corrects its predictions itself. Set prior_correction='none', or leave it out"

    @abstractmethod
    def merge(self, taken: Tensor) -> None:
        """Merge the weights with others, if the step was ``taken``, 0-dimensional bool."""

    def step(self, x: Tensor) -> Tensor:
        """One step on the images and a view of them."""
        if not self.consistency:
            return self._step(x)
        view = self.view(x, padding="reflect", blur=False, noise=False)
        return cast(Tensor, self.replayed("step with a view", self._step, x, view))

    def _step(self, x: Tensor, view: Tensor | None = None) -> Tensor:
        logits = self.logits(x)
        p = at_least_float32(logits.detach()).softmax(-1)
        old = self.sized("mean_probability", p[0]).to(p.dtype)
        old = torch.where(old.isnan(), 1 / p.shape[-1], old)
        weights = self._weights(logits.detach(), p, old) if self.weighting else torch.ones_like(p[:, 0])
        losses = soft_likelihood_ratio(logits, self.clip)
        if view is not None:
            target = logits.detach() if self.detach_target else logits
            with self.counting(weights > 0):
                losses = losses + soft_cross_entropy(target, self.logits(view, accounted=False), 0.5)
        self.note(kept=(weights > 0).float().mean())
        taken = self.descend(losses * weights)
        if not self.known(~taken):
            self.write("mean_probability", torch.lerp(p.mean(0), old, self.diversity_momentum), taken)
            self.count_step(taken)
            self.merge(taken)
        return logits

    def _weights(self, logits: Tensor, p: Tensor, mean_probability: Tensor) -> Tensor:
        """``exp(diversity * certainty / tau)``, both scaled to [0, 1]; 0 where the diversity is below its mean."""
        diversity = _spread(1 - cosine_similarity(mean_probability[None], p, dim=-1))
        certainty = _spread(-entropy(logits))
        weights = (diversity * certainty / self.temperature).exp()
        return torch.where(diversity < diversity.mean(), 0, weights)

    def source(self) -> Mapping[str, Tensor]:
        """The source's values of what learns, by name."""
        return {name: self.source_value(name) for name in self.adaptable}

    def weights(self) -> Mapping[str, Tensor]:
        """What learns, by name."""
        return {name: tensor.detach() for name, tensor in self.adaptable.items()}


def _spread(values: Tensor) -> Tensor:
    """Values (B,) moved and scaled to [0, 1]; 0 where all are equal."""
    low, high = values.aminmax()
    return torch.where(high > low, (values - low) / (high - low), 0)
