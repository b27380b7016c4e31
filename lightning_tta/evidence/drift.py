"""A bet against "the labels that are predicted are distributed as on the source", with a bound on false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tta.errors import DataError, check_range
from lightning_tta.evidence.betting import LEAST, uniforms

STRENGTHS = (3.0, 30.0, 300.0, 3000.0)
"""How many samples' worth each bettor holds by the source's shares."""
_TENSORS = ("counts", "fallen", "log_wealths")


class LabelDriftTest:
    """Whether predicted labels are distributed as on the calibration; may be asked after each sample.

    Like :class:`~lightning_tta.evidence.betting.ConformalRanks`, with the class as the score: of n labels of the
    calibration and the t - 1 before it, the t-th has the rank ``u = (#{y' < y} + draw (#{y' = y} + 1)) / (n + t)``,
    uniform and independent if calibration and stream are exchangeable. With p_k the shares of the classes among the
    n + t - 1 labels, u falls into the k-th of K intervals of lengths p_k, and a bettor of strength a multiplies its
    wealth by::

        q_k / p_k,    q_k = (c_k + a p_k) / (c + a)

    where c_k counts how often an earlier rank has fallen into the k-th interval, c their sum. Its mean over a uniform
    u is 1. The wealth is the mean over bettors of strengths 3, 30, 300 and 3000: the first finds one class in a few
    samples, the last small changes of many. By Ville's inequality the wealth ever reaches ``1 / alpha`` with a
    probability of at most ``alpha``, for streams of every length.

    A stream sorted by class is not exchangeable, so an alarm is right there, though over its whole length the labels
    may be distributed as the source's. It says then that the labels are others at this time.

    Args:
        labels: Predicted on held-out source images (n,), int64, in [0, K); at least 10.
        classes: K.
        alpha: Probability of a false alarm, in (0, 0.5].
        seed: Of the draws.

    Raises:
        ConfigError: If a value is out of range.
        DataError: If there are too few labels.

    Source: ours, of conformal test martingales (Vovk et al., "Algorithmic Learning in a Random World", 2005).
    """

    def __init__(self, labels: Tensor, classes: int, alpha: float = 0.05, seed: int = 0) -> None:
        check_range("alpha", alpha, 0, 0.5, low_open=True)
        check_range("seed", seed, 0, 2**62, integer=True)
        labels = labels.detach().cpu()
        labels = labels[labels >= 0]
        if len(labels) < LEAST:
            raise DataError(
                f"The predictions of at least {LEAST} held-out source images are needed, 1,000 or more are better; got "
                f"{len(labels)}."
            )
        self.alpha, self.seed = alpha, seed
        self.threshold = -math.log(alpha)
        self.calibration = torch.bincount(labels, minlength=classes)
        self.restart()

    def restart(self) -> None:
        """Begin anew with a wealth of 1 and the calibration alone."""
        self.counts = self.calibration.clone()
        self.fallen = torch.zeros_like(self.counts)
        self.log_wealths = torch.zeros(len(STRENGTHS), dtype=torch.float64)
        self.seen, self.largest = 0, 0.0

    def see(self, labels: Tensor) -> None:
        """Take in predicted labels (B,) in their order; those below 0 are none."""
        labels = labels.detach().cpu()
        for part in torch.split(labels[labels >= 0], 256):
            self._see(part)

    def _see(self, labels: Tensor) -> None:
        if not len(labels):
            return
        number, total = torch.arange(len(labels)), self.counts.sum()
        one_hot = torch.nn.functional.one_hot(labels, len(self.counts))
        counts = self.counts + one_hot.cumsum(0) - one_hot  # before each sample, (B, K)
        ends, totals = counts.cumsum(1), total + number
        equal = counts[number, labels]
        draws = uniforms(self.seed, self.seen, len(labels))
        ranks = (ends[number, labels] - equal + draws * (equal + 1)) / (totals + 1)
        places = torch.searchsorted(ends.double(), (ranks * totals)[:, None], right=True)[:, 0]
        places = places.clamp_max(len(self.counts) - 1)
        shares = counts[number, places].double() / totals
        earlier = ((places == places[:, None]) & torch.ones(len(labels), len(labels), dtype=torch.bool).tril(-1)).sum(1)
        strengths = torch.tensor(STRENGTHS, dtype=torch.float64)
        bets = (self.fallen[places] + earlier)[:, None] + strengths * shares[:, None]
        bets = bets / ((self.seen + number)[:, None] + strengths)
        path = self.log_wealths + (bets / shares[:, None]).log().cumsum(0)
        self.largest = max(self.largest, float(path.logsumexp(1).max()) - math.log(len(STRENGTHS)))
        self.log_wealths = path[-1]
        self.counts += one_hot.sum(0)
        self.fallen.index_add_(0, places, torch.ones_like(places))
        self.seen += len(labels)

    @property
    def log_wealth(self) -> float:
        """Logarithm of the wealth by now."""
        return float(self.log_wealths.logsumexp(0)) - math.log(len(STRENGTHS))

    @property
    def alarmed(self) -> bool:
        """Whether the wealth has reached ``1 / alpha`` since the last :meth:`restart`."""
        return self.largest >= self.threshold

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen, the calibration too."""
        return {
            "calibration": self.calibration.clone(),
            "settings": [self.alpha, self.seed],
            **{name: getattr(self, name).clone() for name in _TENSORS},
            "numbers": [self.seen, self.largest],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LabelDriftTest:
        """Counterpart of :meth:`state_dict`."""
        calibration = state["calibration"].cpu()
        labels = torch.arange(len(calibration)).repeat_interleave(calibration)
        test = cls(labels, len(calibration), *state["settings"])
        for name in _TENSORS:
            setattr(test, name, state[name].detach().clone().cpu())
        test.seen, test.largest = state["numbers"]
        return test
