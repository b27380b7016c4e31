"""How several processes share a stream: which of its batches, or which part of each, comes to which."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tta.data.streams import Stream
from lightning_tta.errors import ConfigError

Batches = list[list[int]]


@dataclass(frozen=True)
class Sharing:
    """The share of one process.

    Attributes:
        mode: ``single``: all; ``replicas``: whole domains; ``synchronised``: a part of each batch.
        rank: Number of this process.
        world: How many there are.
    """

    mode: str = "single"
    rank: int = 0
    world: int = 1

    @property
    def joined(self) -> int:
        """How many processes' batches one batch of the stream is made of."""
        return self.world if self.mode == "synchronised" else 1

    def batches(self, stream: Stream, frozen: set[int]) -> Batches:
        """This process's batches, in order; empty ones where a batch of the stream has fewer samples than processes."""
        if self.mode == "single":
            return stream.batches
        if self.mode == "synchronised":
            return [shard_batch(batch, self.rank, self.world) for batch in stream.batches]
        owner = assign_domains(stream, frozen, self.world)
        domains = stream.domain_of([batch[0] for batch in stream.batches])
        return [batch for batch, d in zip(stream.batches, domains, strict=True) if owner[d] == self.rank]


def shard_batch(batch: list[int], rank: int, world: int) -> list[int]:
    """One of ``world`` consecutive parts of a batch, of which the first may have one sample more."""
    each, more = divmod(len(batch), world)
    start = rank * each + min(rank, more)
    return batch[start : start + each + (rank < more)]


def assign_domains(stream: Stream, frozen: set[int], world: int) -> list[int]:
    """The process of each domain: the largest first, each to the process that has least so far.

    A frozen domain is predicted with what was learned on the one before: it stays with it, and so does an empty one.
    Polluting images stay with the domain that they pollute.
    """
    if stream.spans_domains:
        raise ConfigError(
            f"The batches of a {stream.kind} stream span domains: there are no whole domains to deal out."
        )
    units: list[list[int]] = []
    for number, size in enumerate(stream.sizes):
        if (host := stream.hosts[number]) != number:
            next(unit for unit in units if host in unit).append(number)
        elif not units or (number not in frozen and size):
            units.append([number])
        else:
            units[-1].append(number)
    sizes = [sum(stream.sizes[number] for number in unit) for unit in units]
    if len(units) < world or min(sizes) == 0:
        raise ConfigError(
            f"{world} processes cannot share {sum(size > 0 for size in sizes)} domains: each needs one. Use that many "
            "(--trainer.devices), or --model.processes synchronised."
        )
    owner, load = [0] * len(stream.sizes), [0] * world
    for unit in sorted(range(len(units)), key=lambda unit: -sizes[unit]):
        rank = load.index(min(load))
        load[rank] += sizes[unit]
        for number in units[unit]:
            owner[number] = rank
    return owner
