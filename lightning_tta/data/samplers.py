"""Which training and validation samples come when, and on which process."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler

from lightning_tta.data.streams import build_stream, permutation
from lightning_tta.errors import ConfigError

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def get_run_seed() -> int:
    """The seed of this run, the same on every process: that of ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def make_train_sampler(size: int) -> RandomSampler | DistributedSampler[int]:
    """All samples in random order; on several processes, each its share of one common order."""
    rank, world = processes()
    if world == 1:
        return RandomSampler(range(size))
    return DistributedSampler(range(size), world, rank, shuffle=True, seed=get_run_seed(), drop_last=True)  # type: ignore[arg-type]


def take_shard(items: Sequence[T]) -> Sequence[T]:
    """This process's share of the items, in order; none twice, so that metrics stay exact."""
    rank, world = processes()
    return items[rank::world]


def validation_batches(labels: Sequence[Tensor], batch_size: int) -> list[list[int]]:
    """Batches of one domain each, shuffled once and for all; on several processes, this one's share.

    Samples are dealt, not batches: each process meets every domain, in the same order and as often as the others, as a
    metric that is named after a domain and summed over processes needs it.
    """
    rank, world = processes()
    stream = build_stream(labels, kind="iid", batch_size=batch_size * world)
    return [share for batch in stream.batches if (share := batch[rank::world])]


class DomainBatches(BatchSampler):
    """Batches with as many samples of each domain, domain after domain.

    Each domain is shuffled alone and started again when it runs out. An epoch is as many batches as all samples fill.
    Orders follow from torch's global random state at construction and from the epoch, which counts on by itself where
    nobody calls :meth:`set_epoch`; those of several processes from the seed of ``seed_everything`` and the epoch.
    ``domains`` is int64 (N,), ``batch_size`` a multiple of the number of domains.
    """

    def __init__(self, domains: Tensor, batch_size: int) -> None:
        self.members = [(domains == d).nonzero()[:, 0] for d in torch.unique(domains).tolist()]
        if batch_size % len(self.members):
            raise ConfigError(
                f"train_batch_size={batch_size} cannot be shared by {len(self.members)} source domains; give a "
                "multiple of their number."
            )
        self.per_domain, self.size = batch_size // len(self.members), len(domains)
        self.seed = int(torch.empty((), dtype=torch.int64).random_())
        self.epoch = 0
        self.sampler = self  # type: ignore[assignment]  # where Lightning looks for set_epoch
        self.batch_size, self.drop_last = batch_size, True

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.size // (self.batch_size * processes()[1]))

    def __iter__(self) -> Iterator[list[int]]:
        (rank, world), count, epoch = processes(), len(self), self.epoch
        self.epoch += 1
        seed = self.seed if world == 1 else get_run_seed()
        length = count * world * self.per_domain
        orders = [_repeat(members, length, seed, epoch, d) for d, members in enumerate(self.members)]
        for step in range(count):
            start = (step * world + rank) * self.per_domain
            yield [position for order in orders for position in order[start : start + self.per_domain]]


def _repeat(members: Tensor, length: int, *key: int) -> list[int]:
    """Positions of one domain, shuffled anew each time they start again."""
    rounds = range(math.ceil(length / len(members)))
    shuffles = [members[torch.from_numpy(permutation(len(members), *key, number))] for number in rounds]
    return torch.cat(shuffles)[:length].tolist()
