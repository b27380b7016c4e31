"""PETAL: CoTTA with a Gaussian posterior of the source's weights as a prior, and restore by Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import Gradients
from lightning_tta.methods.components.fisher import quantile_bound
from lightning_tta.methods.components.posterior import Posterior, fit_posterior, read_posterior, save_posterior
from lightning_tta.methods.components.pull import PullMethod
from lightning_tta.methods.cotta import CoTTA

DAMPING = 1e-6


class PETAL(PullMethod, CoTTA):
    """Minimises the cross-entropy of the student under its teacher's predictions, and -log of a Gaussian prior.

    :class:`~lightning_tta.methods.cotta.CoTTA`, whose target, teacher, state and passes these are, with ::

        L = L_CoTTA + prior_weight * 1/2 sum_i (theta_i - mu_i)^2 / (var_i + 1e-6)

    and another restore: with g the gradient of L, the weights go back to the source whose g^2 is below the ``restore``
    quantile of all of them, by a selection, not a sort (``restore_by="random"``: CoTTA's; the authors' PETAL-SRes).

    The posterior N(mu, var) is that of SWAG with a diagonal covariance: mean and variance of the weights at the ends of
    epochs of further training on the source, all but the first, with SGD. :meth:`prepare` fits it, BatchNorm at its
    source statistics; or it is loaded from a file that :meth:`save_posterior` has written. The variance comes from sums
    of squared deviations, and is never negative. Student, teacher and anchor start at mu, to which a reset goes back.

    Args:
        model: Any classifier; to fit the posterior, one that ends in a linear layer, which says how many classes.
        prior_weight: >= 0; authors 1e-9 (CIFAR), 1e-11 (ImageNet).
        restore: The quantile, in [0, 1]; authors 0.03 (CIFAR), 0.003 (ImageNet). The probability if ``random``.
        restore_by: ``fisher`` or ``random``.
        start: ``mean``: at mu, as the authors; ``source``: at the weights of the net, the posterior is the prior alone.
        posterior: Path of a file with the posterior; ``None``: :meth:`prepare` fits it.
        swag_epochs: Passes over the source images, >= 2; authors 5 (CIFAR), 2, with four means in each (ImageNet).
        swag_lr: >= 0; authors 8e-4, from the second epoch on rising to 1e-2 (CIFAR), 1e-4 (ImageNet).
        **options: Those of CoTTA; ``symmetric``: authors false (CIFAR), true (ImageNet).

    Raises:
        UnsupportedModelError: If the posterior is to be fitted, and the net has no linear layer.
        WeightsError: If ``posterior`` is no file of one of this net.

    Source: Brahma and Rai, PETAL, CVPR 2023, arXiv 2212.09713; formula from the authors' code and paper. Differs from
    it as CoTTA does, and: the training rate is constant; g^2 of weights of every name counts.
    """

    about = About(
        does="as CoTTA, with a Gaussian posterior of the source's weights as prior; restore by Fisher information",
        learns="all",
        passes="3, and views / 1",
        needs="2,000 labelled source images, or a posterior from a file",
        holds="a teacher, mean and variance of the weights",
        suits="long, domains that change",
        formula="code and paper",
        paper="CVPR 2023, arXiv 2212.09713",
    )
    _values: Sequence[Tensor | None] = ()  # gradients, from the step to the restore

    tasks = frozenset({"images"})

    def __init__(
        self,
        model: nn.Module,
        *,
        prior_weight: float = 1e-9,
        restore: float = 0.03,
        restore_by: Literal["fisher", "random"] = "fisher",
        start: Literal["mean", "source"] = "mean",
        posterior: str | None = None,
        swag_epochs: int = 5,
        swag_lr: float = 8e-4,
        **options: Any,
    ) -> None:
        super().__init__(model, restore=restore, **options)
        check_range("prior_weight", prior_weight, 0)
        check_choice("restore_by", restore_by, ("fisher", "random"))
        check_choice("start", start, ("mean", "source"))
        check_range("swag_epochs", swag_epochs, 2, integer=True)
        check_range("swag_lr", swag_lr, 0)
        self.prior_weight, self.restore_by, self.start = prior_weight, restore_by, start
        self.swag_epochs, self.swag_lr = swag_epochs, swag_lr
        for number, parameter in enumerate(self.learned):
            for name in ("mean", "variance"):
                self.register_buffer(f"{name}_{number}", torch.zeros_like(at_least_float32(parameter.detach())))
        if posterior is not None and not isinstance(posterior, (str, Path)):
            raise ConfigError(f"posterior must be the path of a file, or None; got {posterior!r}.")
        self.needs_source, self.prepared = posterior is None, posterior is not None
        if posterior is None:
            assert self.split  # which refuses a net without a linear layer
        else:
            with self.hold():
                self._take(read_posterior(posterior, {name: tensor.shape for name, tensor in self.student().items()}))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Fit the posterior, from the source weights, unless it was loaded.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,); asked for once an epoch.

        Raises:
            ConfigError: If the method is prepared already, unless it starts at the source.
            DataError: See :func:`~lightning_tta.methods.components.posterior.fit_posterior`.
        """
        if self.needs_source:
            if self.start == "mean":
                self.check_not_prepared()
            self.let_go()
            self._take(fit_posterior(self, source_batches, self.swag_epochs, self.swag_lr))
        super().prepare(source_batches)

    def save_posterior(self, path: str | Path) -> None:
        """Write the posterior to a file, for the option ``posterior``."""
        save_posterior(self._posterior, list(self.student()), path)

    @property
    def _posterior(self) -> Posterior:
        means, variances = (
            [at_least_float32(self.get_buffer(f"{kind}_{number}")) for number in range(len(self.learned))]
            for kind in ("mean", "variance")
        )
        return Posterior(means, variances)

    @torch.no_grad()
    def _take(self, posterior: Posterior) -> None:
        """Take up a posterior, and start from its mean."""
        with outside_inference_mode():
            pairs = zip(posterior.means, posterior.variances, strict=True)
            for (name, slot), (number, (mean, variance)) in zip(
                self.teacher.slots.items(), enumerate(pairs), strict=True
            ):
                self.get_buffer(f"mean_{number}").copy_(mean)
                self.get_buffer(f"variance_{number}").copy_(variance)
                for state in (f"model.{name}", f"teacher.{slot}") if self.start == "mean" else ():
                    self.write(state, mean)
                    self.renew_source(state)

    def prior(self) -> Tensor | float:
        """-log of the prior's density but for a constant, times its weight; its gradient comes by itself."""
        if not self.prior_weight:
            return 0.0
        posterior = self._posterior
        strengths = torch._foreach_reciprocal(torch._foreach_add(list(posterior.variances), DAMPING))
        return self.pull(posterior.means, strengths, self.prior_weight / 2)

    def apply_gradients(self, gradients: Gradients) -> Tensor:
        """As of every method; the gradients are kept for the restore."""
        self._values = gradients.values
        return super().apply_gradients(gradients)

    @torch.no_grad()
    def finish(self, where: Tensor | None) -> None:
        """Weights of small squared gradient go back to the source."""
        values, self._values = self._values, ()
        if self.restore_by == "random":
            super().finish(where)
            return
        pairs = [pair for pair in zip(self.student().items(), values, strict=True) if pair[1] is not None]
        squares = [at_least_float32(value).square() for _, value in pairs if value is not None]
        bound = quantile_bound(squares, self.restore)
        for ((name, weight), _), square in zip(pairs, squares, strict=True):
            back = square < bound if where is None else (square < bound) & where
            weight.detach().copy_(torch.where(back, self.source_value(f"model.{name}"), weight))
