"""AdaContrast: labels by a vote of near features, learned from strong views, with a contrast between images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.contrast import contrast_queue
from lightning_tta.methods.components.teacher import TeacherMethod
from lightning_tta.views.strong import flip_some, strong_views


class AdaContrast(TeacherMethod):
    """Minimises a cross-entropy with voted labels, a contrast with other images, and the loss of diversity.

    With student s, teacher t (an average of past students), weak view w and strong views q, k of each image, features
    z, logits u, and a bank of the last ``queue_size`` images' z_t(w), p_t(w), keys z_t(k) and labels::

        y = arg-max of the mean p in the bank over the ``neighbours`` features nearest to z_s(w), by cosine
            (arg-max u_s(w) up to ``warmup`` images of the stream)
        L = class_weight     * mean_b CE(y, u_s(q))
          + contrast_weight  * mean_b -log( e^{z_s(q).z_t(k)/T} / (e^{z_s(q).z_t(k)/T} + sum_m e^{z_s(q).k_m/T}) )
          + diversity_weight * sum_c pbar_c log pbar_c,   pbar = mean_b p_s(q)
        one step of s;   the batch enters the bank;   t <- ema_decay * t + (1 - ema_decay) * s

    Features are taken at length 1; the keys k_m are those of the bank that had another label when they entered.

    Parameters touched: all, of s and t; BatchNorm uses batch statistics, each pass its own. State: s, t, the optimizer,
    the bank, of ``queue_size`` x (2 D + K + 1) numbers, 330 MB for ResNet-50 on ImageNet, and the number of steps and
    images. Per batch and step: four forward passes, of the student over w, q and, after the step, the images, and of
    the teacher over k and w together; one backward pass. Returns the student's logits after the step. ``stats`` has
    ``changed``, the share of labels that the vote changed.

    Args:
        model: A classifier that ends in one linear layer.
        lr: Authors' online setting in public benchmarks: 2e-4 with ``sgd`` (CIFAR, batch 200; ImageNet, batch 64).
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``.
        weight_decay: >= 0; authors 1e-4.
        class_weight: >= 0; authors 1.
        contrast_weight: >= 0; authors 1.
        diversity_weight: >= 0; authors 1.
        temperature: T, > 0; authors 0.07.
        neighbours: >= 1; authors 10.
        queue_size: >= 1; authors 16384.
        warmup: Images of the stream before the first vote, >= 0; public benchmarks 1024.
        ema_decay: Of the teacher, in [0, 1]; authors 0.999.
        head: Name of the last linear layer where the search finds another.
        seed: Of the views.
        **options: ``momentum``: authors 0.9. ``steps``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: Chen et al., CVPR 2022, arXiv 2204.10377; formula from the authors' code, in the online form, one pass over
    the stream, of public benchmarks. Differs from both: the bank starts empty, not with random keys; labels of the bank
    are those of its keys (there labels of a new batch are compared with keys that it replaces); the prediction uses the
    statistics of the batch (there averages over the stream; ``statistics="ema"`` is near to that); the strong view
    has no random crop, as in the benchmarks' CIFAR and ImageNet-C settings, and its colours change in a fixed order; a
    linear head learns at the rate of the rest; SGD without Nesterov.
    """

    about = About(
        does="cross-entropy with labels voted by near features; contrast between images; diversity",
        learns="all",
        passes="4 / 1",
        needs="linear head",
        holds="a teacher, features, keys and predictions of 16,384 images",
        suits="shuffled, long",
        formula="code",
        paper="CVPR 2022, arXiv 2204.10377",
    )
    returns = "after the step"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 2e-4,
        optimizer: OptimizerName = "sgd",
        weight_decay: float = 1e-4,
        class_weight: float = 1.0,
        contrast_weight: float = 1.0,
        diversity_weight: float = 1.0,
        temperature: float = 0.07,
        neighbours: int = 10,
        queue_size: int = 16384,
        warmup: int = 1024,
        ema_decay: float = 0.999,
        head: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        options |= {"lr": lr, "optimizer": optimizer, "weight_decay": weight_decay}
        super().__init__(model, ema_decay=ema_decay, seed=seed, **options)
        weights = {"class": class_weight, "contrast": contrast_weight, "diversity": diversity_weight}
        for name, value in weights.items():
            check_range(f"{name}_weight", value, 0)
        check_range("temperature", temperature, 0, low_open=True)
        check_range("neighbours", neighbours, 1, integer=True)
        check_range("queue_size", queue_size, 1, integer=True)
        check_range("warmup", warmup, 0, integer=True)
        self.class_weight, self.contrast_weight, self.diversity_weight = weights.values()
        self.temperature, self.neighbours, self.queue_size, self.warmup = temperature, neighbours, queue_size, warmup
        self.split = HeadSplit(self.model, head)
        like = at_least_float32(self.split.head.weight.detach())
        widths = {"features": self.split.num_features, "keys": self.split.num_features}
        for name, width in {**widths, "probabilities": self.split.num_classes}.items():
            self.state(f"bank.{name}", like.new_zeros(queue_size, width), source=0.0)
            self.keep_wide(f"bank.{name}")
        self.state("bank.labels", torch.zeros(queue_size, dtype=torch.int64, device=like.device), source=0)
        self.state("images_seen", torch.zeros((), dtype=torch.int64, device=like.device), source=0)

    def stream_weights(self) -> dict[str, Tensor]:
        """None: the student predicts, which is the net itself."""
        return {}

    def step(self, x: Tensor) -> Tensor:
        """One step of the student, the batch into the bank, the teacher towards the student; then the prediction."""
        weak = flip_some(x, self.draw_key(1))
        key_views = strong_views(x, self.draw_key(3))
        teacher = self.teach_features(torch.cat([key_views, weak]), groups=2)
        (keys, features), (_, logits) = (at_least_float32(each).view(2, len(x), -1) for each in teacher)
        labels, usable = self._vote(weak)
        queries, query_logits = self.features(strong_views(x, self.draw_key(2)))
        query_logits, keys = at_least_float32(query_logits), normalize(keys, dim=1)
        losses = self.class_weight * cross_entropy(query_logits, labels, reduction="none")
        if self.contrast_weight:
            negative = (labels[:, None] != self.value("bank.labels")) & self._filled
            queries = normalize(at_least_float32(queries), dim=1)
            contrast = contrast_queue(queries, keys, self.value("bank.keys"), negative, self.temperature)
            losses = losses + self.contrast_weight * contrast
        mean = query_logits.softmax(1).mean(0)
        taken = self.descend(losses, usable, self.diversity_weight * (mean * (mean + 1e-8).log()).sum())
        new = {"features": normalize(features, dim=1), "keys": keys, "probabilities": logits.softmax(1)}
        finite = torch.stack([each.isfinite().all() for each in new.values()]).all()
        self._remember({**new, "labels": labels}, taken & finite)
        self.follow(taken)
        return self.infer(x)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """The student's prediction."""
        return self.logits(x)

    @property
    def _filled(self) -> Tensor:
        """Which places of the bank hold an image, (M,)."""
        seen = self.value("images_seen")
        return torch.arange(self.queue_size, device=seen.device) < seen

    @torch.no_grad()
    def _vote(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B,) of weak views, and which of them are of finite features, (B,)."""
        features, logits = self.features(weak)
        own, bank = logits.argmax(1), self.value("bank.features")
        similarity = (normalize(features.to(bank.dtype), dim=1) @ bank.T).masked_fill(~self._filled, float("-inf"))
        nearest = similarity.topk(min(self.neighbours, self.queue_size), dim=1)
        votes = self.value("bank.probabilities")[nearest.indices] * (nearest.values > float("-inf"))[..., None]
        voted = torch.where(self.value("images_seen") >= max(self.warmup, 1), votes.sum(1).argmax(1), own)
        self.note(changed=(voted != own).float().mean())
        return voted, features.isfinite().all(1) & logits.isfinite().all(1)

    @torch.no_grad()
    def _remember(self, new: dict[str, Tensor], where: Tensor) -> None:
        """Put a batch into the bank, in the place of the oldest, if ``where``, 0-dimensional and bool, is true."""
        seen, number = self.value("images_seen"), len(new["labels"])
        last = slice(max(0, number - self.queue_size), None)
        places = torch.remainder(seen + torch.arange(number, device=seen.device), self.queue_size)[last]
        for name, values in new.items():
            held = self.value(f"bank.{name}")
            held.index_copy_(0, places, torch.where(where, values[last].to(held.dtype), held[places]))
        self.write("images_seen", seen + number, where)
