"""The monitor of shift: a betting martingale on the source's entropies, with a bound on false alarms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from lightning_tta.errors import NotPreparedError
from lightning_tta.evidence.betting import Bets, Ranks, ShiftTest, check_settings
from lightning_tta.guard.monitors.base import Monitor, Seen, Want
from lightning_tta.losses import entropy


class Poem(Monitor):
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
    needs_source: ClassVar[bool] = True

    def __init__(self, alpha: float = 0.05, ranks: Ranks = "conformal", bets: Bets = "mixture", seed: int = 0) -> None:
        check_settings(alpha, ranks, bets, seed)
        self.settings = (alpha, ranks, bets, seed)
        self.test: ShiftTest | None = None
        self.alarms = 0
        self._is_new = False

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
        self.test.see(entropy(seen.source.double()))
        self._is_new = self.test.alarmed and not self.alarms
        self.alarms += self._is_new

    def alarm(self) -> str:
        """``shift`` with the batch at which the wealth reached its threshold."""
        return "shift" if self._is_new else ""

    def values(self) -> dict[str, float]:
        """``poem_log_wealth``, and ``poem_epsilon``: above 0 where the entropies are larger than the source's."""
        if self.test is None:
            return {}
        return {"poem_log_wealth": self.test.log_wealth, "poem_epsilon": self.test.bettor.epsilon}

    def begin(self) -> None:
        """A new stream: a wealth of 1."""
        if self.test is not None:
            self.test.restart()
        self.alarms, self._is_new = 0, False

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {"test": None if self.test is None else self.test.state_dict(), "alarms": self.alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.test = None if state["test"] is None else ShiftTest.from_state(state["test"])
        self.alarms, self._is_new = int(state["alarms"]), False
