"""BatchNorm statistics of each class in each domain of the stream, where nobody says which domain an image is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.split import execution_order
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_range, did_you_mean
from lightning_tta.methods.base.account import Statistics
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import State
from lightning_tta.methods.components.class_statistics import Balanced, Members, change
from lightning_tta.methods.components.stream_statistics import MOMENTS, instance_moments

DOMAINS, DOMAIN_CLASSES = "statistics.domains", "statistics.domain_classes"
OPENED, USED = "statistics.opened", "statistics.used"
DEPTH = 0.45
"""Of the layer that tells domains apart, among the BatchNorm layers as they run: the third stage of a ResNet-50."""
LISTED = 8
"""So many layers are named where another one is asked for."""


class Domains(Balanced):
    """Statistics of each class in each domain, with domains found on the way: UniTTA's BDN.

    Each domain has statistics as of :class:`~lightning_tta.methods.components.class_statistics.Balanced`, gamma 0, of
    the images that are taken to be of it, and each image is normalised with those of its domain. Three passes a batch
    and step: one with the statistics of all domains together, which gives the pseudo-labels; one with these and the
    batch in them, in which one layer tells the domains; and the method's own. By its moments over pixels m_i, v_i in
    that layer, image i is of the domain d with the least ``sum_c (m_i - m_d)^2 + (sqrt(v_i) - sqrt(v_d))^2``, or of a
    new one, if the source's statistics are nearer than those of all domains. New ones start at the source's. If there
    is no room, the one that has had the fewest images, of the older half, makes it.

    State: (1 + domains) x K x C x 2 floats, see :attr:`memory_bytes`; bounded as of ``Balanced``. ``predict`` makes the
    three passes too, and changes nothing. Processes cannot adapt as one.

    Args:
        method: Whose net it is.
        eta: As of ``Balanced``.
        domains: Room for so many, at least 2; authors 32.
        layer: Name of the BatchNorm layer that tells domains apart; ``None``: the one at 45 % of the net's BatchNorm
            layers, as they run, about the first of the third stage in a ResNet-50, as the authors have it.
        groups: As of ``Balanced``.
        max_bytes: As of ``Balanced``.
        classes: As of ``Balanced``.

    Raises:
        ConfigError: If there is no such layer.
        UnsupportedModelError: At the first batch, if the layer does not run.

    Source: Du et al., UniTTA, arXiv 2407.20080. Differs from the authors' code: the logits are those of the third pass
    alone; the step is 1 / n where eta n > 1; variances between classes are over K; a domain that makes room does so
    before its successor's first images, not after.
    """

    synchronized = False
    images_apart = False
    no_plain_net = (
        "each image is normalised with the statistics of its own domain (statistics='domains'). Use 'balanced'"
    )
    float32 = (*Balanced.float32, DOMAINS, DOMAIN_CLASSES)

    def __init__(
        self,
        method: TTAMethod,
        *,
        eta: float | None = None,
        domains: int = 16,
        layer: str | None = None,
        groups: int | None = None,
        max_bytes: int = 2**26,
        classes: int | None = None,
    ) -> None:
        check_range("domains", domains, 2, integer=True)
        self.slots = domains
        names = list(batch_norm_layers(method.model))
        if layer is not None and layer not in names:
            listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
            raise ConfigError(f"The net has no BatchNorm layer {layer!r}.{did_you_mean(layer, names)} It has {listed}.")
        super().__init__(method, eta=eta, gamma=0.0, groups=groups, max_bytes=max_bytes, classes=classes)
        ran = [name for name in execution_order(method.model) or names if name in names] or names
        self.layer = ran[min(round(DEPTH * len(ran)), len(ran) - 1)] if layer is None else layer
        moments = method.value(MOMENTS)
        source = torch.cat([moments, torch.zeros_like(moments[:1])])
        method.state(DOMAINS, source.repeat(domains, 1, 1), source=source)
        method.state(
            DOMAIN_CLASSES, moments[:, None].repeat(1, domains * self.groups, 1), source=moments[:, None].clone()
        )
        first = torch.arange(domains, device=moments.device) == 0
        method.state(OPENED, first.to(torch.int64))  # 0: not yet; else the how manieth
        method.state(USED, torch.zeros(domains, dtype=torch.int64, device=moments.device), source=0)
        self._instances: tuple[Tensor, Tensor] | None = None  # of the layer that tells domains apart
        self._looking = False
        self._domains: Members | None = None
        self._choice: dict[str, Tensor] = {}
        self._apart: Tensor | None = None  # the domains of images that are predicted apart; the last is the source's

    def look(self, method: State, x: Tensor) -> None:
        """Label the batch by one pass, find its domains by another."""
        assert isinstance(method, TTAMethod)
        self._domains, self._instances = None, None
        super().look(method, x)
        assert self._members is not None
        before = self._is_on
        self._looking, self._is_on, self._seen = True, True, {}
        try:
            with torch.no_grad():
                method.task.logits(method.model(x))
                self._choice["shared"] = self.seen(method)
        finally:
            self._looking, self._is_on, self._seen = False, before, {}
        if self._instances is None:
            raise UnsupportedModelError(
                f"BatchNorm layer '{self.layer}', which tells domains apart, does not run. Name another one: "
                "statistics={'kind': 'domains', 'layer': ...}."
            )
        with torch.no_grad():
            slot, new, opens = self._find(method, *self._instances)
            found = {"slot": slot, "new": new, "opens": opens}
            self._choice |= {name: self.keep(method, name, value) for name, value in found.items()}
            self._domains = self.keep_members(method, "domains", slot * self.groups + self._members.cells)
        self._instances = None

    def look_apart(self, method: State, x: Tensor) -> None:
        """Find the domains by one pass, with the statistics of all domains together."""
        assert isinstance(method, TTAMethod)
        self._looking, self._instances = True, None
        try:
            with torch.no_grad():
                method.task.logits(method.model(x))
        finally:
            self._looking = False
        if self._instances is not None:  # else refused at the first step
            known, source = self._distances(method, *self._instances)
            nearest = _first(known == known.amin(1, keepdim=True))
            self._apart = torch.where(source < known.amin(1), self.slots, nearest)
        self._instances = None

    def _distances(self, method: State, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """From moments (B, C) in the layer: to each domain, (B, D), infinite if it is not open; to the source, (B,)."""
        place = self.places[self.layer]
        known, source = (
            torch.stack([summary[..., 0, place], (summary[..., 1, place] + summary[..., 2, place]).sqrt()])
            for summary in (method.value(DOMAINS), method.source_value(DOMAINS))
        )
        image = torch.stack([mean, var.sqrt()])[:, :, None].to(known)  # (2, B, 1, C)
        distance = (image - known[:, None]).square().sum((0, 3))
        distance = torch.where(method.value(OPENED) > 0, distance, torch.inf)
        return distance, (image - source[:, None, None]).square().sum((0, 3))[:, 0]

    def _find(self, method: State, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The domain of each image, (B,); the one that would be opened, and whether it is, 0-dimensional."""
        distance, to_source = self._distances(method, mean, var)
        opened, used = method.value(OPENED), method.value(USED)
        fresh = to_source < distance.amin(1)
        age = (opened[:, None] > opened).sum(1)  # how many are older; of all of them when they are all open
        old = torch.where(age < len(opened) // 2, used, torch.iinfo(torch.int64).max)
        new = torch.where((opened > 0).all(), _first(old == old.amin()), _first(opened == 0))
        opens = fresh.any()
        slots = torch.arange(len(opened), device=opened.device)
        nearest = torch.where((slots == new) & opens, torch.inf, distance)
        slot = _first(nearest == nearest.amin(1, keepdim=True))
        return torch.where(fresh, new, slot), new, opens

    def stored(self, method: State, name: str) -> Tensor:
        """Rows (2 B + 3 D, C): those of each image's class in its domain, then three of each domain."""
        if self._looking or self._domains is None:
            return super().stored(method, name)
        place = self.places[name]
        source = method.source_value(DOMAINS)[:, place]
        slots = torch.arange(self.slots, device=source.device)
        is_new = self._choice["opens"] & (slots == self._choice["new"])
        domains = torch.where(is_new[:, None, None], source, method.value(DOMAINS)[:, :, place])
        rows = method.value(DOMAIN_CLASSES)[:, :, place][:, self._domains.cells]
        of_new = self._choice["opens"] & (self._choice["slot"] == self._choice["new"])
        rows = torch.where(of_new[:, None], source[:2, None], rows)
        return torch.cat([rows.flatten(0, 1), domains.flatten(0, 1)])

    def rule(self, method: State, name: str, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics of each image's domain with this input in it; while domains are looked for, of all together."""
        if self._looking and name == self.layer:
            self._instances = instance_moments(x)
        if self._apart is not None and not self._looking:
            place = self.places[name]
            source = method.source_value(DOMAINS)[None, :, place]
            found = torch.cat([method.value(DOMAINS)[:, :, place], source])[self._apart]
            return torch.stack([found[:, 0], found[:, 1] + found[:, 2]]), old
        if self._looking or self._domains is None:
            return super().rule(method, name, x, old)
        moments, members = self.labelled(x, self._domains, method.value(MOMENTS))
        if members is None:
            return method.value(MOMENTS)[:, self.places[name]], old
        slot, number = self._choice["slot"], 3 * self.slots
        domains, rows = old[-number:].view(self.slots, 3, -1), old[:-number]
        if members is not self._domains:  # views of the batch one after the other
            repeats = len(members.cells) // len(slot)
            slot, rows = slot.repeat(repeats), rows.view(2, -1, rows.shape[1]).repeat(1, repeats, 1).flatten(0, 1)
        row_mean, row_var = rows.chunk(2)
        new = change(*moments, row_mean, row_var, members)
        of = (torch.arange(self.slots, device=slot.device)[:, None] == slot).to(rows.dtype) * members.share[:, 0]
        delta = of @ new.mean
        crossed = of @ (new.mean * (row_mean - domains[slot, 0] + 0.5 * new.mean))
        steps = torch.stack([delta, of @ new.var, 2 * crossed - delta * delta], 1)
        domains = domains + steps
        found = domains[slot]
        noted = torch.cat([row_mean + new.mean, row_var + new.var, domains.flatten(0, 1)])
        return torch.stack([found[:, 0], found[:, 1] + found[:, 2]]), noted

    def write(self, method: State, seen: list[Tensor], good: Tensor, images: int) -> None:
        """Write what all domains have together, and what each has; open a domain."""
        if self._domains is None:
            return
        shared, number = self._choice["shared"], 3 * self.slots
        good = good & torch.isfinite(shared.sum())
        super().write(method, [shared], good, images)
        rows, table, source = seen[0], method.value(DOMAIN_CLASSES), method.source_value(DOMAINS)
        slot, new, opens = (self._choice[name] for name in ("slot", "new", "opens"))
        places = new * self.groups + torch.arange(self.groups, device=new.device)
        for part, value in zip(table, source, strict=False):
            part.index_copy_(0, places, torch.where(good & opens, value, part[places]))
        self.write_rows(table, self._domains, rows[:-number], good)
        method.write(DOMAINS, rows[-number:].view(self.slots, 3, -1), good)
        opened, used = method.value(OPENED), method.value(USED)
        slots = torch.arange(self.slots, device=new.device)
        is_new = opens & (slots == new)
        method.write(USED, torch.where(is_new, 0, used) + (slots[:, None] == slot).sum(1), good)
        method.write(OPENED, torch.where(is_new, opened.amax() + 1, opened), good)

    def statistics(self, method: State, model: nn.Module) -> Statistics | None:
        """None are the same for all images."""
        return None

    def drop(self, where: Tensor | None = None) -> None:
        """Forget what was noted; at the end of a batch, its labels and domains too."""
        super().drop(where)
        if where is None:
            self._domains, self._choice, self._apart = None, {}, None

    def renew(self, method: State, model: Any) -> None:
        """The tensors are other ones now."""
        super().renew(method, model)
        self._domains, self._choice = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_domains": None, "_choice": {}, "_instances": None, "_apart": None}


def _first(where: Tensor) -> Tensor:
    """The first place along the last dimension where a condition holds; the last, where it does nowhere (NaN)."""
    places = torch.arange(where.shape[-1], device=where.device)
    return torch.where(where, places, where.shape[-1] - 1).amin(-1)
