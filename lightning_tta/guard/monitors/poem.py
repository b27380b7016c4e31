"""The monitor of shift: a betting martingale on the source's entropies, with a bound on false alarms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch

from lightning_tta.errors import NotPreparedError
from lightning_tta.evidence.betting import Bets, Ranks, ShiftTest, check_settings
from lightning_tta.guard.monitors.base import Seen, Want
from lightning_tta.guard.monitors.betting import BettingMonitor
from lightning_tta.losses import entropy


class Poem(BettingMonitor[ShiftTest]):
    """Alarms, as ``shift``, when the entropies of the source net are no longer those on held-out source images.

    It tests the stream and not the method: :class:`~lightning_tta.evidence.betting.ShiftTest` has the test and its
    guarantee. On a stream that is like the held-out images the probability that there is ever an alarm is at most
    ``alpha``. There is one alarm in a stream; the log wealth goes on. It says that the stream is another, not that
    accuracy has fallen: a shift that leaves the entropies as they are is not seen, and one that makes them smaller is.

    Needs the source's logits, one more forward pass a batch, and held-out source images: 1,000 or more.
    Images that the net was trained on have smaller entropies, and the alarm comes at once.

    Args:
        alpha: As of :class:`~lightning_tta.evidence.betting.ShiftTest`, as are ``ranks``, ``bets`` and ``seed``.
        ranks: ``conformal``, ``margin`` or ``fixed``; the latter with ``bets="sf_ogd"`` is the paper's.
        bets: ``mixture`` or ``sf_ogd``.
        seed: Of the draws that tell equal ranks apart.

    Raises:
        ConfigError: If a value is out of range.

    Source: POEM, NeurIPS 2024, arXiv 2408.07511.
    """

    name: ClassVar[str] = "poem"
    wants: ClassVar[frozenset[Want]] = frozenset({"source"})
    kind = ShiftTest
    reason = "shift"

    def __init__(self, alpha: float = 0.05, ranks: Ranks = "conformal", bets: Bets = "mixture", seed: int = 0) -> None:
        check_settings(alpha, ranks, bets, seed)
        self.settings = (alpha, ranks, bets, seed)
        super().__init__()

    def prepare(self, batches: Iterable[Seen]) -> None:
        """Take the entropies of held-out source images.

        Raises:
            DataError: If there are fewer than 10.
        """
        entropies = [entropy(seen.logits.double()).cpu() for seen in batches]
        self.test = ShiftTest(torch.cat(entropies) if entropies else torch.empty(0), *self.settings)
        self.begin()

    def see(self, seen: Seen) -> None:
        """Take in a batch.

        Raises:
            NotPreparedError: If it has not seen the source.
        """
        if self.test is None or seen.source is None:
            raise NotPreparedError(
                "The monitor 'poem' compares with held-out source images: call prepare(...) with the source's logits "
                "of 1,000 of them before the stream, and give it the source's logits of each batch."
            )
        self.bet(self.test, entropy(seen.source.double()))

    def values(self) -> dict[str, float]:
        """``poem_log_wealth``, and ``poem_epsilon``: above 0 where the entropies are larger than the source's."""
        if self.test is None:
            return {}
        return {"poem_log_wealth": self.test.log_wealth, "poem_epsilon": self.test.bettor.epsilon}
