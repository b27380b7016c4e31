"""BatchNorm statistics of a population in which all classes are equally frequent, whatever the stream's mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tta import collective
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_range
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.stream_statistics import MOMENTS, StreamStatistics, instance_moments

CLASSES, BETWEEN, GROUPS = "statistics.classes", "statistics.between", "statistics.groups"
PLACES = 256
"""Tensors that are kept for the batch, at most: seven, of ``domains`` sixteen, for each size of batch."""


class Members(NamedTuple):
    """Which samples of a batch share a row of statistics.

    Attributes:
        cells: The row of each sample, (N,).
        first: The first sample with the same row, (N,).
        same: 1 where two samples have the same row, (N, N).
        number: n, how many have it, (N, 1).
        rate: m, the step size of the row, (N, 1).
        share: 1 / (n G), (N, 1): sums over samples with it are means over all G rows of a population.
    """

    cells: Tensor
    first: Tensor
    same: Tensor
    number: Tensor
    rate: Tensor
    share: Tensor


def make_members(cells: Tensor, groups: int, eta: float, like: Tensor) -> Members:
    """Members of rows; m is 1 / n where n > 1 / eta, else eta."""
    equal = cells[:, None] == cells
    order = torch.arange(len(cells), device=cells.device)
    first = torch.where(equal, order, len(cells)).amin(1)
    same = equal.to(like.dtype)
    number = same.sum(1, keepdim=True)
    rate = torch.where(number > 1 / eta, 1 / number, eta)
    return Members(cells, first, same, number, rate, 1 / (number * groups))


class Change(NamedTuple):
    """How the rows of samples change: the same for all that share a row; each (N, C).

    Attributes:
        mean: delta.
        var: m (s - n v) - delta^2.
        spread: m s - delta^2, the variance around the new mean.
    """

    mean: Tensor
    var: Tensor
    spread: Tensor


def change(mean: Tensor, var: Tensor, row_mean: Tensor, row_var: Tensor, members: Members) -> Change:
    """What samples with moments (N, C) make of the rows (N, C) that they have."""
    distance = mean - row_mean
    delta = members.rate * (members.same @ distance)
    squares = members.rate * (members.same @ torch.addcmul(var, distance, distance))
    spread = squares - delta * delta
    return Change(delta, spread - members.rate * members.number * row_var, spread)


class ClassStatistics(StreamStatistics):
    """Base of the kinds that keep statistics of each class, in rows; beyond ``max_bytes`` classes share rows.

    A pass with what is stored gives the pseudo-labels of the batch, and so the row of each image.

    Args:
        method: Whose net it is.
        groups: G, rows, at most K; ``None``: as many as ``max_bytes`` allows.
        max_bytes: Bound of the state.
        classes: K, where the net does not end in a linear layer.
        tables: How many means and variances a row has in the state.

    Raises:
        ConfigError: If ``groups`` exceeds the number of classes.
        UnsupportedModelError: If the number of classes is not known.

    Attributes:
        classes: K.
        groups: G.
        memory_bytes: Of the state.
        cells: The row of each image of the batch, of all processes, (N,); ``None``: not known yet.
    """

    def __init__(
        self, method: TTAMethod, *, groups: int | None, max_bytes: int, classes: int | None, tables: int = 1
    ) -> None:
        check_range("max_bytes", max_bytes, 1, integer=True)
        for name, value in (("groups", groups), ("classes", classes)):
            if value is not None:
                check_range(name, value, 1, integer=True)
        super().__init__(method)
        head = _head(method)
        self.classes = classes or (0 if head is None else len(head))
        if not self.classes:
            raise UnsupportedModelError(
                f"{type(method.model).__name__} does not end in a linear layer, so its number of classes is not known, "
                "of each of which these statistics keep a row. Give it: statistics={'kind': ..., 'classes': K}."
            )
        if groups is not None and groups > self.classes:
            raise ConfigError(f"groups={groups} is more than the {self.classes} classes. Give at most as many.")
        moments = method.value(MOMENTS)
        row = tables * moments.numel() * moments.element_size()
        self.groups = min(groups or max(1, max_bytes // row), self.classes)
        self.memory_bytes = self.groups * row
        self._shares = self.groups < self.classes
        if self._shares:
            numbers = torch.arange(self.classes)
            of = numbers % self.groups if head is None or len(head) != self.classes else alike(head, self.groups)
            method.state(GROUPS, of.to(moments.device))
        self.cells: Tensor | None = None
        self._places: dict[tuple[Any, ...], Tensor] = {}

    def look(self, method: State, x: Tensor) -> None:
        """Label the batch by a pass with what is stored."""
        assert isinstance(method, TTAMethod)
        self.cells = None
        with torch.no_grad():
            logits = method.task.logits(method.model(x))
            if logits.shape[-1] != self.classes:
                raise UnsupportedModelError(
                    f"The net gives {logits.shape[-1]} logits, and there are statistics of {self.classes} classes, as "
                    "given, or by its last linear layer. Give "
                    f"statistics={{'kind': ..., 'classes': {logits.shape[-1]}}}."
                )
            self.label(method, logits.argmax(-1))

    def label(self, method: State, labels: Tensor) -> None:
        """Take the pseudo-labels (B,) of the batch, until :meth:`drop`."""
        labels = collective.gather(labels)
        self.cells = self.keep(method, "cells", method.value(GROUPS)[labels] if self._shares else labels)

    def keep(self, method: State, name: str, value: Tensor) -> Tensor:
        """The same in a tensor that stays where it is, as recorded parts of a step read it; one for each shape."""
        key = (name, value.shape, value.dtype, value.device)
        if key not in self._places:
            if len(self._places) >= PLACES:  # batches of ever other sizes; what was recorded does not hold any more
                self._places.clear()
                method.layout += 1
            with outside_inference_mode():
                self._places[key] = torch.empty_like(value)
        return self._places[key].copy_(value)

    def moments(self, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor, int]:
        """Moments (N, C) of the samples of all processes, and how many times the labelled images are among them.

        Several times where views of the batch come one after the other; 0 where the labels do not fit, or are not
        known.
        """
        mean, var = (each.to(like) for each in instance_moments(x))
        if self.cells is None:
            return mean, var, 0
        if collective.is_joined():
            mean, var = collective.gather(torch.stack([mean, var], 1)).unbind(1)
        times, rest = divmod(len(mean), len(self.cells))
        return mean, var, 0 if rest else times

    def drop(self, where: Tensor | None = None) -> None:
        """Forget what was noted; at the end of a batch, its labels too."""
        super().drop(where)
        if where is None:
            self.cells = None

    def renew(self, method: State, model: Any) -> None:
        """The tensors are other ones now."""
        super().renew(method, model)
        self.cells, self._places = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cells": None, "_places": {}}


class Balanced(ClassStatistics):
    """The statistics of a population with equally frequent classes, by those of each class: TRIBE's BBN.

    Each class k has a mean mu_k and a variance v_k in each layer, which start at the source's. A first pass with what
    is stored gives the pseudo-labels of the batch. Of n_k images of class k, with m = 1 / n_k if n_k > 1 / eta, else
    eta, and moments over the pixels of each image::

        delta_k = m sum_i (mean(x_i) - mu_k)      s_k = sum_i mean((x_i - mu_k)^2)
        mu_k <- mu_k + (1 - gamma) delta_k + gamma mean_j delta_j
        v_k  <- v_k + (1 - gamma) (m (s_k - n_k v_k) - delta_k^2)
                    + gamma (mean_j (m s_j - delta_j^2) - mean_j (m n_j) v_k)
        mean = mean_k mu_k        var = mean_k v_k + var_k(mu_k)

    with means over all classes, and delta = s = n = 0 for those that are not in the batch. The batch is in the
    statistics before it is predicted. A stream sorted by class moves its class only, a share 1 / K of the statistics.

    State: K x C x 2 floats, C the channels of all layers together: 0.4 MB for a ResNet-18 and 10 classes, 212 MB for a
    ResNet-50 and 1,000; :attr:`memory_bytes` says it. Beyond ``max_bytes``, or with ``groups``, classes share rows.
    Groups are of classes whose rows in the net's last linear layer point the same way, for such classes have features,
    and so statistics, that are alike, so that the mixture of classes within a group matters less than in groups by
    number. Groups cost accuracy all the same. Without such a layer they are by number, k mod G.

    Passes per batch and step: one more forward pass. All passes of the batch, of views of it too, have its labels.

    Args:
        method: Whose net it is.
        eta: Step size, in (0, 1]; ``None``: 0.003 up to 20 rows (groups of classes), 0.05 up to 200, else 0.5. Authors
            0.01 (CIFAR-10), 0.05 (CIFAR-100), 0.5 (ImageNet).
        gamma: Share of a change that all classes take, in [0, 1]; ``None``: as the authors, 0, 0.1 and 0.5.
        groups: G, rows, at most K; ``None``: as many as ``max_bytes`` allows.
        max_bytes: Bound of the state.
        classes: K, where the net does not end in a linear layer.

    Raises:
        ConfigError: If ``groups`` exceeds the number of classes.
        UnsupportedModelError: If the number of classes is not known.

    Attributes:
        groups: G.
        memory_bytes: Of the state.

    Source: Su et al., TRIBE, AAAI 2024, arXiv 2309.14949. Differs from the authors' code: no gradient through the
    statistics; ``var_k`` is that of a population, over K; a batch that is not finite leaves them alone; classes may
    share rows.
    """

    float32: tuple[str, ...] = (MOMENTS, CLASSES, BETWEEN)

    def __init__(
        self,
        method: TTAMethod,
        *,
        eta: float | None = None,
        gamma: float | None = None,
        groups: int | None = None,
        max_bytes: int = 2**26,
        classes: int | None = None,
    ) -> None:
        super().__init__(method, groups=groups, max_bytes=max_bytes, classes=classes, tables=1 + self.slots)
        few, some = self.groups <= 20, self.groups <= 200
        self.eta = (0.003 if few else 0.05 if some else 0.5) if eta is None else eta
        self.gamma = (0.0 if few else 0.1 if some else 0.5) if gamma is None else gamma
        check_range("eta", self.eta, 0, 1, low_open=True)
        check_range("gamma", self.gamma, 0, 1)
        moments = method.value(MOMENTS)
        method.state(CLASSES, moments[:, None].repeat(1, self.groups, 1), source=moments[:, None].clone())
        method.state(BETWEEN, torch.zeros_like(moments[0]), source=0.0)
        self._members: Members | None = None

    slots = 0
    """Rows of a class beside the first."""

    def look(self, method: State, x: Tensor) -> None:
        """Label the batch, and find which images share a row."""
        self._members = None
        super().look(method, x)

    def label(self, method: State, labels: Tensor) -> None:
        """Take the pseudo-labels, and find which images share a row."""
        super().label(method, labels)
        assert self.cells is not None
        self._members = self.keep_members(method, "members", self.cells)

    def keep_members(self, method: State, name: str, cells: Tensor) -> Members:
        """Which samples share a row, in tensors that stay where they are."""
        members = make_members(cells, self.groups, self.eta, method.value(MOMENTS))
        return Members(*(self.keep(method, f"{name}.{part}", value) for part, value in enumerate(members)))

    def drop(self, where: Tensor | None = None) -> None:
        """Forget what was noted; at the end of a batch, its labels too."""
        super().drop(where)
        if where is None:
            self._members = None

    def stored(self, method: State, name: str) -> Tensor:
        """Rows (2 N + 6, C): mu and v of each sample's class; means of mu and v over classes, and the variance of mu.

        And three for what all classes take: what is added to mu; what v is multiplied by, and what is added to it.
        """
        if self._members is None:
            return method.value(MOMENTS)[:, self.places[name]]
        place = self.places[name]
        mean, var = method.value(MOMENTS)[:, place]
        between = method.value(BETWEEN)[place]
        rows = method.value(CLASSES)[:, :, place][:, self._members.cells].flatten(0, 1)
        zero = torch.zeros_like(mean)
        return torch.cat([rows, torch.stack([mean, var - between, between, zero, torch.ones_like(mean), zero])])

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics of the balanced population with this input in it."""
        moments, members = self.labelled(x, self._members, method.value(MOMENTS))
        if members is None:
            return method.value(MOMENTS)[:, self.places[name]], old
        if members is not self._members:  # more samples than labels: views of the batch one after the other
            repeats = len(members.cells) // len(self._members.cells)  # type: ignore[union-attr]
            row = old[:-6].view(2, -1, old.shape[1])
            old = torch.cat([row.repeat(1, repeats, 1).flatten(0, 1), old[-6:]])
        mean, var, between, shift, scale, offset = old[-6:]
        row_mean, row_var = old[:-6].chunk(2)
        new = change(*moments, row_mean, row_var, members)
        delta, own = (members.share * new.mean).sum(0), 1 - self.gamma
        crossed = (members.share * new.mean * (row_mean - mean + 0.5 * own * new.mean)).sum(0)
        between = between + 2 * own * crossed - own * own * delta * delta
        step = own * (members.share * new.var).sum(0)
        row_mean, row_var = row_mean + own * new.mean, row_var + own * new.var
        if self.gamma:
            spread = self.gamma * (members.share * new.spread).sum(0)
            kept = 1 - self.gamma * (members.share * members.rate * members.number).sum()
            row_mean, row_var = row_mean + self.gamma * delta, row_var + spread + (kept - 1) * (row_var - own * new.var)
            shift, scale, offset = shift + self.gamma * delta, scale * kept, offset * kept + spread
            var = var * kept + spread
        mean, var = mean + delta, var + step
        summary = torch.stack([mean, var, between, shift, scale, offset])
        return torch.stack([mean, var + between]), torch.cat([row_mean, row_var, summary])

    def labelled(
        self, x: Tensor, members: Members | None, like: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Members | None]:
        """Moments (N, C) of the samples of all processes, and which rows they have; ``None``: that is not known."""
        mean, var, times = self.moments(x, like)
        if members is None or not times:
            return (mean, var), None
        if times > 1:
            members = make_members(members.cells.repeat(times), self.groups, self.eta, mean)
        return (mean, var), members

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Write the rows of the classes in the batch, what all others take, and the population's statistics."""
        if self._members is None:
            return
        rows, table = seen[0], method.value(CLASSES)
        mean, var, between, shift, scale, offset = rows[-6:]
        if self.gamma:
            table[0].add_(torch.where(good, shift, 0))
            table[1].mul_(torch.where(good, scale, 1)).add_(torch.where(good, offset, 0))
        self.write_rows(table, self._members, rows[:-6], good)
        method.write(MOMENTS, torch.stack([mean, var + between]), good)
        method.write(BETWEEN, between, good)

    @staticmethod
    def write_rows(table: Tensor, members: Members, rows: Tensor, good: Tensor) -> None:
        """Write rows (2 N, C) to a table (2, R, C): where several samples have one row, those of the first."""
        for part, new in zip(table, rows.chunk(2), strict=True):
            part.index_copy_(0, members.cells, torch.where(good, new[members.first], part[members.cells]))

    def renew(self, method: State, model: Any) -> None:
        """The tensors are other ones now."""
        super().renew(method, model)
        self._members = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_members": None}


