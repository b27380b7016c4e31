"""Which training and validation samples come when, and on which process."""

import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, Sampler

from lightning_tta.errors import ConfigError

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """This process's number and how many there are."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def run_seed() -> int:
    """The seed of this run, the same on every process: that of ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def shuffled(size: int) -> Sampler[int]:
    """All samples in random order; on several processes, each its share of one common order."""
    rank, world = processes()
    if world == 1:
        return RandomSampler(range(size))
    return DistributedSampler(range(size), world, rank, shuffle=True, seed=run_seed(), drop_last=True)  # type: ignore[arg-type]


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This process's share of the items, in order; none twice, so that metrics stay exact."""
    rank, world = processes()
    return items[rank::world]


class DomainBatches(BatchSampler):
    """Batches with as many samples of each domain, domain after domain.

    Each domain is shuffled on its own and started again when it runs out. An epoch is as many batches as all samples
    fill. On several processes each has its part of the common order.

    Args:
        domains: The domain of each sample, int64 (N,).
        batch_size: Samples in a batch, a multiple of the number of domains.

    Raises:
        ConfigError: If ``batch_size`` does not divide.
    """

    def __init__(self, domains: Tensor, batch_size: int) -> None:
        self.members = [(domains == d).nonzero()[:, 0] for d in torch.unique(domains).tolist()]
        if batch_size % len(self.members):
            raise ConfigError(
                f"train_batch_size={batch_size} cannot be shared by {len(self.members)} source domains; give a "
                "multiple of their number."
            )
        self.each = batch_size // len(self.members)
        self.rank, self.world = processes()
        self.count = max(1, len(domains) // (batch_size * self.world))
        self.epoch = 0
        self.sampler = self  # type: ignore[assignment]  # where Lightning looks for set_epoch
        self.batch_size = batch_size
        self.drop_last = True

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        orders = [self._order(number) for number in range(len(self.members))]
        for step in range(self.count):
            start = (step * self.world + self.rank) * self.each
            yield [position for order in orders for position in order[start : start + self.each]]

    def _order(self, number: int) -> list[int]:
        """One domain's samples, shuffled again each time it starts anew."""
        generator = torch.Generator().manual_seed(hash((run_seed(), self.epoch, number)) % 2**63)
        members, wanted = self.members[number], self.count * self.world * self.each
        rounds = -(-wanted // len(members))
        drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        order: list[int] = torch.cat(drawn)[:wanted].tolist()
        return order
