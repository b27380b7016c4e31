"""AdaNPC: a vote of the most similar features, of labelled source images and of confident ones of the stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.source_features import check_classes, labelled_features
from lightning_tta.methods.components.source_images import see_source_images

SMALLEST = 1e-5  # share of a class without a vote


class AdaNPC(TTAMethod):
    """Minimises nothing: the k most similar features of a labelled bank vote for the class of an image.

    With unit features z, and a bank of unit features b_i with labels y_i::

        N = the k of the bank with the largest z . b_i
        v_c = sum over i in N with y_i = c of  w_i,    w = softmax over N of (z . b_i / temperature)
        returned: log(v + 1e-5)
        then, where max_c v_c >= threshold: (z, arg-max v) joins the bank

    So the softmax of what is returned is v, up to 1e-5. The bank starts with features of labelled source images, from
    :meth:`prepare`, which stay; of the stream's it has the last ``stream_per_class`` of each class, so that it is
    bounded. Parameters touched: none; BatchNorm keeps its source statistics. Per batch: one forward pass, no backward
    pass; the batch is predicted before it joins. A batch with features that are not finite does not. ``stats`` has the
    share of images that joined and the number of the stream's features in the bank.

    State: the stream's features, K x ``stream_per_class`` x D floats, and the number that ever joined, by class. Beside
    it K x ``source_per_class`` x D floats of the source: for ImageNet and D = 2048, 20 and 20, 328 MB.

    Args:
        model: A classifier that ends in one linear layer, whose input are the features; its weights are not used.
        k: Features that vote, >= 1; all if there are fewer. Authors: 100; tried 1 to 200.
        temperature: > 0. Authors: 0.1; tried 0.01 to 0.5.
        threshold: >= 0, of the share v of the winner; above 1 nothing joins. Authors: 0.1, which of ten classes or
            fewer every winner has; tried 0, 0.25, 0.75.
        source_per_class: Source features kept of each class, the first ones shown, >= 1. Authors: all.
        stream_per_class: Features of the stream kept of each class, the last ones, >= 1. Authors: all, without bound.
        second_softmax: Compare the threshold with the maximum of softmax(v), as the authors' code: of ten classes
            that is between 0.10 and 0.23, of 1000 below 0.003, whatever the vote.
        head: Name of the last linear layer where the search finds another.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: Zhang et al., AdaNPC, ICML 2023, arXiv 2304.12566; formula from the authors' code. Differs from it: the bank
    is bounded; no second softmax; the logarithm of the shares is returned; the net need not have been trained with the
    vote, as in the paper's main setting; there is no form with a ball around the feature, or with a BatchNorm layer
    that learns.
    """

    about = About(
        does="a vote of the most similar features of a bank: labelled source images, and sure ones of the stream",
        learns="none",
        passes="1 / 0",
        needs="linear head, labelled source images",
        holds="K x 300 features",
        suits="shuffled, sorted by class",
        formula="code",
        paper="ICML 2023, arXiv 2304.12566",
    )

    needs_source = True
    no_plain_net = (
        "it predicts by a vote of stored features, which no weights of the net can. Deploy the method itself, or use "
        "'t3a' or 'neo', which become a last linear layer"
    )
    source_features: Tensor
    source_counts: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int = 100,
        temperature: float = 0.1,
        threshold: float = 0.1,
        source_per_class: int = 200,
        stream_per_class: int = 100,
        second_softmax: bool = False,
        head: str | None = None,
    ) -> None:
        super().__init__(model)
        for name, number in (("k", k), ("source_per_class", source_per_class), ("stream_per_class", stream_per_class)):
            check_range(name, number, 1, integer=True)
        check_range("temperature", temperature, 0, low_open=True)
        check_range("threshold", threshold, 0)
        self.k, self.temperature, self.threshold = k, temperature, threshold
        self.source_per_class, self.stream_per_class = source_per_class, stream_per_class
        self.second_softmax = second_softmax
        self.split = HeadSplit(self.model, head)
        classes, width = self.split.num_classes, self.split.num_features
        like = at_least_float32(self.split.head.weight.detach())
        self.register_buffer("source_features", like.new_zeros(classes * source_per_class, width))
        self.register_buffer("source_counts", torch.zeros(classes, dtype=torch.int64, device=like.device))
        self.state("features", like.new_zeros(classes * stream_per_class, width), source=0)
        self.state("joined", torch.zeros_like(self.source_counts), source=0)
        self.keep_wide("features")

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take the first ``source_per_class`` features of each class of ``source_batches``.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,), integers below K.

        Raises:
            DataError: If there is no image with finite features, or a batch has no such labels.
        """
        with outside_inference_mode():
            bank, counts = torch.zeros_like(self.source_features), torch.zeros_like(self.source_counts)

        @torch.no_grad()
        def see(images: Tensor, labels: Tensor) -> None:
            features, labels = labelled_features(self, images, labels)
            number = counts[labels] + (labels[:, None] == labels).tril(-1).sum(1)
            first = number < self.source_per_class
            bank[(labels * self.source_per_class + number)[first]] = normalize(features, dim=1)[first]
            counts.add_(labels.bincount(minlength=len(counts))).clamp_(max=self.source_per_class)

        see_source_images(self, source_batches, see, classes=self.split.num_classes, running=nullcontext)
        check_classes(self, counts)
        with outside_inference_mode(), torch.no_grad():
            self.source_features.copy_(bank)
            self.source_counts.copy_(counts)
        super().prepare(source_batches)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Predict the batch, then add to the bank what is sure."""
        features, shares = self._vote(x)
        whole = shares.isfinite().all() & features.isfinite().all()
        self.count("skipped_steps", ~whole)
        sureness = shares.softmax(1) if self.second_softmax else shares
        sureness, labels = sureness.max(1)
        sure = (sureness >= self.threshold) & whole
        self._join(features, labels, sure)
        held = self.value("joined").clamp_max(self.stream_per_class).sum()
        self.note(joined=sure.float().mean(), held=held)
        return (shares + SMALLEST).log()

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """Predict with the bank as it is."""
        return (self._vote(x)[1] + SMALLEST).log()

    def _vote(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (B, D) and the share of each class in the vote (B, K)."""
        features, _ = self.features(x)
        stream = at_least_float32(self.value("features"))
        with torch.autocast(x.device.type, enabled=False):
            features = normalize(features.to(stream.dtype), dim=1)
            banks = (
                (self.source_features, self.source_counts, self.source_per_class),
                (stream, self.value("joined"), self.stream_per_class),
            )
            similar, classes = [], []
            for bank, counts, size in banks:
                place = torch.arange(len(bank), device=bank.device)
                classes.append(place // size)
                filled = place % size < counts[classes[-1]]
                similar.append(torch.where(filled, features @ bank.to(features.dtype).T, -torch.inf))
            table = torch.cat(similar, 1)
            nearest, index = table.topk(min(self.k, table.shape[1]), dim=1)
            weights = (nearest / self.temperature).softmax(1)
            votes = torch.cat(classes)[index][..., None] == torch.arange(len(self.source_counts), device=x.device)
            return features, (weights[:, None] @ votes.to(weights.dtype))[:, 0]

    def _join(self, features: Tensor, labels: Tensor, sure: Tensor) -> None:
        """Add unit features (B, D) with labels (B,) to the bank, where ``sure``, (B,) bool; the oldest give way."""
        bank, joined, size = self.value("features"), self.value("joined"), self.stream_per_class
        alike = (labels[:, None] == labels) & sure
        before, number = alike.tril(-1).sum(1), alike.sum(1)
        written = sure & (number - before <= size)  # of more than there is room for, the last
        place = labels * size + (joined[labels] + before) % size
        # All others write what the first that is written does, to its place; if there is none, what stands there.
        first = written.to(torch.int64).argmax().view(1)
        new = torch.where(written[:, None], features, features[first])
        place = torch.where(written, place, place[first])
        bank.index_copy_(0, place, torch.where(written.any(), new.to(bank), bank[place]))
        classes = torch.arange(len(joined), device=labels.device)
        self.write("joined", joined + ((classes[:, None] == labels) & sure).sum(1))
