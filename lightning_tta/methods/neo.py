"""NEO: the mean feature of the stream is taken out of every feature; no gradient, no parameter."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.shift import ShiftMethod

JUDGED_IMAGES = 256
"""After so many images it is judged once whether raw centering suits the net."""

LESS_EVEN = 0.003
"""Raw centering that makes the mean prediction less even than the source's by more than this share of ln K is wrong."""


class NEO(ShiftMethod):
    """Minimises nothing: subtracts the mean feature of the stream, as shift moves all features alike.

    With features z, last linear layer g(z) = W z + b, and the batch entered before it is predicted::

        c <- c + B / n (mean_b z_b - c)      n images so far, these B included; of equal batches the mean over batches
        c <- (1 - momentum) c + momentum mean_b z_b                     NEO-continual, with ``momentum``; c = 0 at first
        returned:  g(z - c)    raw
                   g(z - c + mu)    ``center="source"``; mu: mean of the source's features

    Under neural collapse and balanced classes mu is 0, or W mu the same for all classes, and raw centering needs no
    source data. Where it is not, raw centering moves the classes' logits against each other on clean images too. That
    shows without labels: shift makes predictions pile up in few classes, and a right centering spreads them over
    classes again; a wrong one concentrates them. ``stats["spread"]`` is the entropy of the mean prediction minus that
    of the source's, in nats, over the stream. Once, after 256 images, a value below -0.003 ln K is warned of.

    Over pixels each position is an image of the formulas. Most of them are of one class, say the background, whose mean
    c nearly is: raw centering would take away what tells that class, on clean images too. So ``source`` is the default
    there, and ``spread``, which would not show it, is not judged.

    With ``balanced`` c is the mean over classes, of those predicted so far, of the mean feature of each::

        c <- 1 / |seen| sum_k m_k,   m_k: mean over all images so far with arg-max g(z - c + mu) = k, c as before
        mu <- 1 / |seen| sum_k mu_k,   mu_k: that of the source's images

    A stream that is sorted by class then moves c less; on a shuffled one wrong predictions cost a part of the gain.

    While one image alone has been seen (without ``momentum``), z - c says nothing of it, and the source predicts.
    Parameters touched: none; BatchNorm keeps its source statistics. State: c - mu, the number of images, for the raw
    form two mean predictions; ``balanced``: K (D + 1) floats. Per batch: one forward pass, no backward pass. An image
    whose features are not finite does not enter.

    Args:
        model: A classifier that ends in one linear layer.
        center: ``raw``, the authors'; ``source``, which needs source images without labels before the stream; or
            ``auto``: ``source`` over pixels, else ``raw``.
        momentum: Weight of a new batch in c, in (0, 1]; ``None``: the mean over all images.
        balanced: Each predicted class has the same weight in c; not with ``momentum``.
        head: Name of the last linear layer where the search finds another.

    Raises:
        ConfigError: If ``balanced`` and ``momentum`` are both set.
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: NEO, ICLR 2026, openreview mVlIKLiizr. Differs from the paper: batches count by their images; one image
    alone is predicted by the source; ``center="source"``, ``balanced``, pixels and the warning are ours. The authors'
    code was not seen.
    """

    about = About(
        does="subtracts the stream's mean feature",
        learns="none",
        passes="1 / 0",
        needs="linear head; with center: source, and over pixels, source images",
        holds="a mean, D",
        suits="shuffled, any batch size",
        formula="paper",
        paper="ICLR 2026, openreview mVlIKLiizr",
    )

    returns = "after the step"
    synchronized = True
    tasks = frozenset({"images", "pixels"})

    def __init__(
        self,
        model: nn.Module,
        *,
        center: Literal["auto", "raw", "source"] = "auto",
        momentum: float | None = None,
        balanced: bool = False,
        head: str | None = None,
    ) -> None:
        check_choice("center", center, ("auto", "raw", "source"))
        if momentum is not None:
            check_range("momentum", momentum, 0, 1, low_open=True)
            if balanced:
                raise ConfigError("balanced=True is a mean over all images, and has no momentum. Set momentum=None.")
        super().__init__(model, head)
        over_pixels = self.task.kind == "pixels"
        if center == "auto":
            center = "source" if over_pixels else "raw"
        self.center, self.momentum, self.balanced = center, momentum, balanced
        classes, like = self.split.num_classes, self.value("shift")
        if center == "source":
            self.expect_source(classes if balanced else 1)
        else:
            self.state("mean_predictions", like.new_zeros(2 * classes), source=0)
            self.keep_wide("mean_predictions")
        if balanced:
            self.state("class_sums", like.new_zeros(classes, len(like) + 1), source=0)
            self.keep_wide("class_sums")
        self._judged = center == "source" or over_pixels

    @property
    def offset(self) -> Tensor:
        """The shift; 0 while one image alone is in a mean."""
        shift = self.value("shift")
        return shift if self.momentum is not None else torch.where(self.value("images") > 1, shift, 0)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Take the batch into the mean, then predict it."""
        features, logits, finite = self.seen(x)
        shift, before = self.value("shift"), self.value("images")
        if self.balanced:
            mean, number = self._balanced_mean(features, finite)
            weight: Tensor | float = 1.0
        else:
            residuals = features - self.source_mean[0] if self.center == "source" else features
            mean, number = collective.weighted_sums(residuals, finite)
            weight = number / (before + number) if self.momentum is None else self.momentum
        there_are = number > 0
        self.count("skipped_steps", ~there_are)
        self.write("shift", shift + weight * (mean - shift), there_are)
        self.write("images", before + number.to(before.dtype))
        scores = self.scores(features, self.offset)
        if self.center == "raw":
            self._compare(logits, scores, finite)
        return self.shaped(scores)

    def forward(self, x: Tensor) -> Tensor:
        """As of every method; and judge the raw form once."""
        logits = super().forward(x)
        if not self._judged and int(self.value("images")) >= JUDGED_IMAGES:
            self._judged = True
            spread, classes = float(self._spread()), self.split.num_classes
            if spread < -LESS_EVEN * math.log(classes):
                warnings.warn(
                    f"Centering the features has made the mean prediction of {int(self.value('images'))} images less "
                    f"even over the {classes} classes than the source's is (by {-spread:.3f} nats); a right centering "
                    "makes it more even. The features of this net are not centered on its source data, and accuracy "
                    "may fall below that of the source. Use center='source', which needs source images without "
                    "labels; or 't3a' or 'source'.",
                    stacklevel=2,
                )
        return logits

    def _balanced_mean(self, features: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """The shift that all images so far give, class by class, and the number of images in the batch."""
        classes = torch.arange(self.split.num_classes, device=features.device)
        predicted = self.scores(features, self.offset).argmax(1)
        members = ((predicted[:, None] == classes) & finite[:, None]).to(features.dtype)  # (B, K)
        columns = torch.cat([torch.where(finite[:, None], features, 0), torch.ones_like(features[:, :1])], 1)
        batch = members.T @ columns  # (K, D + 1): sums of features, and how many
        mean, processes = collective.weighted_sums(batch[None], torch.ones_like(features[:1, 0]))
        batch = mean * processes
        self.write("class_sums", self.value("class_sums") + batch)
        sums, counts = self.value("class_sums")[:, :-1], self.value("class_sums")[:, -1:]
        means = sums / counts.clamp_min(1)
        if self.center == "source":
            means = means - self.source_mean
        occurs = (counts > 0).to(means.dtype)
        return (occurs * means).sum(0) / occurs.sum().clamp_min(1), batch[:, -1].sum()

    def _compare(self, logits: Tensor, scores: Tensor, finite: Tensor) -> None:
        """Take in the source's and the centered predictions."""
        before = self.value("mean_predictions")
        both = torch.cat([logits.softmax(1), scores.softmax(1)], 1).to(before.dtype)
        mean, number = collective.weighted_sums(both, finite)
        weight = number / self.value("images").clamp_min(1)
        self.write("mean_predictions", before + weight * (mean - before), number > 0)
        self.note(spread=self._spread())

    def _spread(self) -> Tensor:
        """Entropy of the mean centered prediction minus that of the source's, in nats."""
        entropies: Tensor = torch.special.entr(self.value("mean_predictions").view(2, -1)).sum(1)
        return entropies[1] - entropies[0]
