"""T3A: a classifier of class prototypes that collects the confident features of the stream."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.host import host_has
from lightning_tta.methods.base.method import TTAMethod

EMPTY = 1e4  # the entropy of an empty slot: above any real one, finite in half precision too


class T3A(TTAMethod):
    """Minimises nothing: predicts with prototypes, the mean direction of the most confident features of each class.

    With features z, head g(z) = W z + b, logits u = g(z), class y = arg-max u and entropy H(softmax(u))::

        supports of class k:  S_k = {w_k / |w_k|} at the start; each image of the batch adds z / |z| to S_y
        kept of S_k:          the filter_k of lowest entropy; the row w_k, with the entropy of g(w_k), competes too
        returned:             z . c_k,  c_k = sum(S_k) / |sum(S_k)|, without bias, z as it is

    The batch is added before it is predicted. Parameters touched: none; BatchNorm keeps its source statistics. Per
    batch: one forward pass, no backward pass. ``stats`` has the number of supports, with a filter.

    State: the sums of the supports, K x D floats; with ``filter_k`` = M also the supports and their entropies,
    K x M x (D + 1) floats, allocated at once, however long the stream: 2 MB for K = 10, M = 100, D = 512; 164 MB for
    ImageNet, M = 20, D = 2048. Without a filter nothing is ever dropped, so the sums alone are exact, 8 MB there.

    Args:
        model: A classifier that ends in one linear layer.
        filter_k: Supports kept per class, >= 1; ``None`` or -1: all. Authors: one of 1, 5, 20, 50, 100 or all, chosen
            on validation data; common benchmarks: 100 (CIFAR-10-C), 20 (CIFAR-100-C, ImageNet-C).
        head: Name of the last linear layer where the search finds another.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.

    Source: Iwasawa and Matsuo, NeurIPS 2021 (Test-Time Classifier Adjustment Module). Differs from the authors' code: a
    row of the classifier starts its own class, as in the paper, and not the class that g(w_k) predicts, which can leave
    a class without prototype; -1 keeps all (theirs drops the highest entropy of each class); of equal entropies the
    older support stays; a batch that overflows is not added.
    """

    about = About(
        does="scores features with prototypes of the sure ones",
        learns="none",
        passes="1 / 0",
        needs="linear head",
        holds="prototypes, filter_k x K x D",
        suits="shuffled",
        formula="code and paper",
        paper="NeurIPS 2021",
    )

    sums: Tensor
    supports: Tensor
    entropies: Tensor

    def __init__(self, model: nn.Module, *, filter_k: int | None = 100, head: str | None = None) -> None:
        super().__init__(model)
        filter_k = None if filter_k == -1 else filter_k
        if filter_k is not None:
            check_range("filter_k", filter_k, 1, integer=True)
        self.filter_k = filter_k
        self.split = HeadSplit(self.model, head)
        with torch.no_grad():
            rows = normalize(at_least_float32(self.split.head.weight.detach()), dim=1)
            row_entropies = at_least_float32(entropy(self.split.head(self.split.head.weight)))
        self.register_buffer("sums", rows)
        self.state("sums", self.sums)
        if filter_k is not None:
            # An empty slot holds the class's row, so that a snapshot of the rows is one of the whole bank.
            self.register_buffer("supports", rows[:, None].repeat(1, filter_k, 1))
            self.register_buffer("entropies", torch.full((len(rows), filter_k), EMPTY).to(row_entropies))
            self.entropies[:, 0] = row_entropies
            self.state("entropies", self.entropies)
            self.state("supports", self.supports, source=rows[:, None].clone())

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Add the batch to the bank, then predict it."""
        features, logits = self.features(x)
        features = features.to(self.sums.dtype)
        finite = torch.isfinite(features).all() & torch.isfinite(logits).all()
        self.count("skipped_steps", ~finite)
        if not self.known(~finite):
            with torch.autocast(x.device.type, enabled=False):
                self._add(normalize(features, dim=1), logits.argmax(1), entropy(logits), finite)
        return self._scores(features)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """Predict with the prototypes as they are."""
        return self._scores(self.features(x)[0].to(self.sums.dtype))

    @property
    def no_plain_net(self) -> str:  # type: ignore[override]
        """Where the head is not a linear layer of its own."""
        head = self.split.head
        names = [name for name, p in self.model.named_parameters(remove_duplicate=False) if p is head.weight]
        if type(head).forward is nn.Linear.forward and names == [f"{self.split.name}.weight"]:
            return ""
        return (
            "its prototypes cannot replace the last linear layer, whose weight is shared, computed or quantised. "
            "Deploy the method itself"
        )

    def stream_weights(self) -> dict[str, Tensor]:
        """The prototypes as rows of the head, without bias."""
        weights = {f"{self.split.name}.weight": normalize(self.sums, dim=1)}
        bias = self.split.head.bias
        return weights if bias is None else {**weights, f"{self.split.name}.bias": torch.zeros_like(bias)}

    def _scores(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return features @ normalize(self.sums, dim=1).T

    def _rows(self, classes: Tensor) -> Tensor:
        """Which classes to write: those that occur, (T,), where the host knows them at no cost.

        Elsewhere as many as can occur. One that stands there twice is written twice, the same.
        """
        if self.skips_when_empty and host_has(classes):
            return torch.from_numpy(np.unique(classes.numpy()))
        number = len(self.sums)
        few = not torch.compiler.is_exporting() and len(classes) < number  # an exported step takes any number
        return classes if few else torch.arange(number, device=classes.device)

    def _add(self, new: Tensor, classes: Tensor, entropies: Tensor, where: Tensor) -> None:
        """Supports (B, D) with their classes and entropies (B,), if ``where``, 0-dimensional and bool, is true."""
        rows = self._rows(classes)
        members = rows[:, None] == classes  # (T, B)
        if self.filter_k is None:
            sums = self.sums[rows]
            self.sums.index_copy_(0, rows, torch.where(where, sums + members.to(new) @ new, sums))
            return
        count = self.filter_k
        candidates = torch.where(members, entropies.to(self.entropies), EMPTY)
        before, old = self.entropies[rows], self.supports[rows]
        table = torch.cat([before, candidates], 1)  # (T, M + B)
        lowest = table.argsort(dim=1, stable=True)[:, :count]  # older ones first, so never another class's image
        kept = torch.arange(len(rows), device=lowest.device)[:, None] * count + lowest
        place = torch.where(lowest < count, kept, len(rows) * count + lowest - count)
        place = torch.where(where, place, torch.arange(place.numel(), device=place.device).view_as(place))
        supports = torch.cat([old.flatten(0, 1), new])[place]
        filled = torch.where(where, table.gather(1, lowest), before)
        self.supports.index_copy_(0, rows, supports)
        self.entropies.index_copy_(0, rows, filled)
        self.sums.index_copy_(0, rows, torch.where((filled < EMPTY / 2)[..., None], supports, 0).sum(1))
        self.note(supports=(self.entropies < EMPTY / 2).sum())
