"""PeTTA: RoTTA that measures how far it has gone from the source, and slows down and holds on accordingly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError, check_choice, check_range
from lightning_tta.losses import soft_cross_entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.memory_statistics import MemoryStatistics
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.rotta import RoTTA


class PeTTA(RoTTA):
    """Minimises the cross-entropy between student and teacher, held by the source as far as features have drifted.

    As :class:`~lightning_tta.methods.rotta.RoTTA`, with its memory of M images x_i, teacher t, student s, random view v
    and statistics of each net, but a step after every batch. With z the teacher's features of the batch, y their
    predicted classes, mu_k and var_k of the source's features of class k over D dimensions, and a, the anchor, the
    source net, whose statistics follow the memory too::

        gamma = 1 - exp(-mean_{k in y, d} (c_kd - mu_kd)^2 / (var_kd + 1e-6))
        L = mean_i loss(x_i) + gamma * pull_weight * R + anchor_weight * mean_i CE(p_a(x_i), p_s(v(x_i)))
        loss(x) = (CE(p_t, p_s) + CE(p_s, p_t) + CE(p_t, p_v) + CE(p_v, p_t)) / 4     p_v of s at v(x), the others at x
        R = - mean over tensors of cos(theta, theta_0)
        t <- t + (1 - gamma) (1 - ema_decay) (s - t)
        c_k <- 0.95 c_k + 0.05 mean of z over the images of class k in the batch      after gamma; c starts as mu

    The more the prototypes c drift from the source's means, the slower goes the teacher, and the more the student is
    drawn to the source. So it lasts where domains come again and again.

    Parameters touched, state and returns as of RoTTA; further the anchor's statistics, mu, var and c. Passes a batch:
    five forward, four of M images, and one backward. ``stats``: ``drift``, gamma.

    Args:
        model: A classifier with normalisation layers that ends in one linear layer.
        pull_weight: >= 0; authors 10 (CIFAR, ImageNet), 1 (DomainNet).
        anchor_weight: >= 0; authors 1.
        loss: ``both``, as above, authors for CIFAR; ``view``: CE(p_t, p_v) alone, authors for ImageNet.
        regularizer: ``cosine``, as above, or ``l2``, the squared distance, mean over tensors. Authors: ``cosine``.
        **options: Those of RoTTA but ``update_every``: ``capacity``, ``ema_decay``, ``bn_momentum``, ``lambda_t``,
            ``lambda_u``, ``seed``, ``lr``, ``optimizer``, ``momentum``, ``weight_decay``, with the same values.

    Raises:
        UnsupportedModelError: As RoTTA, or if the net does not end in a linear layer.

    Source: Hoang et al., PeTTA, NeurIPS 2024, arXiv 2311.18193. Formula from the authors' code. Differs from it as
    RoTTA does; a class of which the source images have fewer than two does not count in gamma (there it gives NaN).
    """

    about = About(
        does="cross-entropy to an averaged teacher on a balanced memory, held by the source as features drift",
        learns="norm layers",
        passes="5 / 1",
        needs="norm layers, a linear head, source images",
        holds="64 images, a teacher, 3 x K x D of the source",
        suits="long, recurring domains, sorted by class",
        formula="code",
        paper="NeurIPS 2024, arXiv 2311.18193",
    )

    needs_source = True
    fixed_options = frozenset({"update_every"})

    def __init__(
        self,
        model: nn.Module,
        *,
        pull_weight: float = 10.0,
        anchor_weight: float = 1.0,
        loss: Literal["both", "view"] = "both",
        regularizer: Literal["cosine", "l2"] = "cosine",
        bn_momentum: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(model, bn_momentum=bn_momentum, update_every=None, **options)
        check_range("pull_weight", pull_weight, 0)
        check_range("anchor_weight", anchor_weight, 0)
        check_choice("loss", loss, ("both", "view"))
        check_choice("regularizer", regularizer, ("cosine", "l2"))
        self.pull_weight, self.anchor_weight = pull_weight, anchor_weight
        self.loss, self.regularizer = loss, regularizer
        self._drawn: Tensor | None = None  # gamma pull_weight R, from the loss to its gradient
        self.of_anchor = MemoryStatistics(self, "anchor", momentum=bn_momentum)
        self.statistics += (self.of_anchor,)
        like = self.split.head.weight.detach()
        for name in ("source_means", "source_vars"):
            self.register_buffer(name, torch.zeros_like(like))
        self.register_buffer("source_numbers", torch.zeros_like(like[:, :1]))  # images of each class, (K, 1)
        self.state("prototypes", torch.zeros_like(like))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take mean and variance of the features of each class that the source net predicts; labels are not used.

        Raises:
            DataError: If no class has two finite images.
        """
        like = self.split.head.weight.detach().double()
        with outside_inference_mode():
            numbers, sums, squares = like.new_zeros(len(like), 1), torch.zeros_like(like), torch.zeros_like(like)

        def see(images: Tensor) -> None:
            features, logits = self.features(images)
            good = torch.isfinite(features).all(1) & torch.isfinite(logits).all(1)
            members = (torch.arange(len(like), device=like.device)[:, None] == logits.argmax(1)) & good
            z = torch.where(good[:, None], features, 0).double()
            numbers.add_(members.sum(1, keepdim=True))
            sums.add_(members.double() @ z)
            squares.add_(members.double() @ (z * z))

        with self.at_source():
            see_source_images(self, source_batches, see, running=nullcontext)
        if not bool((numbers > 1).any()):
            raise DataError(
                "'petta' needs source images, at least two of a class, for means and variances of their features; "
                f"found {int(numbers.sum())} that are finite. Give batches {{'image': (B, C, H, W) in [0, 1]}} of the "
                "training set."
            )
        with outside_inference_mode(), torch.no_grad():
            enough, means = numbers > 1, sums / numbers
            variances = ((squares - numbers * means * means) / (numbers - 1)).clamp(min=0)
            self.get_buffer("source_numbers").copy_(numbers)
            self.get_buffer("source_means").copy_(torch.where(enough, means, 0))
            self.get_buffer("source_vars").copy_(torch.where(enough, variances, 0))
            self.write("prototypes", self.get_buffer("source_means"))
            self.renew_source("prototypes")
        super().prepare(source_batches)

    @torch.no_grad()
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits and features of a batch."""
        features, logits = self.split(x, self.infer)
        return logits, features

    @torch.no_grad()
    def drift(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """How far the prototypes of the classes in a batch are from the source, gamma; and the prototypes after it."""
        prototypes, means = self.value("prototypes"), self.get_buffer("source_means")
        members = torch.arange(len(means), device=means.device)[:, None] == logits.argmax(1)
        number = members.sum(1, keepdim=True)
        counts = (number > 0) & (self.get_buffer("source_numbers") > 1)
        distances = (prototypes - means).square() / (self.get_buffer("source_vars") + 1e-6)
        mean = torch.where(counts, distances, 0).sum() / (counts.sum() * means.shape[1]).clamp(min=1)
        batch = (members.to(features.dtype) @ features) / number
        moved = torch.lerp(prototypes, batch.to(prototypes), 0.05)
        return 1 - (-mean).exp(), torch.where(counts, moved, prototypes)

    def learn_from(self, images: Tensor, there: Tensor, ages: Tensor, *more: Tensor) -> Tensor:
        """A step of the student on images (M, C, H, W), then of the teacher; whether all was finite."""
        view, logits, features = more
        gamma, prototypes = self.drift(logits, features)
        with torch.no_grad(), self.of_teacher.moving(there):
            target = self.logits(images, self.teacher.weights())
        with torch.no_grad(), self.of_anchor.moving(there):  # before the student, whose graph needs its own weights
            anchor = self.logits(images, self.source())
        with self.of_student.moving(there):
            losses = soft_cross_entropy(target, self.logits(images), 0.5)
        with self.of_student.moving(there, again=True):
            viewed = self.logits(view)
        if self.loss == "both":
            losses = (losses + soft_cross_entropy(target, viewed, 0.5)) / 2
        else:
            losses = soft_cross_entropy(target, viewed)
        losses = losses + self.anchor_weight * soft_cross_entropy(anchor, viewed)
        self._drawn = gamma * self.pull_weight * self.distance()
        try:
            taken = self.descend(losses, there, self._drawn.detach())
        finally:
            self._drawn = None
        self.note(drift=gamma)
        if not self.known(~taken):
            self.update_teacher(taken * (1 - gamma))
            self.write("prototypes", prototypes, taken)
        return taken

    def differentiate(self, loss: Tensor, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor | None, ...]:
        """With the gradient of R, which every net has: so that it is seen where the others do not reach."""
        values = super().differentiate(loss, tensors)
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return values
        pulls = torch.autograd.grad(drawn, self.learned)
        return tuple(None if value is None else value + pull for value, pull in zip(values, pulls, strict=True))

    def distance(self) -> Tensor:
        """R, of the student from the source."""
        pairs = [(tensor, self.source()[name]) for name, tensor in self.student().items()]
        if self.regularizer == "l2":
            return torch.stack([(now - then).square().sum() for now, then in pairs]).mean()
        return -torch.stack([cosine_similarity(now[None], then[None]).mean() for now, then in pairs]).mean()
