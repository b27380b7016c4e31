"""CAFA: features near the Gaussian of their class on the source, and far from those of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import ConfigError, DataError, check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.components.source_features import class_moments

LARGEST = 2**29
"""Numbers in all covariances, 2 GB: of one for each class, K D^2."""


class CAFA(GradientMethod):
    """Minimises the log-ratio of a feature's distance to its predicted class and of those to all others.

    With features z, source means m_c and covariance S of each class, from :meth:`prepare`, and y = arg-max p::

        d_c = (z - m_c)' S~^(-1) (z - m_c),   S~ = (1 - shrinkage) S + shrinkage tr(S) / D I
        L   = mean_b log( d_y / sum_{c != y} d_c )

    S is that of all features about the mean of their class; or one for each class. Classes without a source image are
    left out, and so are images that are predicted as one of them.

    Parameters touched: weight and bias of every normalisation layer; BatchNorm uses batch statistics. State: these and
    the optimizer; saved with them the means and a root of S~^(-1). Per batch and step: one forward, one backward pass.
    Returns the logits before the step. ``stats["distance"]`` is the mean of the d_y / D: about 1 on the source.

    Args:
        model: A classifier with normalisation layers that ends in one linear layer.
        shrinkage: In [0, 1]; our choice 0.1, the paper names none. 0 needs more images than D, and no dead feature.
        covariance: ``tied``: one of all classes, D^2 floats. ``class``: one for each, K D^2 floats; the paper has it
            for CIFAR-10, with the whole training set.
        head: Name of the last linear layer where the search finds another.
        **options: ``lr`` and ``optimizer``: those of Tent, which are not known to be the paper's. ``momentum``,
            ``weight_decay``, ``steps``, ``lr_batch_size``.

    Raises:
        ConfigError: If ``covariance="class"`` would need more than 2 GB.
        UnsupportedModelError: If the net has no affine normalisation layer, or does not end in a linear layer.

    Source: Jung et al., CAFA, ICCV 2023, arXiv 2206.00205; no public code. Reconstruction: distances, labels and
    parameters are the paper's; that the two distances make the logarithm of a ratio is from digests of it and not
    verified. The shrinkage is ours.
    """

    about = About(
        does="log-ratio of the Mahalanobis distances to the predicted class of the source and to all others",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers, linear head, 2,000 labelled source images",
        holds="(K + D) x D floats",
        suits="shuffled, reset at each domain",
        formula="reconstruction",
        paper="ICCV 2023, arXiv 2206.00205",
    )

    uses_batch_statistics = True
    synchronized = True
    needs_source = True
    source_means: Tensor
    source_roots: Tensor
    source_seen: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        shrinkage: float = 0.1,
        covariance: Literal["tied", "class"] = "tied",
        head: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        check_range("shrinkage", shrinkage, 0, 1)
        check_choice("covariance", covariance, ("tied", "class"))
        self.shrinkage, self.covariance = shrinkage, covariance
        self.split = HeadSplit(self.model, head)
        classes, width = self.split.num_classes, self.split.num_features
        groups = classes if covariance == "class" else 1
        if groups > 1 and groups * width**2 > LARGEST:
            raise ConfigError(
                f"covariance='class' must be of at most {LARGEST:,} numbers; got {groups} classes of {width} features, "
                f"{groups * width**2:,}. Use covariance='tied'."
            )
        like = at_least_float32(self.split.head.weight.detach())
        self.register_buffer("source_means", like.new_zeros(classes, width))
        self.register_buffer("source_roots", like.new_zeros(groups, width, width))
        self.register_buffer("source_seen", torch.zeros(classes, dtype=torch.bool, device=like.device))
        self.learn(self.select("norm"))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take the means and covariances of the source's features, at the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,), integers below K.

        Raises:
            DataError: If there are images of one class only, a batch has no such labels, or a covariance is singular.
        """
        moments = class_moments(self, source_batches, self.covariance)
        seen, covariance = moments.counts > 0, moments.covariance
        if int(seen.sum()) < 2:
            raise DataError(
                f"CAFA compares the distances to two classes or more; found source images of {int(seen.sum())}. Give "
                "images of all classes."
            )
        assert covariance is not None
        diagonal = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * diagonal * eye
        if len(shrunk) > 1:
            shrunk[~seen] = eye
        factor, wrong = torch.linalg.cholesky_ex(shrunk)
        if bool(wrong.any()):
            which, other = "", ""
            if len(shrunk) > 1:
                which, other = f" of class {int((wrong > 0).nonzero()[0])}", ", or covariance='tied'"
            raise DataError(
                f"The covariance{which} of {covariance.shape[-1]} source features is singular with "
                f"shrinkage={self.shrinkage}, from {int(moments.counts.sum())} images of {int(seen.sum())} classes. "
                f"Give more images, two or more of each class, or a larger shrinkage{other}."
            )
        with outside_inference_mode(), torch.no_grad():
            self.source_means.copy_(moments.means)
            self.source_roots.copy_(torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False))
            self.source_seen.copy_(seen)
        super().prepare(source_batches)

    def step(self, x: Tensor) -> Tensor:
        """One step on the images that are predicted as a class of the source images."""
        features, logits = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            distances = self.distances(features.to(self.source_means.dtype))
        labels = logits.detach().argmax(1)
        smallest = torch.finfo(distances.dtype).tiny
        own = distances.gather(1, labels[:, None])[:, 0].clamp_min(smallest)
        classes = torch.arange(distances.shape[1], device=labels.device)
        others = torch.where(self.source_seen & (labels[:, None] != classes), distances, 0).sum(1).clamp_min(smallest)
        counts = self.source_seen[labels]
        self.note(distance=torch.where(counts, own.detach(), 0).sum() / counts.sum() / features.shape[1])
        self.descend(own.log() - others.log(), counts)
        return logits

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances (B, K) of features (B, D) to all classes."""
        means, roots = self.source_means, self.source_roots
        if len(roots) > 1:
            return torch.einsum("kde,bke->bkd", roots, features[:, None] - means).square().sum(2)
        center = means.mean(0)  # large offsets would cancel in what follows
        z, m = (features - center) @ roots[0].T, (means - center) @ roots[0].T
        return (z.square().sum(1)[:, None] + m.square().sum(1) - 2 * z @ m.T).clamp_min(0)
