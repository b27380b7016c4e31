"""SHOT, online: information maximisation, and labels from centroids of the batch; the classifier stays."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta import collective
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import OptimizerName


class SHOT(GradientMethod):
    """Minimises the entropy of each prediction less that of their mean, plus a cross-entropy with labels of clusters.

    With predictions p, features z with a 1 appended and scaled to length 1, f, and y~ a label that is a constant::

        L = mean_b H(p)  -  diversity_weight * H(mean_b p)  +  label_weight * mean_b CE(y~, p)

        c_k = sum_b p_bk f_b / sum_b p_bk,   y~ = arg-max_k cos(f, c_k)      over the classes that are some arg-max p
        c_k = mean of the f_b with y~_b = k, y~ = arg-max_k cos(f, c_k)      over the classes that are some y~

    Parameters touched: all but those of the last linear layer, which holds the source's hypothesis; BatchNorm uses
    batch statistics. State: these and the optimizer. Per batch and step: one forward, one backward pass. Returns the
    logits before the step. ``stats`` has both entropies, and the share of labels that are not the arg-max.

    H(mean p) asks the batch for all classes equally: on streams sorted by class, and with batches smaller than K, it
    works against the truth; ``diversity_weight=0`` leaves it out.

    Args:
        model: A classifier that ends in one linear layer.
        lr: Learning rate, >= 0. Authors: 1e-3 for the backbone.
        optimizer: ``sgd`` (authors), ``nesterov``, ``adam`` or ``adamw``.
        label_weight: >= 0. Authors: 0.3, and 0.1 for digits.
        diversity_weight: >= 0. Authors: 1, and 0 where the target has fewer classes than the source.
        labels: ``centroid``: as above, the authors', who cluster the whole target set before each epoch; ``confident``:
            the arg-max of the samples whose max p exceeds ``threshold``, what public online forms have.
        threshold: Of ``confident``, in [0, 1]. Public online forms: 0.9.
        head: Name of the last linear layer where the search finds another.
        **options: ``momentum`` (authors 0.9), ``weight_decay`` (authors 1e-3; public online forms 0), ``steps``,
            ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer, or nothing else can learn.

    Source: Liang et al., ICML 2020, arXiv 2002.08546; formula from the authors' code, which is offline: this is its
    form for one pass over a stream. Differs from it: clusters are those of the batch; no bottleneck layer with a rate
    of its own; the rate does not decay; SGD without Nesterov; the net stays in eval mode with batch statistics; the
    logarithm of the mean prediction is not shifted by 1e-5. With ``confident``, and no such sample, the term is 0 (in
    public online forms NaN).
    """

    about = About(
        does="entropy, less that of the mean prediction, and cross-entropy with labels from centroids of the batch",
        learns="all but the last linear layer",
        passes="1 / 1",
        needs="linear head",
        holds="-",
        suits="shuffled, batches larger than K",
        formula="code",
        paper="ICML 2020, arXiv 2002.08546",
    )

    uses_batch_statistics = True
    synchronized = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "sgd",
        label_weight: float = 0.3,
        diversity_weight: float = 1.0,
        labels: Literal["centroid", "confident"] = "centroid",
        threshold: float = 0.9,
        head: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, **options)
        check_range("label_weight", label_weight, 0)
        check_range("diversity_weight", diversity_weight, 0)
        check_choice("labels", labels, ("centroid", "confident"))
        check_range("threshold", threshold, 0, 1)
        self.label_weight, self.diversity_weight = label_weight, diversity_weight
        self.labels, self.threshold = labels, threshold
        self.split = HeadSplit(self.model, head)
        frozen = {id(parameter) for parameter in self.split.head.parameters()}
        extractor = {name: p for name, p in self.select("all").items() if id(p) not in frozen}
        if not extractor:
            raise UnsupportedModelError(
                f"SHOT learns all parameters but those of the last linear layer '{self.split.name}', and "
                f"{type(model).__name__} has no others that are free to learn. Use a method that learns none, such as "
                "'t3a' or 'lame'."
            )
        self.learn(extractor)

    def step(self, x: Tensor) -> Tensor:
        """One step on the whole batch."""
        features, logits = self.features(x)
        log_p = torch.log_softmax(at_least_float32(logits), dim=1)
        p = log_p.exp()
        mean_p = collective.mean(p)
        diversity = -(mean_p * mean_p.clamp_min(torch.finfo(mean_p.dtype).tiny).log()).sum()
        entropies, extra = entropy(logits), -self.diversity_weight * diversity
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            guesses = p.argmax(1)
            labels = self._clustered(features.to(p.dtype), p, guesses) if self.labels == "centroid" else guesses
        surprise = -log_p.gather(1, labels[:, None])[:, 0]
        losses = entropies
        if self.labels == "centroid":
            losses = losses + self.label_weight * surprise
        else:
            mean, number = collective.weighted_sums(surprise, p.detach().amax(1) > self.threshold)
            extra = extra + self.label_weight * torch.where(number > 0, mean, 0)
        self.note(mean_entropy=collective.mean(entropies), mean_prediction_entropy=diversity)
        self.note(relabelled=collective.mean((labels != guesses).to(p.dtype)))
        self.descend(losses, extra=extra)
        return logits

    def _clustered(self, features: Tensor, p: Tensor, guesses: Tensor) -> Tensor:
        """Labels (B,) of features (B, D) whose predictions p (B, K) have the arg-max ``guesses`` (B,)."""
        f = normalize(torch.cat([features, torch.ones_like(features[:, :1])], 1), dim=1)
        number = torch.ones_like(f[:, 0]).sum().view(1)  # no number of the host, which a program would fix
        classes, labels = torch.arange(p.shape[1], device=p.device), guesses
        for soft in (True, False):
            one_hot = (labels[:, None] == classes).to(p.dtype)
            sums = (p if soft else one_hot).T @ f  # of this process; of a centroid only the direction counts
            centroids = normalize(collective.mean((sums / number)[None], number), dim=1)
            present = collective.mean(one_hot) > 0
            labels = torch.where(present, f @ centroids.T, -torch.inf).argmax(1)
        return labels