def _head(method: TTAMethod) -> Tensor | None:
    """The weight (K, D) of the net's last linear layer."""
    try:
        return HeadSplit(method.model).head.weight.detach()
    except UnsupportedModelError:
        return None


def alike(weight: Tensor, groups: int) -> Tensor:
    """Groups of equal size, but for one, of rows of a matrix (K, D) that point the same way: the group of each, (K,).

    By halves: the rows, as unit vectors, are ordered along the direction in which they differ most, and cut; so on with
    each half. The same on every machine, up to rounding in ties.
    """
    rows = torch.nn.functional.normalize(weight.double().cpu(), dim=1)
    of = torch.zeros(len(rows), dtype=torch.int64)
    parts = [(torch.arange(len(rows)), 0, groups)]
    while parts:
        members, start, number = parts.pop()
        if number == 1:
            of[members] = start
            continue
        centered = rows[members] - rows[members].mean(0)
        axis = torch.linalg.eigh(centered @ centered.T).eigenvectors[:, -1]
        axis = axis * torch.where(axis[axis.abs().argmax()] < 0, -1.0, 1.0)
        order, half = members[axis.argsort(stable=True)], number // 2
        cut = len(order) * half // number
        parts += [(order[:cut].sort().values, start, half), (order[cut:].sort().values, start + half, number - half)]
    return of
